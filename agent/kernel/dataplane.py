"""The dataplane of one node: maps, programs and links, opened together, migrated together, removed together.

    <bpffs>/ebproxy/
        links/<hook>                            what the kernel runs, across agents and layouts
        links/tcx/<ifindex>_<direction>         the same, on devices
        <layout>/<map>                          the maps of one layout (abi.layout_id)
        <layout>/programs_<digest>/<program>    the programs over those maps

An agent whose layout is the one in use adopts everything. One with another layout fills maps of its own first, then
turns the links to programs over them, then removes the old: connections see one or the other, never neither.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agent.core.abi import POD_RANGE_OWN, U32, MapSizes, layout_id, map_specs
from agent.core.network import (
    DevicePatterns,
    Entries,
    Network,
    PodDetection,
    address_entries,
    device_entries,
    range_entries,
)
from agent.errors import DataplaneError
from agent.kernel import attach, bpf, bpffs, programs, selftest, tc
from agent.kernel.maglev import MaglevTables
from agent.kernel.maps import MapStore
from agent.kernel.node_maps import NodeMaps
from agent.kernel.packet_path import PacketPath, wanted_programs
from agent.kernel.programs import BIND_HOOKS, PacketProgram, ProgramOptions
from agent.kernel.takeover import Takeover

log = logging.getLogger("ebproxy.dataplane")

NAME = "ebproxy"
_ATTACH_BUDGET_S = 0.05
_ACTIVATE_BUDGET_S = 0.5
LINKS = "links"


@dataclass(frozen=True, slots=True)
class DataplaneOptions:
    """Where and how.

    ``cgroup`` is the node's cgroup root; None = no socket hooks at all. ``socket_lb``: whether they translate, or only
    keep the ports of NodePorts. ``clsact``: attach to devices by filters also where the kernel has links for it.
    """

    bpffs: Path
    cgroup: Path | None
    sizes: MapSizes
    programs: ProgramOptions = field(default_factory=ProgramOptions)
    socket_lb: bool = True
    patterns: DevicePatterns = field(default_factory=DevicePatterns)
    pods: PodDetection = field(default_factory=PodDetection)
    clsact: bool = False


class Dataplane:
    """An open dataplane. ``store`` is written by the reconciler alone."""

    def __init__(self, options: DataplaneOptions) -> None:
        """Open or create maps and programs; hooks stay as they are until ``activate``.

        Raises: DataplaneError, LoaderError.
        """
        self.options = options
        bpffs.ensure_mounted(options.bpffs)
        self.root = options.bpffs / NAME
        self.root.mkdir(exist_ok=True)
        self._lock = bpffs.lock(self.root)
        specs = map_specs(options.sizes)
        self.layout = layout_id(specs)
        self.directory = self.root / self.layout
        self.is_active = False
        try:
            former = tuple(directory for directory in layouts(self.root) if directory != self.directory)
            self.store = MapStore.open(self.directory, specs, former)
            self.former = Takeover(self.store.maps, specs, former)
            self.programs = programs.open_or_load(self.directory, self.store, specs, options.programs)
        except BaseException:
            os.close(self._lock)  # so that whoever cleans up next does not meet a second agent in us
            raise
        self.tables = MaglevTables(self.store, self.directory, specs, options.programs)
        self.store.build_table = self.tables.build
        self._network: Network | None = None
        self._pod_cidrs: tuple[str, ...] | None = None
        self._node_maps = NodeMaps(self.store)
        self._map_faults: list[str] = []
        self.packet_path = PacketPath(self._attachment(), self.programs.packets)

    def _attachment(self) -> tc.Attachment:
        if not self.options.clsact and tc.has_tcx(self.programs.packets[PacketProgram.INGRESS]):
            return tc.Tcx(self.root / LINKS)
        return tc.Clsact()

    @property
    def is_migrating(self) -> bool:
        """Whether the hooks run programs over another layout's maps: fill ours before ``activate``."""
        used = attached_maps(self.root)
        return bool(used) and self.store.maps["frontends"].info.id not in used

    @property
    def is_in_use(self) -> bool:
        """Whether any hook runs programs over this layout's maps."""
        return self.store.maps["frontends"].info.id in attached_maps(self.root)

    def follow(self, network: Network, pod_cidrs: tuple[str, ...] | None) -> None:
        """Take in the node's network, and its Node's podCIDRs (None = not known yet: what a former agent said stays).

        Addresses first, then programs: none runs on a device of which it does not know where it is. Before ``activate``
        only the maps are written. Raises nothing: what went wrong is in ``faults``.
        """
        if pod_cidrs is not None and pod_cidrs != self._pod_cidrs:
            for remark in self.options.pods.remarks(network, pod_cidrs):
                log.warning("%s", remark)
        self._network, self._pod_cidrs = network, pod_cidrs
        self._write_node(network)
        if self.is_active:
            self.packet_path.follow(self._wanted(network), _ATTACH_BUDGET_S)

    @property
    def is_behind(self) -> bool:
        """Whether there was no time yet for some devices: ``catch_up``."""
        return self.is_active and self.packet_path.is_behind

    def catch_up(self) -> None:
        """Attach more of what there was no time for."""
        if self._network:
            self.packet_path.follow(self._wanted(self._network), _ATTACH_BUDGET_S)

    def _wanted(self, network: Network) -> dict[tc.Hook, PacketProgram]:
        return wanted_programs(
            network.devices, self.options.patterns, policy=self.options.programs.policy, uplinks=network.uplinks
        )

    @property
    def faults(self) -> tuple[str, ...]:
        """What of addresses and devices could not be brought about, for the operator; it is tried again."""
        devices = self._network.devices if self._network else ()
        names = {device.ifindex: device.name for device in devices}
        attaching = (
            f"device {names.get(hook.device, hook.device)}, {hook.direction.name.lower()}: {fault}"
            for hook, fault in self.packet_path.faults.items()
        )
        return (*self._map_faults, *attaching, *filter(None, (self.tables.fault,)))

    def _write_node(self, network: Network) -> int:
        maps = {
            "node_addresses": address_entries(network),
            "devices": device_entries(network, self.options.pods),
        }
        changed = 0
        self._map_faults.clear()
        for name, entries in (*maps.items(), *self._ranges()):
            try:
                changed += self._node_maps.write(name, entries)
            except DataplaneError as error:
                self._map_faults.append(str(error))
        return changed

    def _ranges(self) -> Iterator[tuple[str, Entries]]:
        """Say where pods are, as far as that is known; this node's own only matter to policy."""
        pods, node = self.options.pods, self._pod_cidrs
        has_policy = self.options.programs.policy
        if node is not None:
            yield "pod_ranges", range_entries(pods, node, node if has_policy else ())
        elif not pods.needs_node:
            found = self.store.maps["pod_ranges"].items() if has_policy else ()
            left = {key: flags for key, flags in found if U32.packer.unpack(flags)[0] & POD_RANGE_OWN}
            yield "pod_ranges", {**range_entries(pods, ()), **left}

    def _check_node(self) -> int:
        """Compare the kernel with what is wanted of devices and addresses, and heal it; returns what differed."""
        if self._network is None:
            return 0
        self._node_maps.forget()
        changed = self._write_node(self._network)
        if self.is_behind:
            return changed  # what is yet to be attached was not detached by anybody
        return changed + self.packet_path.check(self._wanted(self._network), _ACTIVATE_BUDGET_S)

    def activate(self) -> int:
        """Turn every hook to our programs, prove that they fire, remove what is no longer in use.

        Returns how many hooks changed. Raises: DataplaneError.
        """
        hooks = self._socket_programs()
        self.former.copy(is_older=not self.is_in_use)
        changed = self._check_node()
        if self.options.cgroup is not None:
            changed += attach.attach(self.root / LINKS, self.options.cgroup, hooks)
        changed += attach.detach(self.root / LINKS, but=hooks)
        if self.options.cgroup is not None and self.options.socket_lb:
            selftest.prove_hook_fires(self.store, self.options.cgroup)
        self.former.copy(is_older=False)  # what began meanwhile
        self.former.close()
        self._remove_former()
        self.is_active = True
        return changed

    def _socket_programs(self) -> dict[bpf.AttachType, int]:
        """Choose the programs of the socket hooks that are to run."""
        if self.options.cgroup is None:
            return {}
        every = self.programs.sockets
        return every if self.options.socket_lb else {hook: every[hook] for hook in BIND_HOOKS}

    def reattach(self) -> int:
        """Bring back what somebody detached or wrote; returns how many hooks and entries. Raises: DataplaneError."""
        changed = 0
        if self.options.cgroup is not None:
            changed += attach.attach(self.root / LINKS, self.options.cgroup, self._socket_programs())
        return changed + self.tables.check() + self._check_node()

    def _remove_former(self) -> None:
        for directory in layouts(self.root):
            if directory != self.directory:
                shutil.rmtree(directory)
        for pins in self.directory.glob("programs_*"):
            if pins != programs.pins_of(self.directory, self.options.programs):
                shutil.rmtree(pins)
        other: tc.Attachment = tc.Clsact()
        if isinstance(self.packet_path.attachment, tc.Clsact):
            other = tc.Tcx(self.root / LINKS)
        tc.detach_all(other)

    def close(self) -> None:
        """Close descriptors; the kernel keeps forwarding by what is pinned."""
        self.former.close()
        self.store.close()
        self.tables.close()
        self.programs.close()
        os.close(self._lock)


def layouts(root: Path) -> list[Path]:
    """List the directories of every layout under a dataplane's root."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name != LINKS)


def attached_maps(root: Path) -> frozenset[int]:
    """Read the ids of the maps that attached programs use, on sockets and on devices."""
    hooks = attach.attached_programs(root / LINKS)
    packets = attach.programs_by_id(root, (*tc.Tcx(root / LINKS).attached().values(), *tc.Clsact().attached().values()))
    return frozenset(ident for program in (*hooks.values(), *packets) for ident in program.map_ids)


def active_layout(bpffs_directory: Path) -> Path | None:
    """Find the layout that the hooks use, or else the only one there is; None = there is none."""
    root = bpffs_directory / NAME
    found = layouts(root)
    used = attached_maps(root)
    for directory in found:
        # A layout that was cut short while it was made has no maps yet.
        with contextlib.suppress(FileNotFoundError), attach.closing(bpf.obj_get(directory / "frontends")) as fd:
            if bpf.map_info(fd).id in used:
                return directory
    return found[0] if len(found) == 1 else None


def remove(bpffs_directory: Path) -> list[str]:
    """Remove every link, program and map, and the mount if it was made here; says what was removed, a line each.

    Raises: DataplaneError.
    """
    root = bpffs_directory / NAME
    said = []
    try:
        if root.is_dir():
            with attach.closing(bpffs.lock(root)):
                detached = attach.detach(root / LINKS)
                detached += tc.detach_all(tc.Tcx(root / LINKS)) + tc.detach_all(tc.Clsact())
                said.append(f"detached {detached} programs")
                said += [f"removed layout {directory.name}" for directory in layouts(root)]
                shutil.rmtree(root)
        if bpffs_directory.is_dir() and bpffs.unmount_if_ours(bpffs_directory):
            said.append(f"unmounted {bpffs_directory}")
        elif bpffs.is_bpffs(bpffs_directory) and not bpffs_directory.is_mount():
            with contextlib.suppress(OSError):  # of somebody else's pins
                bpffs_directory.rmdir()
    except OSError as error:
        message = f"cleaning {root}: {error}"
        raise DataplaneError(message) from error
    return said
