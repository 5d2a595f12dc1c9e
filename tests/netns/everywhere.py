"""Services with every kind of frontend, for one node's scene: who asks where, and what a backend may see of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.lab.manifests import Port
from tests.lab.polling import until
from tests.lab.scene import Scene
from tests.lab.stage import Backend
from tests.lab.traffic import Client

KINDS = ("ClusterIP", "NodePort", "externalIP", "LoadBalancer")
ORIGINS = ("pod", "host", "outside")
POD_RANGES = "10.180.0.0/16,fd00:10:180::/48"


@dataclass(frozen=True, slots=True)
class Everywhere:
    """A Service's frontends: for each kind, both addresses and the port."""

    name: str
    frontends: dict[str, tuple[tuple[str, str], int]]
    ports: tuple[Port, ...]

    def at(self, kind: str, family: int) -> tuple[str, int]:
        """Address and port of a frontend; family 0 = IPv4, 1 = IPv6."""
        addresses, port = self.frontends[kind]
        return addresses[family], port


def ports(node_port: int) -> tuple[Port, ...]:
    """A port in every protocol."""
    return tuple(Port(f"http-{p.lower()}", 80, 8080, p, node_port) for p in ("TCP", "UDP", "SCTP"))


def publish(
    scene: Scene, name: str, backends: Sequence[Backend], policy: str = "Cluster", **spec: object
) -> Everywhere:
    """Write a Service with every kind of frontend, and wait until it is programmed; nodes outside are told the way."""
    ips = scene.ips(name)
    number = int(ips[0].rsplit(".", 1)[1])
    own_ports = ports(30_000 + number)
    external = (f"198.51.100.{number}", f"2001:db8:51::{number:x}")
    balanced = (f"203.0.113.{number}", f"2001:db8:113::{number:x}")
    scene.write(
        name,
        backends,
        own_ports,
        **{"type": "LoadBalancer", "externalIPs": list(external), "ingress": balanced, **spec},
        externalTrafficPolicy=policy,
    )
    for outsider in scene.lab.outsiders:
        for address in (*ips, *external, *balanced):
            outsider.route(address, scene.node)
    made = Everywhere(
        name,
        {
            "ClusterIP": (ips, 80),
            "NodePort": (scene.node.addresses, 30_000 + number),
            "externalIP": (external, 80),
            "LoadBalancer": (balanced, 80),
        },
        own_ports,
    )
    for kind in KINDS:
        for family in (0, 1):
            address, port = made.at(kind, family)
            text = f"{f'[{address}]' if family else address}:{port}"
            for protocol in ("TCP", "UDP", "SCTP"):
                until(lambda: scene.agent.count(f"{text}/{protocol}") is not None, f"{text} is there")  # noqa: B023
    until(scene.agent.is_settled, "everything is programmed")
    return made


def own_addresses(scene: Scene) -> set[str]:
    """The addresses that a masqueraded client may be seen with."""
    bridge = ("10.180.1.1", "fd00:10:180:1::1")
    return {*scene.node.addresses, *bridge}


def client_address(scene: Scene, origin: str, family: int) -> set[str]:
    """What a backend sees of a client that is not masqueraded."""
    if origin == "pod":
        return {scene.shopper.addresses[family]}
    return own_addresses(scene) if origin == "host" else {scene.lab.outsiders[0].addresses[family]}


def is_masqueraded(kind: str, policy: str, origin: str) -> bool:
    """Say whether a backend sees the node (the table of origins and frontends)."""
    if origin == "host":
        return True
    return origin == "outside" if kind == "ClusterIP" else policy == "Cluster"


def clients_of(scene: Scene, outside: Client) -> dict[str, Client]:
    """Give the clients by where they are."""
    return {**scene.clients, "outside": outside}
