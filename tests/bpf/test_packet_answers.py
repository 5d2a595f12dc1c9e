"""What the packet path says in a service's name, refusals, echoes, complaints about sizes; and where it is silent."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, TCP, IPOption_Router_Alert
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoReply, ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from agent.core.abi import Counter, FrontendFlag, FrontendKind
from tests.bpf import packet_path as at
from tests.bpf.harness import TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC
from tests.bpf.packet_path import REFUSE, SILENT, to
from tests.bpf.packets import (
    PAYLOAD,
    PROTOCOLS,
    End,
    difference,
    echo_request,
    fragments,
    moved,
    network,
    packet,
    settle,
)
from tests.bpf.test_packet_life import CLIENTS, FAMILIES, FRONTENDS, TARGET, check
from tests.lab import netns

ORIGINS = tuple(CLIENTS)
NUMBERS = [pytest.param(number, id=name) for name, number in FAMILIES.items()]
KINDS = [pytest.param(kind, id=kind.name.lower()) for kind in FRONTENDS]


def client_of(origin: str, number: int) -> End:
    return End(CLIENTS[origin][number], 4000)


def frontend_of(kind: FrontendKind, number: int) -> End:
    addresses, port = FRONTENDS[kind]
    return End(addresses[number], port)


def enter(path, origin, sent):
    """Let a client's packet meet the first program on its way."""
    if origin != "host":
        return path.ingress("one" if origin == "pod" else "eth0", sent)
    return path.loopback(sent) if Ether(bytes(sent))[1].dst in at.NODE else path.egress("eth0", sent)


def answer_to(refused: Packet, body: Packet) -> Packet:
    """Build an answer from whom a packet was sent to: to its sender, by the way it came."""
    ip = refused[1]
    fields = {"hlim": 64} if isinstance(ip, IPv6) else {"id": 0, "flags": "DF"}
    built = network(ip.dst, ip.src, **fields) / body
    built.src, built.dst = refused.dst, refused.src
    return settle(built)


def reset(refused: Packet, *, payload: int) -> Packet:
    """The RST of RFC 9293, 3.10.7.1, to a segment with so many bytes of payload."""
    segment = refused[TCP]
    ports = {"sport": segment.dport, "dport": segment.sport, "window": 0}
    if segment.flags.A:
        return answer_to(refused, TCP(**ports, seq=segment.ack, flags="R"))
    taken = payload + int(segment.flags.S) + int(segment.flags.F)
    return answer_to(refused, TCP(**ports, seq=0, ack=segment.seq + taken, flags="RA"))


def unreachable(refused: Packet) -> Packet:
    """The port-unreachable error about a packet, with as much of it as is ever needed."""
    if isinstance(refused[1], IPv6):
        return answer_to(refused, ICMPv6DestUnreach(code=4) / Raw(bytes(refused[1])[:48]))
    return answer_to(refused, ICMP(type=3, code=3) / Raw(bytes(refused[1])[:28]))


def refusal(refused: Packet, payload: bytes = PAYLOAD) -> Packet:
    return reset(refused, payload=len(payload)) if TCP in refused else unreachable(refused)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_behind_a_service_refuses(path, kind, origin, protocol, number):
    frontend = frontend_of(kind, number)
    path.serve(protocol, frontend, inside=REFUSE, kind=kind)
    sent = packet(protocol, client_of(origin, number), frontend)

    check(enter(path, origin, sent), TC_ACT_REDIRECT, refusal(sent))
    assert path.counted() == {Counter.REJECTED: 1}
    assert path.flows() == []


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_for_this_client_is_silence(path, kind, origin, protocol, number):
    """The traffic policy Local without local endpoints; pods and nodes of the cluster are served elsewhere."""
    frontend = frontend_of(kind, number)
    inside = SILENT if kind is FrontendKind.CLUSTER_IP else to(End(at.REMOTE_POD[number], TARGET))
    path.serve(protocol, frontend, inside=inside, outside=SILENT, kind=kind)

    ran = enter(path, origin, packet(protocol, client_of(origin, number), frontend))

    if kind is FrontendKind.CLUSTER_IP or origin == "outside":
        assert ran.verdict == TC_ACT_SHOT
        assert path.counted() == {Counter.DROPPED: 1}
    else:
        assert ran.verdict in (TC_ACT_UNSPEC, TC_ACT_REDIRECT)
        assert path.counted() == {Counter.FLOWS: 1}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("payload", [b"", PAYLOAD], ids=["empty", "payload"])
@pytest.mark.parametrize("flags", ["S", "A", "F", "FA", "P"])
def test_what_a_reset_says(path, flags, payload, number):
    frontend = frontend_of(FrontendKind.CLUSTER_IP, number)
    path.serve("tcp", frontend, inside=REFUSE, kind=FrontendKind.CLUSTER_IP)
    sent = packet("tcp", client_of("outside", number), frontend, flags=flags, payload=payload)

    check(path.ingress("eth0", sent), TC_ACT_REDIRECT, reset(sent, payload=len(payload)))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("flags", ["R", "RA"])
def test_a_reset_is_not_answered(path, flags, number):
    frontend = frontend_of(FrontendKind.CLUSTER_IP, number)
    path.serve("tcp", frontend, inside=REFUSE, kind=FrontendKind.CLUSTER_IP)
    sent = packet("tcp", client_of("outside", number), frontend, flags=flags, payload=b"")

    assert path.ingress("eth0", sent).verdict == TC_ACT_SHOT


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_padding_is_no_payload(path, protocol, number):
    """Short frames are filled up to 60 bytes."""
    frontend = frontend_of(FrontendKind.NODE_PORT, number)
    path.serve(protocol, frontend, inside=REFUSE, kind=FrontendKind.NODE_PORT)
    sent = packet(protocol, client_of("outside", number), frontend, payload=b"")

    ran = path.ingress("eth0", bytes(sent) + b"padding")

    check(ran, TC_ACT_REDIRECT, refusal(sent, b""))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_an_undefined_port_of_a_cluster_ip_refuses(path, origin, protocol, number):
    address = frontend_of(FrontendKind.CLUSTER_IP, number).address
    path.reserve(address)
    path.serve(protocol, End(address, 80), inside=to(End(at.REMOTE_POD[number], TARGET)))
    sent = packet(protocol, client_of(origin, number), End(address, 81))

    check(enter(path, origin, sent), TC_ACT_REDIRECT, refusal(sent))
    assert path.counted() == {Counter.UNDEFINED_PORT: 1}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_undefined_port_of_another_address_is_not_ours(path, kind, protocol, number):
    frontend = frontend_of(kind, number)
    path.serve(protocol, frontend, inside=to(End(at.REMOTE_POD[number], TARGET)), kind=kind)
    sent = packet(protocol, client_of("outside", number), frontend._replace(port=81))

    check(path.ingress("eth0", sent), TC_ACT_UNSPEC, sent)
    assert path.counted() == {}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_a_cluster_ip_answers_a_ping(path, origin, number):
    address = frontend_of(FrontendKind.CLUSTER_IP, number).address
    path.reserve(address)
    sent = echo_request(CLIENTS[origin][number], address)

    ran = enter(path, origin, sent)

    wanted = network(address, CLIENTS[origin][number])
    wanted /= (ICMPv6EchoReply(id=5, seq=1) if number else ICMP(type=0, id=5, seq=1)) / Raw(PAYLOAD)
    wanted.src, wanted.dst = sent.dst, sent.src
    check(ran, TC_ACT_REDIRECT, settle(wanted))


RANGES = {
    "inside one": (("172.30.0.0/24", "192.0.2.0/24"), ("fd00:172:30::/64",), True),
    "exactly": (("172.30.0.100/32",), ("fd00:172:30::100/128",), True),
    "another's": (("192.0.2.0/24",), ("2001:db8:1::/64",), False),
    "all": (("0.0.0.0/0",), ("::/0",), True),
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("v4", "v6", "is_allowed"), list(RANGES.values()), ids=list(RANGES))
def test_source_ranges(path, v4, v6, is_allowed, protocol, number):
    frontend = frontend_of(FrontendKind.LOAD_BALANCER, number)
    backend = End(at.REMOTE_POD[number], TARGET)
    ranges = v6 if number else v4
    path.serve(protocol, frontend, inside=to(backend), kind=FrontendKind.LOAD_BALANCER, ranges=ranges)

    ran = path.ingress("eth0", packet(protocol, client_of("outside", number), frontend))

    assert ran.verdict == (TC_ACT_REDIRECT if is_allowed else TC_ACT_SHOT)
    assert path.counted() == {Counter.FLOWS if is_allowed else Counter.SOURCE_RANGE: 1}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("allowed", ORIGINS)
def test_source_ranges_hold_for_every_origin(path, allowed, origin, number):
    """For pods and nodes, too; a range of the service beside it means nothing."""
    frontend = frontend_of(FrontendKind.LOAD_BALANCER, number)
    backend = End(at.REMOTE_POD[number], TARGET)
    ranges = (f"{CLIENTS[allowed][number]}/{128 if number else 32}",)
    service = path.serve("tcp", frontend, inside=to(backend), kind=FrontendKind.LOAD_BALANCER, ranges=ranges)
    path.allow(service + 1, "0.0.0.0/0", "::/0")

    enter(path, origin, packet("tcp", client_of(origin, number), frontend))

    assert path.counted() == {Counter.FLOWS if allowed == origin else Counter.SOURCE_RANGE: 1}


@pytest.fixture
def narrow_pod(path):
    """The MTU of pod two, smaller than the uplink's."""
    netns.configure(path.node.netns, ["link set v11 mtu 1300"])
    yield 1300
    netns.configure(path.node.netns, ["link set v11 mtu 1500"])


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_packet_too_big_for_its_way_is_answered(path, narrow_pod, protocol, number):
    """So that path MTU discovery finds the way of the translated packet."""
    frontend = frontend_of(FrontendKind.NODE_PORT, number)
    path.serve(protocol, frontend, inside=to(End(at.POD_TWO[number], TARGET)), kind=FrontendKind.NODE_PORT)
    sent = packet(protocol, client_of("outside", number), frontend, payload=bytes(1400), may_be_cut=False)

    ran = path.ingress("eth0", sent)

    quoted = Raw(bytes(sent[1])[: 48 if number else 28])
    error = ICMPv6PacketTooBig(mtu=narrow_pod) if number else ICMP(type=3, code=4, nexthopmtu=narrow_pod)
    check(ran, TC_ACT_REDIRECT, answer_to(sent, error / quoted))
    assert path.counted()[Counter.TOO_BIG] == 1


def test_a_fragment_too_big_for_its_way_is_answered(path, narrow_pod):
    """IPv6: what is quoted has the fragment's header, or the sender would not know what it is about."""
    frontend = frontend_of(FrontendKind.NODE_PORT, 1)
    path.serve("udp", frontend, inside=to(End(at.POD_TWO[1], TARGET)), kind=FrontendKind.NODE_PORT)
    whole = packet("udp", client_of("outside", 1), frontend, payload=bytes(2000))
    first = fragments(whole, 1400)[0]

    ran = path.ingress("eth0", first)

    quoted = Raw(bytes(first[1])[: 40 + 8 + 8])
    check(ran, TC_ACT_REDIRECT, answer_to(first, ICMPv6PacketTooBig(mtu=narrow_pod) / quoted))


def test_a_packet_that_may_be_cut_is_left_to_the_stack(path, narrow_pod):
    """IPv4 without the flag Don't Fragment: whoever sends such packets does not listen to complaints about them."""
    frontend = frontend_of(FrontendKind.NODE_PORT, 0)
    path.serve("udp", frontend, inside=to(End(at.POD_TWO[0], TARGET)), kind=FrontendKind.NODE_PORT)
    sent = packet("udp", client_of("outside", 0), frontend, payload=bytes(1400))

    ran = path.ingress("eth0", sent)

    assert Ether(ran.packet)[1].dst == at.POD_TWO[0]


@pytest.mark.parametrize("number", NUMBERS)
def test_segments_to_be_cut_later_are_not_too_big(path, narrow_pod, number):
    """What counts is the size of the segments that offload will make."""
    frontend = frontend_of(FrontendKind.NODE_PORT, number)
    path.serve("tcp", frontend, inside=to(End(at.POD_TWO[number], TARGET)), kind=FrontendKind.NODE_PORT)
    sent = packet("tcp", client_of("outside", number), frontend, payload=bytes(2400))

    ran = path.ingress("eth0", sent, gso_size=1200, gso_segs=2)

    assert ran.verdict == TC_ACT_REDIRECT
    assert Ether(ran.packet)[1].dst == at.POD_TWO[number]


@pytest.mark.parametrize("number", NUMBERS)
def test_without_endpoints_clients_out_of_range_are_refused_too(path, number):
    frontend = frontend_of(FrontendKind.LOAD_BALANCER, number)
    ranges = ("2001:db8:99::/64",) if number else ("192.0.2.0/24",)
    path.serve("tcp", frontend, inside=REFUSE, kind=FrontendKind.LOAD_BALANCER, ranges=ranges)

    ran = path.ingress("eth0", packet("tcp", client_of("outside", number), frontend, flags="S"))

    assert ran.verdict == TC_ACT_REDIRECT
    assert "R" in Ether(ran.packet)[TCP].flags
    assert path.counted() == {Counter.REJECTED: 1}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("ranges", [False, True])
def test_a_load_balancer_s_address_that_the_node_has_itself(path, ranges, number):
    """The host asks from the very address that it asks for: the backend must see one that leads back here."""
    frontend = frontend_of(FrontendKind.LOAD_BALANCER, number)
    path.own(frontend.address)
    allowed = (f"{at.NODE[number]}/{128 if number else 32}",) if ranges else ()
    path.serve(
        "tcp", frontend, inside=to(End(at.REMOTE_POD[number], TARGET)), kind=FrontendKind.LOAD_BALANCER, ranges=allowed
    )

    ran = path.loopback(packet("tcp", End(frontend.address, 4000), frontend, flags="S"))

    assert ran.verdict == TC_ACT_REDIRECT
    assert (Ether(ran.packet)[1].src, Ether(ran.packet)[1].dst) == (at.NODE[number], at.REMOTE_POD[number])


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("ttl", [1, 2])
def test_a_packet_out_of_hops_is_dropped(path, ttl, number):
    frontend = frontend_of(FrontendKind.NODE_PORT, number)
    path.serve("udp", frontend, inside=to(End(at.REMOTE_POD[number], TARGET)), kind=FrontendKind.NODE_PORT)

    ran = path.ingress("eth0", packet("udp", client_of("outside", number), frontend, ttl=ttl))

    assert ran.verdict == (TC_ACT_SHOT if ttl == 1 else TC_ACT_REDIRECT)
    assert path.counted().get(Counter.TTL_EXCEEDED, 0) == int(ttl == 1)


@pytest.mark.parametrize("number", NUMBERS)
def test_without_a_route_to_the_backend_the_packet_is_dropped(path, number):
    frontend = frontend_of(FrontendKind.NODE_PORT, number)
    nowhere = ("240.0.0.1", "fd00:dead::1")[number]
    path.serve("udp", frontend, inside=to(End(nowhere, TARGET)), kind=FrontendKind.NODE_PORT)
    route = f"route add unreachable {nowhere}"
    netns.configure(path.node.netns, [route])
    try:
        ran = path.ingress("eth0", packet("udp", client_of("outside", number), frontend))
    finally:
        netns.configure(path.node.netns, [route.replace("add", "del")])

    assert ran.verdict == TC_ACT_SHOT
    assert path.counted() == {Counter.NO_ROUTE: 1}


def strangers() -> dict[str, Packet]:
    """Packets that are no service's."""
    pod, other = End(at.POD_ONE[0], 4000), End(at.REMOTE_POD[0], TARGET)
    plain = packet("udp", pod, other)
    return {
        "tcp": packet("tcp", pod, other),
        "udp": plain,
        "sctp": packet("sctp", pod, other),
        "ipv6": packet("tcp", End(at.POD_ONE[1], 4000), End(at.REMOTE_POD[1], TARGET)),
        "ping": echo_request(at.POD_ONE[0], at.REMOTE_POD[0]),
        "ping6": echo_request(at.POD_ONE[1], at.REMOTE_POD[1]),
        "arp": Ether(bytes(Ether() / ARP(psrc=at.POD_ONE[0], pdst="10.180.2.1") / Raw(bytes(18)))),
        "gre": settle(network(at.POD_ONE[0], at.REMOTE_POD[0], proto=47) / Raw(PAYLOAD)),
        "esp6": settle(network(at.POD_ONE[1], at.REMOTE_POD[1], nh=50) / Raw(PAYLOAD)),
        "first fragment": fragments(packet("udp", pod, other, payload=bytes(100)), 64)[0],
        "multicast": packet("udp", pod, End("224.0.0.251", 5353)),
        "other port": packet("tcp", pod, End("10.96.0.10", 443)),
        "other protocol": packet("udp", pod, End("10.96.0.10", 80)),
        "unknown ethertype": Ether(bytes(Ether(type=0x88CC) / Raw(PAYLOAD))),
    }


@pytest.mark.parametrize("hook", ["ingress", "egress", "loopback"])
@pytest.mark.parametrize("name", list(strangers()))
def test_what_is_no_services_is_left_alone(path, name, hook):
    path.serve("tcp", End("10.96.0.10", 80), inside=to(End(at.REMOTE_POD[0], TARGET)))
    sent = strangers()[name]

    ran = path.loopback(sent) if hook == "loopback" else getattr(path, hook)("one", sent)

    assert difference(ran.packet, sent) == ""
    assert ran.verdict == TC_ACT_UNSPEC
    assert path.counted() == {}
    assert path.flows() == []


def test_options_of_ipv4_stay(path):
    frontend, backend = End("10.96.0.10", 80), End(at.REMOTE_POD[0], TARGET)
    path.serve("udp", frontend, inside=to(backend))
    sent = packet("udp", client_of("pod", 0), frontend, options=[IPOption_Router_Alert()])

    check(path.ingress("one", sent), TC_ACT_UNSPEC, moved(sent, destination=backend))


def test_a_datagram_without_checksum_keeps_none(path):
    """Zero says that there is none, over IPv4."""
    frontend, backend = End("10.96.0.10", 80), End(at.REMOTE_POD[0], TARGET)
    path.serve("udp", frontend, inside=to(backend), flags=FrontendFlag.MASQUERADE)
    sent = packet("udp", client_of("pod", 0), frontend)
    raw = bytearray(bytes(sent))
    raw[40:42] = b"\0\0"

    ran = path.ingress("one", bytes(raw))

    assert Ether(ran.packet)[1].dst == backend.address
    assert ran.packet[40:42] == b"\0\0"
