"""Three nodes with a server each, clients on all of them and outside, and where a Service of every kind is reached."""

from __future__ import annotations

import http.client
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

from tests.cluster.api_servers import AnyApiServer, write_kubeconfig
from tests.cluster.relay import Relay
from tests.lab import netns
from tests.lab.agents import Agent
from tests.lab.lab import Lab, Node
from tests.lab.scene import TARGETS
from tests.lab.stage import Stage
from tests.lab.traffic import Client

COUNT = 3
POD_RANGES = "10.180.0.0/16,fd00:10:180::/48"


class Nodes(Stage):
    """``web``: a pod on each node with a server that says its name; ``pods``, ``hosts``, ``outside``: clients."""

    START_LIMIT_S = 120.0  # three agents compile at once

    def __init__(self, *, overlay: bool = False) -> None:
        self._stack = ExitStack()
        with self.closed_on_failure():
            self.lab = self._stack.enter_context(Lab(COUNT, overlay=overlay))
            self.nodes = self.lab.nodes
            self.web = [node.add_pod(f"web-{node.number}", *TARGETS) for node in self.nodes]
            self.shoppers = [node.add_pod(f"shopper-{node.number}") for node in self.nodes]
            self.outsider = self.lab.outsider()
            self.pods = [pod.client() for pod in self.shoppers]
            self.hosts = [node.client() for node in self.nodes]
            self.outside = self.outsider.client()

    def close(self) -> None:
        self._stack.close()

    @property
    def clients(self) -> dict[str, Client]:
        """Every client, by where it is: ``pod-1`` to ``pod-3``, ``host-1`` to ``host-3``, ``outside``."""
        named = {f"pod-{number}": client for number, client in enumerate(self.pods, start=1)}
        named |= {f"host-{number}": client for number, client in enumerate(self.hosts, start=1)}
        return named | {"outside": self.outside}


class Offer:
    """Where a dual-stack Service of every kind is reached: each pair of addresses is IPv4's and IPv6's."""

    nodes: list[Node]
    ips: tuple[str, str]
    external: tuple[str, str]
    balanced: tuple[str, str]
    node_port: int

    def at(self, kind: str, family: int, node: int = 0) -> tuple[str, int]:
        """Address and port by kind of frontend; family 0 = IPv4, 1 = IPv6; ``node``: whose NodePort, from 0."""
        if kind == "NodePort":
            return self.nodes[node].addresses[family], self.node_port
        return {"ClusterIP": self.ips, "externalIP": self.external, "LoadBalancer": self.balanced}[kind][family], 80


def watching_agent(stack: ExitStack, node: Node, api: AnyApiServer, **config: Any) -> Agent:
    """Make the agent of a node that has this API server for its source."""
    stack.enter_context(Relay(node.netns, urlsplit(api.url).port or 0))
    kubeconfig = write_kubeconfig(node.directory / "kubeconfig", api)
    return Agent(node, flags=("--kubeconfig", str(kubeconfig)), **config)


def health_status(place: str, address: str, port: int) -> int:
    """Ask for a Service's health on a node, from a network namespace; 0 = nobody listens."""
    with netns.entered(place):
        connection = http.client.HTTPConnection(address, port, timeout=5)
        try:
            connection.request("GET", "/anything")
            return connection.getresponse().status
        except ConnectionRefusedError:
            return 0
        finally:
            connection.close()
