"""What the sources hand to the policy model: pods, namespaces and policies, small and immutable.

Source: core/v1 Pod and Namespace, networking.k8s.io/v1 NetworkPolicy, policy.networking.k8s.io/v1alpha2
ClusterNetworkPolicy.
"""

from __future__ import annotations

import enum
from typing import ClassVar, NamedTuple

import msgspec

from agent.core.records import Fault, Kind, ObjectKey, Protocol

Labels = tuple[tuple[str, str], ...]
"""Keys and values, sorted by key."""


class NamedPort(NamedTuple):
    """A port that a pod's container gives a name."""

    name: str
    protocol: Protocol
    number: int


class PodRecord(msgspec.Struct, frozen=True, gc=False):
    """A pod as policy sees it.

    ``addresses`` are of 16 bytes, at most one of each family; none for a pod that has none yet, that has ended
    (Succeeded, Failed), or that uses its node's network. ``created`` is RFC 3339 text: of two pods that say they have
    an address, the younger has it, unless it is the one that is terminating.
    """

    key: ObjectKey
    addresses: tuple[bytes, ...]
    labels: Labels = ()
    ports: tuple[NamedPort, ...] = ()
    is_local: bool = False
    is_terminating: bool = False
    created: str = ""

    kind: ClassVar[Kind] = Kind.POD


class NamespaceRecord(msgspec.Struct, frozen=True, gc=False):
    """A namespace; ``kubernetes.io/metadata.name`` is among its labels, whether or not the object has it."""

    key: ObjectKey
    labels: Labels = ()

    kind: ClassVar[Kind] = Kind.NAMESPACE


class Operator(enum.StrEnum):
    """How a requirement compares. Source: meta/v1 LabelSelectorOperator."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class Requirement(msgspec.Struct, frozen=True, gc=False):
    """One condition on one label; ``values`` is empty of EXISTS and DOES_NOT_EXIST."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()


class Selector(msgspec.Struct, frozen=True, gc=False):
    """Conditions that all have to hold; none selects everything. matchLabels are requirements of one value."""

    requirements: tuple[Requirement, ...] = ()


EVERYTHING = Selector()


class Prefix(NamedTuple):
    """A range of addresses: 16 bytes, host bits zero, and how many of 128 bits count."""

    address: bytes
    bits: int


class IpBlock(msgspec.Struct, frozen=True, gc=False):
    """A range of addresses but for some within it; one of IPv6 that spans the addresses of IPv4 excepts them."""

    prefix: Prefix
    excepts: tuple[Prefix, ...] = ()


class Peer(msgspec.Struct, frozen=True, gc=False):
    """Who is meant by one entry of from or to: a block of addresses, else pods.

    ``namespaces`` of None is the policy's own; ``pods`` of None are all.
    """

    namespaces: Selector | None = None
    pods: Selector | None = None
    block: IpBlock | None = None


class PortRange(msgspec.Struct, frozen=True, gc=False):
    """Ports ``first`` to ``last`` of a protocol, or the one that the destination's containers call ``name``."""

    protocol: Protocol
    first: int = 0
    last: int = 65_535
    name: str = ""


class Rule(msgspec.Struct, frozen=True, gc=False):
    """One entry of ingress or egress.

    ``peers`` of None: everybody, of (): nobody; ``ports`` of None: whatever protocol it is.
    """

    peers: tuple[Peer, ...] | None = None
    ports: tuple[PortRange, ...] | None = None


class NetworkPolicyRecord(msgspec.Struct, frozen=True, gc=False):
    """A NetworkPolicy; a direction that it does not isolate is None, one where nothing is allowed is ().

    ``is_partial``: not all of it could be read, and what could not allows nothing.
    """

    key: ObjectKey
    subject: Selector
    ingress: tuple[Rule, ...] | None = None
    egress: tuple[Rule, ...] | None = None
    is_partial: bool = False

    kind: ClassVar[Kind] = Kind.NETWORK_POLICY


class Tier(enum.StrEnum):
    """Where a ClusterNetworkPolicy stands: before NetworkPolicy, or behind it."""

    ADMIN = "Admin"
    BASELINE = "Baseline"


class Action(enum.StrEnum):
    """What a tier's rule does with what it matches; PASS leaves it to the next tier."""

    ACCEPT = "Accept"
    DENY = "Deny"
    PASS = "Pass"  # noqa: S105 - no password


_CLOSED = {Action.ACCEPT: "accepts nobody", Action.DENY: "denies everybody"}


class TierRule(msgspec.Struct, frozen=True, gc=False):
    """One rule of a ClusterNetworkPolicy. ``name`` may be empty.

    A rule that could not be read, or with a peer or protocol that could not be understood: an ACCEPT has no peers, a
    DENY or PASS is a DENY of everybody. Source: ClusterNetworkPolicyIngressPeer, "fail closed". ``unknown`` is the
    field of what was not understood, ``written`` the action as it is written, empty where that is no text; None = the
    rule is not closed.
    """

    action: Action
    rule: Rule
    name: str = ""
    unknown: str = ""
    written: str | None = None

    @property
    def comes_to(self) -> str:
        """Say what a closed rule comes to; empty where it is not closed."""
        return _CLOSED[self.action] if self.written is not None else ""


class ClusterPolicyRecord(msgspec.Struct, frozen=True, gc=False):
    """A ClusterNetworkPolicy; the lower its ``priority`` (0 to 1000), the earlier it decides.

    ``is_partial``: not all of it could be read, and rules that could not are as those that are not understood.
    """

    key: ObjectKey
    tier: Tier
    priority: int
    namespaces: Selector
    pods: Selector | None = None
    ingress: tuple[TierRule, ...] = ()
    egress: tuple[TierRule, ...] = ()
    is_partial: bool = False

    kind: ClassVar[Kind] = Kind.CLUSTER_NETWORK_POLICY


def not_understood(record: ClusterPolicyRecord) -> tuple[Fault, ...]:
    """Name the parts of a policy that say nothing we know, and what their rules come to."""
    return tuple(
        [
            Fault(rule.unknown, f"not understood, so that the rule {rule.comes_to}")
            for rule in (*record.ingress, *record.egress)
            if rule.unknown
        ]
    )


PolicyRecord = PodRecord | NamespaceRecord | NetworkPolicyRecord | ClusterPolicyRecord
