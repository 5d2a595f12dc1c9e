"""The dataplane of one node: maps, programs and links, opened together, migrated together, removed together.

    <bpffs>/ebproxy/
        links/<hook>                            what the kernel runs, across agents and layouts
        <layout>/<map>                          the maps of one layout (abi.layout_id)
        <layout>/programs_<digest>/<hook>       the programs over those maps

An agent whose layout is the one in use adopts everything. One with another layout fills maps of its own first, then
turns the links to programs over them, then removes the old: connections see one or the other, never neither.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from agent.core.abi import MapSizes, layout_id, map_specs
from agent.errors import DataplaneError
from agent.kernel import attach, bpf, bpffs, programs, selftest
from agent.kernel.maps import MapStore

NAME = "ebproxy"
LINKS = "links"


@dataclass(frozen=True, slots=True)
class DataplaneOptions:
    """Where and how. ``cgroup`` is the node's cgroup root; None = no socket hooks."""

    bpffs: Path
    cgroup: Path | None
    sizes: MapSizes
    remember_peer: bool = True
    host_netns: int | None = None


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
        self.store = MapStore.open(self.directory, specs, former=tuple(layouts(self.root)))
        self.is_active = False
        self.programs = programs.open_or_load(self.directory, self.store, specs, self._program_options())

    def _program_options(self) -> programs.ProgramOptions:
        return programs.ProgramOptions(
            self.options.sizes.socket_origins, self.options.remember_peer, self.options.host_netns
        )

    @property
    def is_migrating(self) -> bool:
        """Whether the hooks run programs over another layout's maps: fill ours before ``activate``."""
        frontends = self.store.maps["frontends"].info.id
        attached = attach.attached_programs(self.root / LINKS)
        return any(frontends not in program.map_ids for hook, program in attached.items() if hook.startswith("connect"))

    def activate(self) -> int:
        """Turn every hook to our programs, prove that they fire, remove what is no longer in use.

        Returns how many hooks changed. Raises: DataplaneError.
        """
        if self.options.cgroup is None:
            changed = attach.detach(self.root / LINKS)
        else:
            changed = attach.attach(self.root / LINKS, self.options.cgroup, self.programs)
            selftest.prove_hook_fires(self.store, self.options.cgroup)
        self._remove_former()
        self.is_active = True
        return changed

    def reattach(self) -> int:
        """Attach again what somebody detached; returns how many hooks that were. Raises: DataplaneError."""
        if self.options.cgroup is None:
            return 0
        return attach.attach(self.root / LINKS, self.options.cgroup, self.programs)

    def _remove_former(self) -> None:
        for directory in layouts(self.root):
            if directory != self.directory:
                shutil.rmtree(directory)
        for pins in self.directory.glob("programs_*"):
            if pins != programs.pins_of(self.directory, self._program_options()):
                shutil.rmtree(pins)

    def close(self) -> None:
        """Close descriptors; the kernel keeps forwarding by what is pinned."""
        self.store.close()
        for fd in self.programs.values():
            os.close(fd)
        os.close(self._lock)


def layouts(root: Path) -> list[Path]:
    """List the directories of every layout under a dataplane's root."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name != LINKS)


def active_layout(bpffs_directory: Path) -> Path | None:
    """Find the layout that the hooks use, or else the only one there is; None = there is none."""
    root = bpffs_directory / NAME
    found = layouts(root)
    attached = attach.attached_programs(root / LINKS)
    used = {ident for program in attached.values() for ident in program.map_ids}
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
                said.append(f"detached {attach.detach(root / LINKS)} programs")
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
