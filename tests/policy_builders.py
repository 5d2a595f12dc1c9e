"""Builders of what policy looks at: name what matters, leave the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from agent.core.abi import Direction
from agent.core.addresses import AddressRange, parse_address
from agent.core.events import Delete, Event, ListEnded, ListStarted, Upsert
from agent.core.policy_model import PolicyModel
from agent.core.policy_planner import Numbers, PolicyPlan, PolicyPlanner, PolicySizes
from agent.core.policy_records import (
    Action,
    ClusterPolicyRecord,
    IpBlock,
    NamedPort,
    NamespaceRecord,
    NetworkPolicyRecord,
    Operator,
    Peer,
    PodRecord,
    PolicyRecord,
    PortRange,
    Prefix,
    Requirement,
    Rule,
    Selector,
    Tier,
    TierRule,
)
from agent.core.records import POLICY_KINDS, ObjectKey, Protocol
from tests.builders import key
from tests.policy_reference import PolicyMaps


def pod(
    name: str,
    *ips: str,
    ports: Sequence[tuple[str, int] | tuple[str, int, Protocol]] = (),
    local: bool = True,
    terminating: bool = False,
    created: str = "",
    **labels: str,
) -> PodRecord:
    """A pod of this node; ``name`` may be ``namespace/name``, ports are name, number and protocol."""
    named = tuple(NamedPort(port[0], port[2] if len(port) > 2 else Protocol.TCP, port[1]) for port in ports)
    addresses = tuple(map(parse_address, ips))
    return PodRecord(key(name), addresses, tuple(sorted(labels.items())), named, local, terminating, created)


def namespace(name: str, **labels: str) -> NamespaceRecord:
    """A namespace, with its name among its labels."""
    return NamespaceRecord(ObjectKey("", name), tuple(sorted({"kubernetes.io/metadata.name": name, **labels}.items())))


def selector(*requirements: Requirement, **labels: str) -> Selector:
    """Conditions; those on labels by name are of one value."""
    equal = (Requirement(name, Operator.IN, frozenset({value})) for name, value in labels.items())
    return Selector((*equal, *requirements))


def need(label: str, operator: Operator, *values: str) -> Requirement:
    """One condition."""
    return Requirement(label, operator, frozenset(values))


def pods(*requirements: Requirement, **labels: str) -> Peer:
    """Pods of the policy's own namespace."""
    return Peer(pods=selector(*requirements, **labels))


def cidr(text: str, *excepts: str) -> Peer:
    """A block of addresses but for some."""
    return Peer(block=IpBlock(prefix(text), tuple(map(prefix, excepts))))


def prefix(text: str) -> Prefix:
    """A range of addresses."""
    return Prefix(*AddressRange.parse(text))


def tcp(first: int, last: int | None = None) -> PortRange:
    """A port, or a range."""
    return PortRange(Protocol.TCP, first, first if last is None else last)


def udp(first: int, last: int | None = None) -> PortRange:
    """A port, or a range."""
    return PortRange(Protocol.UDP, first, first if last is None else last)


def rule(*peers: Peer, ports: Sequence[PortRange] | None = None) -> Rule:
    """A rule for these peers; without any, for everybody."""
    return Rule(peers or None, None if ports is None else tuple(ports))


def network_policy(
    name: str,
    subject: Selector | None = None,
    ingress: Iterable[Rule] | None = None,
    egress: Iterable[Rule] | None = None,
) -> NetworkPolicyRecord:
    """A NetworkPolicy; about all pods of its namespace unless told."""
    return NetworkPolicyRecord(
        key(name),
        subject or Selector(),
        None if ingress is None else tuple(ingress),
        None if egress is None else tuple(egress),
    )


def cluster_policy(
    name: str,
    *,
    tier: Tier = Tier.ADMIN,
    priority: int = 0,
    namespaces: Selector | None = None,
    pods: Selector | None = None,
    ingress: Iterable[TierRule] = (),
    egress: Iterable[TierRule] = (),
) -> ClusterPolicyRecord:
    """A ClusterNetworkPolicy; about all pods unless told."""
    return ClusterPolicyRecord(
        ObjectKey("", name), tier, priority, namespaces or Selector(), pods, tuple(ingress), tuple(egress)
    )


def accept(*peers: Peer, ports: Sequence[PortRange] | None = None) -> TierRule:
    """Accept these peers; without any, everybody."""
    return TierRule(Action.ACCEPT, rule(*peers, ports=ports))


def deny(*peers: Peer, ports: Sequence[PortRange] | None = None) -> TierRule:
    """Deny these peers; without any, everybody."""
    return TierRule(Action.DENY, rule(*peers, ports=ports))


def skip(*peers: Peer, ports: Sequence[PortRange] | None = None) -> TierRule:
    """Pass these peers on to the next tier; without any, everybody."""
    return TierRule(Action.PASS, rule(*peers, ports=ports))


MOST_STEPS = 12


class PolicyNode:
    """A node's policy: the model, the planner, and the maps they are written to."""

    def __init__(self, *records: PolicyRecord, sizes: PolicySizes | None = None, fails_open: bool = False) -> None:
        self.model = PolicyModel("n1")
        self.maps = PolicyMaps()
        self.sizes = sizes or PolicySizes()
        self.fails_open = fails_open
        for kind in POLICY_KINDS:
            self.model.apply(ListStarted(kind))
        for record in records:
            self.model.apply(Upsert(record))
        for kind in POLICY_KINDS:
            self.model.apply(ListEnded(kind))
        self.restart(Numbers())

    def restart(self, numbers: Numbers | None = None) -> list[PolicyPlan]:
        """Start anew with what the maps hold."""
        self.planner = PolicyPlanner(
            self.model,
            self.sizes,
            self.maps.state,
            self.planner.numbers if numbers is None else numbers,
            fails_open=self.fails_open,
            since=7,
        )
        return self.settle()

    def apply(self, *changes: PolicyRecord | Event) -> list[PolicyPlan]:
        """Take in what changed, all at once, and carry out every plan."""
        for change in changes:
            self.model.apply(Upsert(change) if hasattr(change, "key") and not isinstance(change, Delete) else change)
        return self.settle()

    def may_send(self, source: bytes, destination: bytes, protocol: int, port: int) -> bool:
        """Tell whether the maps let a connection pass, at both its ends."""
        judge = self.maps.verdict
        return judge(source, destination, Direction.EGRESS, protocol, port) and judge(
            destination, source, Direction.INGRESS, protocol, port
        )

    def delete(self, record: PolicyRecord) -> list[PolicyPlan]:
        """Delete an object."""
        return self.apply(Delete(record.kind, record.key))

    def settle(self) -> list[PolicyPlan]:
        """Carry out plans until there is nothing to do."""
        plans = []
        for plan in self.plans():
            plans.append(plan)
            self.maps.apply(plan)
        return plans

    def plans(self) -> Iterator[PolicyPlan]:
        """Ask for plans until there is nothing to do; each is to be carried out."""
        for _ in range(MOST_STEPS):
            if not (plan := self.planner.plan()):
                return
            yield plan
        raise AssertionError("the planner does not come to an end")
