"""Cgroups of the lab: a subtree of the machine's v2 tree, wherever that is mounted."""

from __future__ import annotations

import time
from pathlib import Path

_LIMIT_S = 10.0


def mount_point() -> Path:
    """Find the cgroup v2 mount."""
    lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    return next(Path(line.split()[1]) for line in lines if line.split()[2] == "cgroup2")


def members(tree: Path) -> list[int]:
    """List the processes anywhere in a tree."""
    return [
        int(line)
        for directory in (tree, *tree.rglob("*/"))
        for line in (directory / "cgroup.procs").read_text(encoding="ascii").split()
    ]


def end(tree: Path) -> None:
    """Kill what runs in a tree, and remove it. Raises: TimeoutError."""
    if not tree.is_dir():
        return
    (tree / "cgroup.kill").write_text("1", encoding="ascii")
    deadline = time.monotonic() + _LIMIT_S
    while "populated 1" in (tree / "cgroup.events").read_text(encoding="ascii"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {members(tree)} of {tree} do not end")
        time.sleep(0.005)
    for directory in sorted(tree.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
        directory.rmdir()
    tree.rmdir()
