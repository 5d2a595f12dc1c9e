"""A scene: a node with pods, servers, clients, manifests and an agent; what most tests of one node need."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Self

from tests.lab.agents import Agent
from tests.lab.lab import Lab, Pod
from tests.lab.manifests import WEB, Endpoint, Manifests, Port, endpoint_slice, service
from tests.lab.traffic import Client

TARGETS = (8080, 8081)
# Small maps are read back quickly; what needs large or tiny ones says so.
SIZES = {"frontends": 4096, "segments": 8192, "socketOrigins": 1024, "peerOrigins": 1024}
Backend = Pod | Endpoint


class Scene:
    """A context manager. ``web``: pods with servers at TARGETS; ``pod`` and ``host``: clients; one Service a file.

    Of several ``nodes``, the first has the agent, and each of the others one pod of ``far``.
    """

    def __init__(self, web: int = 3, *, nodes: int = 1, overlay: bool = False, **config: Any) -> None:
        self.lab = Lab(nodes, overlay=overlay)
        try:
            self.node = self.lab.nodes[0]
            self.web = [self.node.add_pod(f"web-{number}", *TARGETS) for number in range(1, web + 1)]
            self.far = [node.add_pod(f"far-{node.number}", *TARGETS) for node in self.lab.nodes[1:]]
            self.shopper = self.node.add_pod("shopper")
            self.pod = self.shopper.client()
            self.host = self.node.client()
            self.manifests = Manifests(self.node.directory / "manifests")
            self.manifests.write("node", self.node.manifest())
            self.agent = Agent(self.node, self.manifests, **({"mapSizes": SIZES} | config))
        except BaseException:
            self.lab.close()
            raise
        self._numbers: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            self.agent.start().wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take everything down."""
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
        slices = [self.slice(name, backends, ports, family) for family in (4, 6)]
        self.manifests.write(name, service(name, self.ips(name), ports, **spec), *slices)
        return self.ips(name)

    def slice(self, name: str, backends: Sequence[Backend], ports: Sequence[Port] = WEB, family: int = 4) -> Any:
        """Build one EndpointSlice: pods in their address of the family, endpoints where they are of it."""
        endpoints = [backend.endpoint(family) if isinstance(backend, Pod) else backend for backend in backends]
        fitting = [e for e in endpoints if (":" in e.address) == (family == 6)]
        return endpoint_slice(name, fitting, ports, ipv6=family == 6)

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
