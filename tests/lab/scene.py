"""A scene: a node with pods, servers, clients, manifests and an agent; what most tests of one node need."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from tests.lab.agents import Agent
from tests.lab.lab import Lab, Pod
from tests.lab.manifests import WEB, Manifests, Port, service
from tests.lab.stage import Backend, Stage, slice_of
from tests.lab.traffic import Client

TARGETS = (8080, 8081)
# Small maps are read back quickly; what needs large or tiny ones says so.
SIZES = {"frontends": 4096, "segments": 8192, "socketOrigins": 1024, "peerOrigins": 1024}


class Scene(Stage):
    """A context manager. ``web``: pods with servers at TARGETS; ``pod`` and ``host``: clients; one Service a file.

    Of several ``nodes``, the first has the agent, and each of the others one pod of ``far``.
    """

    def __init__(self, web: int = 3, *, nodes: int = 1, overlay: bool = False, **config: Any) -> None:
        self.lab = Lab(nodes, overlay=overlay)
        with self.closed_on_failure():
            self.node = self.lab.nodes[0]
            self.web = [self.node.add_pod(f"web-{number}", *TARGETS) for number in range(1, web + 1)]
            self.far = [node.add_pod(f"far-{node.number}", *TARGETS) for node in self.lab.nodes[1:]]
            self.shopper = self.node.add_pod("shopper")
            self.pod = self.shopper.client()
            self.host = self.node.client()
            self.manifests = Manifests(self.node.directory / "manifests")
            self.manifests.write("node", self.node.manifest())
            self.agent = Agent(self.node, self.manifests, **({"mapSizes": SIZES} | config))
        self.agents = [self.agent]
        self._numbers: dict[str, int] = {}

    def close(self) -> None:
        self.lab.close()

    @property
    def clients(self) -> dict[str, Client]:
        """The clients by where they are."""
        return {"pod": self.pod, "host": self.host}

    def ips(self, name: str) -> tuple[str, str]:
        """The ClusterIPs of a Service of this name."""
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        return f"10.96.1.{number}", f"fd00:10:96::1:{number:x}"

    def write(
        self, name: str, backends: Sequence[Backend], ports: Sequence[Port] = WEB, **spec: Any
    ) -> tuple[str, str]:
        """Write the file of a dual-stack Service, and return its ClusterIPs."""
        slices = [slice_of(name, backends, ports, family) for family in (4, 6)]
        self.manifests.write(name, service(name, self.ips(name), ports, **spec), *slices)
        return self.ips(name)

    def publish(self, name: str, pods: Sequence[Pod], ports: Sequence[Port] = WEB, **spec: Any) -> tuple[str, str]:
        """Write a Service over pods and wait until it is programmed; returns its ClusterIPs."""
        ips = self.write(name, pods, ports, **spec)
        self.wait_for(name, len(pods), ports)
        return ips

    def wait_for(self, name: str, count: int | None, ports: Sequence[Port] = WEB) -> None:
        """Wait until every frontend of a Service has so many backends; None = is gone."""
        for ip in self.ips(name):
            for port in ports:
                self.agent.wait_for(f"{f'[{ip}]' if ':' in ip else ip}:{port.number}/{port.protocol}", count)

    def withdraw(self, name: str, ports: Sequence[Port] = WEB) -> None:
        """Delete a Service's file, if it is there, and wait until it is gone from the maps."""
        with contextlib.suppress(FileNotFoundError):
            self.manifests.remove(name)
        self.wait_for(name, None, ports)
