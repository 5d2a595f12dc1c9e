"""The policies in force outlive agents; a damaged file is as none."""

from __future__ import annotations

import msgspec
import pytest

from agent.core.policy_records import Operator, Tier
from agent.core.records import Protocol
from agent.observe.former_policies import FILE, PolicyFile, read_policies, remove_policies
from tests.policy_builders import accept, cidr, cluster_policy, deny, need, network_policy, pods, rule, selector, tcp

POLICIES = [
    network_policy("x/none", selector(app="web"), ingress=[]),
    network_policy(
        "x/all",
        selector(need("app", Operator.NOT_IN, "a", "b")),
        ingress=[rule(pods(tier="1"), cidr("10.0.0.0/8", "10.1.0.0/16"), ports=[tcp(80, 90)]), rule()],
        egress=[rule(cidr("fd00::/8"), ports=())],
    ),
    cluster_policy(
        "guard",
        tier=Tier.BASELINE,
        priority=7,
        namespaces=selector(team="a"),
        pods=selector(app="web"),
        ingress=[accept(pods(app="x"))],
        egress=[deny(ports=[tcp(Protocol.UDP)])],
    ),
]


NAMED = {(it.kind, it.key): it for it in POLICIES}


def test_policies_are_read_back(tmp_path):
    PolicyFile(tmp_path).write(NAMED, NAMED)

    assert read_policies(tmp_path) == POLICIES


def test_there_are_none_at_first(tmp_path, caplog):
    assert read_policies(tmp_path) == []
    assert caplog.text == ""


def test_a_change_is_appended_and_the_file_stays_short(tmp_path):
    file, policies = PolicyFile(tmp_path), dict(NAMED)
    file.write(policies, policies)
    before = (tmp_path / FILE).read_bytes()
    (gone, first), (changed, second), _ = NAMED.items()
    del policies[gone]
    policies[changed] = msgspec.structs.replace(second, ingress=())

    file.write(policies, [gone, changed])
    assert (tmp_path / FILE).read_bytes().startswith(before)
    assert sorted(read_policies(tmp_path), key=by_key) == sorted(policies.values(), key=by_key)

    lengths = set()
    for _ in range(200):
        file.write({gone: first}, [gone])
        lengths.add(len((tmp_path / FILE).read_bytes().splitlines()))
    assert max(lengths) == 66
    assert read_policies(tmp_path) == [first]


def by_key(record):
    return record.key


def test_after_a_write_that_failed_the_file_is_written_anew(tmp_path):
    file = PolicyFile(tmp_path)
    file.write(NAMED, NAMED)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(OSError, match="directory"):
        file.write(NAMED, NAMED)
    (tmp_path / FILE).rmdir()

    file.write(NAMED, [next(iter(NAMED))])

    assert read_policies(tmp_path) == POLICIES


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        pytest.param(slice(0), 0, id="empty"),
        pytest.param(slice(100), 0, id="a part of a line"),
        pytest.param(slice(-2), 2, id="the last line cut short"),
        pytest.param(slice(5, None), 2, id="the first line damaged"),
    ],
)
def test_a_damaged_line_is_as_none(tmp_path, caplog, cut, left):
    PolicyFile(tmp_path).write(NAMED, NAMED)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[cut])

    assert len(read_policies(tmp_path)) == left
    assert (FILE in caplog.text) == bool(whole[cut])


@pytest.mark.parametrize("kind", ["Service", "Nothing"])
def test_what_is_no_policy_is_left_out(tmp_path, kind):
    (tmp_path / FILE).write_text(f'{{"kind":"{kind}","key":["x","y"],"record":null}}\n')

    assert read_policies(tmp_path) == []


@pytest.mark.parametrize("policies", [NAMED, {}, None], ids=["with policies", "without any", "it is not there"])
def test_it_is_removed_and_what_is_no_longer_enforced_is_told_once(tmp_path, policies, caplog):
    if policies is not None:
        PolicyFile(tmp_path).write(policies, policies)
    for _ in range(2):
        remove_policies(tmp_path)

    assert not list(tmp_path.iterdir())
    told = [f"networkPolicy is off: policies that a former agent enforced and this one does not: {len(POLICIES)}"]
    assert caplog.messages == (told if policies else [])
    assert {record.levelname for record in caplog.records} <= {"WARNING"}
