"""bpf(2): maps, pins, links and what the kernel knows about them.

Every call raises OSError with the kernel's errno; nothing here retries or decides. Keys and values are bytes in the
layout of ``core/abi.py``; batches are those bytes end to end.
Source: include/uapi/linux/bpf.h, bpf(2).
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import platform
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_SYSCALL_NUMBER = {"x86_64": 321, "aarch64": 280}
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_NR_BPF = _SYSCALL_NUMBER.get(platform.machine(), 321)


class Command(enum.IntEnum):
    """The commands of bpf(2) that are used."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_TEST_RUN = 10
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    MAP_LOOKUP_BATCH = 24
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_DETACH = 34


class MapType(enum.IntEnum):
    """The kinds of map that are used."""

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LPM_TRIE = 11
    RINGBUF = 27


class AttachType(enum.IntEnum):
    """The hooks of a cgroup. They carry the names of the programs in ``bpf/sock.c``."""

    CONNECT4 = 10
    CONNECT6 = 11
    POST_BIND4 = 12
    POST_BIND6 = 13
    SENDMSG4 = 14
    SENDMSG6 = 15
    RECVMSG4 = 19
    RECVMSG6 = 20
    GETPEERNAME4 = 29
    GETPEERNAME6 = 30
    SOCK_RELEASE = 34


class Direction(enum.IntEnum):
    """The two hooks of a device, by their attach types as links (tcx)."""

    INGRESS = 46
    EGRESS = 47


PROG_TYPE_SCHED_CLS = 3
PROG_TYPE_CGROUP_SOCK = 9
PROG_TYPE_CGROUP_SOCK_ADDR = 18
NO_PREALLOC = 1
_NAME_SIZE = 16
_INFO_SIZE = 256
_TEST_PACKET_SIZE = 64


@dataclass(frozen=True, slots=True)
class MapInfo:
    """What the kernel says of a map; sizes in bytes."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


@dataclass(frozen=True, slots=True)
class ProgInfo:
    """What the kernel says of a program."""

    type: int
    id: int
    name: str
    map_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """What the kernel says of a cgroup link. ``cgroup_id`` is the inode of the cgroup's directory; 0 = it is gone."""

    id: int
    prog_id: int
    cgroup_id: int
    attach_type: int


@dataclass(frozen=True, slots=True)
class TcxInfo:
    """What the kernel says of a device's link. ``ifindex`` is 0 once the device is gone, or the link was detached."""

    id: int
    prog_id: int
    ifindex: int
    direction: int


def prog_type(hook: AttachType | Direction) -> int:
    """Give the type of the programs that a hook takes."""
    if isinstance(hook, Direction):
        return PROG_TYPE_SCHED_CLS
    is_sock = hook in (AttachType.SOCK_RELEASE, AttachType.POST_BIND4, AttachType.POST_BIND6)
    return PROG_TYPE_CGROUP_SOCK if is_sock else PROG_TYPE_CGROUP_SOCK_ADDR


def bpf(command: Command, attr: ctypes.Array[ctypes.c_char]) -> int:
    """Make the system call and return its result. Raises: OSError."""
    result: int = _syscall(_NR_BPF, int(command), attr, len(attr))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf {command.name}: {os.strerror(code)}")
    return result


def _attr(layout: str, *fields: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack(layout, *fields), struct.calcsize(layout))


def _pointer(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("ascii", "replace")


def map_create(kind: MapType, key_size: int, value_size: int, max_entries: int, flags: int, name: str) -> int:
    """Create a map and return its descriptor; ``name`` is cut to 15 characters."""
    layout = "=5I2I16s"
    cut = name.encode()[: _NAME_SIZE - 1]
    attr = ctypes.create_string_buffer(
        struct.pack(layout, kind, key_size, value_size, max_entries, flags, 0, 0, cut), struct.calcsize(layout)
    )
    return bpf(Command.MAP_CREATE, attr)


def obj_pin(fd: int, path: Path) -> None:
    """Pin a map, program or link in bpffs."""
    name = ctypes.create_string_buffer(bytes(path))
    bpf(Command.OBJ_PIN, _attr("=QII", _pointer(name), fd, 0))


def obj_get(path: Path) -> int:
    """Open what is pinned at ``path``."""
    name = ctypes.create_string_buffer(bytes(path))
    return bpf(Command.OBJ_GET, _attr("=QII", _pointer(name), 0, 0))


def _info(fd: int, seed: bytes = b"") -> bytes:
    buffer = ctypes.create_string_buffer(seed, _INFO_SIZE)
    bpf(Command.OBJ_GET_INFO_BY_FD, _attr("=IIQ", fd, _INFO_SIZE, _pointer(buffer)))
    return buffer.raw


def map_info(fd: int) -> MapInfo:
    """Ask what map this is."""
    kind, ident, key_size, value_size, max_entries, flags, name = struct.unpack_from("=6I16s", _info(fd))
    return MapInfo(kind, ident, key_size, value_size, max_entries, flags, _text(name))


def prog_info(fd: int) -> ProgInfo:
    """Ask what program this is, and which maps it uses (at most 64)."""
    ids = ctypes.create_string_buffer(64 * 4)
    # struct bpf_prog_info: nr_map_ids is at 52, map_ids at 56, name at 64.
    raw = _info(fd, bytes(52) + struct.pack("=IQ", 64, _pointer(ids)))
    kind, ident = struct.unpack_from("=II", raw)
    (count,) = struct.unpack_from("=I", raw, 52)
    return ProgInfo(kind, ident, _text(raw[64:80]), struct.unpack_from(f"={count}I", ids.raw))


def link_info(fd: int) -> LinkInfo:
    """Ask what a cgroup link joins."""
    _, ident, prog_id, _, cgroup_id, attach_type = struct.unpack_from("=3IIQI", _info(fd))
    return LinkInfo(ident, prog_id, cgroup_id, attach_type)


def tcx_info(fd: int) -> TcxInfo:
    """Ask what a device's link joins."""
    _, ident, prog_id, _, ifindex, direction = struct.unpack_from("=6I", _info(fd))
    return TcxInfo(ident, prog_id, ifindex, direction)


def prog_fd_by_id(ident: int) -> int:
    """Open a program by id."""
    return bpf(Command.PROG_GET_FD_BY_ID, _attr("=III", ident, 0, 0))


def run_repeatedly(prog_fd: int, repeat: int) -> int:
    """Run a program of the packet path up to ``repeat`` times, on a packet of zeros; returns what the last run did.

    Raises: OSError; EINTR where a signal came in between runs.
    """
    packet = ctypes.create_string_buffer(_TEST_PACKET_SIZE)
    layout = "=4I2Q4I2Q"
    attr = _attr(layout, prog_fd, 0, _TEST_PACKET_SIZE, 0, _pointer(packet), 0, repeat, 0, 0, 0, 0, 0)
    bpf(Command.PROG_TEST_RUN, attr)
    returned: int = struct.unpack_from("=I", attr.raw, 4)[0]
    return returned


def link_create(prog_fd: int, target: int, attach_type: AttachType | Direction) -> int:
    """Attach a program behind those that are there; returns the link.

    ``target`` is a cgroup's descriptor, or a device's ifindex.
    """
    return bpf(Command.LINK_CREATE, _attr("=4I", prog_fd, target, attach_type, 0))


def link_update(link_fd: int, prog_fd: int) -> None:
    """Put another program in a link's place, atomically: no call finds the hook empty."""
    bpf(Command.LINK_UPDATE, _attr("=4I", link_fd, prog_fd, 0, 0))


def link_detach(link_fd: int) -> None:
    """Detach a link's program at once, whoever else holds the link."""
    bpf(Command.LINK_DETACH, _attr("=I", link_fd))


def prog_query(target: int, attach_type: AttachType | Direction) -> tuple[int, ...]:
    """List the ids of the programs attached to this very cgroup (a descriptor) or device (an ifindex); at most 64.

    The kernel answers in all of the structure, however much of it was given: nothing of it may be left out.
    """
    ids = ctypes.create_string_buffer(64 * 4)
    attr = _attr("=4IQII4Q", target, attach_type, 0, 0, _pointer(ids), 64, 0, 0, 0, 0, 0)
    bpf(Command.PROG_QUERY, attr)
    (count,) = struct.unpack_from("=I", attr.raw, 24)
    return struct.unpack_from(f"={count}I", ids.raw)


class Map:
    """An open map. Values of per-CPU maps are one value per possible CPU, each padded to 8 bytes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.info = map_info(fd)
        stride = self.info.value_size
        if self.info.type == MapType.PERCPU_ARRAY:
            stride = (stride + 7) // 8 * 8 * possible_cpus()
        self.value_stride = stride

    def close(self) -> None:
        """Close the descriptor; a pin keeps the map."""
        os.close(self.fd)

    def lookup(self, key: bytes) -> bytes | None:
        """Read one value; None = no such key."""
        value = ctypes.create_string_buffer(self.value_stride)
        try:
            self._element(Command.MAP_LOOKUP_ELEM, key, value)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return value.raw

    def update(self, key: bytes, value: bytes) -> None:
        """Write one value, new or not."""
        self._element(Command.MAP_UPDATE_ELEM, key, ctypes.create_string_buffer(value, len(value)))

    def delete(self, key: bytes) -> bool:
        """Delete one key; returns whether it was there."""
        try:
            self._element(Command.MAP_DELETE_ELEM, key)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def _element(self, command: Command, key: bytes, value: ctypes.Array[ctypes.c_char] | None = None) -> None:
        key_buffer = ctypes.create_string_buffer(key, len(key))
        pointer = _pointer(value) if value is not None else 0
        bpf(command, _attr("=IIQQQ", self.fd, 0, _pointer(key_buffer), pointer, 0))

    def update_batch(self, keys: bytes, values: bytes, count: int) -> None:
        """Write ``count`` values in order. Not atomic: a failure leaves those before it written."""
        self._batch(Command.MAP_UPDATE_BATCH, keys, values, count)

    def delete_batch(self, keys: bytes, count: int) -> None:
        """Delete ``count`` keys in order. Not atomic; ENOENT stops it."""
        self._batch(Command.MAP_DELETE_BATCH, keys, b"", count)

    def delete_present(self, keys: Sequence[bytes]) -> int:
        """Delete those of these keys that are there, in order; returns how many were."""
        deleted = 0
        while keys:
            done = self._batch(Command.MAP_DELETE_BATCH, b"".join(keys), b"", len(keys), until=errno.ENOENT)
            deleted += done
            keys = keys[done + 1 :]  # the first that is missing ends a batch
        return deleted

    def _batch(self, command: Command, keys: bytes, values: bytes, count: int, until: int = 0) -> int:
        """Run a batch and return how many elements were done, all of them or as far as the error ``until``."""
        if not count:
            return 0
        key_buffer = ctypes.create_string_buffer(keys, len(keys))
        value_buffer = ctypes.create_string_buffer(values, max(len(values), 1))
        attr = _attr("=QQQQIIQQ", 0, 0, _pointer(key_buffer), _pointer(value_buffer), count, self.fd, 0, 0)
        try:
            bpf(command, attr)
        except OSError as error:
            if error.errno != until:
                raise
        done: int = struct.unpack_from("=I", attr.raw, 32)[0]
        return done

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Read every entry, in batches; entries that come or go meanwhile may be missed."""
        key_size, stride = self.info.key_size, self.value_stride
        for keys, values, count in self.batches():
            for i in range(count):
                yield keys[i * key_size : (i + 1) * key_size], values[i * stride : (i + 1) * stride]

    def batches(self, size: int = 4096) -> Iterator[tuple[bytes, bytes, int]]:
        """Read every entry, ``size`` at a time, as (keys, values, count); what is past ``count`` means nothing."""
        size = max(min(size, self.info.max_entries), 64)
        cursor_in = ctypes.create_string_buffer(max(self.info.key_size, 8))
        cursor_out = ctypes.create_string_buffer(max(self.info.key_size, 8))
        started = False
        while True:
            keys = ctypes.create_string_buffer(size * self.info.key_size)
            values = ctypes.create_string_buffer(size * self.value_stride)
            attr = _attr(
                "=QQQQIIQQ",
                _pointer(cursor_in) if started else 0,
                _pointer(cursor_out),
                _pointer(keys),
                _pointer(values),
                size,
                self.fd,
                0,
                0,
            )
            done = False
            try:
                bpf(Command.MAP_LOOKUP_BATCH, attr)
            except OSError as error:
                if error.errno == errno.ENOSPC:  # one bucket holds more than a batch
                    size *= 2
                    continue
                if error.errno != errno.ENOENT:
                    raise
                done = True
            (count,) = struct.unpack_from("=I", attr.raw, 32)
            yield keys.raw, values.raw, count
            if done:
                return
            cursor_in, cursor_out = cursor_out, cursor_in
            started = True


def possible_cpus() -> int:
    """Count the possible CPUs, which per-CPU values are sized by."""
    text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip()
    return int(text.rsplit("-", 1)[-1].rsplit(",", 1)[-1]) + 1
