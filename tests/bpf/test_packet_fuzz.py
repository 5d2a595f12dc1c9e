"""Malformed packets: each is left as it is, dropped, or answered well; none is translated into something else.

Every packet is judged by a parser of the tests' own (anatomy.py). The random part is repeatable: EBPROXY_FUZZ_SEED
chooses another, and EBPROXY_FUZZ_ROUNDS how long it takes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator

import pytest
from scapy.layers.inet import IPOption_Router_Alert
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from agent.core.abi import FrontendKind
from tests.bpf import packet_path as at
from tests.bpf.anatomy import judge
from tests.bpf.harness import TC_ACT_SHOT, smallest
from tests.bpf.packet_path import REFUSE, PacketPath, to
from tests.bpf.packets import (
    PROTOCOLS,
    End,
    echo_request,
    fragments,
    icmp_error,
    network,
    packet,
    reply_to,
    settle,
)

SEED = int(os.environ.get("EBPROXY_FUZZ_SEED", "20261121"))
ROUNDS = int(os.environ.get("EBPROXY_FUZZ_ROUNDS", "3000"))
VIPS = ("10.96.0.10", "fd00:10:96::10")
_ASKED = [{VIPS[number]: (80, 81), at.NODE[number]: (30080, 30081)} for number in (0, 1)]
HOOKS = {
    "uplink ingress": ("ingress", "eth0"),
    "pod ingress": ("ingress", "one"),
    "uplink egress": ("egress", "eth0"),
    "pod egress": ("egress", "one"),
    "loopback": ("loopback", ""),
}
_ODD_NUMBERS = (0, 1, 2, 7, 8, 19, 20, 21, 27, 28, 39, 40, 41, 47, 48, 60, 255, 256, 1500, 0x7FFF, 0x8000, 0xFFFF)


def _services(path: PacketPath) -> None:
    """A ClusterIP, a NodePort, one that nobody serves, and an address whose other ports are refused; either family."""
    for number in (0, 1):
        backend = End(at.REMOTE_POD[number], 8080)
        for protocol in PROTOCOLS:
            path.serve(protocol, End(VIPS[number], 80), inside=to(backend), affinity_s=10)
            path.serve(protocol, End(at.NODE[number], 30080), inside=to(backend), kind=FrontendKind.NODE_PORT)
            path.serve(protocol, End(at.NODE[number], 30081), inside=REFUSE, kind=FrontendKind.NODE_PORT)
        path.reserve(VIPS[number])


def _corpus(path: PacketPath) -> list[Packet]:
    """Packets that are well: the first of flows, replies, errors about them, to be refused, fragments, with options."""
    found = []
    for number in (0, 1):
        client = End(at.OUTSIDE[number], 4000)
        for protocol in PROTOCOLS:
            frontends = (End(a, p) for a, ports in _ASKED[number].items() for p in ports)
            found += [packet(protocol, client, frontend) for frontend in frontends]
            sent = Ether(path.ingress("eth0", found[-2]).packet)
            assert sent[1].dst == at.REMOTE_POD[number], "else nothing is at stake"
            found += [reply_to(sent), icmp_error(sent, "192.0.2.9" if number == 0 else "2001:db8::9")]
            found.append(icmp_error(sent, at.OTHER_NODE[number], "port-unreachable", quoted=48 if number else 28))
            found += fragments(packet(protocol, client, End(at.NODE[number], 30080), payload=bytes(200)), 96)[:2]
        found.append(echo_request(at.OUTSIDE[number], VIPS[number]))
    options = [IPOption_Router_Alert()]
    found.append(packet("tcp", End(at.OUTSIDE[0], 4000), End(at.NODE[0], 30080), options=options))
    return found + list(_with_extensions())


def _with_extensions() -> Iterator[Packet]:
    client, frontend = End(at.OUTSIDE[1], 4000), End(at.NODE[1], 30080)
    one = [IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), IPv6ExtHdrRouting(), IPv6ExtHdrFragment(id=3)]
    chains = [[header] for header in one] + [one[:2], one[:3], one[::-1], [IPv6ExtHdrDestOpt()] * 5]
    for protocol in PROTOCOLS:
        body = packet(protocol, client, frontend)[2]
        for chain in [*chains, [IPv6ExtHdrDestOpt()] * 7]:
            built = network(client.address, frontend.address)
            for header in chain:
                built = built / header.copy()
            yield settle(built / body.copy())


def _set(raw: bytes, offset: int, *values: int) -> bytes:
    return raw[:offset] + bytes(values) + raw[offset + len(values) :]


def truncated(corpus: list[Packet]) -> Iterator[bytes]:
    """Cut off at every length."""
    for whole in map(bytes, corpus):
        yield from (whole[:size] for size in range(smallest(whole), min(len(whole), 150)))


def misled(corpus: list[Packet]) -> Iterator[bytes]:
    """With every version and header length, with lengths that are too small and too large, with every next header."""
    for whole in map(bytes, corpus):
        yield from (_set(whole, 14, value) for value in range(256))
        offset = 18 if whole[12:14] == b"\x86\xdd" else 16
        yield from (_set(whole, offset, *number.to_bytes(2, "big")) for number in _ODD_NUMBERS)
        yield from (_set(whole, 20 if offset == 18 else 23, value) for value in range(256))


def cut_inside(corpus: list[Packet]) -> Iterator[bytes]:
    """ICMP errors about ever less of a packet, whose own lengths and sums are right; and with odd headers inside."""
    for error in corpus:
        ip = error[1]
        if not (ip.payload.name.startswith("ICMP") and len(ip.payload) > 40):
            continue
        inner = bytes(ip.payload)[8:]
        for size in range(min(len(inner), 90)):
            cut = error.copy()
            layer = cut[2]
            layer.remove_payload()
            yield bytes(settle(cut / inner[:size]))
        start = len(bytes(error)) - len(inner)
        yield from (_set(bytes(error), start, value) for value in range(256))


def with_odd_extensions(corpus: list[Packet]) -> Iterator[bytes]:
    """IPv6 extension headers whose lengths lead out of the packet, or nowhere."""
    for whole in map(bytes, corpus):
        if whole[12:14] == b"\x86\xdd" and whole[20] in (0, 43, 44, 60):
            yield from (_set(whole, 55, value) for value in range(256))
            yield from (_set(whole, 54, value) for value in (0, 6, 17, 43, 44, 50, 51, 58, 59, 60, 132, 135, 255))


def flipped(corpus: list[Packet]) -> Iterator[bytes]:
    """With some bytes changed, at random."""
    chance = random.Random(SEED)
    for _ in range(ROUNDS):
        raw = bytearray(bytes(chance.choice(corpus)))
        for _ in range(chance.choice((1, 1, 2, 3, 8))):
            raw[chance.randrange(12, len(raw))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        yield bytes(raw)


def random_bytes(_: list[Packet]) -> Iterator[bytes]:
    """Nothing but noise, after an Ethernet type that promises more."""
    chance = random.Random(SEED + 1)
    for _ in range(ROUNDS):
        kind = chance.choice((b"\x08\x00\x45", b"\x86\xdd\x60", b"\x08\x00", b"\x86\xdd", b""))
        noise = chance.randbytes(12) + kind + chance.randbytes(chance.randrange(3, 200))
        if len(noise) >= smallest(noise):
            yield noise


MUTATORS = (truncated, misled, cut_inside, with_odd_extensions, flipped, random_bytes)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("hook", list(HOOKS))
@pytest.mark.parametrize("mutate", MUTATORS, ids=lambda mutate: mutate.__name__)
def test_no_packet_becomes_something_else(path, mutate, hook, record_property):
    record_property("seed", SEED)
    print(f"EBPROXY_FUZZ_SEED={SEED}")
    _services(path)
    corpus = _corpus(path)
    name, device = HOOKS[hook]
    faults, held, count = [], set(), 0

    with path.inside():
        for count, raw in enumerate(mutate(corpus), start=1):  # noqa: B007
            ran = path.loopback(raw) if name == "loopback" else getattr(path, name)(device, raw)
            fault = judge(raw, ran, held)
            if fault:
                faults.append(f"{fault}\n  in  {raw.hex()}\n  out {ran.packet.hex()} verdict {ran.verdict}")
            if ran.verdict == TC_ACT_SHOT:
                held.add(raw)  # a fragment, perhaps, that is sent on when its first one comes

    assert count > 100
    assert not faults, _summary(faults)


def _summary(faults: Iterable[str]) -> str:
    listed = list(faults)
    return f"{len(listed)} faults\n" + "\n".join(listed[:5])
