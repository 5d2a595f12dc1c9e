"""Convert parts of ClusterNetworkPolicies as they are on the wire into parts of records, as `convert` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from sys import intern
from typing import Any

import msgspec

from agent.core.policy_records import Action, Peer, PortRange, Rule, Selector, TierRule
from agent.core.records import Protocol
from agent.sources.convert import fault
from agent.sources.convert_policy import block, port_name, prefix, selector
from agent.sources.parts import shaped
from agent.sources.reader import UNKNOWN_FIELD, explain
from agent.sources.wire_policy import (
    NamespacedPods,
    TierEgressRule,
    TierIngressRule,
    TierPeer,
    TierProtocols,
    TierSubject,
    WirePort,
)


class _Unknown(Exception):
    """A part of a rule says nothing we know: its definition is newer than we are, or what it says is experimental."""

    def __init__(self, field: str) -> None:
        self.field = field
        super().__init__(field)


def subject(said: TierSubject, field: str) -> tuple[Selector, Selector | None]:
    """Convert whom a policy is about: namespaces, and which of their pods."""
    found = _tier_selectors(said, field)
    if found is None:
        raise fault(field, "neither namespaces nor pods")
    return found


def rules(said: Sequence[object], field: str, peers: str) -> tuple[TierRule, ...]:
    """Convert the rules of one direction, from builtin values; ``peers`` is ``from`` or ``to``."""
    return tuple([tier_rule(rule, f"{field}[{index}]", peers) for index, rule in enumerate(said)])


def tier_rule(said: object, field: str, peers: str) -> TierRule:
    """Convert one rule."""
    try:
        rule = _shaped(said, field, peers)
        if not rule.peers:
            raise fault(f"{field}.{peers}", "empty")
        body = Rule(_tier_peers(rule.peers, f"{field}.{peers}"), _tier_ports(rule.protocols, f"{field}.protocols"))
    except _Unknown as unknown:
        return closed(said, unknown.field)
    return TierRule(rule.action, body, rule.name or "")


def _shaped(said: object, field: str, peers: str) -> TierIngressRule | TierEgressRule:
    """Convert a rule to its shape on the wire. Raises: _Unknown, for a field that is newer than we are."""
    try:
        rule: TierIngressRule | TierEgressRule = shaped(said, _shape(peers), field)
    except msgspec.ValidationError as error:
        found = explain(error)
        if found.reason == UNKNOWN_FIELD:
            raise _Unknown(found.field) from None
        raise
    return rule


def rule_fields(peers: str) -> list[tuple[str, Any]]:
    """List the fields of a rule of one direction, by name and shape on the wire."""
    return [(it.encode_name, it.type) for it in msgspec.structs.fields(_shape(peers))]


def _shape(peers: str) -> type[TierIngressRule | TierEgressRule]:
    return TierIngressRule if peers == "from" else TierEgressRule


def closed(said: object, unknown: str = "") -> TierRule:
    """Make what a rule comes to that is not understood. Source: ClusterNetworkPolicyIngressPeer, "fail closed".

    ``said``: the rule in builtin values, whatever it says.
    """
    rule = said if isinstance(said, dict) else {}
    written, name = (it if isinstance(it, str) else "" for it in (rule.get("action"), rule.get("name")))
    is_accept = written == Action.ACCEPT
    action, body = (Action.ACCEPT, Rule(peers=())) if is_accept else (Action.DENY, Rule())
    return TierRule(action, body, name, unknown, written)


def _tier_peers(said: Sequence[TierSubject], field: str) -> tuple[Peer, ...]:
    """Convert peers. Raises: _Unknown."""
    return tuple(dict.fromkeys(peer for index, it in enumerate(said) for peer in _tier_peer(it, f"{field}[{index}]")))


def _tier_peer(said: TierSubject, field: str) -> Iterator[Peer]:
    selected = _tier_selectors(said, field)
    networks = said.networks if isinstance(said, TierPeer) else None
    if not networks and not selected:
        raise _Unknown(_experimental(said, field))
    if selected:
        yield Peer(*selected)
    for index, text in enumerate(networks or ()):
        yield Peer(block=block(prefix(text, f"{field}.networks[{index}]")))


def _experimental(said: TierSubject, field: str) -> str:
    """Name what a peer says as precisely as is known; of a field that is newer than we are, the peer is."""
    return next((f"{field}.{name}" for name in _given(said)), field)


def _given(said: TierSubject) -> list[str]:
    """List what a subject or a peer is given by."""
    values = {"namespaces": said.namespaces, "pods": said.pods, "nodes": said.nodes}
    if isinstance(said, TierPeer):
        values |= {"networks": said.networks, "domainNames": said.domain_names}
    return [name for name, value in values.items() if value is not None]


def _tier_selectors(said: TierSubject, field: str) -> tuple[Selector, Selector | None] | None:
    """Convert which pods are selected; None where it is not by selectors."""
    given = _given(said)
    if len(given) > 1:
        raise fault(field, f"more than one of {', '.join(given)}")
    if said.namespaces is not None:
        return selector(said.namespaces, f"{field}.namespaces"), None
    return _namespaced(said.pods, f"{field}.pods") if said.pods is not None else None


def _namespaced(said: NamespacedPods, field: str) -> tuple[Selector, Selector]:
    namespaces = selector(said.namespace_selector, f"{field}.namespaceSelector")
    return namespaces, selector(said.pod_selector, f"{field}.podSelector")


def _tier_ports(said: Sequence[TierProtocols] | None, field: str) -> tuple[PortRange, ...] | None:
    """Convert protocols; None for whatever protocol it is. Raises: _Unknown."""
    if not said:
        return None
    return tuple(
        dict.fromkeys(port for index, it in enumerate(said) for port in _tier_protocol(it, f"{field}[{index}]"))
    )


def _tier_protocol(said: TierProtocols, field: str) -> Iterator[PortRange]:
    """Convert one entry; a named port is that of any protocol."""
    given = [(name, getattr(said, name)) for name in ("tcp", "udp", "sctp") if getattr(said, name) is not None]
    name = said.destination_named_port
    if len(given) + bool(name) > 1:
        raise fault(field, "more than one of tcp, udp, sctp and destinationNamedPort")
    if not given and not name:
        raise _Unknown(field)
    if name:
        port_name(name, f"{field}.destinationNamedPort")
        yield from (PortRange(protocol, name=intern(name)) for protocol in Protocol)
    for protocol, body in given:
        port = body.destination_port
        place = f"{field}.{protocol}.destinationPort"
        yield PortRange(Protocol[protocol.upper()], *(_numbers(port, place) if port is not None else ()))


def _numbers(said: WirePort, field: str) -> tuple[int, int]:
    """Convert a port or a range of them. Raises: _Unknown."""
    if said.number is not None and said.range is not None:
        raise fault(field, "number and range")
    if said.number is not None:
        return said.number, said.number
    if said.range is None:
        raise _Unknown(field)
    if said.range.end < said.range.start:
        raise fault(f"{field}.range.end", f"{said.range.end} is less than start, {said.range.start}")
    return said.range.start, said.range.end
