"""What policy makes of headers: who a packet is from in truth, what is spoofed, held, unreadable; and translation."""

from __future__ import annotations

from itertools import product

import pytest
from scapy.layers.inet6 import ICMPv6MLReport2, ICMPv6ND_NA, ICMPv6ND_NS
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from agent.core.abi import PEER_ANY, PEER_WORLD, Counter, Direction, FrontendKind, Reason, SubjectFlag
from tests.bpf import packet_path as at
from tests.bpf.harness import TC_ACT_REDIRECT, TC_ACT_UNSPEC
from tests.bpf.packet_path import to
from tests.bpf.packets import (
    PROTOCOLS,
    End,
    difference,
    echo_request,
    icmp_error,
    moved,
    network,
    packet,
    reply_to,
    settle,
)
from tests.bpf.policy_path import BLOCK, ONE, REMOTE, TWO, PolicyPath, fault_of_pass, is_dropped
from tests.bpf.talk import NUMBERS as FAMILIES

CLIENT_PORT, TARGET = 40_000, 8080
SERVICE = ("10.96.0.10", "fd00:10:96::10")
BALANCER = ("198.51.100.10", "2001:db8:51::10")
EACH = pytest.mark.parametrize(("protocol", "family"), list(product(PROTOCOLS, (0, 1))))


def client(family: int) -> End:
    return End(at.POD_ONE[family], CLIENT_PORT)


@EACH
@pytest.mark.parametrize("is_allowed", [True, False], ids=["allowed", "denied"])
def test_a_service_is_judged_by_the_backend_it_leads_to(policy: PolicyPath, protocol, family, is_allowed):
    """Not by its own address and port; the answer passes before its translation."""
    frontend, backend = End(SERVICE[family], 80), End(at.REMOTE_POD[family], TARGET)
    policy.serve(protocol, frontend, inside=to(backend))
    policy.rule(Direction.EGRESS, REMOTE, protocol, TARGET if is_allowed else 80)
    policy.rule(Direction.EGRESS, PEER_WORLD, protocol, TARGET if is_allowed else 80)
    sent = packet(protocol, client(family), frontend)

    ran = policy.from_pod(sent)

    (told,) = policy.told()
    assert (told.source, told.destination) == (client(family), backend)
    assert (told.peer, told.allowed) == (REMOTE, is_allowed)
    answer = packet(protocol, backend, client(family), flags="SA")
    if not is_allowed:
        assert is_dropped(ran)
        assert is_dropped(policy.to_pod(answer))
        return
    assert not fault_of_pass(ran, moved(sent, destination=backend))
    assert not fault_of_pass(policy.to_pod(answer), moved(answer, source=frontend))
    assert not fault_of_pass(policy.from_pod(sent), moved(sent, destination=backend))
    assert policy.judged() == {(Direction.EGRESS, Reason.POLICY, True): 1}


@EACH
def test_what_was_a_connection_to_the_address_itself_is_judged_anew_as_a_service(policy, protocol, family):
    frontend, backend = End(BALANCER[family], 80), End(at.REMOTE_POD[family], TARGET)
    policy.rule(Direction.EGRESS, PEER_WORLD)
    sent = packet(protocol, client(family), frontend)
    assert not fault_of_pass(policy.from_pod(sent), sent)

    policy.serve(protocol, frontend, inside=to(backend), kind=FrontendKind.LOAD_BALANCER)
    assert is_dropped(policy.from_pod(sent))
    policy.rule(Direction.EGRESS, REMOTE)
    assert policy.from_pod(sent).verdict == TC_ACT_REDIRECT
    assert [known.other for known in policy.connections()] == [backend]


@EACH
def test_answers_that_were_translated_on_their_way_in_belong_to_the_backend(policy, protocol, family):
    """A pod asks for a load balancer's address: the node masquerades it, and translates the answer where it enters."""
    frontend, backend = End(BALANCER[family], 80), End(at.REMOTE_POD[family], TARGET)
    policy.serve(protocol, frontend, inside=to(backend), kind=FrontendKind.LOAD_BALANCER)
    policy.rule(Direction.EGRESS, REMOTE, protocol, TARGET)
    ran = policy.from_pod(packet(protocol, client(family), frontend))
    assert ran.verdict == TC_ACT_REDIRECT

    inward = Ether(policy.ingress("eth0", reply_to(Ether(ran.packet))).packet)
    assert inward[1].src == frontend.address
    assert not fault_of_pass(policy.to_pod(inward), inward)

    policy.rule(Direction.EGRESS, REMOTE, protocol, TARGET, allowed=False)
    policy.raise_generation()
    assert is_dropped(policy.to_pod(inward))


@EACH
@pytest.mark.parametrize("is_allowed", [True, False], ids=["allowed", "denied"])
def test_a_client_behind_the_nodes_address_is_judged_by_its_own(policy, protocol, family, is_allowed):
    outsider = End(at.OUTSIDE[family], 5000)
    frontend, backend = End(at.NODE[family], 30_080), End(at.POD_ONE[family], TARGET)
    policy.serve(protocol, frontend, inside=to(backend), kind=FrontendKind.NODE_PORT)
    policy.block(("172.30.0.0/24", "fd00:172:30::/64")[family], BLOCK)
    policy.rule(Direction.INGRESS, BLOCK if is_allowed else TWO, protocol, TARGET)
    ran = policy.ingress("eth0", packet(protocol, outsider, frontend))
    seen = Ether(ran.packet)
    assert seen[1].src == at.NODE[family], "it is masqueraded"

    ran = policy.to_pod(seen)

    (told,) = policy.told()
    assert (told.source, told.destination, told.peer, told.allowed) == (outsider, backend, BLOCK, is_allowed)
    assert is_dropped(ran) != is_allowed
    if is_allowed:
        assert not fault_of_pass(ran, seen)
        answer = reply_to(seen)
        assert policy.from_pod(answer).verdict == TC_ACT_REDIRECT
        policy.rule(Direction.INGRESS, BLOCK, protocol, TARGET, allowed=False)
        policy.raise_generation()
        assert is_dropped(policy.from_pod(answer))
        assert is_dropped(policy.to_pod(seen))


@EACH
def test_a_pod_reaches_itself_by_way_of_a_service(policy, protocol, family):
    frontend, backend = End(SERVICE[family], 80), End(at.POD_ONE[family], TARGET)
    policy.serve(protocol, frontend, inside=to(backend))

    there = policy.from_pod(packet(protocol, client(family), frontend))
    assert there.verdict == TC_ACT_REDIRECT
    seen = Ether(there.packet)
    assert not fault_of_pass(policy.to_pod(seen), seen)
    assert policy.from_pod(reply_to(seen)).verdict in {TC_ACT_REDIRECT, TC_ACT_UNSPEC}
    assert not policy.judged().keys() & {(direction, Reason.POLICY, False) for direction in Direction}


@EACH
def test_a_refusal_in_a_services_name_needs_no_leave(policy, protocol, family):
    frontend = End(SERVICE[family], 80)
    policy.serve(protocol, frontend, inside=at.REFUSE)
    refused = policy.from_pod(packet(protocol, client(family), frontend))
    assert refused.verdict == TC_ACT_REDIRECT
    answer = Ether(refused.packet)

    device = policy.ifindex["one"]
    assert not fault_of_pass(policy.to_pod(answer, ingress_ifindex=device), answer)
    assert is_dropped(policy.to_pod(answer)), "from elsewhere it does"


ODD: dict[str, tuple[str, str]] = {
    "another-pods": (at.POD_TWO[0], at.POD_TWO[1]),
    "outside": at.FAR,
    "the-nodes": at.NODE,
    "nobodys": ("0.0.0.0", "::"),
}


@EACH
@pytest.mark.parametrize("source", ODD.values(), ids=ODD)
def test_what_is_sent_in_the_name_of_others_is_dropped(policy, source, protocol, family):
    policy.rule(Direction.EGRESS, PEER_ANY)
    sent = packet(protocol, End(source[family], 4000), End(at.REMOTE_POD[family], 80))

    assert is_dropped(policy.from_pod(sent))

    assert policy.judged() == {(Direction.EGRESS, Reason.SPOOFED, False): 1}
    (told,) = policy.told()
    assert (told.source.address, told.reason, told.device) == (source[family], Reason.SPOOFED, policy.ifindex["one"])
    assert policy.flows() == policy.connections() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_and_pings_in_the_name_of_others_are_dropped(policy, family):
    policy.rule(Direction.EGRESS, PEER_ANY)
    about = packet("tcp", End(at.REMOTE_POD[family], 1), End(at.POD_ONE[family], 2))

    assert is_dropped(policy.from_pod(icmp_error(about, at.POD_TWO[family])))
    assert is_dropped(policy.from_pod(echo_request(at.POD_TWO[family], at.REMOTE_POD[family])))
    assert policy.judged() == {(Direction.EGRESS, Reason.SPOOFED, False): 2}


@EACH
@pytest.mark.parametrize("behind", ["", "two"], ids=["not-known-where", "behind-its-own-device"])
def test_who_is_a_subject_too_is_no_source_for_others(policy, behind, protocol, family):
    policy.subject(at.POD_TWO, TWO, SubjectFlag(0), device=behind)
    sent = packet(protocol, End(at.POD_TWO[family], 4000), End(at.REMOTE_POD[family], 80))

    assert is_dropped(policy.from_pod(sent))
    assert policy.judged() == {(Direction.EGRESS, Reason.SPOOFED, False): 1}
    assert not fault_of_pass(policy.from_pod(sent, "two"), sent)


@EACH
def test_a_subject_that_says_where_it_is_needs_no_other_witness(policy, protocol, family):
    """The device's own entry is not looked at: here it would say otherwise."""
    policy.device("one", at.POD_TWO)
    policy.rule(Direction.EGRESS, PEER_ANY)
    sent = packet(protocol, client(family), End(at.REMOTE_POD[family], 80))
    assert not fault_of_pass(policy.from_pod(sent), sent)

    policy.subject(at.POD_ONE, ONE)
    policy.age(1)  # of what is known of a connection one second need not be looked at again
    assert is_dropped(policy.from_pod(sent))


@EACH
def test_a_pod_that_has_moved_is_believed_before_its_subject_says_so(policy, protocol, family):
    """But not where the device does not say either that it is the pod's."""
    policy.subject(at.POD_ONE, ONE, device="two")
    policy.rule(Direction.EGRESS, PEER_ANY)
    sent = packet(protocol, client(family), End(at.REMOTE_POD[family], 80))

    assert not fault_of_pass(policy.from_pod(sent), sent)
    policy.device("one", None)
    other = packet(protocol, End(at.POD_ONE[family], CLIENT_PORT + 1), End(at.REMOTE_POD[family], 80))
    assert is_dropped(policy.from_pod(other))
    assert policy.judged()[Direction.EGRESS, Reason.SPOOFED, False] == 1


def test_a_device_of_nobody_known_has_any_source(policy):
    policy.device("one", None)
    sent = packet("tcp", End(at.FAR[0], 4000), End(at.REMOTE_POD[0], 80))

    assert not fault_of_pass(policy.from_pod(sent), sent)


def test_link_local_addresses_are_those_of_the_pod_behind_the_device(policy):
    sent = packet("udp", End("fe80::1", 4000), End("ff02::fb", 5353))
    assert is_dropped(policy.from_pod(sent))
    assert policy.told()[0].subject == ONE

    policy.rule(Direction.EGRESS, PEER_WORLD)
    assert not fault_of_pass(policy.from_pod(sent), sent)

    inward = packet("udp", End("fe80::2", 4000), End("fe80::1", 53))
    assert is_dropped(policy.to_pod(inward))
    assert policy.told()[-1][3:5] == (ONE, PEER_WORLD)


@pytest.mark.parametrize(
    ("source", "group", "link"),
    [
        pytest.param("10.180.2.99", "224.0.0.251", "01:00:5e:00:00:fb", id="IPv4"),
        pytest.param("10.180.2.99", "255.255.255.255", "ff:ff:ff:ff:ff:ff", id="broadcast"),
        pytest.param("fe80::9", "ff02::fb", "33:33:00:00:00:fb", id="IPv6"),
    ],
)
def test_what_goes_to_many_is_judged_for_each_of_them(policy, source, group, link):
    """Their packets have one tuple: that the first may have it says nothing of the next."""
    policy.subject(at.POD_TWO, TWO)
    policy.device("two", at.POD_TWO)
    policy.rule(Direction.INGRESS, PEER_WORLD, subject=TWO)
    sent = packet("udp", End(source, 4000), End(group, 5353))
    sent[Ether].dst = link

    assert not fault_of_pass(policy.to_pod(sent, "two"), sent)
    assert is_dropped(policy.to_pod(sent))
    assert not fault_of_pass(policy.to_pod(sent, "two"), sent)
    assert is_dropped(policy.to_pod(sent))
    assert policy.connections() == []


ALWAYS: dict[str, Packet] = {
    "ARP": Ether(src="02:00:00:00:00:01") / ARP(psrc=at.POD_ONE[0], pdst=at.NODE[0]),
    "neighbour-solicitation": network("::", "ff02::1:ff00:10") / ICMPv6ND_NS(tgt=at.POD_ONE[1]),
    "neighbour-advertisement": network("fe80::1", at.POD_ONE[1]) / ICMPv6ND_NA(tgt=at.POD_ONE[1]),
    "listener-report": network("fe80::1", "ff02::16") / ICMPv6MLReport2(),
}


@pytest.mark.parametrize("is_strict", [True, False], ids=["strict", "standard"])
@pytest.mark.parametrize("sent", ALWAYS.values(), ids=ALWAYS)
def test_what_a_link_lives_by_always_passes(policy, sent, is_strict):
    policy.set_state(is_strict=is_strict)
    if is_strict:
        policy.release(at.POD_ONE)
    settled = settle(sent)

    assert not fault_of_pass(policy.from_pod(settled), settled)
    assert not fault_of_pass(policy.to_pod(settled), settled)
    assert policy.judged() == {}


@EACH
@pytest.mark.parametrize("is_known", [True, False], ids=["known-device", "unknown-device"])
@pytest.mark.parametrize("is_strict", [True, False], ids=["strict", "standard"])
def test_a_pod_without_its_policy_yet_is_held_in_strict_mode_alone(policy, is_strict, is_known, protocol, family):
    policy.release(at.POD_ONE)
    policy.set_state(is_strict=is_strict)
    if not is_known:
        policy.device("one", None)
    out = packet(protocol, client(family), End(at.REMOTE_POD[family], 80))
    back = packet(protocol, End(at.REMOTE_POD[family], 80), client(family))

    for ran, sent in ((policy.from_pod(out), out), (policy.to_pod(back), back)):
        assert is_dropped(ran) == is_strict
        assert is_strict or not fault_of_pass(ran, sent)

    held = {(direction, Reason.HELD, False): 1 for direction in Direction}
    assert policy.judged() == (held if is_strict else {})
    assert [told.reason for told in policy.told()] == [Reason.HELD, Reason.HELD] * is_strict
    assert policy.connections() == []


def unreadable(family: int) -> dict[str, bytes]:
    """Packets that say what is not so."""
    whole = bytes(packet("tcp", client(family), End(at.REMOTE_POD[family], 80)))
    l3 = 14
    version = bytes([whole[l3] ^ 0x10])
    found = {
        "wrong-version": whole[:l3] + version + whole[l3 + 1 :],
        "cut-short": whole[:-10],
    }
    if family:
        options = bytes([60, 0, 1, 4, 0, 0, 0, 0])
        chain = options * 7
        length = (int.from_bytes(whole[18:20], "big") + len(chain)).to_bytes(2, "big")
        body = chain[:-8] + bytes([6, 0, 1, 4, 0, 0, 0, 0]) + whole[54:]
        found["too-many-extensions"] = whole[:18] + length + bytes([60]) + whole[21:54] + body
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["wrong-version", "cut-short", "too-many-extensions"])
@pytest.mark.parametrize("is_isolated", [True, False], ids=["isolated", "not-isolated"])
def test_what_cannot_be_read_is_dropped_where_something_is_to_be_asked(policy, is_isolated, name, family):
    raw = unreadable(family).get(name)
    if raw is None:
        assert (name, family) == ("too-many-extensions", 0)
        return
    policy.rule(Direction.EGRESS, PEER_ANY)
    if not is_isolated:
        policy.subject(at.POD_ONE, ONE, 0)

    for ran in (policy.from_pod(raw), policy.to_pod(raw)):
        assert is_dropped(ran) == is_isolated
        assert is_isolated or ran.packet == raw
    dropped = {(direction, Reason.UNREADABLE, False): 1 for direction in Direction}
    assert policy.judged() == (dropped if is_isolated else {})
    assert [told.subject for told in policy.told()] == [ONE, ONE] * is_isolated


@EACH
def test_a_denial_is_answered_where_it_is_asked_for(policy, protocol, family):
    policy.set_state(is_answered=True)
    sent = packet(protocol, client(family), End(at.REMOTE_POD[family], 80))

    ran = policy.from_pod(sent)

    assert ran.verdict == TC_ACT_REDIRECT
    answer = Ether(ran.packet)
    assert (answer[1].src, answer[1].dst) == (at.REMOTE_POD[family], at.POD_ONE[family])
    if protocol == "tcp":
        assert (answer[2].sport, answer[2].dport, str(answer[2].flags)) == (80, CLIENT_PORT, "RA")
    else:
        assert answer[2].type == (1 if family else 3)
    assert not difference(bytes(settle(answer)), answer), "its sums are right"
    assert policy.judged() == {(Direction.EGRESS, Reason.POLICY, False): 1}
    assert is_dropped(policy.to_pod(packet(protocol, End(at.REMOTE_POD[family], 9), End(at.POD_ONE[family], 80))))


def test_events_that_nobody_has_read_are_lost_and_counted(policy):
    sent = packet("tcp", client(0), End(at.REMOTE_POD[0], 80))
    before = policy.lost()
    room = policy.store.maps["events"].info.max_entries // 80  # of 72 bytes each, and what leads them
    with policy.inside():
        for _ in range(room + 7):
            policy.from_pod(sent)

    told = policy.told()
    assert policy.lost() - before == room + 7 - len(told) > 0
    assert policy.judged() == {(Direction.EGRESS, Reason.POLICY, False): room + 7}
    times = [each.time for each in told]
    assert times == sorted(times)
    policy.from_pod(sent)
    assert len(policy.told()) == 1, "there is room again"


@pytest.mark.parametrize(("sample", "least", "most"), [(0, 0, 0), (1, 200, 200), (8, 4, 60)])
def test_of_connections_that_are_allowed_some_are_told(policy, sample, least, most):
    policy.set_state(sample=sample)
    policy.rule(Direction.EGRESS, REMOTE)
    with policy.inside():
        for port in range(200):
            policy.from_pod(packet("tcp", End(at.POD_ONE[0], 20_000 + port), End(at.REMOTE_POD[0], 80)))

    assert least <= len(policy.told()) <= most
    assert policy.judged() == {(Direction.EGRESS, Reason.POLICY, True): 200}


@pytest.mark.parametrize("stage", [0, 1], ids=["from", "to"])
def test_without_its_other_half_a_program_lets_nothing_pass(policy, stage):
    frontend, backend = End(BALANCER[0], 80), End(at.REMOTE_POD[0], TARGET)
    policy.serve("tcp", frontend, inside=to(backend))
    policy.rule(Direction.EGRESS, REMOTE)
    sent, answer = packet("tcp", client(0), frontend), packet("tcp", backend, client(0), flags="SA")
    assert not fault_of_pass(policy.from_pod(sent), moved(sent, destination=backend))
    key, stages = stage.to_bytes(4, "little"), policy.store.maps["stages"]
    policy.counted()
    stages.delete(key)
    try:
        ran = policy.to_pod(answer) if stage else policy.from_pod(sent)
    finally:
        policy.chain()

    assert is_dropped(ran)
    assert policy.counted() == {Counter.STAGE_MISSED: 1}
    assert not fault_of_pass(policy.from_pod(sent), moved(sent, destination=backend))
    assert not fault_of_pass(policy.to_pod(answer), moved(answer, source=frontend))
