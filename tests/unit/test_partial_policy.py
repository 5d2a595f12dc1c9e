"""What is left of a policy that cannot be read as a whole: it isolates whom it did, and allows no more."""

import json

import pytest

from agent.core.addresses import AddressRange
from agent.core.events import Malformed
from agent.core.policy_records import (
    EVERYTHING,
    Action,
    ClusterPolicyRecord,
    IpBlock,
    NetworkPolicyRecord,
    Peer,
    PortRange,
    Prefix,
    Rule,
    Tier,
    TierRule,
)
from agent.core.records import Kind, ObjectKey, Protocol
from agent.sources.decode import Decoder
from tests.policy_builders import selector

KEY, CLUSTER_KEY = ObjectKey("shop", "web"), ObjectKey("", "guard")
APP = selector(app="web")
BAD_PORT = {"port": 80, "protocol": "QUIC"}
BAD_PEER = {"podSelector": {"matchExpressions": [{"key": "a", "operator": "Near", "values": ["1"]}]}}
CIDR = {"ipBlock": {"cidr": "10.0.0.0/8"}}
TEN = Peer(block=IpBlock(Prefix(*AddressRange.parse("10.0.0.0/8"))))
EIGHTY = PortRange(Protocol.TCP, 80, 80)
NOBODY = Rule(peers=())
PEER_FAULT = "podSelector.matchExpressions[0].operator"


def decode(kind, value):
    """Decode from JSON, and find that a YAML parser's values come to the same."""
    decoder = Decoder("here", policy=True)
    event = decoder.decode(kind, json.dumps(value).encode()).event
    assert decoder.decode_object(kind, value) == event
    assert isinstance(event, Malformed)
    return event


def network_policy(**spec):
    return {
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"podSelector": {"matchLabels": {"app": "web"}}, **spec},
    }


def cluster_policy(**spec):
    return {
        "metadata": {"name": "guard"},
        "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, **spec},
    }


@pytest.mark.parametrize(
    ("spec", "ingress", "egress", "field"),
    [
        pytest.param(
            {"ingress": [{"ports": [{"port": 80}, BAD_PORT]}]},
            (Rule(ports=(EIGHTY,)),),
            None,
            "spec.ingress[0].ports[1].protocol",
            id="a port costs itself",
        ),
        pytest.param(
            {"ingress": [{"ports": [BAD_PORT]}]},
            (Rule(ports=()),),
            None,
            "spec.ingress[0].ports[0].protocol",
            id="the only port: not all ports",
        ),
        pytest.param(
            {"ingress": [{"ports": 80}]}, (Rule(ports=()),), None, "spec.ingress[0].ports", id="ports that are no list"
        ),
        pytest.param(
            {"ingress": [{"from": [BAD_PEER, CIDR]}]},
            (Rule(peers=(TEN,)),),
            None,
            f"spec.ingress[0].from[0].{PEER_FAULT}",
            id="a peer costs itself",
        ),
        pytest.param(
            {"egress": [{"to": [BAD_PEER]}]},
            (),
            (NOBODY,),
            f"spec.egress[0].to[0].{PEER_FAULT}",
            id="the only peer: not everybody",
        ),
        pytest.param(
            {"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["?"]}}, CIDR]}]},
            (Rule(peers=(TEN,)),),
            None,
            "spec.ingress[0].from[0].ipBlock.except[0]",
            id="an exception costs its block",
        ),
        pytest.param(
            {"ingress": ["all", {"from": [CIDR]}]},
            (NOBODY, Rule(peers=(TEN,))),
            None,
            "spec.ingress[0]",
            id="a rule costs itself and keeps its place",
        ),
        pytest.param({"ingress": "all"}, (), None, "spec.ingress", id="rules that are no list"),
        pytest.param(
            {"egress": {"to": []}}, (), (), "spec.egress", id="egress that is no list is isolated all the same"
        ),
        pytest.param(
            {"ingress": [{"from": [BAD_PEER], "ports": [BAD_PORT]}]},
            (Rule((), ()),),
            None,
            f"spec.ingress[0].from[0].{PEER_FAULT}, spec.ingress[0].ports[0].protocol",
            id="all faults are told",
        ),
    ],
)
def test_network_policies(spec, ingress, egress, field):
    event = decode(Kind.NETWORK_POLICY, network_policy(**spec))

    assert event.partial == NetworkPolicyRecord(KEY, APP, ingress, egress, is_partial=True)
    assert (event.key, event.field) == (KEY, field)
    assert event.reason.count("; ") == field.count(", ")


BAD_RULES = {
    "a network": {"to": [{"networks": ["10.0.0.0"]}]},
    "two in one": {"to": [{"namespaces": {}, "networks": ["::/0"]}]},
    "a port": {"to": [{"namespaces": {}}], "protocols": [{"tcp": {"destinationPort": {"number": 70000}}}]},
    "no peers": {},
}


@pytest.mark.parametrize("said", BAD_RULES.values(), ids=BAD_RULES)
@pytest.mark.parametrize(
    ("action", "wanted"),
    [
        ("Accept", TierRule(Action.ACCEPT, NOBODY, "odd", written="Accept")),
        ("Deny", TierRule(Action.DENY, Rule(), "odd", written="Deny")),
        ("Pass", TierRule(Action.DENY, Rule(), "odd", written="Pass")),
        ("Ask", TierRule(Action.DENY, Rule(), "odd", written="Ask")),
        (None, TierRule(Action.DENY, Rule(), "odd", written="")),
    ],
    ids=str,
)
def test_a_rule_of_a_tier_is_closed(said, action, wanted):
    """Source: ClusterNetworkPolicyIngressPeer, "fail closed"."""
    good = {"action": "Accept", "to": [{"namespaces": {}}]}
    event = decode(
        Kind.CLUSTER_NETWORK_POLICY, cluster_policy(egress=[good, {"action": action, "name": "odd", **said}])
    )

    accept = TierRule(Action.ACCEPT, Rule((Peer(EVERYTHING),)))
    assert event.partial == ClusterPolicyRecord(
        CLUSTER_KEY, Tier.ADMIN, 1, EVERYTHING, egress=(accept, wanted), is_partial=True
    )


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        pytest.param({"name": False, "action": "Refuse"}, ["action", "name"], id="both of another shape"),
        pytest.param({"action": "Deny", "to": [{"networks": ["10.0.0.0"]}]}, ["to[0].networks[0]"], id="one alone"),
        pytest.param({"action": "Ask", "to": 7, "protocols": 8}, ["action", "protocols", "to"], id="each of three"),
    ],
)
def test_all_faults_of_a_tiers_rule_are_told(said, fields):
    event = decode(Kind.CLUSTER_NETWORK_POLICY, cluster_policy(egress=[{"to": [{"namespaces": {}}], **said}]))

    assert sorted(event.field.split(", ")) == [f"spec.egress[0].{name}" for name in fields]
    assert event.reason.count("; ") == len(fields) - 1


def test_beside_a_rule_that_cannot_be_read_one_that_is_not_understood_is_closed():
    unread = {"action": "Deny", "to": [{"networks": ["10.0.0.0"]}]}
    newer = {"action": "Accept", "to": [{"namespaces": {}}], "ports": []}
    event = decode(Kind.CLUSTER_NETWORK_POLICY, cluster_policy(egress=[unread, newer]))

    assert event.field == "spec.egress[0].to[0].networks[0]"
    assert event.partial.egress == (
        TierRule(Action.DENY, Rule(), written="Deny"),
        TierRule(Action.ACCEPT, NOBODY, unknown="spec.egress[1].ports", written="Accept"),
    )


@pytest.mark.parametrize("said", ["deny", 7, {"action": "Accept"}], ids=str)
def test_rules_of_a_tier_that_are_no_list_deny(said):
    event = decode(Kind.CLUSTER_NETWORK_POLICY, cluster_policy(ingress=said))

    assert event.partial.ingress == (TierRule(Action.DENY, Rule(), written=""),)
    assert event.field == "spec.ingress"


@pytest.mark.parametrize(
    ("kind", "value", "field"),
    [
        pytest.param(
            Kind.NETWORK_POLICY,
            network_policy(podSelector={"matchLabels": 7}, ingress=[5]),
            "spec.podSelector.matchLabels",
            id="podSelector",
        ),
        pytest.param(Kind.NETWORK_POLICY, network_policy(policyTypes="Both"), "spec.policyTypes", id="policyTypes"),
        pytest.param(
            Kind.NETWORK_POLICY, network_policy(policyTypes=["ingress"]), "spec.policyTypes[0]", id="the only direction"
        ),
        pytest.param(
            Kind.NETWORK_POLICY,
            network_policy(policyTypes=["Ingress", "egress"], egress=[{}]),
            "spec.policyTypes[1]",
            id="one of the directions",
        ),
        pytest.param(Kind.NETWORK_POLICY, {"metadata": {"name": "web"}, "spec": 5}, "spec", id="spec"),
        pytest.param(Kind.CLUSTER_NETWORK_POLICY, cluster_policy(tier="Middle"), "spec.tier", id="tier"),
        pytest.param(Kind.CLUSTER_NETWORK_POLICY, cluster_policy(priority="high"), "spec.priority", id="priority"),
        pytest.param(Kind.CLUSTER_NETWORK_POLICY, cluster_policy(subject={}), "spec.subject", id="subject"),
        pytest.param(
            Kind.CLUSTER_NETWORK_POLICY,
            cluster_policy(subject={"namespaces": {}, "zones": {}}),
            "spec.subject.zones",
            id="a part of the subject",
        ),
    ],
)
def test_nothing_is_left_where_it_is_not_known_whom_it_is_about_or_when_it_decides(kind, value, field):
    event = decode(kind, value)

    assert (event.partial, event.field) == (None, field)
