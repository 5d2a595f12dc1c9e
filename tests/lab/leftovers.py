"""What a lab leaves on the machine: find it, remove it, also after a run that was killed."""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import tempfile
from pathlib import Path

from tests.lab import cgroups, netns

PREFIX = "ebproxy-lab-"
LOCK = "lock"
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def clear(directory: Path) -> None:
    """Remove everything of the lab whose directory this is: processes first, then what they used."""
    cgroups.end(cgroups.mount_point() / directory.name)
    for point in _mounts(directory):
        _libc.umount2(bytes(point), _MNT_DETACH)
    for name in _namespaces(directory.name):
        netns.remove(name)
    shutil.rmtree(directory, ignore_errors=True)


def find(directory: Path) -> list[str]:
    """Say what is left of a lab: one line each."""
    word = directory.name
    tree = cgroups.mount_point() / word
    found = [f"namespace {name}" for name in _namespaces(word)]
    found += [f"mount {point}" for point in _mounts(directory)]
    found += [f"process {pid} {command}" for pid, command in _processes(word)]
    if tree.exists():
        found.append(f"cgroup {tree}")
    if directory.exists():
        found.append(f"directory {directory}")
    return found


def sweep() -> list[str]:
    """Remove the labs whose owner is gone; returns their names."""
    swept = []
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            with (directory / LOCK).open("r+", encoding="ascii") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clear(directory)
        except (BlockingIOError, FileNotFoundError):  # it lives, or has only just begun
            continue
        swept.append(directory.name)
    return swept


def _namespaces(word: str) -> list[str]:
    return sorted(path.name for path in netns.RUN.glob(f"{word}-*"))


def _mounts(directory: Path) -> list[Path]:
    points = [Path(line.split()[1]) for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    return sorted((point for point in points if point.is_relative_to(directory)), reverse=True)


def _processes(word: str) -> list[tuple[int, str]]:
    """Processes of other namespaces or directories of the lab, by their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in command:
            found.append((int(path.name), command.strip()))
    return found
