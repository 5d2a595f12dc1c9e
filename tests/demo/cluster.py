"""The cluster of the demo: two nodes, a shop's pods on both, one directory of YAML, an agent a node.

Services: ``web`` (pods on both nodes), ``empty`` (nobody behind it). Both are dual stack, TCP and UDP.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.lab.agents import Agent
from tests.lab.lab import Lab, Pod
from tests.lab.manifests import WEB, Manifests, endpoint_slice, namespace, network_policy, service
from tests.lab.traffic import Client

WEB_IPS = ("10.96.0.10", "fd00:10:96::10")
EMPTY_IPS = ("10.96.0.11", "fd00:10:96::11")
PORT = WEB[0].number


@dataclass(slots=True)
class Cluster:
    """What the steps use. ``clients`` by where they are: a pod of node-1, the host node-2."""

    lab: Lab
    manifests: Manifests
    web: list[Pod]
    agents: list[Agent]
    clients: dict[str, Client]

    def scale(self, count: int) -> None:
        """Let the first ``count`` web pods be behind the Service, by editing its manifest."""
        slices = [
            endpoint_slice("web", [pod.endpoint(family) for pod in self.web[:count]], ipv6=family == 6)
            for family in (4, 6)
        ]
        pods = [pod.manifest("web") for pod in self.web[:count]]
        self.manifests.write("web", service("web", WEB_IPS), *slices, *pods)

    def let_in(self, *apps: str) -> None:
        """Have a NetworkPolicy that lets the pods of these apps in to the web pods, and nobody else."""
        rules = [{"from": [{"podSelector": {"matchLabels": {"app": app}}}]} for app in apps]
        self.manifests.write("policy", network_policy("web", "web", policyTypes=["Ingress"], ingress=rules))

    def open(self) -> None:
        """Have no NetworkPolicy."""
        self.manifests.remove("policy")


def build(lab: Lab) -> Cluster:
    """Make pods, servers and YAML on a new lab; start no agent yet."""
    one, two = lab.nodes
    target = WEB[0].target
    web = [node.add_pod(f"web-{number}", target) for number, node in enumerate((one, two, one, two), start=1)]
    shopper = one.add_pod("shopper")
    manifests = Manifests(lab.directory / "manifests")
    manifests.write("nodes", *(node.manifest() for node in lab.nodes))
    manifests.write("empty", service("empty", EMPTY_IPS))
    manifests.write("shopper", namespace(), shopper.manifest("shopper"))
    clients = {"pod on node-1": shopper.client(), "host node-2": two.client()}
    agents = [Agent(node, manifests, networkPolicy="standard", flowSample=1) for node in lab.nodes]
    cluster = Cluster(lab, manifests, web, agents, clients)
    cluster.scale(2)
    return cluster
