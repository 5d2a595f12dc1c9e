"""Packets whose source is what one likes, sent as they are."""

from __future__ import annotations

import socket
import struct

from tests.lab import netns

_CLIENT_PORT = 40_000


def datagram(source: str, target: str, port: int, payload: bytes = b"?\n") -> bytes:
    """Write an IP packet of a UDP datagram."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    ends = socket.inet_pton(family, source) + socket.inet_pton(family, target)
    size = 8 + len(payload)
    plain = struct.pack("!HHHH", _CLIENT_PORT, port, size, 0) + payload
    if family == socket.AF_INET:
        return struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 1, 0, 64, socket.IPPROTO_UDP, 0) + ends + plain
    pseudo = ends + struct.pack("!IxxxB", size, socket.IPPROTO_UDP) + plain + bytes(size % 2)
    total = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF or 0xFFFF
    header = struct.pack("!IHBB", 6 << 28, size, socket.IPPROTO_UDP, 64)
    return header + ends + plain[:6] + struct.pack("!H", checksum) + plain[8:]


def send(place: str, packet: bytes, target: str) -> None:
    """Send a packet as it is from a network namespace."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with netns.entered(place):
        raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw:
        raw.sendto(packet, (target, 0))


def listener(place: str, address: str, port: int) -> socket.socket:
    """Open a socket that datagrams come to."""
    with netns.entered(place):
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(5)
    sock.bind((address, port))
    return sock
