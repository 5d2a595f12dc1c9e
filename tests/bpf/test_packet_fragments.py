"""Fragments: only the first carries the ports, and all of them go one way."""

from __future__ import annotations

import pytest
from scapy.packet import Packet

from agent.core.abi import Counter, FlowFlag
from tests.bpf import packet_path as at
from tests.bpf.harness import TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, Ran
from tests.bpf.packet_path import PacketPath, to
from tests.bpf.packets import End, fragments, moved, packet
from tests.bpf.talk import NUMBERS, TARGET, Talk
from tests.bpf.test_packet_life import check

SCTP = pytest.param(
    "sctp",
    marks=pytest.mark.xfail(reason="its CRC runs over all fragments; SCTP cuts its messages itself, IP never has to"),
)


def _through(path: PacketPath, device: str, pieces: list[Packet]) -> list[Ran]:
    return [path.ingress(device, piece) for piece in pieces]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", ["tcp", "udp", SCTP])
def test_fragments_of_a_masqueraded_packet_and_of_its_answer(path, protocol, number):
    talk = Talk(path, protocol, number)
    talk.ask()
    whole = packet(protocol, talk.client, talk.frontend, flags="A", payload=bytes(range(200)) * 5)
    pieces = fragments(whole, 400)

    sent = _through(path, "eth0", pieces)

    wanted = fragments(moved(whole, source=talk.source, destination=talk.backend, ttl=63), 400)
    for ran, piece in zip(sent, wanted, strict=True):
        check(ran, TC_ACT_REDIRECT, piece)
    answer = packet(protocol, talk.backend, talk.source, flags="A", payload=bytes(range(200)) * 6)
    back = fragments(moved(answer, source=talk.frontend, destination=talk.client, ttl=63), 400)
    for ran, piece in zip(_through(path, "eth0", fragments(answer, 400)), back, strict=True):
        check(ran, TC_ACT_REDIRECT, piece)


@pytest.mark.parametrize("number", NUMBERS)
def test_fragments_begin_a_flow(path, number):
    """The first packet of a flow may be in pieces, too."""
    talk = Talk(path, "udp", number)
    whole = packet("udp", talk.client, talk.frontend, payload=bytes(range(200)) * 5)

    sent = _through(path, "eth0", fragments(whole, 400))

    source = next(flow.becomes[0] for flow in path.flows() if not flow.flags & FlowFlag.REPLY)
    for ran, piece in zip(
        sent, fragments(moved(whole, source=source, destination=talk.backend, ttl=63), 400), strict=True
    ):
        check(ran, TC_ACT_REDIRECT, piece)


@pytest.mark.parametrize("number", NUMBERS)
def test_two_fragmented_packets_at_once(path, number):
    """Told apart by their identification."""
    talks = [Talk(path, "udp", number, port) for port in (4000, 4001)]
    pieces, wanted = [], []
    for ident, talk in enumerate(talks, start=7):
        talk.ask()
        whole = packet("udp", talk.client, talk.frontend, payload=bytes([ident]) * 1000)
        pieces.append(fragments(whole, 400, ident))
        wanted.append(fragments(moved(whole, source=talk.source, destination=talk.backend, ttl=63), 400, ident))

    for both, expected in zip(zip(*pieces, strict=True), zip(*wanted, strict=True), strict=True):
        for piece, same in zip(both, expected, strict=True):
            check(path.ingress("eth0", piece), TC_ACT_REDIRECT, same)


@pytest.mark.parametrize("number", NUMBERS)
def test_fragments_of_a_pods_packet(path, number):
    """Unmasqueraded: there at ingress, the answer's where it leaves for the pod."""
    client, backend = End(at.POD_ONE[number], 4000), End(at.REMOTE_POD[number], TARGET)
    frontend = End(("10.96.0.10", "fd00:10:96::10")[number], 80)
    path.serve("udp", frontend, inside=to(backend))
    whole = packet("udp", client, frontend, payload=bytes(1000))
    answer = packet("udp", backend, client, payload=bytes(1100))

    for piece, wanted in _cut(whole, moved(whole, destination=backend)):
        check(path.ingress("one", piece), TC_ACT_UNSPEC, wanted)
    for piece, _ in _cut(answer, answer):
        check(path.ingress("eth0", piece), TC_ACT_UNSPEC, piece)
    for piece, wanted in _cut(answer, moved(answer, source=frontend)):
        check(path.egress("one", piece), TC_ACT_UNSPEC, wanted)


def _cut(before: Packet, after: Packet) -> list[tuple[Packet, Packet]]:
    return list(zip(fragments(before, 400), fragments(after, 400), strict=True))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 2, 1), (2, 0, 1)], ids=str)
def test_fragments_in_any_order(path, order, number):
    """What comes before the first fragment waits for it, and is then sent again behind it as if it came just now."""
    talk = Talk(path, "udp", number)
    talk.ask()
    whole = packet("udp", talk.client, talk.frontend, payload=bytes(range(200)) * 5)
    pieces = fragments(whole, 400)
    wanted = fragments(moved(whole, source=talk.source, destination=talk.backend, ttl=63), 400)
    early = order[: order.index(0)]

    for index in early:
        ran = path.ingress("eth0", pieces[index])
        assert (ran.verdict, ran.packet) == (TC_ACT_SHOT, bytes(pieces[index]))
    if early:
        check(path.ingress("eth0", pieces[0]), TC_ACT_REDIRECT, pieces[early[-1]])
    # Where packets really go, all but the last of those that waited were sent by the program itself.
    for index in (0, *early, *order[order.index(0) + 1 :]):
        check(path.ingress("eth0", pieces[index]), TC_ACT_REDIRECT, wanted[index])
    assert Counter.FRAGMENT_LOST not in path.counted()


@pytest.mark.parametrize("number", NUMBERS)
def test_fragments_of_a_stranger_are_left_alone(path, number):
    whole = packet("udp", End(at.POD_ONE[number], 4000), End(at.REMOTE_POD[number], TARGET), payload=bytes(1000))

    for piece in fragments(whole, 400):
        check(path.ingress("one", piece), TC_ACT_UNSPEC, piece)
        check(path.egress("eth0", piece), TC_ACT_UNSPEC, piece)


@pytest.mark.parametrize("number", NUMBERS)
def test_more_early_fragments_than_there_is_room_for(path, number):
    whole = packet("udp", End(at.OUTSIDE[number], 4000), End(at.NODE[number], 30080), payload=bytes(1000))
    pieces = fragments(whole, 160)[1:]
    assert len(pieces) > at.FRAGMENT_PLACES

    verdicts = [path.ingress("eth0", piece).verdict for piece in pieces]

    assert verdicts == [TC_ACT_SHOT] * len(pieces)
    assert path.counted() == {Counter.FRAGMENT_LOST: len(pieces) - at.FRAGMENT_PLACES}
