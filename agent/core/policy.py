"""What the policies say, made into one flat verdict for each peer, protocol and port.

         Admin tier ──pass──┐
           │ accept, deny   ▼
           │          NetworkPolicies, if any isolates: allowed by one of them, or denied
           │                │ none isolates
           ▼                ▼
        verdict  ◂── Baseline tier, else allowed

Tiers decide by priority, then name, then the order of their rules; precedence is settled here, so that in the map the
longest prefix may decide. Source: networking.k8s.io/v1 NetworkPolicySpec; policy.networking.k8s.io/v1alpha2.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from agent.core.abi import (
    POLICY_BASE_BITS,
    POLICY_ENTRY,
    POLICY_PROTOCOL_BITS,
    Direction,
)
from agent.core.policy_records import Action, NamedPort, PortRange
from agent.core.records import Kind, ObjectKey

LAST_PORT = 65_535
_PORT_BITS = 16
ADMIN, NETWORK, BASELINE = range(3)
"""Stages, in the order they decide."""


class RuleName(msgspec.Struct, frozen=True, cache_hash=True, gc=False):
    """Which rule it is: the kind and name of its policy, the direction, and its place there from 0."""

    kind: str
    policy: ObjectKey
    direction: Direction
    index: int


BASELINE_KIND = "BaselineClusterNetworkPolicy"
KIND_NAMES = {
    ADMIN: Kind.CLUSTER_NETWORK_POLICY.value,
    NETWORK: Kind.NETWORK_POLICY.value,
    BASELINE: BASELINE_KIND,
}


class Ports(NamedTuple):
    """A range of ports of one protocol; 0 to LAST_PORT is the whole protocol."""

    protocol: int
    first: int
    last: int


class Decision(NamedTuple):
    """What one rule does with a peer that it matches; ``ports`` of None are all, whatever the protocol."""

    stage: int
    action: Action
    ports: tuple[Ports, ...] | None
    rule: int

    def matches(self, protocol: int, port: int) -> bool:
        """Tell whether it is about a port; protocol 0 stands for all that no rule can name."""
        ports = self.ports
        return ports is None or any(it.protocol == protocol and it.first <= port <= it.last for it in ports)


class Verdict(NamedTuple):
    """Whether it may pass, and which rule said so; 0 = none did."""

    allowed: bool
    rule: int


class Entry(NamedTuple):
    """A verdict for all that begins with the first ``bits`` of a key; ``value`` is laid out as policy_entry."""

    bits: int
    protocol: int
    port: int
    value: bytes


Entries = tuple[Entry, ...]
"""Of one subject, peer and direction: longest prefix first, the last one for everything."""


def decide(decisions: Iterable[Decision], protocol: int, port: int, *, is_isolated: bool) -> Verdict:
    """Find the verdict for one port."""
    stage = ADMIN
    for decision in decisions:
        if decision.stage < stage or not decision.matches(protocol, port):
            continue
        if decision.action is not Action.PASS:
            return Verdict(decision.action is Action.ACCEPT, decision.rule)
        stage = decision.stage + 1
    return Verdict(not is_isolated, 0)


@functools.lru_cache(maxsize=8_192)
def flatten(decisions: tuple[Decision, ...], *, is_isolated: bool) -> Entries:
    """Make decisions, in order of precedence, into prefixes of which the longest decides.

    Verdicts of neighbouring ports that are the same are one range. A protocol has the verdict as its own by which the
    fewest entries remain.
    """
    base = decide(decisions, 0, 0, is_isolated=is_isolated)
    entries = [Entry(POLICY_BASE_BITS, 0, 0, _value(base))]
    for protocol in sorted({it.protocol for decision in decisions for it in decision.ports or ()}):
        ranges = list(_ranges(decisions, protocol, is_isolated=is_isolated))
        entries += _protocol_entries(protocol, ranges, base)
    return tuple(sorted(entries, key=lambda entry: (-entry.bits, entry)))


@functools.lru_cache(maxsize=8_192)
def agree(one: Entries, other: Entries) -> bool:
    """Tell whether two come to the same for every port, whichever rules say so."""
    tables = [{entry[:3]: POLICY_ENTRY.packer.unpack(entry.value)[1] for entry in it} for it in (one, other)]
    ends = {(0, 0)}
    for entry in (*one, *other):
        behind = entry.port + (1 << max(POLICY_PROTOCOL_BITS + _PORT_BITS - entry.bits, 0))
        ends |= {(entry.protocol, port) for port in (0, entry.port, behind) if port <= LAST_PORT}
    return all(_allows(tables[0], *end) == _allows(tables[1], *end) for end in ends)


def _allows(table: Mapping[tuple[int, int, int], int], protocol: int, port: int) -> bool:
    for free in range(_PORT_BITS + 1):
        found = table.get((POLICY_PROTOCOL_BITS + _PORT_BITS - free, protocol, port >> free << free))
        if found is not None:
            return bool(found)
    return bool(table[POLICY_BASE_BITS, 0, 0])


def _protocol_entries(protocol: int, ranges: Sequence[tuple[int, int, Verdict]], base: Verdict) -> list[Entry]:
    verdicts = dict.fromkeys((base, *(verdict for _, _, verdict in ranges)))
    return min((_entries_with(protocol, ranges, base, whole) for whole in verdicts), key=len)


def _entries_with(
    protocol: int, ranges: Sequence[tuple[int, int, Verdict]], base: Verdict, whole: Verdict
) -> list[Entry]:
    entries = [Entry(POLICY_PROTOCOL_BITS, protocol, 0, _value(whole))] if whole != base else []
    for first, last, verdict in ranges:
        if verdict == whole:
            continue
        for port, bits in prefixes(first, last):
            entries.append(Entry(POLICY_PROTOCOL_BITS + bits, protocol, port, _value(verdict)))
    return entries


def _ranges(decisions: tuple[Decision, ...], protocol: int, *, is_isolated: bool) -> Iterator[tuple[int, int, Verdict]]:
    """Cut a protocol's ports where the verdict changes."""
    of_protocol = [it for decision in decisions for it in decision.ports or () if it.protocol == protocol]
    cuts = sorted({0} | {it.first for it in of_protocol} | {it.last + 1 for it in of_protocol} - {LAST_PORT + 1})
    start, verdict = 0, decide(decisions, protocol, 0, is_isolated=is_isolated)
    for cut in cuts[1:]:
        there = decide(decisions, protocol, cut, is_isolated=is_isolated)
        if there != verdict:
            yield start, cut - 1, verdict
            start, verdict = cut, there
    yield start, LAST_PORT, verdict


def prefixes(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cut a range of ports into prefixes: the port each begins with, and how many of its 16 bits count."""
    while first <= last:
        free = min((first & -first).bit_length() - 1 if first else _PORT_BITS, (last - first + 1).bit_length() - 1)
        yield first, _PORT_BITS - free
        first += 1 << free


def _value(verdict: Verdict) -> bytes:
    return POLICY_ENTRY.packer.pack(verdict.rule, verdict.allowed)


def resolve_ports(ports: Sequence[PortRange] | None, named: Sequence[NamedPort]) -> tuple[Ports, ...] | None:
    """Say what ports a rule means of a destination that gives its ports these names."""
    if ports is None:
        return None
    found = {Ports(it.protocol, it.first, it.last) for it in ports if not it.name}
    found |= {
        Ports(port.protocol, port.number, port.number)
        for it in ports
        for port in named
        if it.name and (it.name, it.protocol) == (port.name, port.protocol)
    }
    return tuple(sorted(found))
