"""rtnetlink: devices, addresses and routes of this network namespace, asked for and followed.

A socket of our own: pyroute2 would hold 12 MiB in the agent (docs/decisions/0009). Requests are few and fixed, so what
is packed here is exactly what is used.
Source: rtnetlink(7), include/uapi/linux/{netlink,rtnetlink,if_link,if_addr}.h.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Self

from agent.core.addresses import IPV4_PREFIX
from agent.core.network import Device, LocalAddress, Network

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
ROUTE = struct.Struct("=BBBBBBBBI")
"""``struct rtmsg``."""
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _ECHO, _ROOT_AND_MATCH = 0x1, 0x4, 0x8, 0x300
_INTERRUPTED = 0x10
_LIMIT_S = 10  # the kernel answers at once; nothing waits forever for an answer that does not come
_TYPE_MASK = 0x3FFF  # above it: nested, or in network byte order
_RECEIVE = 1 << 17
_EXT_MASK, _SKIP_STATISTICS = 29, 8
# Addresses that only default routes lead to: of documentation (RFC 5737, RFC 3849). Nothing is sent to them.
_ELSEWHERE = (socket.inet_pton(socket.AF_INET, "203.0.113.1"), socket.inet_pton(socket.AF_INET6, "2001:db8::1"))
_LOOPBACK = 1
# The settings of lo that let packets in which the node sends to itself. Source: include/uapi/linux/ip.h.
_SETTINGS = {"accept_local": 23, "route_localnet": 26}


class Kind(IntEnum):
    """The kinds of messages that are used."""

    NEW_LINK = 16
    DEL_LINK = 17
    GET_LINK = 18
    SET_LINK = 19
    NEW_ADDRESS = 20
    DEL_ADDRESS = 21
    GET_ADDRESS = 22
    NEW_ROUTE = 24
    DEL_ROUTE = 25
    GET_ROUTE = 26
    NEW_NEIGHBOUR = 28
    GET_NEIGHBOUR = 30
    NEW_QDISC = 36
    DEL_QDISC = 37
    GET_QDISC = 38
    NEW_FILTER = 44
    DEL_FILTER = 45
    GET_FILTER = 46


# RTNLGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE.
GROUPS = sum(1 << (group - 1) for group in (1, 5, 7, 9, 11))


class Message(NamedTuple):
    """A message: its kind, the kernel's flags, and what follows its header."""

    kind: int
    flags: int
    body: bytes


class DumpInterrupted(Exception):
    """What was listed changed meanwhile: ask again."""


class Netlink:
    """An open socket; a context manager. ``groups`` is a mask of what to be told of unasked."""

    def __init__(self, groups: int = 0) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self.socket.bind((0, groups))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _LIMIT_S, 0))
        self._serial = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def do(self, kind: Kind, body: bytes, flags: int = 0) -> None:
        """Have something done. Raises: OSError with the kernel's errno."""
        for _ in self._exchange(kind, body, flags | _ACK):
            pass

    def ask(self, kind: Kind, body: bytes) -> Message:
        """Ask for one thing. Raises: OSError with the kernel's errno; ENODATA = it has no answer."""
        for message in list(self._exchange(kind, body, _ACK | _ECHO)):
            return message
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))

    def dump(self, kind: Kind, body: bytes) -> list[Message]:
        """List everything of a kind. Raises: OSError, DumpInterrupted."""
        messages = list(self._exchange(kind, body, _ROOT_AND_MATCH))
        if any(message.flags & _INTERRUPTED for message in messages):
            raise DumpInterrupted
        return messages

    def _exchange(self, kind: Kind, body: bytes, flags: int) -> Iterator[Message]:
        self._serial += 1
        size = _HEADER.size + len(body)
        self.socket.send(_HEADER.pack(size, kind, _REQUEST | flags, self._serial, 0) + body)
        while True:
            for message, serial in _split(self.socket.recv(_RECEIVE)):
                if serial != self._serial:
                    continue
                if message.kind in (_ERROR, _DONE):
                    _raise_for(message)
                    return
                yield message

    def drain(self) -> list[Message]:
        """Take in what has been told and not been read, without waiting. Raises: OSError; ENOBUFS = some was lost."""
        messages = []
        with contextlib.suppress(BlockingIOError):
            while True:
                read = self.socket.recv(_RECEIVE, socket.MSG_DONTWAIT)
                messages += [message for message, _ in _split(read)]
        return messages


def _split(raw: bytes) -> Iterator[tuple[Message, int]]:
    offset = 0
    while offset < len(raw):
        size, kind, flags, serial, _ = _HEADER.unpack_from(raw, offset)
        yield Message(kind, flags, raw[offset + _HEADER.size : offset + size]), serial
        offset += size + 3 & ~3


def _raise_for(message: Message) -> None:
    code = -int.from_bytes(message.body[:4], sys.byteorder, signed=True)
    if code > 0:
        raise OSError(code, os.strerror(code))


def pack_attribute(kind: int, value: bytes) -> bytes:
    """Lay out an attribute, padded; nest by packing attributes into the value of another."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def unpack_attributes(raw: bytes) -> dict[int, bytes]:
    """Read attributes by their kinds."""
    found = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(raw):
        size, kind = _ATTRIBUTE.unpack_from(raw, offset)
        if size < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = raw[offset + _ATTRIBUTE.size : offset + size]
        offset += size + 3 & ~3
    return found


def text(raw: bytes) -> str:
    """Read a string."""
    return raw.rstrip(b"\0").decode("utf-8", "replace")


def number(raw: bytes) -> int:
    """Read a u32 in the host's byte order; absent = 0."""
    return int(struct.unpack("=I", raw)[0]) if raw else 0


def concerns_network(message: Message) -> bool:
    """Whether a message may say that ``read_network`` would now answer otherwise. Of routes, only the default ones."""
    if message.kind in (Kind.NEW_ROUTE, Kind.DEL_ROUTE):
        return message.body[1] == 0  # the destination's prefix bits
    return True


def read_network(netlink: Netlink) -> Network:
    """Read devices, addresses and where the default routes leave. Raises: OSError."""
    while True:
        with contextlib.suppress(DumpInterrupted):
            mask = pack_attribute(_EXT_MASK, struct.pack("=I", _SKIP_STATISTICS))
            links = netlink.dump(Kind.GET_LINK, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + mask)
            addresses = netlink.dump(Kind.GET_ADDRESS, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
            ways = tuple(_default_ways(netlink))
            return Network(
                tuple(_device(message.body) for message in links if message.kind == Kind.NEW_LINK),
                tuple(_local_address(message.body) for message in addresses if message.kind == Kind.NEW_ADDRESS),
                frozenset(source for source, _ in ways),
                frozenset(device for _, device in ways),
            )


def _device(body: bytes) -> Device:
    _, hardware, index, _, _ = _LINK.unpack_from(body)
    found = unpack_attributes(body[_LINK.size :])
    described = unpack_attributes(found.get(18, b""))  # IFLA_LINKINFO: IFLA_INFO_KIND, IFLA_INFO_SLAVE_KIND
    return Device(
        index,
        text(found.get(3, b"")),
        text(described.get(1, b"")),
        hardware,
        number(found.get(10, b"")),
        text(described.get(4, b"")),
    )


def _local_address(body: bytes) -> LocalAddress:
    family, bits, flags, scope, index = _ADDRESS.unpack_from(body)
    found = unpack_attributes(body[_ADDRESS.size :])
    # IFA_LOCAL is ours where IFA_ADDRESS is the other end of a point-to-point link.
    address = _widen(found.get(2) or found.get(1, b""))
    wide_flags = number(found.get(8, b"")) or flags
    return LocalAddress(address, index, bits + (96 if family == socket.AF_INET else 0), scope, wide_flags)


def _default_ways(netlink: Netlink) -> Iterator[tuple[bytes, int]]:
    """Say from which address and by which device packets leave that go far."""
    for target in _ELSEWHERE:
        family = socket.AF_INET if len(target) == 4 else socket.AF_INET6
        request = ROUTE.pack(family, len(target) * 8, 0, 0, 0, 0, 0, 0, 0) + pack_attribute(1, target)
        with contextlib.suppress(OSError):  # there is no such route
            found = unpack_attributes(netlink.ask(Kind.GET_ROUTE, request).body[ROUTE.size :])
            if source := found.get(7):  # RTA_PREFSRC; RTA_OIF
                yield _widen(source), number(found.get(4, b""))


def _widen(address: bytes) -> bytes:
    return IPV4_PREFIX + address if len(address) == 4 else address


def open_loopback() -> tuple[str, ...]:
    """Let lo take in packets from and to addresses of the node itself; says which settings that changed.

    Through netlink: the files are read-only in a container. IPv6 has no such settings: it takes them in.
    Raises: OSError.
    """
    closed = tuple(name for name in _SETTINGS if _setting(name) == 0)
    _set_loopback(closed, 1)
    return closed


def close_loopback(names: tuple[str, ...]) -> None:
    """Undo what ``open_loopback`` changed. Raises: OSError."""
    _set_loopback(tuple(name for name in names if name in _SETTINGS), 0)


def _set_loopback(names: tuple[str, ...], value: int) -> None:
    if not names:
        return
    settings = b"".join(pack_attribute(_SETTINGS[name], struct.pack("=I", value)) for name in names)
    ipv4 = pack_attribute(socket.AF_INET, pack_attribute(1, settings))  # IFLA_INET_CONF
    with Netlink() as netlink:
        netlink.do(Kind.SET_LINK, _LINK.pack(socket.AF_UNSPEC, 0, _LOOPBACK, 0, 0) + pack_attribute(26, ipv4))


def _setting(name: str) -> int:
    return int(Path("/proc/sys/net/ipv4/conf/lo", name).read_text(encoding="ascii"))
