"""What may begin a flow: what opens a connection; at an address of the node nothing else, its own have ports there."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from agent.core.abi import Counter, FrontendKind
from tests.bpf import packet_path as at
from tests.bpf.harness import TC_ACT_REDIRECT, TC_ACT_UNSPEC
from tests.bpf.packet_path import REFUSE, to
from tests.bpf.packets import PROTOCOLS, End, packet
from tests.bpf.talk import NUMBERS, TARGET
from tests.bpf.test_packet_answers import KINDS, ORIGINS, client_of, enter, frontend_of
from tests.bpf.test_packet_life import check
from tests.lab import netns

PORT = 30080
EXTERNAL = FrontendKind.EXTERNAL_IP
AT_THE_NODE = [
    pytest.param(FrontendKind.NODE_PORT, at.NODE, id="a NodePort"),
    pytest.param(FrontendKind.NODE_PORT, ("127.0.0.1", "::1"), id="a NodePort at loopback"),
    pytest.param(EXTERNAL, at.NODE_SECOND, id="an externalIP that the node has"),
    pytest.param(FrontendKind.LOAD_BALANCER, at.NODE_SECOND, id="a load balancer's address that the node has"),
]
LATER = [("tcp", flags) for flags in ("SA", "A", "PA", "FA", "R", "RA")]
LATER += [("sctp", flags) for flags in ("SA", "A", "FA", "R")]


def begins(path, hook, sent):
    """Whether a packet begins a flow; else it is to be left as it is."""
    ran = hook(sent)
    counted = path.counted()
    if counted:
        assert counted == {Counter.FLOWS: 1}
        assert len(path.flows()) == 2
        return True
    check(ran, TC_ACT_UNSPEC, sent)
    assert path.flows() == []
    return False


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("protocol", "flags"), LATER, ids="-".join)
@pytest.mark.parametrize("segment", [to(End("10.180.1.10", TARGET)), REFUSE], ids=["served", "refused"])
@pytest.mark.parametrize(("kind", "addresses"), AT_THE_NODE)
def test_a_connection_of_somebody_else_s_is_left_alone(path, kind, addresses, segment, protocol, flags, number):
    """The node's own, one of a pod that netfilter masquerades, or one that kube-proxy began: its port is no matter."""
    frontend = End(addresses[number], PORT)
    path.serve(protocol, frontend, inside=segment, kind=kind)
    is_loopback = frontend.address in ("127.0.0.1", "::1")
    client = End(frontend.address if is_loopback else at.FAR[number], 443)

    sent = packet(protocol, client, frontend, flags=flags)
    assert not begins(path, path.loopback if is_loopback else lambda sent: path.ingress("eth0", sent), sent)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("kind", "addresses"), AT_THE_NODE[::2])
def test_what_opens_a_connection_begins_a_flow_at_the_node(path, kind, addresses, protocol, number):
    frontend = End(addresses[number], PORT)
    path.serve(protocol, frontend, inside=to(End(at.REMOTE_POD[number], TARGET)), kind=kind)

    assert begins(path, lambda sent: path.ingress("eth0", sent), packet(protocol, End(at.FAR[number], 443), frontend))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("flags", "may_begin"), [("SA", False), ("A", True), ("PA", True)], ids=str)
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.id != "node_port"])
def test_elsewhere_a_connection_in_its_midst_finds_its_backend_again(path, kind, origin, flags, may_begin, number):
    """Where nobody but services can have it: another node may have begun it. An answer is nobody's question, though."""
    frontend = frontend_of(kind, number)
    path.serve("tcp", frontend, inside=to(End(at.REMOTE_POD[number], TARGET)), kind=kind)
    sent = packet("tcp", client_of(origin, number), frontend, flags=flags)

    assert begins(path, lambda sent: enter(path, origin, sent), sent) == may_begin


@contextlib.contextmanager
def datagram_socket(path, own: End, peer: End | None) -> Iterator[None]:
    """Hold a socket of the node's that is bound to one end, and connected to the other if there is one."""
    with netns.entered(path.node.netns):
        sock = socket.socket(socket.AF_INET6 if own.is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        sock.bind(own)
        if peer:
            sock.connect(peer)
        yield


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("kind", "addresses"), AT_THE_NODE[::2])
@pytest.mark.parametrize(
    ("port", "peer_port", "is_awaited"),
    [
        pytest.param(PORT, 53, True, id="connected to the sender"),
        pytest.param(PORT, 54, False, id="connected to another port"),
        pytest.param(PORT + 1, 53, False, id="at another port"),
        pytest.param(PORT, None, False, id="not connected"),
        pytest.param(None, None, False, id="none"),
    ],
)
def test_a_datagram_that_a_socket_of_the_node_awaits_is_left_alone(
    path, port, peer_port, is_awaited, kind, addresses, number
):
    frontend, sender = End(addresses[number], PORT), End(at.FAR[number], 53)
    path.serve("udp", frontend, inside=to(End(at.REMOTE_POD[number], TARGET)), kind=kind)
    held = contextlib.nullcontext()
    if port:
        own, peer = End(addresses[number], port), peer_port and End(sender.address, peer_port)
        held = datagram_socket(path, own, peer)

    with held:
        assert begins(path, lambda s: path.ingress("eth0", s), packet("udp", sender, frontend)) != is_awaited


@pytest.mark.parametrize("number", NUMBERS)
def test_a_socket_of_the_node_that_awaits_nothing_from_a_service_hides_none(path, number):
    """The address is no local one: nobody is asked, whoever holds the port."""
    client, frontend = client_of("outside", number), frontend_of(EXTERNAL, number)
    path.serve("udp", frontend, inside=to(End(at.REMOTE_POD[number], TARGET)), kind=EXTERNAL)

    with datagram_socket(path, End(("0.0.0.0", "::")[number], frontend.port), client):
        ran = path.ingress("eth0", packet("udp", client, frontend))

    assert ran.verdict == TC_ACT_REDIRECT
    assert path.counted() == {Counter.FLOWS: 1}
