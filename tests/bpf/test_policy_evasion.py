"""Packets that are made to get past policy or past anti-spoofing: each is dropped, and its honest likeness is not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from agent.core.abi import PEER_ANY, Direction, FrontendKind, Reason, SubjectFlag
from tests.bpf import packet_path as at
from tests.bpf.harness import TC_ACT_REDIRECT, Ran
from tests.bpf.packet_path import to
from tests.bpf.packets import (
    CLIENT_MAC,
    NODE_MAC,
    PROTOCOLS,
    End,
    icmp_error,
    network,
    packet,
    reply_to,
    settle,
)
from tests.bpf.policy_path import ISOLATED, ONE, REMOTE, TWO, PolicyPath, fault_of_pass, is_dropped
from tests.bpf.talk import NUMBERS as FAMILIES

CLIENT_PORT, TARGET = 40_000, 8080
BOTH_WAYS = pytest.mark.parametrize("leaves", [True, False], ids=["from-pod", "to-pod"])
Hide = Callable[[Packet], Packet]


def cross(policy: PolicyPath, sent: Packet | bytes, *, leaves: bool, device: str = "one") -> Ran:
    return policy.from_pod(sent, device) if leaves else policy.to_pod(sent, device)


def direction_of(*, leaves: bool) -> Direction:
    return Direction.EGRESS if leaves else Direction.INGRESS


def assert_dropped(policy: PolicyPath, ran: Ran, reason: Reason, *, leaves: bool = True, device: str = "one") -> None:
    """Hold that one packet was dropped, counted and told for this reason."""
    assert is_dropped(ran)
    assert policy.judged() == {(direction_of(leaves=leaves), reason, False): 1}
    (told,) = policy.told()
    assert (told.reason, told.device, told.allowed) == (reason, policy.ifindex[device], False)
    assert told.protocol or told.source == told.destination == End("::", 0), "what is no IP has no ends"


def allow_all(policy: PolicyPath, subject: int = ONE) -> None:
    for direction in Direction:
        policy.rule(direction, PEER_ANY, subject=subject)


WHOEVER: dict[str, Callable[[PolicyPath], None]] = {
    "isolated": lambda policy: None,
    "allowed": allow_all,
    "not-isolated": lambda policy: policy.subject(at.POD_ONE, ONE, SubjectFlag(0), device="one"),
    "no-subject": lambda policy: policy.release(at.POD_ONE),
    "unknown-device": lambda policy: policy.device("one", None),
}
TAGS: dict[str, Hide] = {
    "802.1Q": lambda inner: Dot1Q(vlan=0) / inner,
    "802.1ad": lambda inner: Dot1AD(vlan=0) / inner,
    "two": lambda inner: Dot1Q(vlan=0) / Dot1Q(vlan=0) / inner,
    "of-some-network": lambda inner: Dot1Q(vlan=7) / inner,
}


@BOTH_WAYS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("be", WHOEVER.values(), ids=WHOEVER)
def test_one_more_tag_hides_nothing(policy, be, tag, family, leaves):
    """The receiver takes off what is left of them, and sees IP; the first tag is never in the frame here."""
    be(policy)
    ends = (at.POD_ONE[family], at.REMOTE_POD[family])
    inner = network(*(ends if leaves else ends[::-1])) / UDP(sport=1, dport=2) / b"hidden"
    sent = bytes(Ether(src=CLIENT_MAC, dst=NODE_MAC) / tag(inner[1]))
    assert sent[12:14] in {b"\x81\x00", b"\x88\xa8"}

    assert_dropped(policy, cross(policy, sent, leaves=leaves), Reason.UNREADABLE, leaves=leaves)


OTHERS = {"LLDP": 0x88CC, "MPLS": 0x8847, "PPPoE": 0x8864, "a-length": 100}


def foreign(ethertype: int) -> bytes:
    return bytes(Ether(src=CLIENT_MAC, dst=NODE_MAC, type=ethertype) / Raw(bytes(60)))


ASK = bytes(Ether(src=CLIENT_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(psrc=at.POD_ONE[0], pdst=at.NODE[0]))


@BOTH_WAYS
@pytest.mark.parametrize("ethertype", OTHERS.values(), ids=OTHERS)
def test_other_protocols_than_ip_are_no_concern_of_policy(policy, ethertype, leaves):
    sent = foreign(ethertype)

    assert not fault_of_pass(cross(policy, sent, leaves=leaves), Raw(sent))
    policy.set_state(is_strict=True)
    assert not fault_of_pass(cross(policy, sent, leaves=leaves), Raw(sent)), "whose device it is is known"
    assert policy.judged() == {}


@BOTH_WAYS
def test_in_strict_mode_nothing_but_arp_passes_a_device_of_nobody_known(policy, leaves):
    policy.set_state(is_strict=True)
    policy.device("one", None)
    policy.release(at.POD_ONE)

    assert not fault_of_pass(cross(policy, ASK, leaves=leaves), Raw(ASK))
    for ethertype in OTHERS.values():
        assert_dropped(policy, cross(policy, foreign(ethertype), leaves=leaves), Reason.HELD, leaves=leaves)


UNHELD = {
    "of-a-pod": (at.POD_ONE, at.REMOTE_POD),
    "of-anybody": (at.FAR, at.REMOTE_POD),
    "of-nobody": (("0.0.0.0", "::"), ("255.255.255.255", "ff02::1")),
    "of-the-link": (("169.254.1.1", "fe80::1"), ("169.254.1.2", "fe80::2")),
    "of-a-group": (at.POD_TWO, ("224.0.0.251", "ff02::fb")),
    "of-one-whose-device-is-not-known": (at.SECOND_REMOTE_POD, at.REMOTE_POD),
}


@BOTH_WAYS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ends", UNHELD.values(), ids=UNHELD)
def test_who_is_held_is_so_by_whatever_address(policy, ends, family, leaves):
    policy.release(at.POD_ONE)
    policy.device("one", None)
    policy.subject(at.SECOND_REMOTE_POD, TWO, SubjectFlag(0))

    def sent(port: int) -> Packet:
        own, peer = End(ends[0][family], port), End(ends[1][family], 2)
        return packet("udp", *((own, peer) if leaves else (peer, own)))

    assert not fault_of_pass(cross(policy, sent(1), leaves=leaves), sent(1)), "in standard mode nobody is held"
    policy.judged()
    policy.told()

    policy.set_state(is_strict=True)

    assert_dropped(policy, cross(policy, sent(3), leaves=leaves), Reason.HELD, leaves=leaves)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_nodes_own_address_is_no_pods(policy, family):
    """Whoever has it may reach every pod."""
    policy.device("two", None)
    policy.own(*at.NODE)
    for source in (at.NODE[family], at.POD_ONE[family]):
        sent = packet("udp", End(source, 4000), End(at.REMOTE_POD[family], 80))
        assert_dropped(policy, policy.from_pod(sent, "two"), Reason.SPOOFED, device="two")
    assert policy.connections() == []
    inward = packet("udp", End(at.NODE[family], 4000), End(at.POD_ONE[family], 80))
    assert not fault_of_pass(policy.to_pod(inward), inward)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_in_the_name_of_a_pod_that_is_elsewhere_are_dropped(policy, family):
    policy.device("two", None)
    about = packet("tcp", End(at.REMOTE_POD[family], 1), End(at.POD_ONE[family], 2))

    ran = policy.from_pod(icmp_error(about, at.POD_ONE[family]), "two")

    assert_dropped(policy, ran, Reason.SPOOFED, device="two")


def optioned(source: str) -> Packet:
    """Build a packet with more headers than are read."""
    built = network(source, at.FAR[1])
    for _ in range(7):
        built /= IPv6ExtHdrDestOpt()
    return built / UDP(sport=1, dport=2) / b"abc"


UNREADABLE: dict[str, tuple[int, Callable[[str], Packet]]] = {
    "too-many-extensions": (1, optioned),
    "end-of-a-header": (0, lambda source: network(source, at.FAR[0], flags="MF", proto=6) / Raw(bytes(8))),
    "half-a-header": (0, lambda source: network(source, at.FAR[0], proto=17) / Raw(bytes(4))),
    "half-a-header-6": (1, lambda source: network(source, at.FAR[1], nh=17) / Raw(bytes(4))),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_has_a_source_all_the_same(policy, name):
    family, build = UNREADABLE[name]
    policy.subject(at.POD_ONE, ONE, SubjectFlag(0), device="one")
    own = bytes(build(at.POD_ONE[family]))
    assert not fault_of_pass(policy.from_pod(own), Raw(own))

    ran = policy.from_pod(bytes(build(at.POD_TWO[family])))

    assert_dropped(policy, ran, Reason.SPOOFED)


LINK_LOCAL = {"global": (at.FAR[1], False), "another's": ("fe80::2", True), "a-group": ("ff02::fb", True)}


@pytest.mark.parametrize(("destination", "passes"), LINK_LOCAL.values(), ids=LINK_LOCAL)
@pytest.mark.parametrize("source", ["fe80::bad", "febf::bad"])
@pytest.mark.parametrize("is_known", [True, False], ids=["known-device", "unknown-device"])
def test_a_link_local_source_stays_on_its_link(policy, is_known, source, destination, passes):
    policy.subject(at.POD_ONE, ONE, SubjectFlag(0), device="one")
    if not is_known:
        policy.device("one", None)
    sent = packet("udp", End(source, 1), End(destination, 2))

    ran = policy.from_pod(sent)

    if passes:
        assert not fault_of_pass(ran, sent)
    else:
        assert_dropped(policy, ran, Reason.SPOOFED)


def mapped(address: str) -> str:
    return f"::ffff:{address}"


MAPPED = {
    "source": (mapped(at.POD_ONE[0]), at.REMOTE_POD[1]),
    "destination": (at.POD_ONE[1], mapped(at.REMOTE_POD[0])),
    "both": (mapped(at.POD_ONE[0]), mapped(at.REMOTE_POD[0])),
    "of-others": (mapped(at.POD_TWO[0]), mapped(at.FAR[0])),
}


@BOTH_WAYS
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("ends", MAPPED.values(), ids=MAPPED)
def test_an_ipv6_packet_is_none_of_an_ipv4_connection(policy, ends, protocol, leaves):
    """Not even where it would have the same tuple as one that is known."""
    allow_all(policy)
    own, peer = End(at.POD_ONE[0], CLIENT_PORT), End(at.REMOTE_POD[0], TARGET)
    assert not is_dropped(policy.from_pod(packet(protocol, own, peer)))
    assert not is_dropped(policy.to_pod(packet(protocol, peer, own, flags="SA")))
    before = policy.connections()
    policy.judged()
    policy.told()
    made = [End(address, end.port) for address, end in zip(ends, (own, peer), strict=True)]
    sent = packet(protocol, *(made if leaves else made[::-1]), flags="A")

    ran = cross(policy, sent, leaves=leaves)

    assert_dropped(policy, ran, Reason.SPOOFED if leaves else Reason.UNREADABLE, leaves=leaves)
    assert policy.connections() == before


QUERY, REPORTS, SOLICITATION, ADVERTISEMENT, REDIRECT = 130, 143, 133, 134, 137
LISTENERS = (130, 131, 132, REPORTS)
NEIGHBOURS = (133, 134, 135, 136, 137)


def discovery(kind: int, source: str, destination: str, hops: int, payload: bytes = bytes(20)) -> Packet:
    """Build a message of ICMPv6 that links live by; those of listeners have an option before them."""
    head = network(source, destination, ttl=hops)
    if kind in LISTENERS:
        head = head / IPv6ExtHdrHopByHop(nh=58)
    else:
        head[IPv6].nh = 58
    return Ether(bytes(head / Raw(bytes([kind, 0, 0, 0]) + payload)))


HONEST = [(kind, 1) for kind in LISTENERS] + [(kind, 255) for kind in NEIGHBOURS]
FROM_AFAR = [
    (kind, hops) for kind in (*LISTENERS, *NEIGHBOURS) for hops in (1, 64, 254, 255) if (kind, hops) not in HONEST
]


@pytest.mark.parametrize(("kind", "hops"), FROM_AFAR)
@BOTH_WAYS
def test_what_has_left_its_link_is_no_discovery(policy, kind, hops, leaves):
    """It is ICMP like other, and judged."""
    ends = (at.POD_ONE[1], at.FAR[1])
    sent = discovery(kind, *(ends if leaves else ends[::-1]), hops)

    assert_dropped(policy, cross(policy, sent, leaves=leaves), Reason.POLICY, leaves=leaves)
    allow_all(policy)
    assert not fault_of_pass(cross(policy, sent, leaves=leaves), sent)


@pytest.mark.parametrize(("kind", "hops"), HONEST)
def test_discovery_reaches_every_pod(policy, kind, hops):
    policy.set_state(is_strict=True)
    sent = discovery(kind, "fe80::1", "ff02::1", hops)
    assert not fault_of_pass(policy.to_pod(sent), sent)
    policy.release(at.POD_ONE)
    policy.device("one", None)
    assert not fault_of_pass(policy.to_pod(sent), sent)
    assert policy.judged() == {}


@pytest.mark.parametrize("source", ["::", "fe80::1", at.POD_ONE[1]])
@pytest.mark.parametrize(("kind", "hops"), HONEST)
@pytest.mark.parametrize("is_placed", [True, False], ids=["placed", "not-placed"])
def test_a_pod_speaks_of_its_link_but_is_no_router(policy, is_placed, kind, hops, source):
    if not is_placed:
        policy.subject(at.POD_ONE, ONE, ISOLATED)
    sent = discovery(kind, source, "ff02::1", hops)

    ran = policy.from_pod(sent)

    if kind in {ADVERTISEMENT, REDIRECT}:
        assert_dropped(policy, ran, Reason.SPOOFED)
    else:
        assert not fault_of_pass(ran, sent)
        assert policy.judged() == {}


@pytest.mark.parametrize("source", [at.POD_TWO[1], at.FAR[1], at.NODE[1]], ids=["another-pod", "outside", "the-node"])
@pytest.mark.parametrize(("kind", "hops"), [it for it in HONEST if it[0] not in {ADVERTISEMENT, REDIRECT}])
@pytest.mark.parametrize("is_known", [True, False], ids=["known-device", "unknown-device"])
def test_a_pod_speaks_of_its_link_in_its_own_name(policy, is_known, kind, hops, source):
    policy.subject(at.POD_TWO, TWO, SubjectFlag(0), device="two")
    policy.own(*at.NODE)
    if not is_known:
        policy.device("one", None)
        policy.release(at.POD_ONE)
    sent = discovery(kind, source, "ff02::1", hops)

    ran = policy.from_pod(sent)

    if not is_known and source == at.FAR[1]:
        assert not fault_of_pass(ran, sent), "nothing speaks against it"
    else:
        assert_dropped(policy, ran, Reason.SPOOFED)


ON_LINK = {"behind-a-gateway": (at.FAR[1], False), "on-the-link": (at.OUTSIDE[1], True), "a-pod": (at.POD_TWO[1], True)}


@pytest.mark.parametrize(("destination", "passes"), ON_LINK.values(), ids=ON_LINK)
@pytest.mark.parametrize("kind", [135, 136])
def test_discovery_goes_to_neighbours_alone(policy, kind, destination, passes):
    """What would be sent on to a gateway carries something else."""
    sent = discovery(kind, at.POD_ONE[1], destination, 255, b"out of here")

    ran = policy.from_pod(sent)

    if passes:
        assert not fault_of_pass(ran, sent)
    else:
        assert_dropped(policy, ran, Reason.SPOOFED)


class Quote(NamedTuple):
    """An error at the pod's device: its ends, and those of the packet it quotes, of which one is the pod's peer."""

    leaves: bool
    source: tuple[str, str]
    destination: tuple[str, str]
    is_ours: bool
    passes: bool


QUOTES = {
    "to-the-sender": Quote(True, at.POD_ONE, at.REMOTE_POD, True, True),
    "to-somebody": Quote(True, at.POD_ONE, at.FAR, True, False),
    "to-a-neighbour": Quote(True, at.POD_ONE, at.POD_TWO, True, False),
    "about-anothers": Quote(True, at.POD_ONE, at.REMOTE_POD, False, False),
    "about-anothers-to-somebody": Quote(True, at.POD_ONE, at.FAR, False, False),
    "from-a-router": Quote(False, at.GATEWAY, at.POD_ONE, True, True),
    "from-the-receiver": Quote(False, at.REMOTE_POD, at.POD_ONE, True, True),
    "about-anothers-to-the-pod": Quote(False, at.REMOTE_POD, at.POD_ONE, False, False),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("quote", QUOTES.values(), ids=QUOTES)
def test_an_error_reaches_whoever_sent_what_it_quotes_and_nobody_else(policy, quote, protocol, family):
    """Whoever it quotes: the pod's own connection with its peer, or that of another pod, which is allowed too."""
    policy.subject(at.POD_TWO, TWO, SubjectFlag(0), device="two")
    policy.device("two", at.POD_TWO)
    policy.rule(Direction.EGRESS, REMOTE, protocol, TARGET)
    peer = End(at.REMOTE_POD[family], TARGET)
    for pod, device in ((at.POD_ONE, "one"), (at.POD_TWO, "two")):
        assert not is_dropped(policy.from_pod(packet(protocol, End(pod[family], CLIENT_PORT), peer), device))
    whose = End((at.POD_ONE if quote.is_ours else at.POD_TWO)[family], CLIENT_PORT)
    quoted = packet(protocol, *((peer, whose) if quote.leaves else (whose, peer)), payload=b"hidden " * 40)
    error = icmp_error(quoted, quote.source[family], "port-unreachable")
    error[1].dst = quote.destination[family]
    error = settle(error)
    policy.judged()
    policy.told()

    ran = cross(policy, error, leaves=quote.leaves)

    if quote.passes:
        assert not fault_of_pass(ran, error)
        assert policy.judged() == {}
        return
    assert_dropped(policy, ran, Reason.POLICY, leaves=quote.leaves)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_by_other_pods_than_the_one_that_was_asked_are_judged(policy, family):
    """A pod that routes for others answers for itself alone."""
    policy.rule(Direction.EGRESS, REMOTE, "udp", 53)
    own, peer = End(at.POD_ONE[family], CLIENT_PORT), End(at.REMOTE_POD[family], 53)
    assert not is_dropped(policy.from_pod(packet("udp", own, peer)))
    quoted = packet("udp", peer, own)
    policy.device("one", at.POD_TWO)
    policy.subject(at.POD_TWO, TWO, ISOLATED, device="one")
    policy.judged()

    assert is_dropped(policy.from_pod(icmp_error(quoted, at.POD_TWO[family])))
    assert policy.judged() == {(Direction.EGRESS, Reason.POLICY, False): 1}


TRANSLATED = list(product(("tcp", "udp"), (0, 1)))


@pytest.mark.parametrize(("protocol", "family"), TRANSLATED)
def test_errors_about_what_a_service_translates_pass_both_ways(policy, protocol, family):
    """They and what they quote are translated together: the ends agree at each device."""
    frontend = End(("10.96.0.10", "fd00:10:96::10")[family], 80)
    backend, own = End(at.REMOTE_POD[family], TARGET), End(at.POD_ONE[family], CLIENT_PORT)
    policy.serve(protocol, frontend, inside=to(backend))
    policy.rule(Direction.EGRESS, REMOTE, protocol, TARGET)
    asked = policy.from_pod(packet(protocol, own, frontend))
    assert not is_dropped(asked)
    answer = packet(protocol, backend, own, flags="SA")
    seen = Ether(policy.to_pod(answer).packet)
    assert seen[1].src == frontend.address
    policy.judged()

    about_asked = icmp_error(Ether(asked.packet), at.GATEWAY[family])
    told = Ether(policy.to_pod(about_asked).packet)
    assert bytes(frontend.address, "ascii") in repr(told).encode(), "it says what the pod has asked for"
    about_answer = icmp_error(seen, at.POD_ONE[family], "port-unreachable")
    sent = policy.from_pod(about_answer)
    assert not is_dropped(sent)
    assert Ether(sent.packet)[1].dst == backend.address
    assert policy.judged() == {}


@pytest.mark.parametrize(("protocol", "family"), TRANSLATED)
def test_errors_about_what_is_masqueraded_pass_both_ways(policy, protocol, family):
    outsider = End(at.OUTSIDE[family], 5000)
    frontend, backend = End(at.NODE[family], 30_080), End(at.POD_ONE[family], TARGET)
    policy.serve(protocol, frontend, inside=to(backend), kind=FrontendKind.NODE_PORT)
    policy.rule(Direction.INGRESS, PEER_ANY, protocol, TARGET)
    seen = Ether(policy.ingress("eth0", packet(protocol, outsider, frontend)).packet)
    assert seen[1].src == at.NODE[family], "it is masqueraded"
    assert not fault_of_pass(policy.to_pod(seen), seen)
    answer = reply_to(seen)
    assert policy.from_pod(answer).verdict == TC_ACT_REDIRECT
    policy.judged()

    sent = policy.from_pod(icmp_error(seen, at.POD_ONE[family], "port-unreachable"))
    assert Ether(sent.packet)[1].dst == outsider.address
    about_answer = icmp_error(packet(protocol, frontend, outsider, flags="SA"), at.GATEWAY[family])
    inward = Ether(policy.ingress("eth0", about_answer).packet)
    assert inward[1].dst == at.POD_ONE[family]
    assert not fault_of_pass(policy.to_pod(inward), inward)
    assert policy.judged() == {}


def test_a_ping_that_is_allowed_carries_no_error_elsewhere(policy):
    policy.rule(Direction.EGRESS, REMOTE)
    quoted = IP(src=at.REMOTE_POD[0], dst=at.POD_ONE[0]) / ICMP(type=0, id=5, seq=1) / b"hidden"
    asked = settle(network(at.POD_ONE[0], at.REMOTE_POD[0]) / ICMP(id=5, seq=1))
    assert not is_dropped(policy.from_pod(asked))

    error = settle(network(at.POD_ONE[0], at.FAR[0]) / ICMP(type=3, code=3) / bytes(quoted))

    assert is_dropped(policy.from_pod(error))
