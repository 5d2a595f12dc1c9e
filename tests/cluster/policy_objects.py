"""Write policies that are described as records, so that the API server and the agents read them as users write them."""

from __future__ import annotations

from agent.core.addresses import AddressRange
from agent.core.policy_records import (
    ClusterPolicyRecord,
    NetworkPolicyRecord,
    Operator,
    Peer,
    PortRange,
    Prefix,
    Rule,
    Selector,
    TierRule,
)
from tests.lab.manifests import Object


def as_written(record: NetworkPolicyRecord | ClusterPolicyRecord) -> Object:
    """Write a policy of either kind."""
    return network_policy(record) if isinstance(record, NetworkPolicyRecord) else cluster_policy(record)


def network_policy(record: NetworkPolicyRecord) -> Object:
    """Write a NetworkPolicy; both directions are named in policyTypes where there are rules or none."""
    spec: Object = {"podSelector": _selector(record.subject), "policyTypes": []}
    if record.ingress is not None:
        spec["policyTypes"].append("Ingress")
        spec["ingress"] = [_rule(rule, "from") for rule in record.ingress]
    if record.egress is not None:
        spec["policyTypes"].append("Egress")
        spec["egress"] = [_rule(rule, "to") for rule in record.egress]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": record.key.name, "namespace": record.key.namespace},
        "spec": spec,
    }


def _rule(rule: Rule, peers: str) -> Object:
    assert rule.peers != (), "the API cannot say nobody: an empty list is everybody"
    written: Object = {}
    if rule.peers is not None:
        written[peers] = [_peer(peer) for peer in rule.peers]
    if rule.ports is not None:
        written["ports"] = [_port(port) for port in rule.ports]
    return written


def _peer(peer: Peer) -> Object:
    if peer.block is not None:
        excepts = [_range(hole) for hole in peer.block.excepts]
        return {"ipBlock": {"cidr": _range(peer.block.prefix), **({"except": excepts} if excepts else {})}}
    written = {"namespaceSelector": peer.namespaces, "podSelector": peer.pods}
    return {field: _selector(selector) for field, selector in written.items() if selector is not None}


def _selector(selector: Selector) -> Object:
    """Write what is of one value as a label to match, and the rest as expressions."""
    written: Object = {}
    for need in selector.requirements:
        labels = written.setdefault("matchLabels", {}) if _is_plain(need.operator, len(need.values)) else None
        if labels is not None and need.key not in labels:
            labels[need.key] = min(need.values)
            continue
        values = {"values": sorted(need.values)} if need.values else {}
        expression = {"key": need.key, "operator": need.operator.value, **values}
        written.setdefault("matchExpressions", []).append(expression)
    return written


def _is_plain(operator: Operator, count: int) -> bool:
    return operator is Operator.IN and count == 1


def _port(port: PortRange) -> Object:
    written: Object = {"protocol": port.protocol.name}
    if port.name:
        return {**written, "port": port.name}
    if (port.first, port.last) == (0, 65_535):
        return written
    return {**written, "port": port.first, **({"endPort": port.last} if port.last != port.first else {})}


def _range(prefix: Prefix) -> str:
    return str(AddressRange(*prefix))


def cluster_policy(record: ClusterPolicyRecord) -> Object:
    """Write a ClusterNetworkPolicy."""
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": record.key.name},
        "spec": {
            "tier": record.tier.value,
            "priority": record.priority,
            "subject": _selected(record.namespaces, record.pods),
            "ingress": [_tier_rule(rule, "from") for rule in record.ingress],
            "egress": [_tier_rule(rule, "to") for rule in record.egress],
        },
    }


def _tier_rule(said: TierRule, peers: str) -> Object:
    assert said.rule.peers, "the API cannot say everybody: a list must not be empty"
    ports = {} if said.rule.ports is None else {"protocols": [_tier_port(port) for port in said.rule.ports]}
    return {"action": said.action.value, peers: [_tier_peer(peer) for peer in said.rule.peers], **ports}


def _tier_peer(peer: Peer) -> Object:
    if peer.block is not None:
        assert not peer.block.excepts
        return {"networks": [_range(peer.block.prefix)]}
    assert peer.namespaces is not None
    return _selected(peer.namespaces, peer.pods)


def _selected(namespaces: Selector, pods: Selector | None) -> Object:
    if pods is None:
        return {"namespaces": _selector(namespaces)}
    return {"pods": {"namespaceSelector": _selector(namespaces), "podSelector": _selector(pods)}}


def _tier_port(port: PortRange) -> Object:
    assert not port.name
    if (port.first, port.last) == (0, 65_535):
        return {port.protocol.name.lower(): {}}
    numbers = {"number": port.first} if port.first == port.last else {"range": {"start": port.first, "end": port.last}}
    return {port.protocol.name.lower(): {"destinationPort": numbers}}
