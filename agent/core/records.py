"""What the sources read of objects: small immutable records; events.py has what carries them.

A record holds only what the dataplane reads of an object. Endpoints are packed: a slice keeps, per distinct
*traits* (conditions, locality, hints), one run of 16-byte addresses, so that choosing endpoints looks at traits
(a handful) and not at endpoints (a thousand).
"""

from __future__ import annotations

import enum
from typing import ClassVar, NamedTuple

import msgspec

ADDRESS_SIZE = 16


class Kind(enum.StrEnum):
    """The kinds of objects that are watched."""

    SERVICE = "Service"
    ENDPOINT_SLICE = "EndpointSlice"
    NODE = "Node"
    POD = "Pod"
    NAMESPACE = "Namespace"
    NETWORK_POLICY = "NetworkPolicy"
    CLUSTER_NETWORK_POLICY = "ClusterNetworkPolicy"


SERVICE_KINDS = frozenset({Kind.SERVICE, Kind.ENDPOINT_SLICE, Kind.NODE})
"""What the Service dataplane is made of."""
POLICIES = frozenset({Kind.NETWORK_POLICY, Kind.CLUSTER_NETWORK_POLICY})
POLICY_KINDS = POLICIES | {Kind.POD, Kind.NAMESPACE}
"""What policy is made of; not watched where it is off."""


class Family(enum.IntEnum):
    """An IP family, by its usual number."""

    IPV4 = 4
    IPV6 = 6


class Protocol(enum.IntEnum):
    """A transport protocol, by its IANA number."""

    TCP = 6
    UDP = 17
    SCTP = 132


class ObjectKey(NamedTuple):
    """Namespace and name; the namespace of a cluster-scoped object is empty."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class ServicePort(msgspec.Struct, frozen=True, gc=False):
    """One port of a Service; ``number`` is the port clients use, ``node_port`` that of every node, 0 = none."""

    name: str
    protocol: Protocol
    number: int
    node_port: int = 0


class Forwarding(enum.StrEnum):
    """How packets of clients outside reach a backend on another node."""

    SNAT = "snat"
    DSR = "dsr"


class Algorithm(enum.StrEnum):
    """How a backend is chosen for a client outside."""

    RANDOM = "random"
    MAGLEV = "maglev"


class External(msgspec.Struct, frozen=True, gc=False):
    """How a Service is reached from outside the cluster; node ports stand with the ports.

    Addresses have 16 bytes, either family. ``source_ranges`` (address, prefix bits of 128) limit who may use the load
    balancer's addresses; of a family without a range, everybody may, or nobody where it ``lacks_ranges``: some could
    not be read. ``forwarding`` and ``algorithm`` of None: as the cluster does.
    """

    external_ips: tuple[bytes, ...] = ()
    load_balancer_ips: tuple[bytes, ...] = ()
    source_ranges: tuple[tuple[bytes, int], ...] = ()
    is_local: bool = False
    health_check_node_port: int = 0
    forwarding: Forwarding | None = None
    algorithm: Algorithm | None = None
    lacks_ranges: bool = False


class HealthCheck(NamedTuple):
    """What load balancers ask this node of a Service: on which port, and how many of its addresses here are ready."""

    port: int
    local_endpoints: int


class ServiceRecord(msgspec.Struct, frozen=True, gc=False):
    """A Service as the dataplane sees it.

    ``cluster_ips`` holds 16-byte addresses (IPv4 as ``::ffff:a.b.c.d``), at most one of each family, and is empty
    for a Service that has nothing to program (headless, ExternalName, another proxy's).
    ``created`` is the creation timestamp as RFC 3339 text; it breaks ties between claims to one frontend.
    """

    key: ObjectKey
    cluster_ips: tuple[bytes, ...]
    ports: tuple[ServicePort, ...]
    internal_local: bool = False
    created: str = ""
    affinity_timeout_s: int = 0
    """How long a client keeps its backend after it last connected; 0 = no affinity."""
    external: External | None = None
    """None for a Service that is reached by its ClusterIPs alone."""

    kind: ClassVar[Kind] = Kind.SERVICE


class Traits(msgspec.Struct, frozen=True, gc=False):
    """What the endpoints of one run have in common.

    ``zones`` is None where the endpoint carries no zone hint. ``node_hint`` is None where it carries no node hint,
    else whether the hint names this node.
    Source: discovery.k8s.io/v1 Endpoint.conditions, .nodeName, .hints; KEP-2433, KEP-3015.
    """

    ready: bool = True
    serving: bool = True
    terminating: bool = False
    local: bool = False
    zones: frozenset[str] | None = None
    node_hint: bool | None = None


class SlicePort(msgspec.Struct, frozen=True, gc=False):
    """One port of an EndpointSlice; ``number`` is the port the pods listen on."""

    name: str
    protocol: Protocol
    number: int


class SliceRecord(msgspec.Struct, frozen=True, gc=False):
    """An EndpointSlice: each run is its traits and its endpoints' addresses, 16 bytes each, end to end."""

    key: ObjectKey
    service: ObjectKey
    family: Family
    ports: tuple[SlicePort, ...]
    runs: tuple[tuple[Traits, bytes], ...]
    changed_at: float | None = None
    """Unix time of the change that caused this version, from ``endpoints.kubernetes.io/last-change-trigger-time``."""

    kind: ClassVar[Kind] = Kind.ENDPOINT_SLICE


class NodeRecord(msgspec.Struct, frozen=True, gc=False):
    """Our node: zone, addresses and pod ranges (as text), and whether it is about to go."""

    name: str
    zone: str = ""
    addresses: tuple[str, ...] = ()
    pod_cidrs: tuple[str, ...] = ()
    deleting: bool = False
    """A deletion timestamp, or the cluster autoscaler's ``ToBeDeletedByClusterAutoscaler`` taint."""

    kind: ClassVar[Kind] = Kind.NODE

    @property
    def key(self) -> ObjectKey:
        """The key of the object."""
        return ObjectKey("", self.name)


Record = ServiceRecord | SliceRecord | NodeRecord


class Fault(NamedTuple):
    """A field that cannot be read, and why."""

    field: str
    reason: str
