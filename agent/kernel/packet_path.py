"""The packet path's programs on the devices that are to have them.

Devices come and go at any moment, so that none is a reason to fail for the others: what could not be attached is kept
with its reason, and tried again whenever the kernel is compared with what is wanted.

A first link on a hook waits for the kernel's other CPUs, 16 ms or more (docs/decisions/0009), so that hundreds of
devices take seconds: they are attached a few at a time, the youngest first, and other work goes on in between. To put
another program in the place of one that is there takes no time, and is never put off.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Container, Iterable

from agent.core.network import LOOPBACK, Device, DevicePatterns
from agent.kernel import bpf
from agent.kernel.bpf import Direction
from agent.kernel.programs import PacketProgram
from agent.kernel.tc import Attachment, Hook

_POD_KIND = "veth"
_OF_ANY = {Direction.INGRESS: PacketProgram.INGRESS, Direction.EGRESS: PacketProgram.EGRESS}
_OF_PODS = {Direction.INGRESS: PacketProgram.FROM_POD, Direction.EGRESS: PacketProgram.TO_POD}


def wanted_programs(
    devices: Iterable[Device], patterns: DevicePatterns, *, policy: bool = False, uplinks: Container[int] = ()
) -> dict[Hook, PacketProgram]:
    """Say which hook is to run which program. Where there is policy, devices that pods may be behind have their own.

    ``uplinks``: what the default routes leave by, which is a veth where the node is a container itself.
    """
    known = tuple(devices)
    wanted = {
        Hook(device.ifindex, direction): program
        for device in patterns.choose(known)
        for direction, program in _choose(device, uplinks, policy=policy).items()
    }
    loops = (device for device in known if device.hardware == LOOPBACK)
    return wanted | {Hook(device.ifindex, Direction.EGRESS): PacketProgram.LOOPBACK for device in loops}


def _choose(device: Device, uplinks: Container[int], *, policy: bool) -> dict[Direction, PacketProgram]:
    is_pods = device.kind == _POD_KIND and device.ifindex not in uplinks
    return _OF_PODS if policy and is_pods else _OF_ANY


class PacketPath:
    """What is attached, and what could not be: ``faults`` gives the reason by the device's ifindex and direction.

    ``is_behind``: more is to be attached than there was time for; follow again.
    """

    def __init__(self, attachment: Attachment, programs: dict[PacketProgram, int]) -> None:
        self.attachment = attachment
        self.faults: dict[Hook, str] = {}
        self.is_behind = False
        self._programs = programs
        self._ids = {name: bpf.prog_info(fd).id for name, fd in programs.items()}
        self._attached: dict[Hook, int] | None = None

    def follow(self, wanted: dict[Hook, PacketProgram], budget_s: float = math.inf) -> int:
        """Attach what is wanted and is not there, detach what is not wanted; returns how many hooks that changed.

        For hooks that run nothing of ours yet there are ``budget_s``, and at least one of them is attached.
        """
        if self._attached is None:
            self._attached = self.attachment.attached()
        attached = self._attached
        gone = sorted(attached.keys() - wanted.keys())
        differing = {hook: program for hook, program in wanted.items() if attached.get(hook) != self._ids[program]}
        self.faults.clear()
        changed = sum(map(self._detach, gone))
        changed += sum(self._attach(hook, differing.pop(hook), attached) for hook in attached.keys() & differing.keys())
        deadline = time.monotonic() + budget_s
        for hook in sorted(differing, key=lambda hook: (-hook.device, hook.direction)):
            changed += self._attach(hook, differing.pop(hook), attached)
            if time.monotonic() >= deadline:
                break
        self.is_behind = bool(differing)
        return changed

    def check(self, wanted: dict[Hook, PacketProgram], budget_s: float = math.inf) -> int:
        """Follow what the kernel says is attached, rather than what was done last."""
        self._attached = None
        return self.follow(wanted, budget_s)

    def _attach(self, hook: Hook, program: PacketProgram, attached: dict[Hook, int]) -> bool:
        try:
            self.attachment.attach(hook, self._programs[program])
        except OSError as error:
            if error.errno != errno.ENODEV:  # else it has gone again, which netlink will tell
                self.faults[hook] = str(error)
            return False
        attached[hook] = self._ids[program]
        return True

    def _detach(self, hook: Hook) -> bool:
        assert self._attached is not None  # noqa: S101 - only what is attached is detached
        try:
            self.attachment.detach(hook)
        except OSError as error:
            self.faults[hook] = str(error)
            return False
        del self._attached[hook]
        return True
