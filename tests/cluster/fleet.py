"""Three nodes with an agent each, pods and clients on all of them and outside, and Services of every kind, as YAML.

The agents read one directory: where objects come from is tested elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Self

from tests.cluster.nodes import POD_RANGES, Nodes, Offer
from tests.lab.agents import Agent
from tests.lab.lab import Pod
from tests.lab.manifests import Manifests, Object, Port, service
from tests.lab.polling import until
from tests.lab.scene import SIZES
from tests.lab.stage import Backend, slice_of
from tests.lab.traffic import Answer

PROTOCOLS = ("TCP", "UDP", "SCTP")
FOLLOW_LIMIT_S = 5
# A Service of every kind has some forty frontends on a node.
_SIZES = SIZES | {"maglevTables": 8}


class Fleet(Nodes):
    """A context manager; ``config`` is the agents'."""

    def __init__(self, *, overlay: bool = False, **config: Any) -> None:
        super().__init__(overlay=overlay)
        with self.closed_on_failure():
            self.manifests = Manifests(self.lab.directory / "manifests")
            self.manifests.write("nodes", *(node.manifest(f"zone-{node.number % 2}") for node in self.nodes))
            config = {"clusterCIDR": POD_RANGES, "mapSizes": _SIZES} | config
            self.agents = [Agent(node, self.manifests, **config) for node in self.nodes]
        self._numbers: dict[str, int] = {}

    def service(self, name: str) -> Service:
        """Name a Service: its addresses and ports are its own."""
        return Service(self, name, self._numbers.setdefault(name, len(self._numbers) + 1))


class Service(Offer):
    """A dual-stack Service of all kinds: where it is reached, and what is written of it."""

    def __init__(self, fleet: Fleet, name: str, number: int) -> None:
        self.fleet = fleet
        self.nodes = fleet.nodes
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
        slices = [slice_of(self.name, backends, self.ports, family) for family in (4, 6)]
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


def follow(ask: Callable[[], Answer], wanted: str, limit_s: float = FOLLOW_LIMIT_S) -> Answer:
    """Ask until the answer is this server's name, or this error."""
    return until(lambda: (a := ask()) and (a.name or a.error) == wanted and a, f"{wanted} answers", limit_s)  # type: ignore[return-value]
