"""Packets, built with Scapy and compared whole: what differs is named by its layer and field.

A flow's end is ``(address, port)``. Every packet has an Ethernet header, checksums that are right, and the same MAC
addresses unless told.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, NamedTuple

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, TCPerror, UDPerror
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPerror6,
    IPv6,
    IPv6ExtHdrFragment,
)
from scapy.layers.l2 import Ether
from scapy.layers.sctp import (
    SCTP,
    SCTPChunkAbort,
    SCTPChunkData,
    SCTPChunkInit,
    SCTPChunkInitAck,
    SCTPChunkShutdown,
)
from scapy.packet import NoPayload, Packet, Raw

CLIENT_MAC = "02:00:00:00:00:01"
NODE_MAC = "02:00:00:00:00:02"
PROTOCOLS = ("tcp", "udp", "sctp")
PAYLOAD = b"twenty-three bytes long"  # an odd number: sums over it are padded
# What TCP's flags amount to as an SCTP chunk.
_CHUNKS = {
    "S": SCTPChunkInit(init_tag=9),
    "SA": SCTPChunkInitAck(init_tag=8),
    "FA": SCTPChunkShutdown(),
    "R": SCTPChunkAbort(),
    "RA": SCTPChunkAbort(),
}
_TRANSPORTS = {"tcp": (TCP, TCPerror), "udp": (UDP, UDPerror), "sctp": (SCTP, SCTP)}


class End(NamedTuple):
    """One end of a flow."""

    address: str
    port: int

    @property
    def is_ipv6(self) -> bool:
        """Which family it is of."""
        return ":" in self.address

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.is_ipv6 else f"{self.address}:{self.port}"


def network(source: str, destination: str, **fields: Any) -> Packet:
    """Build an Ethernet and an IP header of the family of the addresses; ``ttl`` is the hop limit of IPv6, too."""
    ether = Ether(src=CLIENT_MAC, dst=NODE_MAC)
    if ":" in destination:
        fields = {"hlim" if key == "ttl" else key: value for key, value in fields.items()}
        return ether / IPv6(src=source, dst=destination, **fields)
    return ether / IP(src=source, dst=destination, **({"id": 4711} | fields))


def packet(
    protocol: str,
    source: End,
    destination: End,
    *,
    flags: str = "S",
    payload: bytes = PAYLOAD,
    may_be_cut: bool = True,
    **ip: Any,
) -> Packet:
    """Build a packet of a flow; ``flags`` are TCP's, and choose the chunk of SCTP's that comes closest."""
    if not (may_be_cut or source.is_ipv6):
        ip["flags"] = "DF"
    transport: dict[str, Packet] = {
        "tcp": TCP(sport=source.port, dport=destination.port, flags=flags, seq=1000, ack=2000, window=4096),
        "udp": UDP(sport=source.port, dport=destination.port),
        "sctp": SCTP(sport=source.port, dport=destination.port, tag=7) / _CHUNKS.get(flags, SCTPChunkData(tsn=5)),
    }
    layers = network(source.address, destination.address, **ip) / transport[protocol]
    return settle(layers / Raw(payload) if payload else layers)


def settle(built: Packet) -> Packet:
    """Give a packet its lengths and checksums: it is as it will be read from the wire."""
    return Ether(bytes(_without_sums(built)))


def moved(
    before: Packet, *, source: End | None = None, destination: End | None = None, ttl: int | None = None
) -> Packet:
    """Build what a packet becomes when its ends are translated: all the rest stays, the sums are right again."""
    after = before.copy()
    ip = _network_of(after)
    transport = _transport_of(after)
    if source:
        ip.src = source.address
        if transport is not None:
            transport.sport = source.port
    if destination:
        ip.dst = destination.address
        if transport is not None:
            transport.dport = destination.port
    if ttl is not None:
        setattr(ip, "hlim" if isinstance(ip, IPv6) else "ttl", ttl)
    return settle(after)


def reply_to(forward: Packet, *, flags: str = "SA", payload: bytes = b"an answer, of an odd size") -> Packet:
    """Build the answer to a packet as its receiver sends it."""
    ip, transport = _network_of(forward), _transport_of(forward)
    name = next(name for name, (kind, _) in _TRANSPORTS.items() if isinstance(transport, kind))
    return packet(name, End(ip.dst, transport.dport), End(ip.src, transport.sport), flags=flags, payload=payload)


def icmp_error(about: Packet, sender: str, kind: str = "too-big", *, mtu: int = 1400, quoted: int = 1200) -> Packet:
    """Build an ICMP error about a packet as a router or receiver sends it to its source.

    ``kind``: too-big, port-unreachable, or ttl-exceeded. At most ``quoted`` bytes of the packet are in it.
    """
    ip = _network_of(about)
    if isinstance(ip, IPv6):
        message6 = {
            "too-big": ICMPv6PacketTooBig(mtu=mtu),
            "port-unreachable": ICMPv6DestUnreach(code=4),
            "ttl-exceeded": ICMPv6TimeExceeded(),
        }
        return settle(network(sender, ip.src) / message6[kind] / bytes(ip)[:quoted])
    message4 = {
        "too-big": ICMP(type=3, code=4, nexthopmtu=mtu),
        "port-unreachable": ICMP(type=3, code=3),
        "ttl-exceeded": ICMP(type=11),
    }
    return settle(network(sender, ip.src) / message4[kind] / bytes(ip)[:quoted])


def echo_request(source: str, destination: str) -> Packet:
    """Build a ping."""
    message = ICMPv6EchoRequest(id=5, seq=1) if ":" in destination else ICMP(id=5, seq=1)
    return settle(network(source, destination) / message / Raw(PAYLOAD))


def fragments(whole: Packet, size: int, identification: int = 77) -> list[Packet]:
    """Cut a packet into fragments whose payload has at most ``size`` bytes, a multiple of eight."""
    ip = _network_of(whole)
    is_ipv6 = isinstance(ip, IPv6)
    body = bytes(ip.payload)
    pieces = []
    for offset in range(0, len(body), size):
        is_last = offset + size >= len(body)
        if is_ipv6:
            head = network(ip.src, ip.dst, nh=44, hlim=ip.hlim)
            middle = IPv6ExtHdrFragment(nh=ip.nh, offset=offset // 8, m=int(not is_last), id=identification)
            built = head / middle / Raw(body[offset : offset + size])
        else:
            flags = 0 if is_last else "MF"
            head = network(ip.src, ip.dst, ttl=ip.ttl, id=identification, frag=offset // 8, flags=flags, proto=ip.proto)
            built = head / Raw(body[offset : offset + size])
        pieces.append(Ether(bytes(built)))
    return pieces


def difference(actual: bytes, expected: Packet) -> str:
    """Name the first field in which a packet differs from what was expected; empty if it is the same to the byte."""
    wanted = bytes(expected)
    if actual == wanted:
        return ""
    pairs = zip_longest(_fields(Ether(actual)), _fields(Ether(wanted)), fillvalue=("nothing", ""))
    found = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
    if not found:
        return f"bytes: {actual.hex()} is not {wanted.hex()}"
    # A wrong sum mostly follows from another field.
    ours, theirs = min(found, key=lambda pair: pair[1][0].endswith("sum"))
    return f"{ours[0]} is {ours[1]}, not {theirs[0]} {theirs[1]}\n  in {_summary(actual)}\n not {_summary(wanted)}"


def _summary(raw: bytes) -> str:
    return str(Ether(raw).command())


def _fields(built: Packet) -> list[tuple[str, Any]]:
    found = []
    for layer in _layers(built):
        found += [(f"{layer.name}.{field.name}", layer.getfieldval(field.name)) for field in layer.fields_desc]
    return found


def _layers(built: Packet) -> list[Packet]:
    found = []
    while not isinstance(built, NoPayload):
        found.append(built)
        built = built.payload
    return found


def _without_sums(built: Packet) -> Packet:
    """Leave the sums and lengths of the packet itself to Scapy; those of one that an ICMP error quotes stand."""
    copy = built.copy()
    for layer in _layers(copy):
        if isinstance(layer, IPerror | IPerror6):
            break
        for field in ("chksum", "cksum", "len", "plen"):
            if field in layer.fields and not layer.name.startswith("SCTPChunk"):
                del layer.fields[field]
        layer.raw_packet_cache = None
    return copy


def _network_of(built: Packet) -> Packet:
    layer = built.getlayer(1)
    assert isinstance(layer, IP | IPv6), built
    return layer


def _transport_of(built: Packet) -> Packet | None:
    return next((layer for layer in _layers(built) if isinstance(layer, TCP | UDP | SCTP)), None)
