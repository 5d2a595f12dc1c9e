"""Which device leads to a pod, and what has the kernel find out: by ARP and neighbour discovery, in its own name.

Source: rtnetlink(7), include/uapi/linux/neighbour.h.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Container
from typing import NamedTuple

from agent.core.addresses import IPV4_PREFIX
from agent.kernel.netlink import ROUTE, Kind, Netlink, number, pack_attribute, unpack_attributes

_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_DST, _LLADDR, _MASTER = 1, 2, 9  # NDA_*
_UNICAST = 1
_MATCHED_ENTRY = 0x2000  # RTM_F_FIB_MATCH: the route itself, not what it says of one address
_CREATE = 0x400  # NLM_F_CREATE
_USE = 1  # NTF_USE
_FAILED, _NOARP, _PERMANENT = 0x20, 0x40, 0x80  # NUD_*


class _Way(NamedTuple):
    """Where the route to an address leads: ``is_own`` where it is to that address alone."""

    family: int
    address: bytes
    device: int
    is_own: bool


class _Neighbour(NamedTuple):
    device: int
    state: int
    hardware: bytes


def ask_device(netlink: Netlink, address: bytes, bridges: Container[int]) -> tuple[int, bool] | None:
    """Find which device leads to one address and nowhere else, and whether that was configured rather than learned.

    A route to the address alone says so; behind a bridge, what answered for the address there. None = nothing does.
    """
    try:
        way = _ask_way(netlink, address)
        if way.device in bridges:
            return _ask_port(netlink, way.device, _ask_neighbour(netlink, way).hardware), False
    except OSError:  # there is no such route, neighbour or port
        return None
    return (way.device, True) if way.is_own else None


def solicit(netlink: Netlink, address: bytes, bridges: Container[int]) -> None:
    """Have the kernel ask who has an address, if it is one behind a bridge; nobody is waited for.

    Where the kernel is asking already, or knows at which port the answer was, this changes nothing.
    """
    with contextlib.suppress(OSError):  # there is no such route, or the bridge is down or gone
        way = _ask_way(netlink, address)
        if way.device in bridges and not _is_set(netlink, way):
            _tell(netlink, way, flags=_USE)


def _is_set(netlink: Netlink, way: _Way) -> bool:
    """Tell whether somebody has set a neighbour (NTF_USE would unset it), and forget one that has no port.

    Of the latter the kernel would ask that link address alone, which may be that of a pod before this one.
    """
    try:
        found = _ask_neighbour(netlink, way)
    except OSError:  # it is not known
        return False
    if found.state & (_PERMANENT | _NOARP):
        return True
    try:
        _ask_port(netlink, way.device, found.hardware)
    except OSError:
        _tell(netlink, way, state=_FAILED)
    return False


def _ask_way(netlink: Netlink, address: bytes) -> _Way:
    """Find where an address is reached without a gateway. Raises: OSError; ENOENT = nowhere."""
    narrow = address[12:] if address.startswith(IPV4_PREFIX) else address
    family = socket.AF_INET if len(narrow) == 4 else socket.AF_INET6
    bits = len(narrow) * 8
    request = ROUTE.pack(family, bits, 0, 0, 0, 0, 0, 0, _MATCHED_ENTRY) + pack_attribute(1, narrow)
    route = netlink.ask(Kind.GET_ROUTE, request).body
    found = unpack_attributes(route[ROUTE.size :])
    device = number(found.get(4, b""))  # RTA_OIF
    if route[7] != _UNICAST or 5 in found or not device:  # RTA_GATEWAY
        raise _absent()
    return _Way(family, narrow, device, route[1] == bits)


def _ask_neighbour(netlink: Netlink, way: _Way) -> _Neighbour:
    """Find what is known of a neighbour. Raises: OSError; ENOENT = no link address."""
    request = _NEIGHBOUR.pack(way.family, way.device, 0, 0, 0) + pack_attribute(_DST, way.address)
    return _ask_entry(netlink, request)


def _ask_port(netlink: Netlink, bridge: int, hardware: bytes) -> int:
    """Find the port of a bridge that a link address was last heard at. Raises: OSError; ENOENT = it was not."""
    request = _NEIGHBOUR.pack(socket.AF_BRIDGE, 0, 0, 0, 0) + pack_attribute(_LLADDR, hardware)
    found = _ask_entry(netlink, request + pack_attribute(_MASTER, struct.pack("=I", bridge)))
    if found.state & _PERMANENT:  # the port's own address, which no pod has
        raise _absent()
    return found.device


def _ask_entry(netlink: Netlink, request: bytes) -> _Neighbour:
    entry = netlink.ask(Kind.GET_NEIGHBOUR, request).body
    _, device, state, _, _ = _NEIGHBOUR.unpack_from(entry)
    hardware = unpack_attributes(entry[_NEIGHBOUR.size :]).get(_LLADDR)
    if hardware is None:
        raise _absent()
    return _Neighbour(device, state, hardware)


def _tell(netlink: Netlink, way: _Way, *, state: int = 0, flags: int = 0) -> None:
    request = _NEIGHBOUR.pack(way.family, way.device, state, flags, 0) + pack_attribute(_DST, way.address)
    netlink.do(Kind.NEW_NEIGHBOUR, request, _CREATE if flags & _USE else 0)


def _absent() -> OSError:
    return OSError(errno.ENOENT, os.strerror(errno.ENOENT))
