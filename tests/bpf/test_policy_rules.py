"""Which entry of policy decides on a new connection, in either direction, for every kind of peer and protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from agent.core.abi import PEER_ANY, PEER_WORLD, Direction, Reason, SubjectFlag
from tests.bpf import packet_path as at
from tests.bpf.packets import PROTOCOLS, End, echo_request, network, packet, settle
from tests.bpf.policy_path import BLOCK, NUMBERS, ONE, REMOTE, TWO, PolicyPath, fault_of_pass, is_dropped
from tests.bpf.talk import NUMBERS as FAMILIES

CLIENT_PORT, SERVER_PORT = 40_000, 8080
DIRECTIONS = pytest.mark.parametrize("direction", Direction, ids=lambda it: it.name.lower())


class Case(NamedTuple):
    """What there is for the peer REMOTE besides a denial by default, and whether a connection to 8080 is allowed."""

    rules: tuple[tuple[int, str, int, int, bool, int], ...]
    is_allowed: bool
    rule: int


CASES = {
    "nothing": Case((), False, 0),
    "base": Case(((REMOTE, "", 0, 0, True, 3),), True, 3),
    "base-denies": Case(((REMOTE, "", 0, 0, False, 4),), False, 4),
    "exact-port": Case(((REMOTE, "*", 8080, 16, True, 5),), True, 5),
    "another-port": Case(((REMOTE, "*", 8081, 16, True, 5),), False, 0),
    "range": Case(((REMOTE, "*", 8064, 10, True, 6),), True, 6),  # 8064 to 8127
    "range-that-ends-before": Case(((REMOTE, "*", 8064, 12, True, 6),), False, 0),  # 8064 to 8079
    "protocol": Case(((REMOTE, "*", 0, 0, True, 7),), True, 7),
    "another-protocol": Case(((REMOTE, "gre", 0, 0, True, 7),), False, 0),
    "longest-denies": Case(((REMOTE, "*", 8080, 16, False, 9), (REMOTE, "*", 8064, 10, True, 6)), False, 9),
    "longest-allows": Case(((REMOTE, "*", 8080, 16, True, 9), (REMOTE, "*", 0, 0, False, 6)), True, 9),
    "anybody": Case(((PEER_ANY, "*", 8080, 16, True, 11),), True, 11),
    "own-before-anybody": Case(((PEER_ANY, "*", 8080, 16, True, 11), (REMOTE, "", 0, 0, False, 12)), False, 12),
    "another-peer": Case(((TWO, "*", 8080, 16, True, 11),), False, 0),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@DIRECTIONS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_longest_prefix_decides(policy: PolicyPath, case: Case, direction, protocol, family):
    for peer, named, port, bits, allowed, number in case.rules:
        policy.rule(direction, peer, named.replace("*", protocol), port, bits, allowed=allowed, number=number)
    own, peer = at.POD_ONE[family], at.REMOTE_POD[family]
    ends = End(own, CLIENT_PORT), End(peer, SERVER_PORT)
    if direction is Direction.INGRESS:
        ends = End(peer, CLIENT_PORT), End(own, SERVER_PORT)
    sent = packet(protocol, *ends)
    cross = policy.from_pod if direction is Direction.EGRESS else policy.to_pod

    ran = cross(sent)

    if case.is_allowed:
        assert not fault_of_pass(ran, sent)
    else:
        assert is_dropped(ran)
    (told,) = policy.told()
    assert told[:3] == (*ends, NUMBERS[protocol])
    assert (told.subject, told.peer, told.rule, told.allowed) == (ONE, REMOTE, case.rule, case.is_allowed)
    assert (told.direction, told.reason) == (direction, Reason.POLICY)
    assert told.device == policy.ifindex["one"]
    assert told.flags == {"tcp": 0x02, "sctp": 0x02, "udp": 0}[protocol]
    assert policy.judged() == {(direction, Reason.POLICY, case.is_allowed): 1}
    assert len(policy.connections()) == case.is_allowed


Make = Callable[[str, str], object]
OTHERS: dict[str, tuple[Make, dict[int, str]]] = {
    "ping": (echo_request, {0: "icmp", 1: "icmpv6"}),
    "gre": (
        lambda a, b: settle(network(a, b, **{"nh" if ":" in b else "proto": 47}) / b"generic"),
        {0: "gre", 1: "gre"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("make", "names"), OTHERS.values(), ids=OTHERS)
@DIRECTIONS
def test_protocols_without_ports_are_judged_by_what_is_for_everything(policy, direction, make, names, family):
    ends = (at.POD_ONE[family], at.REMOTE_POD[family])
    sent = make(*(ends if direction is Direction.EGRESS else ends[::-1]))
    cross = policy.from_pod if direction is Direction.EGRESS else policy.to_pod
    policy.rule(direction, REMOTE, "tcp", 0, 0, number=1)
    assert is_dropped(cross(sent))

    policy.rule(direction, REMOTE, number=2)
    assert not fault_of_pass(cross(sent), sent)

    assert [(told.protocol, told.rule, told.allowed) for told in policy.told()] == [
        (NUMBERS[names[family]], 0, False),
        (NUMBERS[names[family]], 2, True),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("blocks", "peer"),
    [
        pytest.param(((8, BLOCK),), BLOCK, id="in-a-block"),
        pytest.param(((8, BLOCK), (16, BLOCK + 1)), BLOCK + 1, id="longest-prefix"),
        pytest.param((), PEER_WORLD, id="in-none"),
    ],
)
@DIRECTIONS
def test_who_is_no_pod_is_known_by_the_longest_block_that_holds_the_address(policy, direction, blocks, peer, family):
    for bits, number in blocks:
        network_of = {8: ("203.0.0.0/8", "2001::/16"), 16: ("203.0.0.0/16", "2001:db8::/32")}[bits][family]
        policy.block(network_of, number)
    policy.rule(direction, peer, "tcp", SERVER_PORT)
    far, own = at.FAR[family], at.POD_ONE[family]
    if direction is Direction.EGRESS:
        sent = packet("tcp", End(own, CLIENT_PORT), End(far, SERVER_PORT))
        assert not fault_of_pass(policy.from_pod(sent), sent)
    else:
        sent = packet("tcp", End(far, CLIENT_PORT), End(own, SERVER_PORT))
        assert not fault_of_pass(policy.to_pod(sent), sent)

    assert policy.told()[0].peer == peer


def test_a_pod_in_a_block_is_known_by_its_own_identity(policy):
    policy.block("10.180.0.0/16", BLOCK)
    policy.rule(Direction.EGRESS, BLOCK)

    assert is_dropped(policy.from_pod(packet("tcp", End(at.POD_ONE[0], 4000), End(at.REMOTE_POD[0], 80))))
    assert policy.told()[0].peer == REMOTE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("flags", "direction", "is_allowed", "reason"),
    [
        pytest.param(SubjectFlag.INGRESS, Direction.EGRESS, True, Reason.POLICY, id="not-isolated-out"),
        pytest.param(SubjectFlag.EGRESS, Direction.INGRESS, True, Reason.POLICY, id="not-isolated-in"),
        pytest.param(0, Direction.INGRESS, True, Reason.POLICY, id="not-isolated"),
        pytest.param(3 | SubjectFlag.FAIL_CLOSED, Direction.EGRESS, False, Reason.OVERFLOW, id="closed-out"),
        pytest.param(3 | SubjectFlag.FAIL_CLOSED, Direction.INGRESS, False, Reason.OVERFLOW, id="closed-in"),
        pytest.param(3 | SubjectFlag.FAIL_OPEN, Direction.EGRESS, True, Reason.OVERFLOW, id="open-out"),
        pytest.param(3 | SubjectFlag.FAIL_OPEN, Direction.INGRESS, True, Reason.OVERFLOW, id="open-in"),
        pytest.param(1 | SubjectFlag.FAIL_CLOSED, Direction.EGRESS, True, Reason.POLICY, id="closed-not-isolated-out"),
    ],
)
def test_what_a_subject_is_decides_before_any_rule(policy, flags, direction, is_allowed, reason, family):
    policy.subject(at.POD_ONE, ONE, flags)
    ends = End(at.POD_ONE[family], CLIENT_PORT), End(at.REMOTE_POD[family], SERVER_PORT)
    is_out = direction is Direction.EGRESS
    sent = packet("tcp", *(ends if is_out else ends[::-1]))

    ran = (policy.from_pod if is_out else policy.to_pod)(sent)

    assert (not fault_of_pass(ran, sent)) == is_allowed
    assert is_dropped(ran) != is_allowed
    assert policy.judged() == {(direction, reason, is_allowed): 1}
    assert [(told.reason, told.allowed, told.rule) for told in policy.told()] == [(reason, is_allowed, 0)]


def test_who_does_not_fit_may_still_be_asked_by_its_node_and_by_itself(policy):
    policy.subject(at.POD_ONE, ONE, SubjectFlag(3) | SubjectFlag.FAIL_CLOSED)
    probe = packet("tcp", End(at.NODE[0], CLIENT_PORT), End(at.POD_ONE[0], SERVER_PORT))
    own = packet("tcp", End(at.POD_ONE[0], CLIENT_PORT), End(at.POD_ONE[0], SERVER_PORT))

    assert not fault_of_pass(policy.to_pod(probe), probe)
    assert not fault_of_pass(policy.from_pod(own), own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_node_itself_is_always_allowed_in_but_not_out(policy, protocol, family):
    asked = packet(protocol, End(at.NODE[family], CLIENT_PORT), End(at.POD_ONE[family], SERVER_PORT))
    assert not fault_of_pass(policy.to_pod(asked), asked)

    out = packet(protocol, End(at.POD_ONE[family], CLIENT_PORT), End(at.NODE[family], SERVER_PORT))
    assert is_dropped(policy.from_pod(out))

    other = packet(protocol, End(at.OTHER_NODE[family], CLIENT_PORT), End(at.POD_ONE[family], SERVER_PORT))
    assert is_dropped(policy.to_pod(other)), "another node is not this one"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pod_may_always_ask_itself(policy, family):
    own = packet("tcp", End(at.POD_ONE[family], CLIENT_PORT), End(at.POD_ONE[family], SERVER_PORT))

    assert not fault_of_pass(policy.from_pod(own), own)
    assert not fault_of_pass(policy.to_pod(own), own)
