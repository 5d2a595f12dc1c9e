"""What a device does for the kernel: switched on and off. Source: include/uapi/linux/ethtool.h."""

from __future__ import annotations

import ctypes
import enum
import fcntl
import socket
import struct

from tests.lab import netns

_SIOCETHTOOL = 0x8946


class Offload(enum.IntEnum):
    """Each by the command that switches it."""

    TX_CHECKSUM = 0x17
    """Checksums that are left open are completed, as if by hardware; without it the kernel does that."""
    TSO = 0x1F
    GRO = 0x2C


def switch(namespace: str, device: str, offload: Offload, *, is_on: bool) -> None:
    """Switch an offload of a device on or off. Raises: OSError."""
    value = ctypes.create_string_buffer(struct.pack("=II", offload, is_on), 8)
    request = struct.pack("=16sQ16x", device.encode(), ctypes.addressof(value))
    with netns.entered(namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        fcntl.ioctl(opened, _SIOCETHTOOL, request)
