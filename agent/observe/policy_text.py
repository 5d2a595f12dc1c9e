"""How policy is written for people: selectors, peers, ports, rules, identities."""

from __future__ import annotations

from collections.abc import Sequence

from agent.core.addresses import AddressRange
from agent.core.policy import LAST_PORT, RuleName
from agent.core.policy_records import (
    Action,
    IpBlock,
    Labels,
    Operator,
    Peer,
    PortRange,
    Prefix,
    Requirement,
    Rule,
    Selector,
)
from agent.core.records import Kind, ObjectKey
from agent.core.selectors import IdentityName

_ALLOWED = {Action.ACCEPT: "allowed", Action.DENY: "denied", Action.PASS: "passed on"}


def selector_text(selector: Selector | None, everything: str) -> str:
    """Write a selector as kubectl does; ``everything`` where it selects all."""
    return (
        ",".join(_requirement(it) for it in selector.requirements) if selector and selector.requirements else everything
    )


def _requirement(requirement: Requirement) -> str:
    values = sorted(requirement.values)
    match requirement.operator:
        case Operator.IN if len(values) == 1:
            return f"{requirement.key}={values[0]}"
        case Operator.IN:
            return f"{requirement.key} in ({','.join(values)})"
        case Operator.NOT_IN:
            return f"{requirement.key} notin ({','.join(values)})"
        case Operator.EXISTS:
            return requirement.key
        case Operator.DOES_NOT_EXIST:
            return f"!{requirement.key}"


def peers_text(rule: Rule) -> list[str]:
    """Write whom a rule means, a line for each peer."""
    if rule.peers is None:
        return ["everybody"]
    return [_peer(peer) for peer in rule.peers] or ["nobody"]


def _peer(peer: Peer) -> str:
    if peer.block is not None:
        return _block(peer.block)
    pods = selector_text(peer.pods, "")
    who = f"pods {pods}" if pods else "all pods"
    if peer.namespaces is None:
        return f"{who} of its own namespace"
    namespaces = selector_text(peer.namespaces, "")
    return f"{who} of {f'namespaces {namespaces}' if namespaces else 'all namespaces'}"


def _block(block: IpBlock) -> str:
    holes = ", ".join(prefix_text(hole) for hole in block.excepts)
    return prefix_text(block.prefix) + (f" except {holes}" if holes else "")


def prefix_text(prefix: Prefix) -> str:
    """Write a range of addresses."""
    return str(AddressRange(*prefix))


def ports_text(rule: Rule) -> list[str]:
    """Write the ports a rule means."""
    if rule.ports is None:
        return ["all"]
    return [_ports(it) for it in rule.ports] or ["none"]


def _ports(ports: PortRange) -> str:
    if ports.name:
        return f"{ports.protocol.name}/{ports.name}"
    if (ports.first, ports.last) == (0, LAST_PORT):
        return ports.protocol.name
    last = f"-{ports.last}" if ports.last != ports.first else ""
    return f"{ports.protocol.name}/{ports.first}{last}"


def rule_text(rule: RuleName, own_name: str = "") -> str:
    """Name a rule: NetworkPolicy shop/web, ingress rule 0; with the name it has itself: egress rule 2 "no-mail"."""
    own = f' "{own_name}"' if own_name else ""
    return f"{rule.kind} {rule.policy}, {rule.direction.name.lower()} rule {rule.index}{own}"


def isolated_text(policies: Sequence[ObjectKey]) -> str:
    """Say that no rule allows it, and whose absence of one that is."""
    if not policies:
        return "no rule allows it"
    names = ", ".join(map(str, policies))
    one = len(policies) == 1
    return f"no rule allows it; isolated by {Kind.NETWORK_POLICY if one else 'NetworkPolicies'} {names}"


def action_text(action: Action) -> str:
    """Say what becomes of what a rule matches."""
    return _ALLOWED[action]


def labels_document(labels: Labels) -> dict[str, str]:
    """Give labels as JSON has them."""
    return dict(labels)


def labels_text(labels: Labels) -> str:
    """Write labels as kubectl does."""
    return ",".join(f"{name}={value}" for name, value in labels)


def identity_document(name: IdentityName) -> dict[str, object]:
    """Say what an identity stands for: what policies look at of its pods or addresses."""
    return {
        "kind": "pods" if name.is_pod else "block" if name.block else "world",
        "namespace": name.namespace,
        "namespace_labels": dict(name.namespace_labels),
        "labels": dict(name.labels),
        "ports": [f"{port.protocol.name}/{port.name}={port.number}" for port in name.ports],
        "block": prefix_text(name.block) if name.block else None,
    }
