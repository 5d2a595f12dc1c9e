"""A real agent, as a process: start it against the feed, look at it from outside, end it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from agent.config_sizes import describe_sizes
from agent.core.options import NetworkPolicyMode
from agent.errors import AgentUnreachable
from agent.kernel import bpf
from agent.observe.control import ask
from tests.bench.errors import BenchError
from tests.bench.feed import Feed, kubeconfig
from tests.bench.nodes import sizes_for
from tests.bench.polling import until
from tests.bench.population import NODE, Population
from tests.bench.stage import Stage, remove_dataplane
from tests.bench.worker import Worker

_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 20.0


class Agent:
    """One agent after another in the same place, a worker's: same network namespace, same cgroup, same pins."""

    def __init__(
        self,
        stage: Stage,
        feed: Feed,
        population: Population,
        worker: Worker,
        ends: contextlib.ExitStack,
        *,
        has_policy: bool = False,
    ) -> None:
        self._directory = stage.directory / f"agent-{worker.name}"
        self._directory.mkdir()
        self._netns = worker.netns
        self._bpffs = stage.bpffs(f"agent-{worker.name}-bpffs", ends, worker.netns.name)
        self._cgroup = worker.cgroup
        self._state = self._directory / "state"
        mode = NetworkPolicyMode.STANDARD if has_policy else NetworkPolicyMode.OFF
        sizes = describe_sizes(sizes_for(population), NetworkPolicyMode.OFF)
        config = self._directory / "config.yaml"
        config.write_text(f"networkPolicy: '{mode}'\n" + "".join(f"{path}: {size}\n" for path, size in sizes.items()))
        (self._directory / "kubeconfig").write_text(kubeconfig(feed.url))
        self._process: subprocess.Popen[bytes] | None = None
        ends.callback(self.kill)

    def start(self) -> float:
        """Start it; returns when (monotonic seconds)."""
        flags = {
            "--kubeconfig": self._directory / "kubeconfig",
            "--config": self._directory / "config.yaml",
            "--node-name": NODE,
            "--cgroup-root": self._cgroup,
            "--state-dir": self._state,
            "--bpffs": self._bpffs,
            "--metrics-bind-address": "",
            "--healthz-bind-address": "",
        }
        arguments = [str(word) for flag in flags.items() for word in flag]
        begun = time.monotonic()
        with (self._directory / "log").open("ab") as log:
            command = ("nsenter", f"--net={self._netns}", sys.executable, "-m", "agent", "run", *arguments)
            self._process = subprocess.Popen(command, stdout=log, stderr=log)  # nsenter becomes the agent
        return begun

    def wait_settled(self, every_s: float = 0.02) -> None:
        """Wait until everything listed is programmed."""
        until(self._is_settled, _START_LIMIT_S, f"the agent settles ({self._last_words()})", every_s)

    def status(self) -> dict[str, Any]:
        """Ask for its status. Raises: AgentUnreachable."""
        answer: dict[str, Any] = ask(self._state, "status")
        return answer

    def open_map(self, name: str) -> bpf.Map:
        """Open one of its maps, as soon as it is there."""
        return bpf.Map(bpf.obj_get(until(lambda: self._pin(name), _START_LIMIT_S, f"the agent pins {name}")))

    def map_names(self) -> list[str]:
        """Name its maps."""
        layout = until(lambda: self._pin("frontends"), _START_LIMIT_S, "the agent pins its maps").parent
        return sorted(pin.name for pin in layout.iterdir() if pin.is_file())

    def kill(self) -> None:
        """Kill it as `kill -9` does; what it programmed stays."""
        if self._process:
            self._process.kill()
            self._process.wait(_STOP_LIMIT_S)
            self._process = None

    def forget(self) -> None:
        """Remove what killed agents have left, so that the next one starts cold."""
        remove_dataplane(self._bpffs, self._netns.name)

    def memory_kib(self, field: str) -> int:
        """Read a field of /proc/PID/status, in KiB: VmRSS, VmHWM."""
        for line in Path(f"/proc/{self._pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
        raise BenchError(f"/proc/{self._pid}/status has no {field}")

    def cpu_s(self) -> float:
        """CPU time of all its threads so far, from the scheduler's own clock (/proc/PID/task/*/schedstat)."""
        tasks = Path(f"/proc/{self._pid}/task")
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9

    @property
    def _pid(self) -> int:
        if self._process is None:
            raise BenchError("no agent runs")
        return self._process.pid

    def _is_settled(self) -> bool:
        self._check_alive()
        try:
            return bool(self.status()["is_settled"])
        except AgentUnreachable:
            return False

    def _pin(self, name: str) -> Path | None:
        self._check_alive()
        return next(self._bpffs.glob(f"ebproxy/*/{name}"), None)

    def _check_alive(self) -> None:
        if self._process and self._process.poll() is not None:
            raise BenchError(f"the agent ended with status {self._process.returncode}: {self._last_words()}")

    def _last_words(self) -> str:
        log = self._directory / "log"
        return log.read_text(errors="replace")[-1000:] if log.exists() else ""


def fdinfo(fd: int, field: str) -> int:
    """Read a number the kernel tells of a map or program: memlock, run_time_ns, run_cnt."""
    for line in Path(f"/proc/{os.getpid()}/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise BenchError(f"the kernel's fdinfo has no {field}")
