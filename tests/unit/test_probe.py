"""Probing: what each errno of the kernel is taken to mean."""

from __future__ import annotations

import errno
import itertools

import pytest

from agent.cli import checks, doctor
from agent.cli.checks import Finding, Level, Place
from agent.kernel import bpf, capabilities, probe
from agent.kernel.bpf import AttachType, Command
from agent.kernel.probe import Feature


@pytest.fixture
def kernel(monkeypatch):
    """Stand in for the kernel: answer each command with the errno of a table, or else with a descriptor."""

    def answer_with(errors: dict[Command, int]) -> list[Feature]:
        def fake(command: Command, _attr: object) -> int:
            if errors.get(command, 0):
                raise OSError(errors[command], "fake")
            return next(descriptors)

        monkeypatch.setattr(bpf, "bpf", fake)
        return probe.features()

    descriptors = itertools.count(1000)
    closed: list[int] = []
    monkeypatch.setattr(probe.os, "close", closed.append)
    yield answer_with
    assert list(range(1000, next(descriptors))) == sorted(closed), "every descriptor is closed"


MODERN = {Command.LINK_CREATE: errno.EBADF, Command.LINK_UPDATE: errno.EBADF}


@pytest.mark.parametrize(
    ("errors", "missing"),
    [
        ({}, set()),
        ({Command.LINK_CREATE: errno.EINVAL}, {"link:create"}),
        ({Command.LINK_UPDATE: errno.EINVAL}, {"link:update"}),
        ({Command.MAP_CREATE: errno.EINVAL}, {f"map:{name}" for name in probe._MAPS}),
    ],
    ids=["a kernel that has all", "no cgroup links", "no replacement", "no maps"],
)
def test_a_missing_feature_is_named(kernel, errors, missing):
    assert missing == {feature.name for feature in kernel(MODERN | errors) if not feature.is_there}


def test_without_programs_links_are_not_there_either(kernel):
    features = kernel({Command.PROG_LOAD: errno.EINVAL})

    there = {feature.name.partition(":")[0] for feature in features if feature.is_there}
    assert there == {"map"}
    assert sum(feature.name.startswith("hook:") for feature in features) == len(AttachType)


def test_a_refusal_is_not_taken_for_a_missing_feature(kernel):
    features = kernel(dict.fromkeys(Command, errno.EPERM))

    assert all(feature.is_denied and not feature.is_there for feature in features)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ([Feature("a"), Feature("b")], [("kernel", Level.OK, "works: a, b")]),
        (
            [Feature("a"), Feature("b", errno.EINVAL)],
            [("kernel:b", Level.FAIL, "does not work: Invalid argument"), ("kernel", Level.OK, "works: a")],
        ),
        (
            [Feature("a", errno.EPERM), Feature("b", errno.EPERM)],
            [("kernel:bpf", Level.FAIL, "bpf(2) is not permitted to try a, b")],
        ),
    ],
    ids=["all", "one missing", "denied"],
)
def test_features_become_findings(monkeypatch, tmp_path, features, expected):
    monkeypatch.setattr(probe, "features", lambda: features)

    found = checks.check_kernel(Place(tmp_path, tmp_path))

    assert expected == [(finding.id, finding.level, finding.seen) for finding in found]


def test_a_check_that_may_not_look_says_so_and_the_next_goes_on(monkeypatch, tmp_path):
    def check_this_thing(_):
        yield Finding("first", Level.OK, "")
        raise PermissionError(errno.EACCES, "Permission denied")

    def check_next(_):
        yield Finding("next", Level.OK, "")

    monkeypatch.setattr(checks, "CHECKS", (check_this_thing, check_next))

    found = checks.examine(Place(tmp_path, tmp_path))

    assert [(finding.id, finding.level) for finding in found] == [
        ("first", "ok"),
        ("this-thing", "warn"),
        ("next", "ok"),
    ]
    assert "could not be looked at: [Errno 13]" in found[1].seen


def test_who_is_not_root_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(checks.os, "geteuid", lambda: 1000)

    (found,) = checks.check_user(Place(tmp_path, tmp_path))

    assert (found.id, found.level) == ("user", Level.WARN)
    assert "uid 1000" in found.seen


@pytest.mark.parametrize(
    ("levels", "worst"),
    [([], "ok"), (["ok"], "ok"), (["warn", "ok"], "warn"), (["warn", "fail", "ok"], "fail")],
    ids=["none", "ok", "warn", "fail"],
)
def test_the_document_says_the_worst(levels, worst):
    assert worst == doctor.document([Finding("x", Level(level), "") for level in levels])["worst"]


def test_every_finding_that_is_not_ok_has_a_remedy(monkeypatch, tmp_path):
    """Also where nothing works: the checks see a machine that has nothing."""
    monkeypatch.setattr(probe, "features", lambda: [Feature("a", errno.EPERM), Feature("b", errno.EINVAL)])
    monkeypatch.setattr(capabilities, "effective", lambda: 0)
    monkeypatch.setattr(checks.os, "access", lambda *_: False)
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda _: None)

    found = checks.examine(Place(tmp_path / "state", tmp_path / "bpf", tmp_path))

    assert {"capability:CAP_BPF", "kernel:bpf", "kernel:b", "cgroup", "bpffs", "state-dir", "bcc"} <= {
        finding.id for finding in found if finding.level is Level.FAIL
    }
    assert [finding for finding in found if (finding.level is Level.OK) == bool(finding.remedy)] == []
