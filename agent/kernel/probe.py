"""Ask the kernel what it can do, by trying: never by its version.

Nothing here leaves anything behind: what is created is closed at once, and links are only asked for on descriptors
that do not exist, so that a kernel that knows the command answers EBADF and one that does not EINVAL.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from agent.kernel import bpf
from agent.kernel.bpf import AttachType, Command, MapType

_R0, _R1 = 0, 1
_MOV, _CALL, _EXIT = 0xB7, 0x85, 0x95
_TC_ACT_UNSPEC = -1
_NO_FD = 0xFFFFFFFF
_LICENSE = b"GPL\0"
# Source: include/uapi/linux/bpf.h, enum bpf_func_id.
_HELPERS = {"bpf_get_socket_cookie": 46, "bpf_get_netns_cookie": 122, "bpf_set_retval": 187}

_MAPS = {
    "hash": (MapType.HASH, 4, bpf.NO_PREALLOC),
    "lru_hash": (MapType.LRU_HASH, 4, 0),
    "array": (MapType.ARRAY, 4, 0),
    "percpu_array": (MapType.PERCPU_ARRAY, 4, 0),
    "lpm_trie": (MapType.LPM_TRIE, 8, bpf.NO_PREALLOC),
}
# What a helper is called with (None = its context), where it is used.
_CALLS: dict[str, tuple[AttachType, int | None]] = {
    "bpf_get_socket_cookie": (AttachType.SOCK_RELEASE, None),
    "bpf_get_netns_cookie": (AttachType.CONNECT4, None),
    "bpf_set_retval": (AttachType.CONNECT4, -errno.ECONNREFUSED),
}


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that was tried. ``error``: the errno it failed with; 0 = it works."""

    name: str
    error: int = 0

    @property
    def is_there(self) -> bool:
        """Whether the kernel did it."""
        return self.error == 0

    @property
    def is_denied(self) -> bool:
        """Whether it was refused to us, which says nothing about the kernel."""
        return self.error == errno.EPERM


def features() -> list[Feature]:
    """Try everything the dataplane needs: map types, every hook with its helpers, links and their replacement."""
    return [*_map_types(), *_programs(), *_links()]


def instruction(code: int, register: int = 0, immediate: int = 0) -> bytes:
    """Encode one BPF instruction without a source register or an offset."""
    return struct.pack("=BBhi", code, register, 0, immediate)


def passing(value: int = 1) -> bytes:
    """Write a program that returns ``value`` (1 = go on) and does nothing."""
    return instruction(_MOV, _R0, value) + instruction(_EXIT)


def calling(helper: int, argument: int | None = None) -> bytes:
    """Write a program that calls a helper with a number, or with its context, and goes on."""
    load = b"" if argument is None else instruction(_MOV, _R1, argument)
    return load + instruction(_CALL, 0, helper) + passing()


def prog_load(kind: int, attach_type: AttachType | int, instructions: bytes, name: str) -> int:
    """Load a program; returns its descriptor. Raises OSError."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    license_text = ctypes.create_string_buffer(_LICENSE)
    layout = "=IIQQIIQII16sII"
    count = len(instructions) // 8
    pointers = ctypes.addressof(code), ctypes.addressof(license_text)
    packed = struct.pack(layout, kind, count, *pointers, 0, 0, 0, 0, 0, name.encode()[:15], 0, attach_type)
    return bpf.bpf(Command.PROG_LOAD, ctypes.create_string_buffer(packed, len(packed)))


def load_passing(attach_type: AttachType, name: str = "ebproxy_probe") -> int:
    """Load a program for a hook that lets everything pass; returns its descriptor. Raises OSError."""
    return prog_load(bpf.prog_type(attach_type), attach_type, passing(), name)


def load_packet_passing(name: str = "ebproxy_probe") -> int:
    """Load a program for a device that lets everything pass; returns its descriptor. Raises OSError."""
    return prog_load(bpf.PROG_TYPE_SCHED_CLS, 0, passing(_TC_ACT_UNSPEC), name)


def _map_types() -> Iterator[Feature]:
    for name, (kind, key_size, flags) in _MAPS.items():
        yield _tried(f"map:{name}", partial(bpf.map_create, kind, key_size, 8, 1, flags, "ebproxy_probe"))


def _programs() -> Iterator[Feature]:
    for hook in AttachType:
        yield _tried(f"hook:{hook.name.lower()}", partial(load_passing, hook))
    yield _tried("program:tc", load_packet_passing)
    for helper, (hook, argument) in _CALLS.items():
        code = calling(_HELPERS[helper], argument)
        yield _tried(f"helper:{helper}", partial(prog_load, bpf.prog_type(hook), hook, code, "ebproxy_probe"))


def _links() -> Iterator[Feature]:
    try:
        program = load_passing(AttachType.CONNECT4)
    except OSError as error:
        yield from (Feature(name, error.errno or errno.EIO) for name in ("link:create", "link:update"))
        return
    try:
        yield _known("link:create", partial(bpf.link_create, program, _NO_FD, AttachType.CONNECT4))
        yield _known("link:update", partial(bpf.link_update, _NO_FD, program))
    finally:
        os.close(program)


def _tried(name: str, create: Callable[[], int]) -> Feature:
    try:
        os.close(create())
    except OSError as error:
        return Feature(name, error.errno or errno.EIO)
    return Feature(name)


def _known(name: str, ask: Callable[[], object]) -> Feature:
    """Ask with a descriptor that does not exist: EBADF is what a kernel answers that knows the command."""
    try:
        ask()
    except OSError as error:
        return Feature(name, 0 if error.errno == errno.EBADF else error.errno or errno.EIO)
    return Feature(name)
