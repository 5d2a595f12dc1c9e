"""ICMP errors about translated packets: whoever sent the packet hears of it, in its own terms."""

from __future__ import annotations

import pytest
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from agent.core.abi import FrontendKind
from tests.bpf import packet_path as at
from tests.bpf.harness import TC_ACT_REDIRECT, TC_ACT_UNSPEC
from tests.bpf.packet_path import to
from tests.bpf.packets import PROTOCOLS, End, icmp_error, packet, reply_to
from tests.bpf.talk import NUMBERS, TARGET, Talk
from tests.bpf.test_packet_life import check, delivered


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("error", ["too-big", "port-unreachable", "ttl-exceeded"])
@pytest.mark.parametrize("quoted", [1200, "least"])
def test_an_error_about_a_masqueraded_packet_reaches_the_client(path, quoted, error, protocol, number):
    """A hop behind the node, or the backend, complains to the node; the client hears it of what itself has sent."""
    talk = Talk(path, protocol, number)
    sent = packet(protocol, talk.client, talk.frontend, payload=b"question")
    talk.ask()
    size = (48 if number else 28) if quoted == "least" else quoted
    hop = ("192.0.2.9", "2001:db8:9::9")[number]
    complaint = icmp_error(talk.first, hop, error, quoted=size)

    ran = path.ingress("eth0", complaint)

    told = icmp_error(_quoted_as(talk.first, sent), talk.frontend.address, error, quoted=size)
    _set_ttl(told, 63)
    check(ran, TC_ACT_REDIRECT, told)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("error", ["too-big", "port-unreachable"])
def test_an_error_about_an_answer_reaches_the_backend(path, error, protocol, number):
    """A hop between the node and the client complains to the frontend's address."""
    talk = Talk(path, protocol, number)
    talk.ask()
    answer = reply_to(talk.first)
    translated = Ether(path.ingress("eth0", answer).packet)
    complaint = icmp_error(translated, ("192.0.2.9", "2001:db8:9::9")[number], error)

    ran = path.ingress("eth0", complaint)

    told = icmp_error(_quoted_as(translated, answer), talk.source.address, error)
    _set_ttl(told, 63)
    check(ran, TC_ACT_REDIRECT, told)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_error_about_a_pods_packet_reaches_the_pod(path, protocol, number):
    """Not masqueraded: the error passes the stack, and is translated where it leaves for the pod."""
    client, backend = End(at.POD_ONE[number], 4000), End(at.REMOTE_POD[number], TARGET)
    frontend = End(("10.96.0.10", "fd00:10:96::10")[number], 80)
    path.serve(protocol, frontend, inside=to(backend))
    sent = packet(protocol, client, frontend)
    forward = Ether(path.ingress("one", sent).packet)
    complaint = icmp_error(forward, ("192.0.2.9", "2001:db8:9::9")[number])

    check(path.ingress("eth0", complaint), TC_ACT_UNSPEC, complaint)
    told = icmp_error(_quoted_as(forward, sent), frontend.address)
    check(path.egress("one", complaint), TC_ACT_UNSPEC, told)


@pytest.mark.parametrize("number", NUMBERS)
def test_an_error_about_a_host_s_packet_reaches_the_host(path, number):
    client, backend = End(at.NODE[number], 4000), End(at.REMOTE_POD[number], TARGET)
    frontend = End(at.NODE[number], 30080)
    path.serve("tcp", frontend, inside=to(backend), kind=FrontendKind.NODE_PORT)
    sent = packet("tcp", client, frontend)
    forward = Ether(path.loopback(sent).packet)
    complaint = icmp_error(forward, ("192.0.2.9", "2001:db8:9::9")[number])

    told = icmp_error(_quoted_as(forward, sent), frontend.address)
    check(path.ingress("eth0", complaint), TC_ACT_REDIRECT, delivered(told))


@pytest.mark.parametrize("number", NUMBERS)
def test_an_error_about_a_strangers_packet_is_left_alone(path, number):
    talk = Talk(path, "tcp", number)
    talk.ask()
    other = packet("tcp", End(at.NODE[number], 4999), talk.backend)
    complaint = icmp_error(other, ("192.0.2.9", "2001:db8:9::9")[number])

    check(path.ingress("eth0", complaint), TC_ACT_UNSPEC, complaint)


def _quoted_as(translated: Packet, original: Packet) -> Packet:
    """The original as an error quotes it once it is translated back.

    Its TTL is that of the packet which met the error; the transport's checksum, which nobody checks there, stays, too.
    """
    quoted = original.copy()
    _set_ttl(quoted, _ttl_of(translated))
    for field in ("chksum", "cksum"):
        if field in quoted[2].fields:
            setattr(quoted[2], field, getattr(translated[2], field))
    return quoted


def _ttl_of(built: Packet) -> int:
    return int(built[1].hlim if built[1].version == 6 else built[1].ttl)


def _set_ttl(built: Packet, ttl: int) -> None:
    ip = built[1]
    if ip.version == 6:
        ip.hlim = ttl
    else:
        ip.chksum = _ipv4_sum(ip, ttl)
        ip.ttl = ttl


def _ipv4_sum(ip: Packet, ttl: int) -> int:
    fresh = ip.copy()
    fresh.ttl = ttl
    del fresh.chksum
    return int(type(ip)(bytes(fresh)).chksum)
