"""Streams between two pods of one node: judged for both where they leave the one, and let into the other by that."""

from __future__ import annotations

from itertools import product

import pytest

from agent.core.abi import PEER_ANY, Direction, FrontendKind, Reason, SubjectFlag
from tests.bpf import packet_path as at
from tests.bpf.packet_path import to
from tests.bpf.packets import End, fragments, moved, packet
from tests.bpf.policy_path import ONE, TWO, PolicyPath, fault_of_pass, is_dropped
from tests.bpf.policy_pods import both_pods, ends, in_one_second, passes

BALANCER = ("198.51.100.20", "2001:db8:99::20")
ALLOWED = {(Direction.EGRESS, Reason.POLICY, True): 1, (Direction.INGRESS, Reason.POLICY, True): 1}
STREAMS = pytest.mark.parametrize(
    ("protocol", "family"),
    [
        pytest.param(protocol, family, id=f"{protocol}-IPv{(4, 6)[family]}")
        for protocol, family in product(("tcp", "sctp"), (0, 1))
    ],
)


def opening(protocol: str, family: int):
    return packet(protocol, *ends(family))


def let_out(policy: PolicyPath, sent) -> None:
    assert not fault_of_pass(policy.from_pod(sent), sent)


def let_in(policy: PolicyPath, sent) -> None:
    assert not fault_of_pass(policy.to_pod(sent, "two"), sent)


def is_judged_at_either(policy: PolicyPath, sent, arrives) -> None:
    """Hold that a packet is judged by the sender's policy where it leaves, and by the receiver's where it enters."""
    assert not fault_of_pass(policy.from_pod(sent), arrives)
    assert policy.judged() == {(Direction.EGRESS, Reason.POLICY, True): 1}
    let_in(policy, arrives)
    assert policy.judged() == {(Direction.INGRESS, Reason.POLICY, True): 1}


def deny_entry(policy: PolicyPath, *, moves: bool) -> None:
    policy.rule(Direction.INGRESS, PEER_ANY, subject=TWO, allowed=False, number=9, moves=moves)


@STREAMS
def test_both_verdicts_are_taken_and_told_where_it_leaves(policy, protocol, family):
    sent = opening(protocol, family)
    client, server = ends(family)

    def scene() -> None:
        both_pods(policy)
        policy.rule(Direction.INGRESS, ONE, protocol, server.port, subject=TWO, number=8)
        let_out(policy, sent)
        assert policy.judged() == ALLOWED
        (known,) = policy.connections()
        assert known[:5] == (client, server, sent.proto if not family else sent.nh, *[policy.generation] * 2)

        deny_entry(policy, moves=False)
        policy.rule(Direction.INGRESS, ONE, protocol, server.port, subject=TWO, allowed=False, moves=False)
        let_in(policy, sent)
        assert not policy.judged()
        out, into = policy.told()
        assert (out.subject, out.peer, out.rule, out.device) == (ONE, TWO, 7, policy.ifindex["one"])
        assert (into.subject, into.peer, into.rule, into.device) == (TWO, ONE, 8, policy.ifindex["two"])
        assert (out.direction, into.direction) == (Direction.EGRESS, Direction.INGRESS)
        for event in (out, into):
            assert (event.source, event.destination, event.allowed) == (client, server, True)
            assert event.time
            assert event.flags == out.flags

    in_one_second(policy, scene)


@STREAMS
def test_its_answers_are_not_looked_at_either(policy, protocol, family):
    """What looks at a packet would find that nobody's addresses are held."""
    sent, answer = opening(protocol, family), packet(protocol, *reversed(ends(family)), flags="SA")

    def scene() -> None:
        both_pods(policy)
        let_out(policy, sent)
        policy.set_state(is_strict=True)
        policy.release(at.POD_ONE + at.POD_TWO)
        let_in(policy, sent)
        assert passes(policy, answer, ("two", "one"))

    in_one_second(policy, scene)


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("flags", ["S", "SF", "SR", "SFR", "SE"])
def test_each_end_is_told_once_whatever_else_it_says(policy, family, flags):
    both_pods(policy)
    sent = packet("tcp", *ends(family), flags=flags)

    assert passes(policy, sent)
    assert policy.judged() == ALLOWED
    assert len(policy.told()) == 2


@STREAMS
def test_whom_it_may_not_enter_says_so_at_its_own_device(policy, protocol, family):
    both_pods(policy)
    deny_entry(policy, moves=True)
    sent = opening(protocol, family)

    let_out(policy, sent)
    assert policy.judged() == {(Direction.EGRESS, Reason.POLICY, True): 1}
    assert is_dropped(policy.to_pod(sent, "two"))
    assert policy.judged() == {(Direction.INGRESS, Reason.POLICY, False): 1}
    assert [(event.subject, event.rule) for event in policy.told()] == [(ONE, 7), (TWO, 9)]


@STREAMS
def test_who_may_not_leave_asks_nothing_of_the_other(policy, protocol, family):
    both_pods(policy)
    policy.rule(Direction.EGRESS, PEER_ANY, allowed=False)

    assert is_dropped(policy.from_pod(opening(protocol, family)))
    assert policy.judged() == {(Direction.EGRESS, Reason.POLICY, False): 1}
    assert not policy.connections()


@STREAMS
def test_a_verdict_that_is_older_than_a_change_lets_nothing_in(policy, protocol, family):
    both_pods(policy)
    sent = opening(protocol, family)
    let_out(policy, sent)

    deny_entry(policy, moves=True)
    assert is_dropped(policy.to_pod(sent, "two"))


@STREAMS
@pytest.mark.parametrize("unfit", [SubjectFlag.FAIL_CLOSED, SubjectFlag.FAIL_OPEN], ids=lambda it: it.name.lower())
def test_a_receiver_whose_policy_does_not_fit_is_judged_by_that(policy, protocol, family, unfit):
    both_pods(policy)
    policy.subject(at.POD_TWO, TWO, SubjectFlag.INGRESS | unfit, device="two")
    sent = opening(protocol, family)
    is_open = unfit is SubjectFlag.FAIL_OPEN

    let_out(policy, sent)
    assert is_dropped(policy.to_pod(sent, "two")) != is_open
    assert policy.judged()[Direction.INGRESS, Reason.OVERFLOW, is_open] == 1


@STREAMS
@pytest.mark.parametrize("place", ["", "one"], ids=["nowhere", "with the sender"])
def test_a_receiver_behind_no_device_of_its_own_is_judged_where_the_packet_enters(policy, protocol, family, place):
    both_pods(policy)
    policy.subject(at.POD_TWO, TWO, device=place)
    sent = opening(protocol, family)

    let_out(policy, sent)
    deny_entry(policy, moves=False)
    assert is_dropped(policy.to_pod(sent, "two"))


@STREAMS
def test_it_is_let_in_at_the_receivers_own_device_only(policy, protocol, family):
    both_pods(policy)
    policy.subject(at.POD_TWO, TWO, device="eth0")
    sent = opening(protocol, family)
    let_out(policy, sent)
    policy.set_state(is_strict=True)
    policy.release(at.POD_TWO)
    policy.device("two", None)

    assert is_dropped(policy.to_pod(sent, "two"))
    assert policy.judged()[Direction.INGRESS, Reason.HELD, False] == 1


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_a_datagram_is_judged_at_either_device(policy, family):
    both_pods(policy)
    sent = opening("udp", family)

    is_judged_at_either(policy, sent, sent)


@STREAMS
def test_one_whose_answers_are_translated_is_judged_at_either_device(policy, protocol, family):
    """The pod has a flow to the other by way of a service, whose connection is not known any longer."""
    both_pods(policy)
    client, server = ends(family)
    frontend = End(BALANCER[family], 80)
    policy.serve(protocol, frontend, inside=to(server), kind=FrontendKind.CLUSTER_IP)
    served = packet(protocol, client, frontend)
    assert not fault_of_pass(policy.from_pod(served), moved(served, destination=server))
    policy.forget_connections()
    policy.judged()

    let_out(policy, opening(protocol, family))
    assert policy.judged() == {(Direction.EGRESS, Reason.POLICY, True): 1}


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_a_first_fragment_is_looked_at_where_it_enters(policy, family):
    """Whoever lets it in knows of those that follow."""
    both_pods(policy)
    first, _ = fragments(opening("tcp", family), 24)
    let_out(policy, first)
    policy.set_state(is_strict=True)
    policy.release(at.POD_TWO)
    policy.device("two", None)

    assert is_dropped(policy.to_pod(first, "two"))
    assert policy.judged()[Direction.INGRESS, Reason.HELD, False] == 1


@STREAMS
def test_one_to_a_service_is_judged_at_either_device(policy, protocol, family):
    both_pods(policy)
    client, server = ends(family)
    policy.serve(protocol, frontend := End(BALANCER[family], 80), inside=to(server), kind=FrontendKind.CLUSTER_IP)
    served = packet(protocol, client, frontend)

    is_judged_at_either(policy, served, moved(served, destination=server))


@STREAMS
def test_who_was_asked_may_not_ask_back_by_the_same_connection(policy, protocol, family):
    """Both open at once: what lets the answers in does not let in what begins a connection the other way."""
    client, server = ends(family)

    def scene() -> None:
        policy.rule(Direction.EGRESS, PEER_ANY)
        sent = packet(protocol, client, End(at.REMOTE_POD[family], server.port))
        let_out(policy, sent)
        back = packet(protocol, End(at.REMOTE_POD[family], server.port), client)
        assert is_dropped(policy.to_pod(back))
        assert policy.judged()[Direction.INGRESS, Reason.POLICY, False] == 1

    in_one_second(policy, scene)


@STREAMS
def test_a_stream_that_begins_again_from_outside_is_judged_again(policy, protocol, family):
    """It was answered and is over; the generation is the same, but no verdict of this connection's was taken yet."""
    client, server = End(at.REMOTE_POD[family], 40_000), End(at.POD_ONE[family], 8080)
    sent, answer = packet(protocol, client, server), packet(protocol, server, client, flags="SA")

    def scene() -> None:
        policy.rule(Direction.INGRESS, PEER_ANY)
        assert not fault_of_pass(policy.to_pod(sent), sent)
        assert not fault_of_pass(policy.from_pod(answer), answer)
        reset = packet(protocol, client, server, flags="RA")
        assert not fault_of_pass(policy.to_pod(reset), reset)
        policy.judged()
        assert not fault_of_pass(policy.to_pod(sent), sent)
        assert policy.judged() == {(Direction.INGRESS, Reason.POLICY, True): 1}

    in_one_second(policy, scene)
