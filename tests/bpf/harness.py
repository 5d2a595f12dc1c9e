"""BPF_PROG_TEST_RUN of tc programs: a packet in, a verdict and a packet out.

The kernel runs the program as if the packet were on a device of the network namespace of the calling thread, so
routes, neighbours and addresses are those that are really there. Nothing is sent: of a redirect, only that it was asked
for can be seen.
Source: net/bpf/test_run.c, bpf_prog_test_run_skb().
"""

from __future__ import annotations

import ctypes
import enum
import struct
from typing import NamedTuple

from agent.kernel import bpf

TC_ACT_UNSPEC = -1
TC_ACT_SHOT = 2
TC_ACT_REDIRECT = 7

PROG_TYPE_SCHED_CLS = 3
_SMALLEST = {b"\x08\x00": 34, b"\x86\xdd": 54}  # the kernel makes no IP packet without its header
_MAX_OUT = 66_000
# prog_fd, retval, data_size_in, data_size_out, data_in, data_out, repeat, duration, ctx_size_in, ctx_size_out, ctx_in,
# ctx_out, flags, cpu, batch_size
_ATTR = "=4I2Q4I2Q3I"
_SK_BUFF_SIZE = 192
# Where the fields of struct __sk_buff stand that a caller may set; all others must be zero.
_MARK, _PRIORITY, _INGRESS_IFINDEX, _IFINDEX, _GSO_SEGS, _GSO_SIZE = 8, 32, 36, 40, 164, 176


class _Command(enum.IntEnum):
    PROG_TEST_RUN = 10


class Context(NamedTuple):
    """What a program sees of its packet in ``struct __sk_buff``; ``ifindex`` 0 = lo of this namespace."""

    ifindex: int = 0
    ingress_ifindex: int = 0
    mark: int = 0
    priority: int = 0
    gso_size: int = 0
    gso_segs: int = 0

    def pack(self) -> bytes:
        """Lay out as ``struct __sk_buff``."""
        raw = bytearray(_SK_BUFF_SIZE)
        offsets = (_IFINDEX, _INGRESS_IFINDEX, _MARK, _PRIORITY, _GSO_SIZE, _GSO_SEGS)  # in the order of our fields
        for offset, value in zip(offsets, self, strict=True):
            struct.pack_into("=I", raw, offset, value)
        return bytes(raw)


_HERE = Context()


class Ran(NamedTuple):
    """What became of a packet; ``duration_ns`` is the mean of all runs."""

    verdict: int
    packet: bytes
    duration_ns: int
    mark: int


def smallest(packet: bytes) -> int:
    """Say how many bytes the kernel wants of a frame like this one."""
    return _SMALLEST.get(packet[12:14], 15)


def run_program(prog_fd: int, packet: bytes, context: Context = _HERE, repeat: int = 1) -> Ran:
    """Run a tc program on a packet. Raises: OSError.

    With ``repeat``, all runs but the first get the packet as the run before left it.
    """
    data_in = ctypes.create_string_buffer(packet, len(packet))
    data_out = ctypes.create_string_buffer(_MAX_OUT)
    ctx_in = ctypes.create_string_buffer(context.pack(), _SK_BUFF_SIZE)
    ctx_out = ctypes.create_string_buffer(_SK_BUFF_SIZE)
    attr = bpf._attr(
        _ATTR,
        *(prog_fd, 0, len(packet), _MAX_OUT, ctypes.addressof(data_in), ctypes.addressof(data_out)),
        *(repeat, 0, _SK_BUFF_SIZE, _SK_BUFF_SIZE, ctypes.addressof(ctx_in), ctypes.addressof(ctx_out)),
        *(0, 0, 0),
    )
    bpf.bpf(_Command.PROG_TEST_RUN, attr)  # type: ignore[arg-type]
    _, verdict, _, size, _, _, _, duration, *_ = struct.unpack_from(_ATTR, attr.raw)
    (mark,) = struct.unpack_from("=I", ctx_out, _MARK)
    signed = verdict - (1 << 32) if verdict >> 31 else verdict
    return Ran(signed, data_out.raw[:size], duration, mark)
