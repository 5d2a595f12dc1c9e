"""What the agent asks of its capabilities: each is missed by name, and what implies one stands for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.cli import checks
from agent.cli.checks import Level, Place
from agent.errors import EbproxyError
from agent.kernel import capabilities
from tests.unit.test_manifests_yaml import container

NET_ADMIN, SYS_ADMIN, PERFMON, BPF = 12, 21, 38, 39
MISSING = {
    "all there": ({BPF, NET_ADMIN, PERFMON}, ()),
    "none": (set(), ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")),
    "no BPF": ({NET_ADMIN, PERFMON}, ("CAP_BPF",)),
    "no NET_ADMIN": ({BPF, PERFMON}, ("CAP_NET_ADMIN",)),
    "no PERFMON": ({BPF, NET_ADMIN}, ("CAP_PERFMON",)),
    "implied": ({SYS_ADMIN, NET_ADMIN}, ()),
    "not implied": ({SYS_ADMIN}, ("CAP_NET_ADMIN",)),
}


def held(numbers: set[int]) -> int:
    return sum(1 << number for number in numbers)


@pytest.mark.parametrize(("numbers", "names"), MISSING.values(), ids=MISSING)
def test_what_is_missing_is_named(numbers: set[int], names: tuple[str, ...]) -> None:
    assert capabilities.missing(held(numbers)) == names


@pytest.mark.parametrize(("numbers", "names"), MISSING.values(), ids=MISSING)
def test_doctor_fails_where_the_agent_would_not_start(
    monkeypatch: pytest.MonkeyPatch, numbers: set[int], names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(capabilities, "effective", lambda: held(numbers))
    findings = checks.check_capabilities(Place(Path("/nowhere"), Path("/nowhere")))

    failed = [finding.id.removeprefix("capability:") for finding in findings if finding.level is not Level.OK]

    assert tuple(failed) == names


def test_the_agent_says_what_it_lacks() -> None:
    capabilities.require(held({BPF, NET_ADMIN, PERFMON}))

    with pytest.raises(EbproxyError, match=r"^CAP_PERFMON missing: run as root, or add it to the container$"):
        capabilities.require(held({BPF, NET_ADMIN}))
    with pytest.raises(EbproxyError, match=r"^CAP_BPF, CAP_PERFMON missing: .* add them"):
        capabilities.require(held({NET_ADMIN}))


def test_the_effective_set_is_read(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tebproxy\nCapPrm:\t00000000ffffffff\nCapEff:\t000000c000001000\n", encoding="ascii")

    assert capabilities.effective(status) == held({BPF, NET_ADMIN, PERFMON})
    assert capabilities.effective() or os.geteuid() != 0


def test_the_daemonset_adds_what_is_needed() -> None:
    assert {f"CAP_{name}" for name in container()["securityContext"]["capabilities"]["add"]} == set(
        capabilities.NEEDED.values()
    )
