"""Three nodes with an agent each, pods and clients on all of them and outside, and Services of every kind, as YAML.

The agents read one directory: where objects come from is tested elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

from tests.lab.agents import Agent
from tests.lab.lab import Lab, Pod
from tests.lab.manifests import Endpoint, Manifests, Object, Port, endpoint_slice, service
from tests.lab.polling import until
from tests.lab.scene import SIZES
from tests.lab.traffic import Answer, Client

NODES = 3
POD_RANGES = "10.180.0.0/16,fd00:10:180::/48"
PROTOCOLS = ("TCP", "UDP", "SCTP")
START_LIMIT_S = 120  # three agents compile at once
FOLLOW_LIMIT_S = 5
# A Service of every kind has some forty frontends on a node.
_SIZES = SIZES | {"frontends": 4096}
Backend = Pod | Endpoint


class Fleet:
    """A context manager. ``web``: a pod with a server on each node; ``pods``, ``hosts``, ``outside``: clients."""

    def __init__(self, *, overlay: bool = False, **config: Any) -> None:
        self._stack = ExitStack()
        try:
            self.lab = self._stack.enter_context(Lab(NODES, overlay=overlay))
            self.nodes = self.lab.nodes
            self.web = [node.add_pod(f"web-{node.number}", 8080, 8081) for node in self.nodes]
            self.shoppers = [node.add_pod("shopper") for node in self.nodes]
            self.outsider = self.lab.outsider()
            self.pods = [shopper.client() for shopper in self.shoppers]
            self.hosts = [node.client() for node in self.nodes]
            self.outside = self.outsider.client()
            self.manifests = Manifests(self.lab.directory / "manifests")
            self.manifests.write("nodes", *(node.manifest(f"zone-{node.number % 2}") for node in self.nodes))
            config = {"clusterCIDR": POD_RANGES, "mapSizes": _SIZES} | config
            self.agents = [Agent(node, self.manifests, **config) for node in self.nodes]
        except BaseException:
            self.close()
            raise
        self._numbers: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            for agent in self.agents:
                agent.start()
            for agent in self.agents:
                agent.wait(START_LIMIT_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take everything down."""
        self._stack.close()

    @property
    def clients(self) -> dict[str, Client]:
        """Every client, by where it is."""
        inside = {f"pod-{n}": client for n, client in enumerate(self.pods, start=1)}
        return (
            inside | {f"host-{n}": client for n, client in enumerate(self.hosts, start=1)} | {"outside": self.outside}
        )

    def service(self, name: str) -> Service:
        """Name a Service: its addresses and ports are its own."""
        return Service(self, name, self._numbers.setdefault(name, len(self._numbers) + 1))


class Service:
    """A dual-stack Service of all kinds: where it is reached, and what is written of it."""

    def __init__(self, fleet: Fleet, name: str, number: int) -> None:
        self.fleet = fleet
        self.name = name
        self.ips = (f"10.96.2.{number}", f"fd00:10:96::2:{number:x}")
        self.external = (f"198.51.100.{number}", f"2001:db8:51::{number:x}")
        self.balanced = (f"203.0.113.{number}", f"2001:db8:113::{number:x}")
        self.node_port = 31_000 + number
        self.ports = tuple(Port(f"http-{p.lower()}", 80, 8080, p, self.node_port) for p in PROTOCOLS)
        for pair in (self.ips, self.external, self.balanced):
            for address in pair:
                fleet.outsider.route(address, fleet.nodes[0])

    def objects(self, backends: Sequence[Backend], **spec: Any) -> list[Object]:
        """Build the Service and its slices; ``spec`` is of the Service."""
        defaults = {"type": "LoadBalancer", "externalIPs": list(self.external), "ingress": self.balanced}
        slices = []
        for family in (4, 6):
            endpoints = [b.endpoint(family) if isinstance(b, Pod) else b for b in backends]
            fitting = [e for e in endpoints if (":" in e.address) == (family == 6)]
            slices.append(endpoint_slice(self.name, fitting, self.ports, ipv6=family == 6))
        return [service(self.name, self.ips, self.ports, **(defaults | spec)), *slices]

    def publish(self, backends: Sequence[Backend], **spec: Any) -> Self:
        """Write it, and wait until every node has these backends for clients of the cluster."""
        self.write(*self.objects(backends, **spec))
        count = sum(1 for b in backends if isinstance(b, Pod) or ":" not in b.address)
        if spec.get("internalTrafficPolicy") != "Local":
            self.wait_for(count)
        return self

    def write(self, *objects: Object) -> None:
        """Write objects as they are."""
        self.fleet.manifests.write(self.name, *objects)

    def withdraw(self) -> None:
        """Delete it, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fleet.manifests.remove(self.name)

    def wait_for(self, count: int | None) -> None:
        """Wait until every node has so many backends for the ClusterIP; None = until it is gone."""
        for agent in self.fleet.agents:
            for ip in (self.ips[0], f"[{self.ips[1]}]"):
                for protocol in PROTOCOLS:
                    agent.wait_for(f"{ip}:80/{protocol}", count)
            until(agent.is_settled, "everything is programmed")

    def at(self, kind: str, family: int, node: int = 0) -> tuple[str, int]:
        """Address and port by kind of frontend; family 0 = IPv4; ``node``: whose NodePort, from 0."""
        if kind == "NodePort":
            return self.fleet.nodes[node].addresses[family], self.node_port
        addresses = {"ClusterIP": self.ips, "externalIP": self.external, "LoadBalancer": self.balanced}[kind]
        return addresses[family], 80


def follow(ask: Callable[[], Answer], wanted: str, limit_s: float = FOLLOW_LIMIT_S) -> Answer:
    """Ask until the answer is this server's name, or this error."""
    return until(lambda: (a := ask()) and (a.name or a.error) == wanted and a, f"{wanted} answers", limit_s)  # type: ignore[return-value]
