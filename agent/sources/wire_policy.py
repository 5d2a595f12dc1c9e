"""The shape of what policy is made of, as `wire` has that of Services: the fields that are read, and nothing else.

Source: Kubernetes API v1 Pod and Namespace, networking.k8s.io/v1 NetworkPolicy, policy.networking.k8s.io/v1alpha2
ClusterNetworkPolicy.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from agent.core.policy_records import Action, Operator, Tier
from agent.sources.wire import Metadata, PortNumber, ProtocolName, Wire, WireObject

PolicyType = Literal["Ingress", "Egress"]
Priority = Annotated[int, msgspec.Meta(ge=0, le=1000)]


class LabelledMetadata(Metadata, frozen=True):
    """The metadata of an object whose labels are selected by."""

    labels: dict[str, str] | None = None


class PodMetadata(LabelledMetadata, frozen=True):
    """The metadata of a Pod; only whether there is a deletion timestamp matters."""

    deletion_timestamp: object = None


class ContainerPort(Wire, frozen=True):
    """One port of a container."""

    container_port: PortNumber
    name: str | None = None
    protocol: ProtocolName | None = None


class Container(Wire, frozen=True):
    """One container of a Pod."""

    ports: tuple[ContainerPort, ...] | None = None


class InitContainer(Container, frozen=True):
    """One init container; it goes on beside the others if it always restarts."""

    restart_policy: str | None = None


class PodSpec(Wire, frozen=True):
    """The specification of a Pod."""

    node_name: str | None = None
    host_network: bool | None = None
    containers: tuple[Container, ...] | None = None
    init_containers: tuple[InitContainer, ...] | None = None


class PodIP(Wire, frozen=True):
    """An address of a Pod."""

    ip: str | None = None


class PodStatus(Wire, frozen=True):
    """The status of a Pod."""

    phase: str | None = None
    pod_ip: str | None = msgspec.field(name="podIP", default=None)
    pod_ips: tuple[PodIP, ...] | None = msgspec.field(name="podIPs", default=None)


class WirePod(WireObject, frozen=True):
    """A v1 Pod."""

    metadata: PodMetadata
    spec: PodSpec | None = None
    status: PodStatus | None = None


class WireNamespace(WireObject, frozen=True):
    """A v1 Namespace."""

    metadata: LabelledMetadata


class WireRequirement(Wire, frozen=True):
    """One of a selector's matchExpressions."""

    key: str
    operator: Operator
    values: tuple[str, ...] | None = None


class LabelSelector(Wire, frozen=True):
    """A meta/v1 LabelSelector."""

    match_labels: dict[str, str] | None = None
    match_expressions: tuple[WireRequirement, ...] | None = None


class WireBlock(Wire, frozen=True):
    """An ipBlock."""

    cidr: str
    excepts: tuple[str, ...] | None = msgspec.field(name="except", default=None)


class PolicyPeer(Wire, frozen=True):
    """One of from or to of a NetworkPolicy."""

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: WireBlock | None = None


class PolicyPort(Wire, frozen=True):
    """One of the ports of a NetworkPolicy's rule."""

    protocol: ProtocolName | None = None
    port: PortNumber | str | None = None
    end_port: PortNumber | None = None


class IngressRule(Wire, frozen=True):
    """One of ingress of a NetworkPolicy."""

    peers: tuple[PolicyPeer, ...] | None = msgspec.field(name="from", default=None)
    ports: tuple[PolicyPort, ...] | None = None


class EgressRule(Wire, frozen=True):
    """One of egress of a NetworkPolicy."""

    peers: tuple[PolicyPeer, ...] | None = msgspec.field(name="to", default=None)
    ports: tuple[PolicyPort, ...] | None = None


class NetworkPolicySpec(Wire, frozen=True):
    """The specification of a NetworkPolicy."""

    pod_selector: LabelSelector | None = None
    policy_types: tuple[PolicyType, ...] | None = None
    ingress: tuple[IngressRule, ...] | None = None
    egress: tuple[EgressRule, ...] | None = None


class WireNetworkPolicy(WireObject, frozen=True):
    """A networking.k8s.io/v1 NetworkPolicy."""

    spec: NetworkPolicySpec


class TierPart(Wire, frozen=True, forbid_unknown_fields=True):
    """A part of a ClusterNetworkPolicy: a field that is newer than we are may narrow what the others say."""


class TierRequirement(WireRequirement, TierPart, frozen=True):
    """One of a selector's matchExpressions."""


class TierSelector(LabelSelector, TierPart, frozen=True):
    """A LabelSelector as part of a ClusterNetworkPolicy."""

    match_expressions: tuple[TierRequirement, ...] | None = None


class NamespacedPods(TierPart, frozen=True):
    """Pods of some namespaces."""

    namespace_selector: TierSelector | None = None
    pod_selector: TierSelector | None = None


class TierSubject(TierPart, frozen=True):
    """Whom a ClusterNetworkPolicy is about, or one of from; ``nodes`` is experimental, and only to be named."""

    namespaces: TierSelector | None = None
    pods: NamespacedPods | None = None
    nodes: object = None


class TierPeer(TierSubject, frozen=True):
    """One of to of a ClusterNetworkPolicy; only it has networks. ``domain_names`` is as ``nodes``."""

    networks: tuple[str, ...] | None = None
    domain_names: object = None


class WirePortRange(TierPart, frozen=True):
    """Ports from one to another."""

    start: PortNumber
    end: PortNumber


class WirePort(TierPart, frozen=True):
    """A port, or a range of them."""

    number: PortNumber | None = None
    range: WirePortRange | None = None


class TierProtocol(TierPart, frozen=True):
    """What is said of a protocol."""

    destination_port: WirePort | None = None


class TierProtocols(TierPart, frozen=True):
    """One of the protocols of a ClusterNetworkPolicy's rule; exactly one field is there."""

    tcp: TierProtocol | None = None
    udp: TierProtocol | None = None
    sctp: TierProtocol | None = None
    destination_named_port: str | None = None


class WireTierRule(TierPart, frozen=True):
    """What the rules of both directions have."""

    action: Action
    name: str | None = None
    protocols: tuple[TierProtocols, ...] | None = None


class TierIngressRule(WireTierRule, frozen=True):
    """One of ingress of a ClusterNetworkPolicy."""

    peers: tuple[TierSubject, ...] | None = msgspec.field(name="from", default=None)


class TierEgressRule(WireTierRule, frozen=True):
    """One of egress of a ClusterNetworkPolicy."""

    peers: tuple[TierPeer, ...] | None = msgspec.field(name="to", default=None)


class ClusterPolicySpec(Wire, frozen=True):
    """The specification of a ClusterNetworkPolicy."""

    tier: Tier
    priority: Priority
    subject: TierSubject
    ingress: tuple[object, ...] | None = None
    """Each is a ``TierIngressRule``, and is read by itself, as it is closed by itself."""
    egress: tuple[object, ...] | None = None


class WireClusterPolicy(WireObject, frozen=True):
    """A policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy."""

    spec: ClusterPolicySpec
