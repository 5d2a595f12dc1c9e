"""SCTP packets for raw sockets: just enough of RFC 9260 for a question and its answer.

Raw, because a kernel need not have SCTP to forward it. An association of the lab: INIT and INIT ACK, DATA and DATA,
SHUTDOWN and SHUTDOWN ACK; no retransmission, no cookies.
"""

from __future__ import annotations

import enum
import socket
import struct
from typing import NamedTuple

PROTOCOL = 132
MAX_SIZE = 65_535
_HEADER = struct.Struct("!HHI4s")
_CHUNK = struct.Struct("!BBH")
_POLYNOMIAL = 0x82F63B78  # CRC32c, reflected
_TAG = 0x5C79


class Chunk(enum.IntEnum):
    """The types of chunks that are used."""

    DATA = 0
    INIT = 1
    INIT_ACK = 2
    SHUTDOWN = 7
    SHUTDOWN_ACK = 8


class Segment(NamedTuple):
    """An SCTP packet of one chunk."""

    source_port: int
    destination_port: int
    chunk: Chunk
    body: bytes = b""

    def pack(self) -> bytes:
        """Write it with its checksum."""
        chunk = _CHUNK.pack(self.chunk, 3, _CHUNK.size + len(self.body)) + self.body + bytes(-len(self.body) % 4)
        tag = 0 if self.chunk is Chunk.INIT else _TAG
        ports = (self.source_port, self.destination_port, tag)
        checksum = crc32c(_HEADER.pack(*ports, bytes(4)) + chunk).to_bytes(4, "little")
        return _HEADER.pack(*ports, checksum) + chunk

    def answer(self, chunk: Chunk, body: bytes = b"") -> Segment:
        """Build what goes back."""
        return Segment(self.destination_port, self.source_port, chunk, body)


def read(packet: bytes, family: int) -> Segment | None:
    """Read what a raw socket received: IPv4 with its header. None = not ours, or its checksum is wrong."""
    raw = packet[(packet[0] & 15) * 4 :] if family == 4 else packet
    if len(raw) < _HEADER.size + _CHUNK.size:
        return None
    source, destination, tag, checksum = _HEADER.unpack_from(raw)
    zeroed = _HEADER.pack(source, destination, tag, bytes(4)) + raw[_HEADER.size :]
    if crc32c(zeroed).to_bytes(4, "little") != checksum:
        return None
    kind, _, size = _CHUNK.unpack_from(raw, _HEADER.size)
    body = raw[_HEADER.size + _CHUNK.size : _HEADER.size + size]
    return Segment(source, destination, Chunk(kind), body) if kind in set(Chunk) else None


def raw_socket(family: int) -> socket.socket:
    """Open a raw socket for SCTP. Needs CAP_NET_RAW."""
    return socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_RAW, PROTOCOL)


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)  # noqa: PLW2901
        table.append(value)
    return table


_TABLE = _table()


def crc32c(message: bytes) -> int:
    """Compute SCTP's checksum (RFC 9260, appendix A)."""
    register = 0xFFFFFFFF
    for byte in message:
        register = register >> 8 ^ _TABLE[(register ^ byte) & 0xFF]
    return register ^ 0xFFFFFFFF
