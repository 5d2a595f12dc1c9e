"""Find the node's cgroup v2 root: the directory whose socket hooks see every process of the node.

Several cgroup2 mounts may be visible. mountinfo writes each mount's root relative to the root of our own cgroup
namespace, so that a mount of the node's tree inside a container reads as a way up:

    /                      the machine's (or, in a container, the container's own) root
    /..                    one level above our namespace's root
    /../../kubepods        up two levels, then down: a sibling's tree

The node's root is the mount farthest up that has our own cgroup below it.
Source: cgroup_namespaces(7), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from agent.errors import ConfigError, UnsupportedKernel

CGROUP2_MAGIC = 0x63677270
_OCTAL = re.compile(r"\\([0-7]{3})")
_libc = ctypes.CDLL(None, use_errno=True)


class Mount(NamedTuple):
    """A cgroup2 mount, as mountinfo tells it; ``root`` is relative to our cgroup namespace."""

    id: int
    root: str
    path: Path


@dataclass(frozen=True, slots=True)
class CgroupRoot:
    """The directory to attach to.

    ``root``: where it is in the tree, relative to our cgroup namespace; ``own``: our own cgroup, likewise.
    ``is_whole``: it is the root of the machine's tree, not of a part of it.
    ``warning``: why it may not be the node's root; "" = none.
    """

    path: Path
    root: str
    own: str
    is_whole: bool
    warning: str = ""


def find_cgroup_root(
    override: Path | None = None,
    mountinfo: Path = Path("/proc/self/mountinfo"),
    own_cgroup: Path = Path("/proc/self/cgroup"),
) -> CgroupRoot:
    """Find the node's cgroup v2 root, or check the one that was asked for.

    Raises ConfigError if ``override`` is no cgroup v2 directory, UnsupportedKernel if no cgroup2 mount is visible.
    """
    mounts = [mount for mount in read_mounts(mountinfo.read_text()) if _is_on_top(mount)]
    own = read_own(own_cgroup.read_text())
    if override is not None:
        return _checked(override, mounts, own)
    mount = choose(mounts, own)
    if mount is None:
        raise UnsupportedKernel("a cgroup v2 mount", "mount one: mount -t cgroup2 none /sys/fs/cgroup/unified")
    return _judged(mount.path, mount.root, own, holds_us=contains(mount.root, own))


def read_mounts(text: str) -> list[Mount]:
    """Read the cgroup2 mounts out of mountinfo."""
    found = []
    for line in text.splitlines():
        fields = line.split(" ")
        if "-" in fields and fields[fields.index("-") + 1] == "cgroup2":
            found.append(Mount(int(fields[0]), _unescaped(fields[3]), Path(_unescaped(fields[4]))))
    return found


def read_own(text: str) -> str:
    """Read our own cgroup of the v2 tree out of /proc/PID/cgroup; "/" where there is none."""
    for line in text.splitlines():
        if line.startswith("0::"):
            return line.removeprefix("0::").removesuffix(" (deleted)")
    return "/"


def choose(mounts: Sequence[Mount], own: str) -> Mount | None:
    """Choose the outermost mount: of those with ``own`` below them if there are any, else of all."""
    holders: Iterable[Mount] = [mount for mount in mounts if contains(mount.root, own)] or mounts
    return min(holders, key=_from_outside_in, default=None)


def contains(root: str, own: str) -> bool:
    """Tell whether the cgroup ``own`` is ``root`` or below it."""
    ups, downs = _steps(root)
    own_ups, own_downs = _steps(own)
    if ups == own_ups:
        return own_downs[: len(downs)] == downs
    return ups > own_ups and not downs


def is_cgroup2(path: Path) -> bool:
    """Tell whether ``path`` is on a cgroup2 file system."""
    return filesystem_magic(path) == CGROUP2_MAGIC


def filesystem_magic(path: Path) -> int:
    """Ask which kind of file system ``path`` is on; 0 = it cannot be asked. Source: statfs(2)."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        return 0
    return ctypes.c_ulong.from_buffer(buffer).value


def _checked(path: Path, mounts: Sequence[Mount], own: str) -> CgroupRoot:
    if not is_cgroup2(path):
        fault = "is not on a cgroup v2 file system" if path.exists() else "does not exist"
        raise ConfigError([f"cgroupRoot: {path} {fault}; accepted: the node's cgroup v2 root"])
    resolved = path.resolve()
    holders = [mount for mount in mounts if resolved.is_relative_to(mount.path)]
    if not holders:
        return CgroupRoot(path, "?", own, is_whole=False, warning=f"no mount that holds {path} is visible")
    mount = max(holders, key=lambda holder: len(holder.path.parts))
    below = resolved.relative_to(mount.path).as_posix()
    root = mount.root if below == "." else f"{mount.root.rstrip('/')}/{below}"
    # Above our namespace nothing says what the directories on the way to us are called.
    is_above = _steps(root)[0] > _steps(own)[0]
    return _judged(path, root, own, holds_us=contains(root, own) or (is_above and _lists_us(resolved)))


def _lists_us(path: Path) -> bool:
    """Tell whether the cgroup at ``path`` or one below it has this process."""
    own_pid = str(os.getpid())
    for directory, _, _ in os.walk(path):
        try:
            if own_pid in Path(directory, "cgroup.procs").read_text().split():
                return True
        except OSError:  # gone meanwhile, or a threaded cgroup
            continue
    return False


def _judged(path: Path, root: str, own: str, *, holds_us: bool) -> CgroupRoot:
    # Only the root of the whole tree has no type. Source: Documentation/admin-guide/cgroup-v2.rst, cgroup.type.
    is_whole = not (path / "cgroup.type").exists()
    warning = ""
    if not holds_us:
        warning = f"our own cgroup {own} is not below {path} ({root}): our own connections are not translated"
    elif not is_whole and _steps(root) == _steps(own):
        warning = f"{path} is our own cgroup and not the whole tree: nobody else's connections may be translated"
    return CgroupRoot(path, root, own, is_whole, warning)


def _from_outside_in(mount: Mount) -> tuple[int, int, int]:
    ups, downs = _steps(mount.root)
    return -ups, len(downs), len(mount.path.parts)


def _steps(path: str) -> tuple[int, tuple[str, ...]]:
    """Split a path into how far it goes up, and the names down from there."""
    names = [name for name in path.split("/") if name]
    ups = next((i for i, name in enumerate(names) if name != ".."), len(names))
    return ups, tuple(names[ups:])


def _is_on_top(mount: Mount) -> bool:
    """Tell whether the mount's path leads to it, and not to something mounted over it."""
    try:
        fd = os.open(mount.path, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    finally:
        os.close(fd)
    return f"mnt_id:\t{mount.id}" in lines


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda octal: chr(int(octal.group(1), 8)), text)
