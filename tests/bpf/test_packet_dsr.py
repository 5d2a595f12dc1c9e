"""Direct server return, hop by hop: the first node says in the packet what was asked for, the backend's node answers.

Both nodes are the same one, after its maps were emptied.
"""

from __future__ import annotations

import ipaddress

import pytest
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from agent.core.abi import Counter, FlowFlag, FrontendFlag, FrontendKind
from tests.bpf import packet_path as at
from tests.bpf.harness import TC_ACT_REDIRECT, TC_ACT_UNSPEC
from tests.bpf.packet_path import to
from tests.bpf.packets import PROTOCOLS, End, moved, packet, reply_to
from tests.bpf.talk import NUMBERS, TARGET
from tests.bpf.test_packet_life import check

ZERO = ("0.0.0.0", "::")
FRONTENDS = {
    FrontendKind.NODE_PORT: (at.OTHER_NODE, 30080),
    FrontendKind.LOAD_BALANCER: (("203.0.113.10", "2001:db8:113::10"), 80),
}
KINDS = [pytest.param(kind, id=kind.name.lower()) for kind in FRONTENDS]


def frontend_of(kind: FrontendKind, number: int) -> End:
    addresses, port = FRONTENDS[kind]
    return End(addresses[number], port)


def saying(sent: Packet, frontend: End) -> Packet:
    """A packet that says what its client asked for: an option of the experimental kind (RFC 4727) behind the header."""
    raw, asked = bytes(sent), ipaddress.ip_address(frontend.address).packed
    port = frontend.port.to_bytes(2, "big")
    if frontend.is_ipv6:
        option = bytes([raw[20], 2, 1, 0, 0x1E, 18]) + port + asked
        length = (int.from_bytes(raw[18:20], "big") + len(option)).to_bytes(2, "big")
        return Ether(raw[:18] + length + bytes([60]) + raw[21:54] + option + raw[54:])
    option = bytes([0x9E, 8]) + port + asked
    length = (int.from_bytes(raw[16:18], "big") + len(option)).to_bytes(2, "big")
    longer = Ether(raw[:14] + bytes([0x47]) + raw[15:16] + length + raw[18:34] + option + raw[34:])
    longer[1].chksum = None
    return Ether(bytes(longer))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_node_keeps_the_client_and_says_what_was_asked_for(path, kind, protocol, number):
    client, backend = End(at.OUTSIDE[number], 4000), End(at.REMOTE_POD[number], TARGET)
    frontend = End(at.NODE[number], 30080) if kind is FrontendKind.NODE_PORT else frontend_of(kind, number)
    path.serve(protocol, frontend, inside=to(backend), kind=kind, flags=FrontendFlag.DSR)
    sent = packet(protocol, client, frontend)

    check(path.ingress("eth0", sent), TC_ACT_REDIRECT, saying(moved(sent, destination=backend, ttl=63), frontend))
    more = packet(protocol, client, frontend, flags="A", payload=b"more")
    wanted = moved(more, destination=backend, ttl=63)
    # Each datagram says so, as none of them is known to be the first; of a connection, only the one that opens it.
    check(path.ingress("eth0", more), TC_ACT_REDIRECT, saying(wanted, frontend) if protocol == "udp" else wanted)
    assert all(flow.flags & FlowFlag.DSR for flow in path.flows())


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_backend_s_node_answers_in_the_name_of_the_frontend(path, kind, protocol, number):
    """A NodePort is known by its port, as the address is another node's."""
    client, backend, frontend = (
        End(at.OUTSIDE[number], 4000),
        End(at.POD_TWO[number], TARGET),
        frontend_of(kind, number),
    )
    if kind is FrontendKind.NODE_PORT:
        path.reserve(ZERO[number], frontend.port, protocol, FrontendFlag.DSR)
    else:
        path.serve(protocol, frontend, inside=to(backend), kind=kind, flags=FrontendFlag.DSR)
    first = saying(packet(protocol, client, backend), frontend)

    check(path.ingress("eth0", first), TC_ACT_UNSPEC, first)
    check(path.egress("two", first), TC_ACT_UNSPEC, first)
    answer = reply_to(packet(protocol, client, backend))
    check(path.ingress("two", answer), TC_ACT_UNSPEC, answer)
    check(path.egress("eth0", answer), TC_ACT_UNSPEC, moved(answer, source=frontend))
    more = packet(protocol, client, backend, flags="A")
    check(path.ingress("eth0", more), TC_ACT_UNSPEC, more)
    again = reply_to(more, flags="A")
    check(path.egress("eth0", again), TC_ACT_UNSPEC, moved(again, source=frontend))
    # The pair of a reply is what comes here, not what the client asked for: no third entry is made of it.
    assert {(client, backend), (backend, client)} == {flow.asked for flow in path.flows()}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_nobody_offers_is_no_name_to_answer_in(path, protocol, number):
    """Whoever can send packets to a pod must not choose the address that its answers come from."""
    client, backend = End(at.OUTSIDE[number], 4000), End(at.POD_TWO[number], TARGET)
    first = saying(packet(protocol, client, backend), End(("8.8.8.8", "2001:db8::8")[number], 53))

    check(path.ingress("eth0", first), TC_ACT_UNSPEC, first)
    answer = reply_to(packet(protocol, client, backend))
    check(path.egress("eth0", answer), TC_ACT_UNSPEC, answer)
    assert path.flows() == []


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_offered_in_other_ways_is_no_name_to_answer_in(path, kind, number):
    """Without the option nobody but a forger says so."""
    client, backend, frontend = (
        End(at.OUTSIDE[number], 4000),
        End(at.POD_TWO[number], TARGET),
        frontend_of(kind, number),
    )
    path.reserve(ZERO[number], frontend.port, "tcp")
    path.serve("tcp", frontend, inside=to(backend), kind=kind)
    first = saying(packet("tcp", client, backend), frontend)

    check(path.ingress("eth0", first), TC_ACT_UNSPEC, first)
    assert path.flows() == []


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("origin", ["pod", "own"])
def test_clients_and_backends_of_this_node_need_no_such_thing(path, origin, number):
    """A client inside is masqueraded as ever; a backend that is the node itself is simply reached."""
    frontend = frontend_of(FrontendKind.LOAD_BALANCER, number)
    backend = End((at.NODE if origin == "own" else at.REMOTE_POD)[number], TARGET)
    client = End((at.OUTSIDE if origin == "own" else at.POD_ONE)[number], 4000)
    path.serve("tcp", frontend, inside=to(backend), kind=FrontendKind.LOAD_BALANCER, flags=FrontendFlag.DSR)
    sent = packet("tcp", client, frontend)

    ran = path.ingress("eth0" if origin == "own" else "one", sent)

    if origin == "own":
        check(ran, TC_ACT_UNSPEC, moved(sent, destination=backend))
        return
    source = End(at.NODE[number], Ether(ran.packet)[2].sport)
    check(ran, TC_ACT_REDIRECT, moved(sent, source=source, destination=backend, ttl=63))
    assert path.counted() == {Counter.FLOWS: 1}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_datagram_without_room_says_nothing(path, number):
    frontend, backend = frontend_of(FrontendKind.LOAD_BALANCER, number), End(at.REMOTE_POD[number], TARGET)
    path.serve("udp", frontend, inside=to(backend), kind=FrontendKind.LOAD_BALANCER, flags=FrontendFlag.DSR)
    sent = packet("udp", End(at.OUTSIDE[number], 4000), frontend, payload=bytes(1400))

    check(path.ingress("eth0", sent), TC_ACT_REDIRECT, moved(sent, destination=backend, ttl=63))
