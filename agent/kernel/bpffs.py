"""bpffs: find it, mount it where it is missing, unmount what was mounted here."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from pathlib import Path

from agent.errors import DataplaneError

# What is written as the source of a mount of ours: whether the directory below it is ours too.
_SOURCE = "ebproxy"
_SOURCE_OF_NEW = "ebproxy-new"
_libc = ctypes.CDLL(None, use_errno=True)


def _mounts() -> list[tuple[str, Path, str]]:
    """(source, mount point, type) of every mount, in the order they were made."""
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    fields = (line.split(" ") for line in lines)
    return [(source, Path(point.replace("\\040", " ")), kind) for source, point, kind, *_ in fields]


def _mount_holding(path: Path) -> tuple[str, Path, str]:
    holding = [mount for mount in _mounts() if path.is_relative_to(mount[1])]
    deepest = max(len(point.parts) for _, point, _ in holding)
    return [mount for mount in holding if len(mount[1].parts) == deepest][-1]


def is_bpffs(path: Path) -> bool:
    """Whether a directory lies in a bpffs."""
    return _mount_holding(path.resolve())[2] == "bpf"


def ensure_mounted(path: Path) -> None:
    """Make ``path`` a directory in a bpffs, mounting one there if it is not. Raises: DataplaneError."""
    try:
        if not is_bpffs(path):
            source = _SOURCE if path.exists() else _SOURCE_OF_NEW
            path.mkdir(parents=True, exist_ok=True)
            _mount(path, source)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot mount bpffs at {path}: {error}; mount it: mount -t bpf bpf {path}"
        raise DataplaneError(message) from error


def _mount(path: Path, source: str) -> None:
    if _libc.mount(source.encode(), bytes(path), b"bpf", 0, b"mode=0700") != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def lock(path: Path) -> int:
    """Lock a directory against other agents, as long as the descriptor that is returned is open.

    Raises: DataplaneError when another holds it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        message = f"another agent runs on {path}; stop it, or give this one a --bpffs of its own"
        raise DataplaneError(message) from error
    return fd


def unmount_if_ours(path: Path) -> bool:
    """Unmount a bpffs that ``ensure_mounted`` mounted at ``path``, if nothing is left in it; returns whether it did.

    The directory goes with it if it was made for the mount.
    """
    source, point, kind = _mount_holding(path.resolve())
    # The kernel puts files of its own into a new bpffs, with a dot in their names, which no pin can have.
    pins = [entry.name for entry in path.iterdir() if "." not in entry.name]
    if source not in {_SOURCE, _SOURCE_OF_NEW} or (point, kind) != (path.resolve(), "bpf") or pins:
        return False
    if _libc.umount2(bytes(path), 0) != 0:
        return False
    if source == _SOURCE_OF_NEW:
        with contextlib.suppress(OSError):  # something was below the mount
            path.rmdir()
    return True
