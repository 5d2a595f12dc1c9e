"""The policies in force outlive agents; a damaged file is as none."""

from __future__ import annotations

import pytest

from agent.core.policy_records import Operator, Tier
from agent.core.records import Protocol
from agent.observe.former_policies import FILE, read_policies, remove_policies, write_policies
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


def test_policies_are_read_back(tmp_path):
    write_policies(tmp_path, POLICIES)

    assert read_policies(tmp_path) == POLICIES


def test_there_are_none_at_first(tmp_path, caplog):
    assert read_policies(tmp_path) == []
    assert caplog.text == ""


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_damaged_file_is_as_none(tmp_path, caplog, cut):
    write_policies(tmp_path, POLICIES)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:cut])

    assert read_policies(tmp_path) == []
    assert FILE in caplog.text


@pytest.mark.parametrize("exists", [True, False])
def test_it_is_removed(tmp_path, exists):
    if exists:
        write_policies(tmp_path, POLICIES)
    remove_policies(tmp_path)

    assert not list(tmp_path.iterdir())
