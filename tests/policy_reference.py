"""What policy promises, straight from the API's text; and what the programs make of the maps, to be held against it.

The reference looks at records alone, one pair of ends and one port at a time: no identities, no prefixes, no order of
events. Source: networking.k8s.io/v1 NetworkPolicySpec; policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicySpec.
"""

from __future__ import annotations

import functools
import ipaddress
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from agent.core.abi import (
    ADDRESS_RANGE,
    PEER_ANY,
    PEER_WORLD,
    POLICY_BASE_BITS,
    POLICY_ENTRY,
    POLICY_KEY,
    POLICY_PORT_BITS,
    SUBJECT,
    U32,
    Direction,
    SubjectFlag,
    port_bytes,
)
from agent.core.addresses import format_address
from agent.core.policy_planner import PolicyPlan, PolicyState
from agent.core.policy_records import (
    Action,
    ClusterPolicyRecord,
    IpBlock,
    NamespaceRecord,
    NetworkPolicyRecord,
    Operator,
    Peer,
    PodRecord,
    PolicyRecord,
    PortRange,
    Prefix,
    Rule,
    Selector,
    Tier,
    TierRule,
)


@dataclass(frozen=True)
class End:
    """One end of a connection: an address, and the pod that has it with its namespace's labels, if one does."""

    address: bytes
    pod: PodRecord | None = None
    namespace_labels: tuple[tuple[str, str], ...] = ()


class Reference:
    """The records there are."""

    def __init__(self, records: Iterable[PolicyRecord]) -> None:
        self.records = list(records)
        self.pods = [it for it in self.records if isinstance(it, PodRecord)]
        self.namespaces = {it.key.name: it.labels for it in self.records if isinstance(it, NamespaceRecord)}
        self.network = sorted(
            (it for it in self.records if isinstance(it, NetworkPolicyRecord)), key=lambda policy: policy.key
        )
        self.cluster = sorted(
            (it for it in self.records if isinstance(it, ClusterPolicyRecord)),
            key=lambda policy: (policy.priority, policy.key),
        )

    def end(self, address: bytes) -> End:
        """Find who has an address: the youngest pod that says so, and one that is about to go only if no other does."""
        claimants = [pod for pod in self.pods if address in pod.addresses]
        if not claimants:
            return End(address)
        pod = max(claimants, key=lambda it: (not it.is_terminating, it.created, it.key))
        namespace = pod.key.namespace
        return End(address, pod, self.namespaces.get(namespace) or (("kubernetes.io/metadata.name", namespace),))

    def may_send(self, source: bytes, destination: bytes, protocol: int, port: int) -> bool:
        """Tell whether a connection may be, where policy is enforced at both ends."""
        one, other = self.end(source), self.end(destination)
        return self.verdict(one, other, Direction.EGRESS, protocol, port) and self.verdict(
            other, one, Direction.INGRESS, protocol, port
        )

    def verdict(self, subject: End, peer: End, direction: Direction, protocol: int, port: int) -> bool:
        """Tell whether one end's policy allows a connection with the other; the port is the destination's."""
        if subject.pod is None or subject.address == peer.address:
            return True
        destination = subject if direction is Direction.INGRESS else peer
        tiers = (self._tier(Tier.ADMIN), None, self._tier(Tier.BASELINE))
        for tier in tiers:
            if tier is None:
                verdict = self._network_verdict(subject, peer, destination, direction, protocol, port)
            else:
                verdict = _tier_verdict(tier, subject, peer, destination, direction, protocol, port)
            if verdict is not None:
                return verdict
        return True

    def _tier(self, tier: Tier) -> list[ClusterPolicyRecord]:
        return [policy for policy in self.cluster if policy.tier is tier]

    def _network_verdict(
        self, subject: End, peer: End, destination: End, direction: Direction, protocol: int, port: int
    ) -> bool | None:
        """Allowed by any policy that isolates the subject; None if none does."""
        is_isolated = False
        for policy in self.network:
            rules = policy.ingress if direction is Direction.INGRESS else policy.egress
            if rules is None or policy.key.namespace != subject.pod.key.namespace:
                continue
            if not selects(policy.subject, subject.pod.labels):
                continue
            is_isolated = True
            if any(matches(rule, policy.key.namespace, peer, destination, protocol, port) for rule in rules):
                return True
        return False if is_isolated else None


def _tier_verdict(
    tier: list[ClusterPolicyRecord],
    subject: End,
    peer: End,
    destination: End,
    direction: Direction,
    protocol: int,
    port: int,
) -> bool | None:
    for policy in tier:
        if not selects(policy.namespaces, subject.namespace_labels):
            continue
        if policy.pods is not None and not selects(policy.pods, subject.pod.labels):
            continue
        rules: tuple[TierRule, ...] = policy.ingress if direction is Direction.INGRESS else policy.egress
        for rule in rules:
            if matches(rule.rule, "", peer, destination, protocol, port):
                return None if rule.action is Action.PASS else rule.action is Action.ACCEPT
    return None


def matches(rule: Rule, namespace: str, peer: End, destination: End, protocol: int, port: int) -> bool:
    """Tell whether a rule is about a peer and a port of the destination."""
    if rule.peers is not None and not any(means(it, namespace, peer) for it in rule.peers):
        return False
    return rule.ports is None or any(has_port(it, destination, protocol, port) for it in rule.ports)


def means(peer: Peer, namespace: str, end: End) -> bool:
    """Tell whether an entry of from or to means an end."""
    if peer.block is not None:
        return in_block(peer.block, end.address)
    if end.pod is None:
        return False
    if peer.namespaces is None and end.pod.key.namespace != namespace:
        return False
    if peer.namespaces is not None and not selects(peer.namespaces, end.namespace_labels):
        return False
    return peer.pods is None or selects(peer.pods, end.pod.labels)


def selects(selector: Selector, labels: Iterable[tuple[str, str]]) -> bool:
    """Tell whether labels meet every requirement."""
    have = dict(labels)
    for requirement in selector.requirements:
        is_there, value = requirement.key in have, have.get(requirement.key)
        holds = {
            Operator.IN: is_there and value in requirement.values,
            Operator.NOT_IN: not (is_there and value in requirement.values),
            Operator.EXISTS: is_there,
            Operator.DOES_NOT_EXIST: not is_there,
        }[requirement.operator]
        if not holds:
            return False
    return True


def in_block(block: IpBlock, address: bytes) -> bool:
    """Tell whether a block holds an address and no except does."""
    return _holds(block.prefix, address) and not any(_holds(hole, address) for hole in block.excepts)


def _holds(prefix: Prefix, address: bytes) -> bool:
    text = format_address(prefix.address)
    bits = prefix.bits - 96 if "." in text else prefix.bits
    return ipaddress.ip_address(format_address(address)) in ipaddress.ip_network(f"{text}/{bits}")


def has_port(wanted: PortRange, destination: End, protocol: int, port: int) -> bool:
    """Tell whether a port is meant: by its number, or by the name that the destination pod gives it."""
    if wanted.protocol != protocol:
        return False
    if not wanted.name:
        return wanted.first <= port <= wanted.last
    named = destination.pod.ports if destination.pod else ()
    return any((it.name, it.protocol, it.number) == (wanted.name, protocol, port) for it in named)


class PolicyMaps:
    """The maps, and the verdict that ``policy.h`` takes from them."""

    def __init__(self, state: PolicyState | None = None) -> None:
        self.state = state or PolicyState()

    def writes(self, plan: PolicyPlan) -> Iterator[None]:
        """Carry out a plan, one write at a time."""
        state = self.state
        for key, value in plan.policy:
            state.policy[key] = value
            yield
        for name in ("blocks", "identities", "subjects"):
            for key, value in getattr(plan, name).items():
                getattr(state, name)[key] = value
                yield
        for name in ("subjects", "identities", "blocks", "policy"):
            for key in getattr(plan, f"removed_{name}"):
                del getattr(state, name)[key]
                yield

    def apply(self, plan: PolicyPlan) -> None:
        """Carry out a plan."""
        for _ in self.writes(plan):
            pass

    def verdict(self, subject: bytes, peer: bytes, direction: Direction, protocol: int, port: int) -> bool:
        """Judge a connection at one of its ends."""
        found = self.state.subjects.get(subject)
        if found is None or subject == peer:
            return True
        identity, flags, *_ = SUBJECT.packer.unpack(found)
        if not flags & (SubjectFlag.INGRESS if direction is Direction.INGRESS else SubjectFlag.EGRESS):
            return True
        if flags & (SubjectFlag.FAIL_OPEN | SubjectFlag.FAIL_CLOSED):
            return bool(flags & SubjectFlag.FAIL_OPEN)
        return self.rule(identity, self.peer_of(peer), direction, protocol, port)[0]

    def rule(self, subject: int, peer: int, direction: Direction, protocol: int, port: int) -> tuple[bool, int]:
        """Look up a verdict and its rule: the peer's, else everybody's, else denied."""
        for who in (peer, PEER_ANY):
            for key in _policy_keys(subject, who, direction, protocol, port):
                value = self.state.policy.get(key)
                if value is not None:
                    rule, allowed = POLICY_ENTRY.packer.unpack(value)
                    return bool(allowed), rule
        return False, 0

    def peer_of(self, address: bytes) -> int:
        """Look up by what number an address is known."""
        value = self.state.identities.get(address)
        for key in _block_keys(address) if value is None else ():
            value = self.state.blocks.get(key)
            if value is not None:
                break
        return PEER_WORLD if value is None else U32.packer.unpack(value)[0]


@functools.lru_cache(maxsize=100_000)
def _policy_keys(subject: int, peer: int, direction: Direction, protocol: int, port: int) -> tuple[bytes, ...]:
    """Lay out every key that covers a port, the longest prefix first."""
    key = POLICY_KEY.packer.pack(0, subject, peer, direction, protocol, port_bytes(port))[4:]
    lengths = range(POLICY_PORT_BITS, POLICY_BASE_BITS - 1, -1)
    return tuple(bits.to_bytes(4, sys.byteorder) + _masked(key, bits) for bits in lengths)


@functools.lru_cache(maxsize=100_000)
def _block_keys(address: bytes) -> tuple[bytes, ...]:
    return tuple(ADDRESS_RANGE.packer.pack(bits, _masked(address, bits)) for bits in range(128, -1, -1))


def _masked(text: bytes, bits: int) -> bytes:
    size = 8 * len(text)
    return (int.from_bytes(text, "big") >> (size - bits) << (size - bits)).to_bytes(len(text), "big")
