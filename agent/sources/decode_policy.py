"""Decode what policy is made of: pods, namespaces, and the policies of both APIs.

Pods are many and change often: what is equal among them (labels, named ports) is one object, and only what policy
reads is read.
"""

from __future__ import annotations

from functools import lru_cache
from sys import intern
from typing import Any

from agent.core.events import AnyRecord, Upsert
from agent.core.policy_records import (
    ClusterPolicyRecord,
    Labels,
    NamedPort,
    NamespaceRecord,
    NetworkPolicyRecord,
    PodRecord,
    not_understood,
)
from agent.core.records import Fault, Kind, ObjectKey
from agent.sources import convert_policy as convert
from agent.sources import convert_tiers as tiers
from agent.sources import partial_pod, partial_policy
from agent.sources.reader import Reader
from agent.sources.wire_policy import (
    NetworkPolicySpec,
    PodSpec,
    PodStatus,
    WireClusterPolicy,
    WireNamespace,
    WireNetworkPolicy,
    WirePod,
)

NAME_LABEL = "kubernetes.io/metadata.name"

_SHARED_LABELS = 4096
_SHARED_WORDS = 16_384
_NO_SPEC = PodSpec()
_NO_STATUS = PodStatus()


def readers(node_name: str) -> dict[Kind, Reader[Any]]:
    """Make the readers of policy's kinds, as the node of this name sees them."""
    records = _Records(node_name)
    return {
        Kind.POD: Reader(Kind.POD, WirePod, records.pod, records.partial_pod, leaves_out=True),
        Kind.NAMESPACE: Reader(Kind.NAMESPACE, WireNamespace, records.namespace),
        Kind.NETWORK_POLICY: Reader(
            Kind.NETWORK_POLICY, WireNetworkPolicy, records.network_policy, partial_policy.network_policy
        ),
        Kind.CLUSTER_NETWORK_POLICY: Reader(
            Kind.CLUSTER_NETWORK_POLICY, WireClusterPolicy, records.cluster_policy, partial_policy.cluster_policy
        ),
    }


class _Records:
    """Makes records; what is shared is kept in tables of a fixed size, because the words of pods come and go."""

    def __init__(self, node_name: str) -> None:
        self._node_name = node_name
        self._word = lru_cache(_SHARED_WORDS)(_same)
        self._labels = lru_cache(_SHARED_LABELS)(self._make_labels)
        self._ports = lru_cache(_SHARED_LABELS)(_make_ports)

    def pod(self, key: ObjectKey, pod: WirePod) -> Upsert:
        spec, status, metadata = pod.spec or _NO_SPEC, pod.status or _NO_STATUS, pod.metadata
        record = PodRecord(
            key,
            convert.pod_addresses(spec, status),
            self._labels(convert.labels(metadata.labels)),
            self._ports(tuple(convert.named_ports(spec))),
            spec.node_name == self._node_name,
            metadata.deletion_timestamp is not None,
            metadata.creation_timestamp or "",
        )
        return Upsert(record)

    def partial_pod(self, key: ObjectKey, value: object) -> tuple[AnyRecord, list[Fault]]:
        pod, faults = partial_pod.readable(value)
        return self.pod(key, pod).record, faults

    def namespace(self, key: ObjectKey, namespace: WireNamespace) -> Upsert:
        said = (namespace.metadata.labels or {}) | {NAME_LABEL: key.name}
        record = NamespaceRecord(key, self._labels(convert.labels(said)))
        return Upsert(record)

    def network_policy(self, key: ObjectKey, policy: WireNetworkPolicy) -> Upsert:
        spec = policy.spec
        has_ingress, has_egress = _directions(spec)
        ingress = convert.rules(spec.ingress or (), "spec.ingress", "from")
        egress = convert.rules(spec.egress or (), "spec.egress", "to")
        record = NetworkPolicyRecord(
            key,
            convert.selector(spec.pod_selector, "spec.podSelector"),
            ingress if has_ingress else None,
            egress if has_egress else None,
        )
        return Upsert(record)

    def cluster_policy(self, key: ObjectKey, policy: WireClusterPolicy) -> Upsert:
        spec = policy.spec
        record = ClusterPolicyRecord(
            key,
            spec.tier,
            spec.priority,
            *tiers.subject(spec.subject, "spec.subject"),
            tiers.rules(spec.ingress or (), "spec.ingress", "from"),
            tiers.rules(spec.egress or (), "spec.egress", "to"),
        )
        return Upsert(record, not_understood(record))

    def _make_labels(self, labels: Labels) -> Labels:
        word = self._word
        return tuple([(word(name), word(value)) for name, value in labels])


def _directions(spec: NetworkPolicySpec) -> tuple[bool, bool]:
    """Tell whether a policy is about ingress, and about egress. Source: NetworkPolicySpec.policyTypes."""
    types = spec.policy_types
    return ("Ingress" in types, "Egress" in types) if types else (True, bool(spec.egress))


def _make_ports(ports: tuple[NamedPort, ...]) -> tuple[NamedPort, ...]:
    """Keep the first port of a name and protocol."""
    found: dict[tuple[str, int], NamedPort] = {}
    for port in ports:
        found.setdefault((port.name, port.protocol), port._replace(name=intern(port.name)))
    return tuple(found.values())


def _same(word: str) -> str:
    return word
