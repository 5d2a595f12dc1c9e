"""Network namespaces: make, enter, configure, remove."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

RUN = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_LIMIT_S = 30
_libc = ctypes.CDLL(None, use_errno=True)


def ip(*arguments: str, text: str | None = None) -> str:
    """Run ``ip``; raises CalledProcessError with its words."""
    ran = subprocess.run(["ip", *arguments], input=text, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    if ran.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {ran.stderr.strip()} in:\n{text or ''}")
    return ran.stdout


def add(name: str) -> None:
    """Make a namespace whose addresses are usable at once, that forwards, and in which lo is up."""
    ip("netns", "add", name)
    with entered(name):
        for family in ("ipv4", "ipv6"):
            for scope in ("all", "default"):
                _sysctl(f"{family}/conf/{scope}/forwarding", "1")
        for scope in ("all", "default"):
            _sysctl(f"ipv6/conf/{scope}/accept_dad", "0")
    configure(name, ["link set lo up"])


def remove(name: str) -> None:
    """Remove a namespace, if it is there, with every device in it."""
    if (RUN / name).exists():
        ip("netns", "del", name)


def configure(name: str, lines: list[str]) -> None:
    """Run lines of ``ip`` in a namespace, in one batch."""
    ip("-n", name, "-batch", "-", text="\n".join(lines) + "\n")


def _sysctl(path: str, value: str) -> None:
    Path("/proc/sys/net", path).write_text(value, encoding="ascii")


@contextlib.contextmanager
def entered(name: str) -> Iterator[None]:
    """Move this thread into a namespace and back; sockets made meanwhile stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _set_ns(os.open(RUN / name, os.O_RDONLY))
        yield
    finally:
        _set_ns(home)


def _set_ns(fd: int) -> None:
    try:
        if _libc.setns(fd, _CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(fd)
