"""Answers that are kept: the same question is answered as before for one generation, and is taken for no other."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from agent.core.abi import PEER_ANY, QUESTION, VERDICT_BITS, Direction
from agent.core.addresses import parse_address
from tests.bpf import packet_path as at
from tests.bpf.packets import PROTOCOLS, End, packet
from tests.bpf.policy_path import NUMBERS, ONE, REMOTE, TWO, PolicyPath, fault_of_pass, is_dropped
from tests.bpf.talk import NUMBERS as FAMILIES

SERVER_PORT = 8080
MULTIPLIER, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
DIRECTIONS = pytest.mark.parametrize("direction", Direction, ids=lambda it: it.name.lower())


class Asking(NamedTuple):
    """One pod and one peer, between whom connections begin, each from another port."""

    policy: PolicyPath
    direction: Direction
    protocol: str
    family: int

    def rule(self, *, allowed: bool, number: int, moves: bool) -> None:
        named = self.protocol, SERVER_PORT
        self.policy.rule(self.direction, REMOTE, *named, allowed=allowed, number=number, moves=moves)

    def passes(self, client_port: int) -> bool:
        ends = at.POD_ONE[self.family], at.REMOTE_POD[self.family]
        leaves = self.direction is Direction.EGRESS
        return begins(self.policy, self.protocol, ends if leaves else ends[::-1], (client_port, SERVER_PORT), leaves)


def begins(
    policy: PolicyPath, protocol: str, ends: tuple[str, str], ports: tuple[int, int], leaves: bool, device: str = "one"
) -> bool:
    sent = packet(protocol, End(ends[0], ports[0]), End(ends[1], ports[1]))
    ran = policy.from_pod(sent, device) if leaves else policy.to_pod(sent, device)
    assert is_dropped(ran) or not fault_of_pass(ran, sent)
    return not is_dropped(ran)


@pytest.fixture(autouse=True)
def _one_cpu() -> Iterator[None]:
    """Each CPU keeps its own answers."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def asking(policy, direction, protocol, family) -> Asking:
    return Asking(policy, direction, protocol, family)


@pytest.mark.parametrize("first", [True, False], ids=["allowed", "denied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@DIRECTIONS
def test_an_answer_holds_until_the_generation_moves(asking, first):
    policy = asking.policy
    asking.rule(allowed=first, number=7, moves=True)
    assert asking.passes(40_000) == first
    asking.rule(allowed=not first, number=8, moves=False)

    assert asking.passes(40_001) == first
    before, kept = policy.told()
    assert (kept.peer, kept.rule, kept.allowed) == (before.peer, before.rule, before.allowed) == (REMOTE, 7, first)

    policy.raise_generation()
    assert asking.passes(40_002) != first
    assert [(told.peer, told.rule) for told in policy.told()] == [(REMOTE, 8)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@DIRECTIONS
def test_while_the_maps_are_written_nothing_is_kept_and_nothing_that_was_kept_counts(asking):
    policy = asking.policy
    asking.rule(allowed=True, number=7, moves=True)
    assert asking.passes(40_000)

    policy.raise_generation(by=1)
    for turn, allowed in enumerate((False, True, False)):
        asking.rule(allowed=allowed, number=8 + turn, moves=False)
        assert asking.passes(40_001 + turn) == allowed
    asking.rule(allowed=True, number=11, moves=False)
    policy.raise_generation(by=1)

    assert asking.passes(40_010)
    assert policy.told()[-1].rule == 11


class Question(NamedTuple):
    """Who asks, about whom, and what."""

    subject: int = ONE
    peer: int = REMOTE
    direction: Direction = Direction.EGRESS
    protocol: str = "tcp"
    port: int = 0

    def slot(self, family: int) -> int:
        """Where the programs keep the answer."""
        address = parse_address(PODS[self.peer][family])
        port = self.port.to_bytes(2, "big")
        packed = QUESTION.packer.pack(self.subject, address, self.direction, NUMBERS[self.protocol], port)
        value = 0
        for word in struct.unpack("=6I", packed):
            value = (value ^ word) * MULTIPLIER & MASK
        return ((value ^ value >> 32) * MULTIPLIER & MASK) >> 64 - VERDICT_BITS

    def passes(self, policy: PolicyPath, family: int, client_port: int) -> bool:
        leaves = self.direction is Direction.EGRESS
        ends = PODS[self.subject][family], PODS[self.peer][family]
        device = DEVICES[self.subject]
        return begins(policy, self.protocol, ends if leaves else ends[::-1], (client_port, self.port), leaves, device)


PODS = {ONE: at.POD_ONE, TWO: at.POD_TWO, REMOTE: at.REMOTE_POD}
DEVICES = {ONE: "one", TWO: "two"}
OTHERS = [
    Question(subject=TWO),
    Question(peer=TWO),
    Question(direction=Direction.INGRESS),
    Question(protocol="udp"),
    Question(port=1),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("other", OTHERS, ids=["subject", "peer", "direction", "protocol", "port"])
def test_no_answer_is_given_to_a_question_that_differs_in_one_thing_and_has_its_place(policy, other, family):
    policy.subject(at.POD_TWO, TWO, device="two")
    policy.device("two", at.POD_TWO)
    for direction in Direction:
        policy.rule(direction, PEER_ANY, subject=TWO, allowed=False, number=0)
    one, other = next(pair for pair in pairs(other) if pair[0].slot(family) == pair[1].slot(family))
    policy.rule(one.direction, one.peer, one.protocol, one.port, subject=one.subject)

    assert one.passes(policy, family, 20_000)
    assert not other.passes(policy, family, 20_001)
    assert one.passes(policy, family, 20_002)

    assert policy.answered() == {one.slot(family)}, "they have one place"


def pairs(other: Question) -> Iterator[tuple[Question, Question]]:
    """Ask for other ports, both for the same unless it is that they differ in."""
    for port in range(1, 1 << 16):
        yield Question(port=port), other._replace(port=port * 7919 % 65_537 & 0xFFFF if other.port else port)
