"""Agents of the lab: start, kill, ask; and what the maps say, read as the commands read them."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import yaml
from prometheus_client.parser import text_string_to_metric_families

from agent.cli.trace import parse_target
from agent.cli.view import open_store, read_services
from agent.core.abi import SLOT, Frontend, unpack_header
from agent.core.records import Protocol
from agent.errors import AgentUnreachable, DataplaneError
from agent.kernel.maps import MapStore
from agent.observe.control import ask
from tests.lab import netns
from tests.lab.lab import Node
from tests.lab.manifests import Manifests
from tests.lab.polling import until
from tests.lab.processes import end

EBPROXY = (sys.executable, "-m", "agent")
METRICS_PORT = 10249
HEALTH_PORT = 10256
_START_LIMIT_S = 60


class Agent:
    """One node's agent.

    ``manifests``: the directory it reads, unless ``flags`` name another source. ``config``: fields of its configuration
    file, taken at each start. ``wrapper``: a command that runs the agent's. No ``cgroup_root``: it is to be found.
    """

    def __init__(
        self, node: Node, manifests: Manifests | None = None, *, flags: tuple[str, ...] = (), **config: Any
    ) -> None:
        self.node = node
        self.manifests = manifests
        self.state_dir = node.directory / "state"
        self.bpffs = node.directory / "bpf"
        self.log = node.directory / "agent.log"
        self.config = config
        self.wrapper: tuple[str, ...] = ()
        self.cgroup_root = str(node.cgroup)
        self._flags = flags
        self._place = node.place("agent")
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self.start().wait()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Start it, without waiting."""
        config = self.node.directory / "config.yaml"
        config.write_text(yaml.safe_dump({"logFormat": "text", **self.config}), encoding="utf-8")
        flags = ["--manifests", str(self.manifests.directory)] if self.manifests else []
        flags += ["--cgroup-root", self.cgroup_root] if self.cgroup_root else []
        with self.log.open("a", encoding="utf-8") as log:
            self.process = self._place.start(
                *(*self.wrapper, *self.command("run", "--config", str(config), "--node-name", self.node.name)),
                *("--metrics-bind-address", f"127.0.0.1:{METRICS_PORT}"),
                *("--healthz-bind-address", f"0.0.0.0:{HEALTH_PORT}", *flags, *self._flags),
                stderr=log,
                stdout=log,
            )
        return self

    def wait(self, limit_s: float = _START_LIMIT_S) -> Self:
        """Wait until it has programmed everything. Raises: AssertionError with its log when it ends instead."""
        until(lambda: self.has_ended() or self.is_settled(), f"agent of {self.node.name} settles", limit_s)
        assert not self.has_ended(), self.log.read_text(encoding="utf-8")
        return self

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        """End it as kill -9 does."""
        assert self.process
        end(self.process, signal.SIGKILL)

    def stop(self) -> int:
        """End it as the kubelet does; returns its exit status."""
        assert self.process
        return end(self.process)

    def command(self, *arguments: str) -> tuple[str, ...]:
        """Write a command line for this agent's node."""
        verb, *rest = arguments
        return (*EBPROXY, verb, "--state-dir", str(self.state_dir), "--bpffs", str(self.bpffs), *rest)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the node."""
        return self.node.host.run(*self.command(*arguments))

    def json(self, *arguments: str) -> Any:
        """Run a command on the node and read its JSON."""
        ran = self.cli(*arguments, "-o", "json")
        assert ran.stdout, ran.stderr
        return json.loads(ran.stdout)

    def status(self) -> dict[str, Any]:
        """Ask it for its status. Raises: AgentUnreachable."""
        answer: dict[str, Any] = ask(self.state_dir, "status")
        return answer

    def is_settled(self) -> bool:
        """Whether it answers and has programmed everything."""
        try:
            return bool(self.status()["is_settled"])
        except AgentUnreachable:
            return False

    def get(self, path: str, port: int = METRICS_PORT) -> tuple[int, str]:
        """Ask one of its HTTP servers, from its node; returns status code and body."""
        with netns.entered(self.node.netns):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.connect()
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """Read a metric: the sum of its samples that carry these labels."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def map_writes(self) -> float:
        """Map entries it has written and deleted since it started."""
        return self.metric("ebproxy_map_writes_total")

    @contextlib.contextmanager
    def maps(self) -> Iterator[MapStore]:
        """Open the maps the hooks use."""
        with contextlib.closing(open_store(self.bpffs)) as store:
            yield store

    def backends(self, frontend: str) -> tuple[str, ...] | None:
        """Read the backends of a frontend (``10.96.0.10:80/TCP``) out of the maps; None = it is not there."""
        try:
            with self.maps() as store:
                views = read_services(store, self.state_dir)
        except DataplaneError:
            return None
        return next((view.backends for view in views if frontend in {it.text for it in view.frontends}), None)

    def count(self, frontend: str) -> int | None:
        """Count the backends of a frontend, by three lookups; None = it is not there."""
        try:
            with self.maps() as store:
                return _count(store, frontend)
        except DataplaneError:
            return None

    def wait_for(self, frontend: str, count: int | None, limit_s: float = 10) -> None:
        """Wait until the maps hold so many backends for a frontend; None = until it is gone."""
        until(lambda: self.count(frontend) == count, f"{frontend} has {count} backends", limit_s)

    def map_ids(self) -> dict[str, int]:
        """Read the kernel's ids of the maps in use."""
        with self.maps() as store:
            return {name: opened.info.id for name, opened in store.maps.items()}


def _count(store: MapStore, frontend: str) -> int | None:
    text, _, protocol = frontend.partition("/")
    value = store.maps["frontends"].lookup(parse_target(text, Protocol[protocol]).pack())
    if value is None:
        return None
    header = store.maps["segments"].lookup(Frontend.unpack(value).inside.to_bytes(4, sys.byteorder))
    return unpack_header(header or bytes(SLOT.size))[0]


def pins(directory: Path) -> list[str]:
    """List what is pinned below a directory."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())
