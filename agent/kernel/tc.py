"""The packet path's programs on devices: attached, replaced atomically, found again, detached.

Two ways to attach, which look alike from outside:

    tcx     links, pinned at <bpffs>/ebproxy/links/tcx/<ifindex>_<direction>; a program there runs beside others'
    clsact  a filter of our handle in the qdisc ``clsact``, for kernels before 6.6

A device that goes takes its programs along. Whoever moves a device to another network namespace would take ours with
it if they hung on tcx: their pins go when the device leaves this one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from agent.kernel import bpf
from agent.kernel.attach import closing
from agent.kernel.bpf import Direction
from agent.kernel.netlink import (
    DumpInterrupted,
    Kind,
    Message,
    Netlink,
    number,
    pack_attribute,
    text,
    unpack_attributes,
)

DIRECTORY = "tcx"
_TC = struct.Struct("=BxxxiIII")
_KIND, _OPTIONS = 1, 2
_FD, _NAME, _FLAGS, _ID = 6, 7, 8, 11
_DIRECT_ACTION = 1
_CREATE, _REPLACE, _EXCLUSIVE = 0x400, 0x100, 0x200
_CLSACT, _CLSACT_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_PARENTS = {Direction.INGRESS: 0xFFFFFFF2, Direction.EGRESS: 0xFFFFFFF3}
# Priority 1, any protocol. A handle that is nobody else's, so that a filter of somebody is never replaced by ours.
_PRIORITY_AND_PROTOCOL = 1 << 16 | socket.htons(0x0003)
_HANDLE = 0xEB9
_OUR_NAMES = "ebproxy:"


class Hook(NamedTuple):
    """One direction of one device, which is named by its ifindex."""

    device: int
    direction: Direction

    def __str__(self) -> str:
        return f"{self.device}_{self.direction.name.lower()}"


class Attachment(Protocol):
    """A way to attach."""

    def attached(self) -> dict[Hook, int]:
        """Read from the kernel which hooks run which program of ours, by its id; 0 = it was there, and runs no more."""

    def attach(self, hook: Hook, program: int) -> None:
        """Make a hook run a program, in the place of what we had there. Raises: OSError."""

    def detach(self, hook: Hook) -> None:
        """Make a hook run nothing of ours, also where its device is gone. Raises: OSError."""


class Tcx:
    """Links."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / DIRECTORY

    def attached(self) -> dict[Hook, int]:
        """Read the pins."""
        found = {}
        for pin in sorted(self.directory.glob("*")):
            if hook := _hook_of(pin):
                with closing(bpf.obj_get(pin)) as link:
                    info = bpf.tcx_info(link)
                found[hook] = info.prog_id if info.ifindex == hook.device else 0
        return found

    def attach(self, hook: Hook, program: int) -> None:
        """Update the link that is pinned, or pin a new one."""
        pin = self.directory / str(hook)
        with contextlib.suppress(FileNotFoundError), closing(bpf.obj_get(pin)) as link:
            try:
                bpf.link_update(link, program)
            except OSError as error:
                if error.errno != errno.ENOLINK:  # of a device that is gone, or detached by somebody
                    raise
                pin.unlink()
            else:
                return
        self.directory.mkdir(parents=True, exist_ok=True)
        with closing(bpf.link_create(program, hook.device, hook.direction)) as link:
            bpf.obj_pin(link, pin)

    def detach(self, hook: Hook) -> None:
        """Detach the link now, which without its pin the kernel would do a little later, and remove the pin."""
        pin = self.directory / str(hook)
        with contextlib.suppress(OSError), closing(bpf.obj_get(pin)) as link:  # it joins nothing any more
            bpf.link_detach(link)
        pin.unlink(missing_ok=True)


def _hook_of(pin: Path) -> Hook | None:
    device, _, direction = pin.name.partition("_")
    with contextlib.suppress(ValueError, KeyError):
        return Hook(int(device), Direction[direction.upper()])
    return None


class Clsact:
    """Filters of our handle."""

    def attached(self) -> dict[Hook, int]:
        """List the filters of every device that has the qdisc."""
        with Netlink() as netlink:
            return {
                hook: ident
                for device in _clsact_devices(netlink)
                for hook in (Hook(device, direction) for direction in Direction)
                for ident, is_ours in _filters(netlink, hook)
                if is_ours
            }

    def attach(self, hook: Hook, program: int) -> None:
        """Make the qdisc where it is missing; replace our filter, or add it."""
        name = _OUR_NAMES + bpf.prog_info(program).name
        options = (
            pack_attribute(_FD, struct.pack("=I", program))
            + pack_attribute(_NAME, name.encode() + b"\0")
            + pack_attribute(_FLAGS, struct.pack("=I", _DIRECT_ACTION))
        )
        with Netlink() as netlink:
            _make_qdisc(netlink, hook.device)
            netlink.do(Kind.NEW_FILTER, _filter(hook, _HANDLE, "bpf", options), _CREATE | _REPLACE)

    def detach(self, hook: Hook) -> None:
        """Delete our filter, and the qdisc once nobody has a filter in it."""
        with Netlink() as netlink:
            try:
                netlink.do(Kind.DEL_FILTER, _filter(hook, _HANDLE, "bpf"))
                is_empty = not any(list(_filters(netlink, Hook(hook.device, direction))) for direction in Direction)
                if is_empty:
                    netlink.do(Kind.DEL_QDISC, _qdisc(hook.device))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):  # filter, device or qdisc is gone
                    raise


def _make_qdisc(netlink: Netlink, device: int) -> None:
    """Make the qdisc of a device, if it has none. Raises: OSError.

    Its place may be taken by a qdisc ``ingress``, in which a filter for egress would run at ingress.
    """
    try:
        netlink.do(Kind.NEW_QDISC, _qdisc(device), _CREATE | _EXCLUSIVE)
    except FileExistsError:
        found = netlink.ask(Kind.GET_QDISC, _TC.pack(socket.AF_UNSPEC, device, 0, _CLSACT, 0))
        kind = _kind_of(found)
        if kind != "clsact":
            message = (
                f"its qdisc {kind} is in the place of clsact; replace it, or leave the device out (excludeDevices)"
            )
            raise OSError(errno.EEXIST, message) from None


def _kind_of(message: Message) -> str:
    return text(unpack_attributes(message.body[_TC.size :]).get(_KIND, b""))


def _qdisc(device: int) -> bytes:
    return _TC.pack(socket.AF_UNSPEC, device, _CLSACT_HANDLE, _CLSACT, 0) + pack_attribute(_KIND, b"clsact\0")


def _filter(hook: Hook, handle: int, kind: str, options: bytes = b"") -> bytes:
    header = _TC.pack(socket.AF_UNSPEC, hook.device, handle, _PARENTS[hook.direction], _PRIORITY_AND_PROTOCOL)
    return header + pack_attribute(_KIND, kind.encode() + b"\0") + pack_attribute(_OPTIONS, options)


def _clsact_devices(netlink: Netlink) -> list[int]:
    devices = []
    for message in _dump(netlink, Kind.GET_QDISC, _TC.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, device, _, _, _ = _TC.unpack_from(message.body)
        if _kind_of(message) == "clsact":
            devices.append(device)
    return devices


def _filters(netlink: Netlink, hook: Hook) -> Iterator[tuple[int, bool]]:
    """List the filters at a hook: the program's id (0 = it has none), and whether it is ours."""
    request = _TC.pack(socket.AF_UNSPEC, hook.device, 0, _PARENTS[hook.direction], 0)
    for message in _dump(netlink, Kind.GET_FILTER, request):
        _, _, handle, _, _ = _TC.unpack_from(message.body)
        if handle:  # else it is the head of a priority, and the filters follow
            options = unpack_attributes(unpack_attributes(message.body[_TC.size :]).get(_OPTIONS, b""))
            is_ours = handle == _HANDLE and text(options.get(_NAME, b"")).startswith(_OUR_NAMES)
            yield number(options.get(_ID, b"")), is_ours


def _dump(netlink: Netlink, kind: Kind, request: bytes) -> list[Message]:
    while True:
        with contextlib.suppress(DumpInterrupted):
            return netlink.dump(kind, request)


def has_tcx(program: int) -> bool:
    """Whether this kernel attaches programs to devices by links: one that does looks for the device, and finds none."""
    try:
        os.close(bpf.link_create(program, 0, Direction.INGRESS))
    except OSError as error:
        return error.errno == errno.ENODEV
    return True


def detach_all(attachment: Attachment) -> int:
    """Detach everything that was attached this way; returns how many hooks ran something."""
    hooks = list(attachment.attached())
    for hook in hooks:
        attachment.detach(hook)
    return len(hooks)
