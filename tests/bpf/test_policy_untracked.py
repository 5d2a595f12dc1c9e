"""Connections that cannot be entered, as their map takes no more: they are dropped and told, rather than forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from agent.core.abi import PEER_ANY, Direction, MapKind, Reason
from agent.kernel.programs import ProgramOptions
from tests.bpf import packet_path as at
from tests.bpf import policy_path
from tests.bpf.conftest import POLICY_SPECS
from tests.bpf.packets import PROTOCOLS, End, packet
from tests.bpf.policy_path import ONE, PolicyPath, fault_of_pass, is_dropped

# An LRU map makes room as long as it can; this one never does.
FULL_AT_ONE = tuple(
    replace(spec, kind=MapKind.HASH, max_entries=1) if spec.name == "connections" else spec for spec in POLICY_SPECS
)


@pytest.fixture(scope="module")
def small(shared_packet_path, bpf_mount) -> Iterator[PolicyPath]:
    options = ProgramOptions(policy=True)
    with policy_path.opened(shared_packet_path.node, bpf_mount / "small", FULL_AT_ONE, options) as made:
        yield made


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "enters"])
@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_cannot_be_entered_is_dropped(small, protocol, family, leaves):
    small.clear()
    direction = Direction.EGRESS if leaves else Direction.INGRESS
    small.rule(direction, PEER_ANY, number=5)
    own, peer = at.POD_ONE[family], at.REMOTE_POD[family]
    names = (own, peer) if leaves else (peer, own)
    first, second = (packet(protocol, End(names[0], port), End(names[1], 8080)) for port in (40_000, 40_001))
    send = small.from_pod if leaves else small.to_pod

    assert not fault_of_pass(send(first), first)
    assert is_dropped(send(second))
    assert small.judged() == {(direction, Reason.POLICY, True): 1, (direction, Reason.UNTRACKED, False): 1}
    allowed, dropped = small.told()
    assert (allowed.source.port, allowed.allowed, allowed.reason) == (40_000, True, Reason.POLICY)
    assert (dropped.source.port, dropped.allowed, dropped.reason) == (40_001, False, Reason.UNTRACKED)
    assert (dropped.subject, dropped.direction) == (ONE, direction)
    assert len(small.connections()) == 1
