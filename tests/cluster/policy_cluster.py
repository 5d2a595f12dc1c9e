"""Two nodes under policy with nine pods in three namespaces, written as users write them.

fabric
  ├─ node-1 (bridged)  x/a x/c y/b z/a z/c        labels: app=a, b or c; of namespaces: ns=x, y or z
  └─ node-2 (routed)   x/b y/a y/c z/b            each with a Service: ports 1080 and 1081 lead to 80 and 81
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack, suppress
from typing import Any

from agent.core.policy_records import NamespaceRecord, PodRecord
from agent.core.records import Protocol
from agent.observe.control import ask
from tests import policy_builders as records
from tests.cluster.api_driver import (
    CLUSTER_POLICIES,
    NODES,
    POLICIES,
    SERVICES,
    SLICES,
    Refused,
    define_cluster_policies,
)
from tests.cluster.api_driver import NAMESPACES as NAMESPACE_OBJECTS
from tests.cluster.api_driver import PODS as POD_OBJECTS
from tests.cluster.api_servers import AnyApiServer, driver
from tests.cluster.nodes import POD_RANGES, watching_agent
from tests.cluster.policy_tables import (
    NAMES,
    NAMESPACES,
    PODS,
    PORTS,
    PROTOCOLS,
    SERVICE_PORTS,
    Prober,
    Question,
    Tables,
)
from tests.lab.agents import Agent
from tests.lab.lab import Lab, Pod
from tests.lab.manifests import Object, Port, namespace, network_policy, pod, service
from tests.lab.polling import until
from tests.lab.prober import ACKNOWLEDGED
from tests.lab.stage import Stage, slice_of

SIZES = {"frontends": 4096, "segments": 8192, "socketOrigins": 16_384, "peerOrigins": 16_384, "connections": 262_144}
ADDRESSES = {
    name: (f"10.180.{1 + i % 2}.{10 + i // 2}", f"fd00:10:180:{1 + i % 2}::{10 + i // 2}")
    for i, name in enumerate(PODS)
}
SERVICE_ADDRESSES = {name: (f"10.96.1.{i}", f"fd00:96::1{i:02x}") for i, name in enumerate(PODS, start=1)}
_SERVICE = tuple(
    Port(f"{protocol.lower()}-{port}", SERVICE_PORTS[port], port, protocol)
    for protocol, port in itertools.product(("TCP", "UDP", "SCTP"), PORTS)
)
_BEACONS = "beacons"
_SYNC_LIMIT_S = 10.0


def named_ports(name: str) -> tuple[tuple[str, int, str], ...]:
    """Name the ports of a pod: ``web`` is 81 of b, and 80 of the others."""
    return (("serve-80-tcp", 80, "TCP"), ("serve-81-udp", 81, "UDP"), ("web", 81 if name == "b" else 80, "TCP"))


def pod_record(pod: str, **labels: str) -> PodRecord:
    """Describe a pod as the reference takes it."""
    name = pod[-1]
    ports = [(port, number, Protocol[protocol]) for port, number, protocol in named_ports(name)]
    return records.pod(pod, *ADDRESSES[pod], ports=ports, **{"app": name, **labels})


def namespace_record(name: str, **labels: str) -> NamespaceRecord:
    """Describe a namespace as the reference takes it."""
    return records.namespace(name, **{"ns": name, **labels})


def _collection(owner: str) -> str:
    """Name where a namespace's policies are; those of the cluster are in none."""
    return POLICIES.format(owner) if owner else CLUSTER_POLICIES


def asked(host: Prober, name: str) -> set[str]:
    """Ask a pod from a node, in every protocol and family; returns what was heard: ``""`` is silence."""
    host.send([(protocol, address, 80) for protocol in PROTOCOLS for address in ADDRESSES[name]])
    return {"answered" if said in {ACKNOWLEDGED, f"{name} 80"} else said for said in host.hear()}


class PolicyCluster(Stage):
    """A context manager; ``tables`` asks; ``hosts``: a prober of each node's own."""

    START_LIMIT_S = 120.0
    agents: list[Agent]

    def __init__(self, api: AnyApiServer, **config: Any) -> None:
        self._stack = ExitStack()
        self._policies: dict[tuple[str, str], Object] = {}
        self._beacon = 0
        self._relabelled: dict[tuple[str, str], Object] = {}
        self._written: set[tuple[str, str]] = set()
        self._ended: set[tuple[str, str]] = set()
        with self.closed_on_failure():
            self.lab = self._stack.enter_context(Lab(2))
            self.pods = {name: self._add_pod(number, name) for number, name in enumerate(PODS)}
            self.hosts = [Prober(node.host) for node in self.lab.nodes]
            self.api = driver(api)
            define_cluster_policies(self.api)
            self._write_objects()
            given = {"clusterCIDR": POD_RANGES, "mapSizes": SIZES, "networkPolicy": "standard", **config}
            self.agents = [watching_agent(self._stack, node, api, **given) for node in self.lab.nodes]
            self.tables = Tables({name: pod.place for name, pod in self.pods.items()}, self.target)
            self._stack.callback(self.tables.close)

    def close(self) -> None:
        self._stack.close()

    def target(self, question: Question) -> tuple[str, int]:
        """Say at which address and port a question is asked."""
        if question.is_by_service:
            return SERVICE_ADDRESSES[question.destination][question.family == 6], SERVICE_PORTS[question.port]
        return ADDRESSES[question.destination][question.family == 6], question.port

    def set(self, *policies: Object) -> None:
        """Have these policies and no others, and wait until every agent has them in force.

        ClusterNetworkPolicies are not to be edited: of these, only their names are waited for.
        """
        wanted = {(it["metadata"].get("namespace", ""), it["metadata"]["name"]): it for it in policies}
        assert len(wanted) == len(policies), "two policies of one name"
        for owner, name in self._policies.keys() - wanted.keys():
            self.api.delete(_collection(owner), name)
        for key, policy in wanted.items():
            if self._policies.get(key) != policy:
                write = self.api.update if key in self._policies else self.api.create
                write(_collection(key[0]), policy)
        self._policies = wanted
        self.sync()

    def sync(self) -> None:
        """Wait until every agent has what was written of policies so far, by one that is written last.

        A watch delivers the changes of its kind in their order.
        """
        self._beacon += 1
        self.api.create(POLICIES.format(_BEACONS), network_policy(f"beacon-{self._beacon}", namespace=_BEACONS))
        if self._beacon > 1:
            self.api.delete(POLICIES.format(_BEACONS), f"beacon-{self._beacon - 1}")
        for agent in self.agents:
            until(lambda agent=agent: self._has_all(agent), f"{agent.node.name} has the policies", _SYNC_LIMIT_S)
            until(agent.is_settled, f"{agent.node.name} has programmed everything", _SYNC_LIMIT_S)

    def _has_all(self, agent: Agent) -> bool:
        found = {(it["namespace"], it["name"]) for it in ask(agent.state_dir, "policies")}
        return found == self._policies.keys() | {(_BEACONS, f"beacon-{self._beacon}")}

    def label_pod(self, pod: str, **labels: str | None) -> None:
        """Change labels of a pod until `reset`; None removes one. Nothing waits for it."""
        owner, name = pod.split("/")
        self._label(POD_OBJECTS.format(owner), name, {"app": name}, labels)

    def label_namespace(self, name: str, **labels: str | None) -> None:
        """Change labels of a namespace until `reset`; None removes one. Nothing waits for it."""
        self._label(NAMESPACE_OBJECTS, name, {"ns": name}, labels)

    def _label(self, collection: str, name: str, plain: dict[str, str], labels: dict[str, str | None]) -> None:
        before = self._relabelled.setdefault((collection, name), plain)
        before |= {key: None for key in labels if key not in before}
        self.api.patch(collection, name, {"metadata": {"labels": labels}})

    def write_pod(self, owner: str, name: str, source: Object) -> None:
        """Have a pod until `reset`, in the place of one of that name if there is one; its status is as given."""
        self.end_pod(owner, name)
        self._written.add((owner, name))
        self._create_pod(owner, source)

    def end_pod(self, owner: str, name: str) -> None:
        """Have a pod no more, at once, until `reset`."""
        self._ended.add((owner, name))
        with suppress(Refused):
            self.api.delete(POD_OBJECTS.format(owner), name, gracePeriodSeconds="0")
        self._written.discard((owner, name))

    def describe(self, pod_name: str, **labels: str) -> Object:
        """Describe a pod of the lab as Kubernetes does."""
        owner, name = pod_name.split("/")
        made = self.pods[pod_name]
        return pod(name, made.node.name, made.addresses, name, namespace=owner, ports=named_ports(name), **labels)

    def reset(self) -> None:
        """Take away every policy, and have every pod again, and everything its labels."""
        for owner, name in self._written | self._ended:
            with suppress(Refused):
                self.api.delete(POD_OBJECTS.format(owner), name, gracePeriodSeconds="0")
            if f"{owner}/{name}" in self.pods:
                self._create_pod(owner, self.describe(f"{owner}/{name}"))
        self._written, self._ended = set(), set()
        for (collection, name), labels in self._relabelled.items():
            self.api.patch(collection, name, {"metadata": {"labels": labels}})
        self._relabelled = {}
        self.set()

    def _create_pod(self, owner: str, source: Object) -> None:
        self.api.create(POD_OBJECTS.format(owner), source)
        self.api.set_status(POD_OBJECTS.format(owner), source["metadata"]["name"], source["status"])

    def _add_pod(self, number: int, name: str) -> Pod:
        made = self.lab.nodes[number % 2].add_pod(name, *PORTS)
        assert made.addresses == ADDRESSES[name]
        return made

    def _write_objects(self) -> None:
        for node in self.lab.nodes:
            self.api.create(NODES, node.manifest())
        for name in (*NAMESPACES, _BEACONS):
            self.api.create(NAMESPACE_OBJECTS, namespace(name, ns=name))
        for owner, name in itertools.product(NAMESPACES, NAMES):
            self._write_pod(owner, name)

    def _write_pod(self, owner: str, name: str) -> None:
        """Write a pod and its Service."""
        made = self.pods[f"{owner}/{name}"]
        self._create_pod(owner, self.describe(made.name))
        objects = [(SERVICES, service(name, SERVICE_ADDRESSES[made.name], _SERVICE))]
        objects += [(SLICES, slice_of(name, [made], _SERVICE, family)) for family in (4, 6)]
        for collection, source in objects:
            source["metadata"]["namespace"] = owner
            self.api.create(collection.format(owner), source)
