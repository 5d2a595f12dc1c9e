"""Three nodes with an agent each, an API server, clients everywhere, and Services that are written as users write them.

outside ──┐ fabric
          ├─ node-1 (bridged)  web-1, a client pod, a client of the node's own
          ├─ node-2 (routed)   web-2, ...
          └─ node-3 (bridged)  web-3, ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from tests.cluster.api_driver import NODES, SERVICES, SLICES
from tests.cluster.api_servers import AnyApiServer, driver
from tests.cluster.nodes import POD_RANGES, Nodes, Offer, watching_agent
from tests.lab.lab import Pod
from tests.lab.manifests import NAMESPACE, Endpoint, Object, Port, endpoint_slice, node, service
from tests.lab.polling import until
from tests.lab.scene import TARGETS
from tests.lab.stage import Backend, slice_of
from tests.lab.traffic import Client

ZONES = ("zone-a", "zone-b", "zone-a")
KINDS = ("ClusterIP", "NodePort", "externalIP", "LoadBalancer")
SIZES = {"frontends": 4096, "segments": 8192, "socketOrigins": 4096, "peerOrigins": 4096}
SYNC_LIMIT_S = 15
_BEACON = "10.96.255.1"


class ThreeNodes(Nodes):
    """A context manager; ``config`` is the agents'."""

    def __init__(self, api: AnyApiServer, **config: Any) -> None:
        super().__init__()
        self.config = {"clusterCIDR": POD_RANGES, "mapSizes": SIZES, **config}
        self._beacon = self._serial = 0
        with self.closed_on_failure():
            for network in ("10.96.0.0/16", "fd00:96::/112", "198.18.0.0/15", "2001:db8::/32"):
                self.outsider.route(network, self.nodes[0])
            self.api = driver(api, NAMESPACE)
            for found, zone in zip(self.nodes, ZONES, strict=True):
                self.api.create(NODES, node(found.name, found.addresses, found.pod_ranges, zone))
            self.agents = [watching_agent(self._stack, node, api, **self.config) for node in self.nodes]

    def service(self) -> Service:
        """Name a Service: its addresses and ports are nobody else's."""
        self._serial += 1
        return Service(self, self._serial)

    def sync(self) -> None:
        """Wait until every agent has programmed what was written so far: a Service and a slice written last are there.

        Watches deliver the changes of one kind of object in their order.
        """
        self._beacon += 1
        port, count = Port("beacon", self._beacon, 9), 1 + self._beacon % 2
        endpoints = [Endpoint(f"192.0.2.{number}") for number in range(1, 1 + count)]
        objects = (
            (SERVICES, service("beacon", [_BEACON], (port,))),
            (SLICES, endpoint_slice("beacon", endpoints, (port,))),
        )
        for collection, source in objects:
            write = self.api.create if self._beacon == 1 else self.api.update
            write(collection.format(NAMESPACE), source)
        for agent in self.agents:
            agent.wait_for(f"{_BEACON}:{port.number}/TCP", count, SYNC_LIMIT_S)
            until(agent.is_settled, f"{agent.node.name} has programmed everything", SYNC_LIMIT_S)


class Service(Offer):
    """A dual-stack Service of every kind: where it is reached, and what is written of it. ``ports`` may be replaced."""

    def __init__(self, cluster: ThreeNodes, number: int) -> None:
        self._cluster = cluster
        self.nodes = cluster.nodes
        self._written: dict[tuple[str, str], Object] = {}
        high, low = 1 + number // 250, 1 + number % 250
        self.name = f"svc-{number}"
        self.ips = (f"10.96.{high}.{low}", f"fd00:96::{high:x}{low:02x}")
        self.external = (f"198.18.{high}.{low}", f"2001:db8:18::{number:x}")
        self.balanced = (f"198.19.{high}.{low}", f"2001:db8:19::{number:x}")
        self.node_port = 30_000 + number
        self.health_port = 32_000 + number
        self.ports = self.in_protocols("TCP", "UDP")

    def in_protocols(self, *protocols: str) -> tuple[Port, ...]:
        """Give port 80, and the NodePort, in these protocols."""
        return tuple(
            Port(f"http-{protocol.lower()}", 80, TARGETS[0], protocol, self.node_port) for protocol in protocols
        )

    def publish(self, backends: Sequence[Backend] = (), *, slices: Sequence[Object] | None = None, **spec: Any) -> Self:
        """Write the whole Service and its slices, and wait until every node has it; ``spec`` is what it describes."""
        self.write(self.describe(**spec), self.slices(backends) if slices is None else slices)
        self._cluster.sync()
        return self

    def describe(
        self, *, labels: dict[str, str] | None = None, ingress: Sequence[Object] | None = None, **spec: Any
    ) -> Object:
        """Build the Service: of type LoadBalancer, with every kind of frontend, unless ``spec`` says otherwise."""
        kind = spec.setdefault("type", "LoadBalancer")
        made = service(self.name, spec.pop("ips", self.ips), self.ports, **spec)
        made["metadata"]["labels"] = labels or {}
        if kind == "ExternalName":
            made["spec"] = {"type": kind, "externalName": "example.invalid", "ports": made["spec"]["ports"]}
        if kind in ("ClusterIP", "ExternalName"):
            for port in made["spec"]["ports"]:
                port.pop("nodePort", None)
        if kind == "LoadBalancer":
            made["spec"].setdefault("externalIPs", list(self.external))
            given = [{"ip": ip, "ipMode": "VIP"} for ip in self.balanced] if ingress is None else list(ingress)
            made["status"] = {"loadBalancer": {"ingress": given}}
        return made

    def slices(self, backends: Sequence[Backend], ports: Sequence[Port] | None = None, name: str = "") -> list[Object]:
        """Build a slice for each family: pods in both, endpoints in their own."""
        return [
            slice_of(self.name, backends, ports or self.ports, family, f"{self.name}{name}-{family}")
            for family in (4, 6)
        ]

    def write(self, described: Object | None, slices: Sequence[Object]) -> None:
        """Create, update and delete until the API server has these objects of the Service, and no others."""
        wanted = {(SLICES, each["metadata"]["name"]): each for each in slices}
        wanted |= {(SERVICES, self.name): described} if described else {}
        for path, name in self._written.keys() - wanted.keys():
            self._cluster.api.delete(path.format(NAMESPACE), name)
        for (path, name), source in wanted.items():
            self._upsert(path, name, source)
        self._written = wanted

    def _upsert(self, path: str, name: str, source: Object) -> None:
        collection, api = path.format(NAMESPACE), self._cluster.api
        written = self._written.get((path, name))
        if written == source:
            return
        (api.update if written else api.create)(collection, source)
        if "status" in source:
            api.patch(collection, f"{name}/status", {"status": source["status"]})

    def set_backends(self, backends: Sequence[Backend]) -> None:
        """Replace the slices, and wait until every node has them."""
        self.write(self._written.get((SERVICES, self.name)), self.slices(backends))
        self._cluster.sync()

    def delete(self) -> None:
        """Delete everything, without waiting."""
        self.write(None, ())


def endpoints(pods: Iterable[Pod], **conditions: bool) -> list[Endpoint]:
    """Describe pods in both families."""
    return [pod.endpoint(family, **conditions) for pod in pods for family in (4, 6)]


def outcome(client: Client, mode: str, target: tuple[str, int], limit_s: float = 5.0) -> str:
    """Ask once: who answered, or the error."""
    answer = client.ask(mode, *target, limit_s)
    return answer.name or answer.error


def follow(ask: Callable[[], str], wanted: str, limit_s: float = 5.0) -> None:
    """Ask until the outcome is the wanted one."""
    until(lambda: ask() == wanted, f"{wanted} answers", limit_s)
