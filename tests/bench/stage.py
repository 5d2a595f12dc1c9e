"""What a bench is played on: network namespaces, cgroups, directories; all of it goes when the bench ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from agent.kernel import dataplane
from agent.kernel.cgroup import find_cgroup_root
from tests.bench.errors import BenchError
from tests.lab import cgroups, netns

_NAMESPACES = Path("/run/netns")
_COMMAND_LIMIT_S = 300


def command(*argv: str, netns: str = "", text: str | None = None) -> str:
    """Run a command, in a network namespace if one is named, and return what it prints. Raises: BenchError.

    Not by `ip netns exec`, which mounts another /sys.
    """
    prefix = ("nsenter", f"--net={_NAMESPACES / netns}") if netns else ()
    try:
        done = subprocess.run(
            [*prefix, *argv], input=text, capture_output=True, text=True, check=False, timeout=_COMMAND_LIMIT_S
        )
    except FileNotFoundError as error:
        raise BenchError(f"{error.filename} is missing; install it: apt-get install {_PACKAGES}") from error
    if done.returncode != 0:
        raise BenchError(f"{' '.join(argv)}: {done.stderr.strip()[:500]}")
    return done.stdout


_PACKAGES = "gcc libc6-dev iproute2 util-linux nftables iptables"


@dataclass(frozen=True, slots=True)
class Cpus:
    """Where the client runs, and where everything else does; the same CPU where there is just one."""

    client: int
    server: int

    @classmethod
    def choose(cls) -> Cpus:
        """Take the first and the last CPU this process may use."""
        usable = sorted(os.sched_getaffinity(0))
        return cls(usable[0], usable[-1])


class Stage:
    """Gives out places and takes them back at the end, newest first; also when the bench fails."""

    def __init__(self) -> None:
        self._ends = contextlib.ExitStack()
        self._prefix = f"ebbench{os.getpid()}"
        self.cpus = Cpus.choose()
        self.directory = Path(tempfile.mkdtemp(prefix="ebproxy-bench-"))
        self._ends.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self._cgroups = find_cgroup_root().path / self._prefix
        self._cgroups.mkdir()
        self._ends.callback(cgroups.end, self._cgroups)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def scene(self) -> contextlib.ExitStack:
        """A part of the bench, whose ends come sooner: ``with stage.scene() as scene``."""
        return contextlib.ExitStack()

    def netns(self, name: str, ends: contextlib.ExitStack) -> Path:
        """Make a network namespace whose loopback answers for every endpoint and routes every cluster IP.

        The client has an address of the pods' range, so that no rule set masquerades what it sends.
        """
        full = f"{self._prefix}{name}"
        command("ip", "netns", "add", full)
        ends.callback(command, "ip", "netns", "del", full)
        for line in (
            "link set lo up",
            "address add 10.128.0.1/32 dev lo",
            "route add local 10.128.0.0/9 dev lo",
            "route add 10.96.0.0/12 dev lo src 10.128.0.1",
        ):
            command("ip", *line.split(), netns=full)
        return _NAMESPACES / full

    def bare_netns(self, name: str, ends: contextlib.ExitStack) -> str:
        """Make a network namespace that has nothing but lo, and forwards; returns its name."""
        full = f"{self._prefix}{name}"
        netns.add(full)
        ends.callback(netns.remove, full)
        return full

    def cgroup(self, name: str, ends: contextlib.ExitStack) -> Path:
        """Make a cgroup."""
        path = self._cgroups / name
        path.mkdir()
        ends.callback(cgroups.end, path)
        return path

    def bpffs(self, name: str, ends: contextlib.ExitStack, place: str = "") -> Path:
        """Make a directory for a dataplane's pins; whatever was pinned goes with it, and what it has in a namespace."""
        path = self.directory / name
        path.mkdir()
        ends.callback(remove_dataplane, path, place)
        return path


def remove_dataplane(bpffs: Path, place: str) -> None:
    """Remove all of a dataplane, seen from the network namespace it is in."""
    with netns.entered(place) if place else contextlib.nullcontext():
        dataplane.remove(bpffs)
