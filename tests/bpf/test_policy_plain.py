"""Packets that pass by what is written of their connection alone, and what makes them be looked at in full again."""

from __future__ import annotations

from itertools import product

import pytest

from agent.core.abi import PEER_ANY, Direction, FrontendKind, Reason
from tests.bpf import packet_path as at
from tests.bpf.packet_path import to
from tests.bpf.packets import PROTOCOLS, End, moved, packet
from tests.bpf.policy_path import TWO, fault_of_pass, is_dropped
from tests.bpf.policy_pods import both_pods, ends, in_one_second, passes
from tests.bpf.talk import NUMBERS as FAMILIES

BALANCER = ("198.51.100.20", "2001:db8:99::20")
EACH = pytest.mark.parametrize(
    ("protocol", "family"),
    [
        pytest.param(protocol, family, id=f"{protocol}-IPv{(4, 6)[family]}")
        for protocol, family in product(PROTOCOLS, (0, 1))
    ],
)


@EACH
def test_the_packets_of_a_second_are_looked_at_once_each_way(policy, protocol, family):
    """The pods' addresses are nobody's and held by then, which a packet that is looked at is told."""
    client, server = ends(family)
    begun, more = packet(protocol, client, server), packet(protocol, client, server, flags="A")
    answer, back = packet(protocol, server, client, flags="SA"), ("two", "one")

    def scene() -> None:
        both_pods(policy)
        assert passes(policy, begun)
        assert passes(policy, answer, back)
        assert passes(policy, more)
        policy.set_state(is_strict=True)
        policy.release(at.POD_ONE + at.POD_TWO)
        for _ in range(3):
            assert passes(policy, more)
            assert passes(policy, answer, back)

        policy.age(1)
        for sent, device in ((more, "one"), (answer, "two")):
            assert is_dropped(policy.from_pod(sent, device))
        for sent, device in ((more, "two"), (answer, "one")):
            assert is_dropped(policy.to_pod(sent, device))

    in_one_second(policy, scene)
    assert set(policy.judged()) >= {(Direction.EGRESS, Reason.HELD, False), (Direction.INGRESS, Reason.HELD, False)}


@EACH
def test_nobody_speaks_by_another_device_in_the_name_of_a_connection_that_is_known(policy, protocol, family):
    both_pods(policy)
    client, server = ends(family)
    more = packet(protocol, client, server, flags="A")
    assert passes(policy, packet(protocol, client, server))
    assert passes(policy, packet(protocol, server, client, flags="SA"), ("two", "one"))

    for _ in range(2):
        assert passes(policy, more)
        assert is_dropped(policy.from_pod(more, "two"))
    assert policy.judged()[Direction.EGRESS, Reason.SPOOFED, False] == 2


@EACH
def test_who_is_not_known_to_be_behind_the_device_is_looked_at_when_it_answers(policy, protocol, family):
    """The first answer of a stream is foreseen only where nothing is to be found out about its source."""
    both_pods(policy)
    policy.subject(at.POD_TWO, TWO)
    policy.device("two", at.REMOTE_POD)
    client, server = ends(family)
    sent = packet(protocol, client, server)
    assert passes(policy, sent)

    assert is_dropped(policy.from_pod(packet(protocol, server, client, flags="SA"), "two"))


@EACH
def test_a_connection_is_revoked_at_once(policy, protocol, family):
    both_pods(policy)
    client, server = ends(family)
    more, answer = (packet(protocol, *pair, flags="A") for pair in ((client, server), (server, client)))
    assert passes(policy, packet(protocol, client, server))
    assert passes(policy, answer, ("two", "one"))
    assert passes(policy, more)

    policy.rule(Direction.INGRESS, PEER_ANY, subject=TWO, allowed=False)
    policy.raise_generation()
    assert not fault_of_pass(policy.from_pod(more), more), "its egress is allowed still"
    assert is_dropped(policy.to_pod(more, "two"))
    assert is_dropped(policy.from_pod(answer, "two"))


@EACH
def test_answers_are_translated_as_soon_as_a_connection_goes_by_way_of_a_service(policy, protocol, family):
    """A client asks the backend itself, then from the same port the service in front of it."""
    frontend, backend = End(BALANCER[family], 80), End(at.REMOTE_POD[family], 8080)
    client = End(at.POD_ONE[family], 40_000)
    policy.rule(Direction.EGRESS, PEER_ANY)
    policy.serve(protocol, frontend, inside=to(backend), kind=FrontendKind.CLUSTER_IP)
    asked = packet(protocol, client, backend)
    answer = packet(protocol, backend, client, flags="SA")
    assert not fault_of_pass(policy.from_pod(asked), asked)
    for _ in range(2):
        assert not fault_of_pass(policy.to_pod(answer), answer)

    served = packet(protocol, client, frontend)
    assert not fault_of_pass(policy.from_pod(served), moved(served, destination=backend))
    for _ in range(2):
        assert not fault_of_pass(policy.to_pod(answer), moved(answer, source=frontend))


@EACH
def test_a_datagram_finds_a_service_that_is_new_and_a_stream_does_when_it_opens(policy, protocol, family):
    frontend, backend = End(BALANCER[family], 80), End(at.REMOTE_POD[family], 8080)
    policy.rule(Direction.EGRESS, PEER_ANY)
    sent = packet(protocol, End(at.POD_ONE[family], 40_000), frontend)
    for _ in range(2):
        assert not fault_of_pass(policy.from_pod(sent), sent)

    policy.serve(protocol, frontend, inside=to(backend), kind=FrontendKind.CLUSTER_IP)
    assert not fault_of_pass(policy.from_pod(sent), moved(sent, destination=backend))


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("flags", ["FA", "RA"], ids=["closed", "reset"])
def test_the_end_of_a_stream_is_noted_by_packets_that_are_not_looked_at(policy, flags, family):
    both_pods(policy)
    client, server = ends(family)
    assert passes(policy, packet("tcp", client, server))
    assert passes(policy, packet("tcp", server, client, flags="SA"), ("two", "one"))
    assert passes(policy, packet("tcp", client, server, flags=flags))
    assert passes(policy, packet("tcp", server, client, flags=flags), ("two", "one"))
    assert policy.judged()[Direction.EGRESS, Reason.POLICY, True] == 1

    assert passes(policy, packet("tcp", server, client), ("two", "one")), "it is over: the server begins another"
    assert policy.judged()[Direction.EGRESS, Reason.POLICY, True] == 1


@pytest.mark.parametrize("is_asked_before", [True, False], ids=["after itself", "at once"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_the_nodes_own_question_is_answered_in_the_services_name(policy, protocol, family, is_asked_before):
    """Its answers are translated at the pod's device, and have the ends of those that nothing is done to."""
    frontend, backend = End(BALANCER[family], 80), End(at.POD_ONE[family], 8080)
    client = End(at.NODE[family], 40_000)
    asked, answer = packet(protocol, client, backend), packet(protocol, backend, client, flags="SA")

    def scene() -> None:
        policy.serve(protocol, frontend, inside=to(backend), kind=FrontendKind.CLUSTER_IP)
        if is_asked_before:
            assert not fault_of_pass(policy.to_pod(asked), asked)
            assert not fault_of_pass(policy.from_pod(answer), answer)
        policy.egress("eth0", packet(protocol, client, frontend))
        assert not fault_of_pass(policy.to_pod(asked), asked)
        assert not fault_of_pass(policy.from_pod(answer), moved(answer, source=frontend))

    in_one_second(policy, scene)
