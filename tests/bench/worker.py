"""The connect worker: built from C once a run, one process for each namespace and cgroup."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.bench.errors import BenchError
from tests.bench.lines import Line
from tests.bench.population import POD_PORT
from tests.bench.stage import Stage, command
from tests.lab.netns import RUN

_SOURCE = Path(__file__).with_name("connect_worker.c")
_END_LIMIT_S = 10
Samples = NDArray[np.uint32]


class Target(NamedTuple):
    """Where to connect: one of ``spread`` consecutive addresses."""

    address: str
    port: int
    spread: int = 1


def build(stage: Stage) -> Path:
    """Compile the worker. Raises: BenchError."""
    binary = stage.directory / "connect_worker"
    if not binary.exists():
        command("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", str(binary), str(_SOURCE))
    return binary


class Worker:
    """A client and its servers in a namespace and a cgroup; one block at a time."""

    def __init__(self, stage: Stage, name: str, ends: contextlib.ExitStack, line: Line | None = None) -> None:
        """Make the namespace and the cgroup, and start the worker in them; or in a line's, at both ends of it."""
        self.name = name
        self.netns = RUN / line.client if line else stage.netns(name, ends)
        servers = RUN / line.backends if line else self.netns
        self.cgroup = stage.cgroup(name, ends)
        arguments = (self.netns, servers, self.cgroup, stage.cpus.client, stage.cpus.server, POD_PORT)
        self._process = subprocess.Popen(
            [build(stage), *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        ends.callback(self._end)
        self._expect(b"ready\n")

    def block(self, verb: str, count: int, target: Target) -> Samples:
        """Run ``count`` exchanges; returns a row each: nanoseconds of the exchange, and of the close."""
        self._tell(f"{verb} {count} {target.address} {target.spread} {target.port}\n")
        return self._answer(count)

    def begin_churn(self, target: Target) -> None:
        """Connect and close without end."""
        self._tell(f"churn 0 {target.address} {target.spread} {target.port}\n")

    def end_churn(self) -> tuple[int, int]:
        """Stop; returns connects tried and failed."""
        self._tell("\n")
        tried, failed = self._answer(1)[0]
        return int(tried), int(failed)

    def _tell(self, line: str) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error

    def _answer(self, count: int) -> Samples:
        size = count * 8
        assert self._process.stdout
        raw = self._process.stdout.read(size)
        if len(raw) != size:
            raise self._failure()
        return np.frombuffer(raw, np.uint32).reshape(count, 2)

    def _expect(self, line: bytes) -> None:
        assert self._process.stdout
        if self._process.stdout.readline() != line:
            raise self._failure()

    def _failure(self) -> BenchError:
        assert self._process.stderr
        return BenchError(f"worker {self.name}: {self._process.stderr.read().decode(errors='replace').strip()}")

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=_END_LIMIT_S)
