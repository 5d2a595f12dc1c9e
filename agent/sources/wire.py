"""The shape of the API server's objects: the fields that are read, their types, and nothing else.

Unknown fields are skipped. ``null`` is accepted wherever a field may be absent, because the API server writes both.
All are frozen, so that those that recur (ports, conditions, hints) can be looked up by value and converted once.
Source: Kubernetes API v1 Service, v1 Node, discovery.k8s.io/v1 EndpointSlice, meta/v1 ListMeta.
"""

from __future__ import annotations

from typing import Annotated, Generic, Literal, TypeVar

import msgspec

PortNumber = Annotated[int, msgspec.Meta(ge=1, le=65535)]
PortNumberOrZero = Annotated[int, msgspec.Meta(ge=0, le=65535)]
ProtocolName = Literal["TCP", "UDP", "SCTP", ""]
ServiceType = Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName", ""]
TrafficPolicy = Literal["Cluster", "Local", ""]
Affinity = Literal["None", "ClientIP", ""]
AffinitySeconds = Annotated[int, msgspec.Meta(ge=1, le=86400)]
SERVICE_NAME_LABEL = "kubernetes.io/service-name"


class Wire(msgspec.Struct, frozen=True, gc=False, rename="camel"):
    """A JSON object; none can be part of itself, so the collector need not track them."""


class Metadata(Wire, frozen=True):
    """What every object says of itself."""

    name: str
    namespace: str | None = None
    resource_version: str | None = None
    creation_timestamp: str | None = None


class WireObject(Wire, frozen=True):
    """An object of the API."""

    metadata: Metadata


class Named(Wire, frozen=True):
    """A JSON object of which only the name is read."""

    name: str


class ServiceLabels(Wire, frozen=True):
    """The labels of a Service that are read."""

    proxy_name: str | None = msgspec.field(name="service.kubernetes.io/service-proxy-name", default=None)


class ServiceAnnotations(Wire, frozen=True):
    """The annotations of a Service that are read; of any type, because one that says nothing known is ignored."""

    forwarding: object = msgspec.field(name="ebproxy.io/forwarding-mode", default=None)
    algorithm: object = msgspec.field(name="ebproxy.io/algorithm", default=None)


class ServiceMetadata(Metadata, frozen=True):
    """The metadata of a Service."""

    labels: ServiceLabels | None = None
    annotations: ServiceAnnotations | None = None


class WireServicePort(Wire, frozen=True):
    """One port of a Service."""

    port: PortNumber
    name: str | None = None
    protocol: ProtocolName | None = None
    node_port: PortNumberOrZero | None = None


class ClientIPConfig(Wire, frozen=True):
    """How long a client keeps its backend."""

    timeout_seconds: AffinitySeconds | None = None


class AffinityConfig(Wire, frozen=True):
    """What session affinity is configured with."""

    client_ip: ClientIPConfig | None = msgspec.field(name="clientIP", default=None)


class ServiceSpec(Wire, frozen=True):
    """The specification of a Service."""

    type: ServiceType | None = None
    cluster_ip: str | None = msgspec.field(name="clusterIP", default=None)
    cluster_ips: tuple[str, ...] | None = msgspec.field(name="clusterIPs", default=None)
    ports: tuple[WireServicePort, ...] | None = None
    internal_traffic_policy: TrafficPolicy | None = None
    external_traffic_policy: TrafficPolicy | None = None
    external_ips: tuple[str, ...] | None = msgspec.field(name="externalIPs", default=None)
    load_balancer_source_ranges: tuple[str, ...] | None = None
    health_check_node_port: PortNumberOrZero | None = None
    session_affinity: Affinity | None = None
    session_affinity_config: AffinityConfig | None = None


class Ingress(Wire, frozen=True):
    """Where a load balancer answers; ``ip_mode`` of None is VIP."""

    ip: str | None = None
    ip_mode: str | None = None


class LoadBalancerStatus(Wire, frozen=True):
    """What a load balancer says of a Service."""

    ingress: tuple[Ingress, ...] | None = None


class ServiceStatus(Wire, frozen=True):
    """The status of a Service."""

    load_balancer: LoadBalancerStatus | None = None


class WireService(WireObject, frozen=True):
    """A v1 Service."""

    metadata: ServiceMetadata
    spec: ServiceSpec
    status: ServiceStatus | None = None


class SliceLabels(Wire, frozen=True):
    """The labels of an EndpointSlice that are read."""

    service: str | None = msgspec.field(name=SERVICE_NAME_LABEL, default=None)
    headless: str | None = msgspec.field(name="service.kubernetes.io/headless", default=None)


class SliceAnnotations(Wire, frozen=True):
    """The annotations of an EndpointSlice that are read; of any type, because a bad one is ignored."""

    changed_at: object = msgspec.field(name="endpoints.kubernetes.io/last-change-trigger-time", default=None)


class SliceMetadata(Metadata, frozen=True):
    """The metadata of an EndpointSlice."""

    labels: SliceLabels | None = None
    annotations: SliceAnnotations | None = None


class Conditions(Wire, frozen=True):
    """The conditions of an endpoint; None means the same as absent."""

    ready: bool | None = True
    serving: bool | None = True
    terminating: bool | None = False


class Hint(Named, frozen=True):
    """A zone or node that an endpoint is meant for."""


class Hints(Wire, frozen=True):
    """The zones and nodes an endpoint is meant for."""

    for_zones: tuple[Hint, ...] | None = None
    for_nodes: tuple[Hint, ...] | None = None


class Endpoint(Wire, frozen=True):
    """One endpoint of an EndpointSlice."""

    addresses: list[str] | None = None
    conditions: Conditions | None = Conditions()
    node_name: str | None = None
    hints: Hints | None = None


class WireSlicePort(Wire, frozen=True):
    """One port of an EndpointSlice; an absent name is the empty one, a ``null`` name is no name."""

    name: str | None = ""
    protocol: ProtocolName | None = None
    port: PortNumberOrZero | None = None


class WireSlice(WireObject, frozen=True):
    """A discovery.k8s.io/v1 EndpointSlice, of any address type: one that is not known says nothing to us."""

    metadata: SliceMetadata
    address_type: str
    endpoints: list[Endpoint] | None = None
    ports: tuple[WireSlicePort, ...] | None = None


class NodeLabels(Wire, frozen=True):
    """The labels of a Node that are read."""

    zone: str | None = msgspec.field(name="topology.kubernetes.io/zone", default=None)


class NodeMetadata(Metadata, frozen=True):
    """The metadata of a Node; only whether there is a deletion timestamp matters."""

    labels: NodeLabels | None = None
    deletion_timestamp: object = None


class Taint(Wire, frozen=True):
    """A taint of a Node."""

    key: str


class NodeSpec(Wire, frozen=True):
    """The specification of a Node."""

    pod_cidr: str | None = msgspec.field(name="podCIDR", default=None)
    pod_cidrs: tuple[str, ...] | None = msgspec.field(name="podCIDRs", default=None)
    taints: tuple[Taint, ...] | None = None


class NodeAddress(Wire, frozen=True):
    """An address of a Node, and what it is: InternalIP, ExternalIP, or a name."""

    type: str
    address: str


class NodeStatus(Wire, frozen=True):
    """The status of a Node."""

    addresses: tuple[NodeAddress, ...] | None = None


class WireNode(WireObject, frozen=True):
    """A v1 Node."""

    metadata: NodeMetadata
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


class IdentityMetadata(Wire, frozen=True):
    """Metadata of any type at all: what is left to read of an object that cannot be read."""

    name: object = None
    namespace: object = None
    resource_version: object = None
    labels: object = None


class Identity(Wire, frozen=True):
    """An object of which only the identity is read."""

    metadata: IdentityMetadata


class ListMetadata(Wire, frozen=True):
    """The metadata of a list: where to watch from, and where the next page starts."""

    resource_version: str | None = None
    continue_token: str | None = msgspec.field(name="continue", default=None)


class ListEnvelope(Wire, frozen=True):
    """A list, its items unread."""

    metadata: ListMetadata
    items: list[msgspec.Raw] | None = None


_Object = TypeVar("_Object")


class WatchEvent(Wire, Generic[_Object], frozen=True):
    """An event of a watch, its object read with it. Source: meta/v1 WatchEvent."""

    type: str
    object: _Object
