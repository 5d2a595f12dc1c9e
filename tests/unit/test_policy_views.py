"""What the agent answers about policy, and how it is written."""

from __future__ import annotations

import re

import pytest

from agent.cli.flows import row, since_ns
from agent.cli.policy import _show
from agent.core.abi import Direction
from agent.core.events import Malformed, Upsert
from agent.core.policy_planner import PolicySizes
from agent.core.policy_records import (
    Action,
    NetworkPolicyRecord,
    Operator,
    Peer,
    PolicyRecord,
    PortRange,
    Rule,
    Selector,
    TierRule,
    not_understood,
)
from agent.core.records import Kind, ObjectKey, Protocol
from agent.errors import ConfigError
from agent.observe.policy_text import isolated_text, peers_text, ports_text, selector_text
from agent.observe.policy_views import PolicyViews
from tests.builders import key
from tests.policy_builders import (
    PolicyNode,
    accept,
    cidr,
    cluster_policy,
    deny,
    namespace,
    need,
    network_policy,
    pod,
    pods,
    rule,
    selector,
    tcp,
    udp,
)

SELECTORS = {
    "a=1": selector(a="1"),
    "a in (1,2)": selector(need("a", Operator.IN, "2", "1")),
    "a notin (1,2)": selector(need("a", Operator.NOT_IN, "2", "1")),
    "a": selector(need("a", Operator.EXISTS)),
    "!a": selector(need("a", Operator.DOES_NOT_EXIST)),
    "a=1,!b": selector(need("b", Operator.DOES_NOT_EXIST), a="1"),
    "everything": Selector(),
}


@pytest.mark.parametrize(("text", "given"), SELECTORS.items(), ids=SELECTORS)
def test_selectors_are_written_as_kubectl_does(text: str, given: Selector) -> None:
    assert selector_text(given, "everything") == text


PEERS = {
    "everybody": rule(),
    "pods app=web of its own namespace": rule(pods(app="web")),
    "all pods of its own namespace": rule(Peer(pods=Selector())),
    "all pods of all namespaces": rule(Peer(namespaces=Selector())),
    "pods app=web of namespaces team=a": rule(Peer(namespaces=selector(team="a"), pods=selector(app="web"))),
    "10.0.0.0/8": rule(cidr("10.0.0.0/8")),
    "10.0.0.0/8 except 10.1.0.0/16, 10.2.0.0/16": rule(cidr("10.0.0.0/8", "10.1.0.0/16", "10.2.0.0/16")),
    "fd00::/8": rule(cidr("fd00::/8")),
}


@pytest.mark.parametrize(("text", "given"), PEERS.items(), ids=PEERS)
def test_peers_are_written_for_people(text: str, given) -> None:
    assert peers_text(given) == [text]


PORTS = {
    "TCP/80": tcp(80),
    "UDP/1000-2000": udp(1000, 2000),
    "SCTP": PortRange(Protocol.SCTP),
    "TCP/http": PortRange(Protocol.TCP, name="http"),
}


@pytest.mark.parametrize(("text", "given"), PORTS.items(), ids=PORTS)
def test_ports_are_written_for_people(text: str, given: PortRange) -> None:
    assert ports_text(rule(ports=[given])) == [text]


def test_no_ports_are_all_and_an_empty_list_is_none() -> None:
    assert (ports_text(rule()), ports_text(rule(ports=[]))) == (["all"], ["none"])


@pytest.mark.parametrize(
    ("policies", "text"),
    [
        ((), "no rule allows it"),
        (("shop/a",), "no rule allows it; isolated by NetworkPolicy shop/a"),
        (("shop/a", "shop/b"), "no rule allows it; isolated by NetworkPolicies shop/a, shop/b"),
    ],
    ids=["nobody", "one", "two"],
)
def test_who_isolates_is_named(policies: tuple[str, ...], text: str) -> None:
    assert isolated_text(tuple(map(key, policies))) == text


@pytest.fixture
def node() -> PolicyNode:
    return PolicyNode(
        namespace("shop", team="a"),
        pod("shop/web", "10.1.0.1", "fd00::1", app="web", ports=[("http", 8080)]),
        pod("shop/db", "10.1.0.2", app="db"),
        pod("shop/far", "10.1.1.1", app="web", local=False),
        network_policy("shop/web", selector(app="web"), ingress=[rule(cidr("192.0.2.0/24"), ports=[tcp(80)])]),
        cluster_policy(
            "guard", priority=7, namespaces=selector(team="a"), egress=[deny(cidr("10.9.0.0/16")), accept()]
        ),
    )


@pytest.fixture
def views(node: PolicyNode) -> PolicyViews:
    return PolicyViews(node.model, node.planner)


def test_policies_are_listed_in_the_order_they_decide(views: PolicyViews) -> None:
    cluster, network = views.policies()

    assert (cluster["name"], cluster["tier"], cluster["priority"]) == ("guard", "Admin", 7)
    assert (cluster["subject"], cluster["pods"]) == ("all pods of team=a", ["shop/db", "shop/web"])
    assert [(it["action"], it["peers"]) for it in cluster["rules"]] == [
        ("denied", ["10.9.0.0/16"]),
        ("allowed", ["everybody"]),
    ]
    assert (network["namespace"], network["name"], network["directions"]) == ("shop", "web", ["ingress"])
    assert (network["pods"], network["subject"]) == (["shop/web"], "app=web")
    assert network["rules"] == [
        {
            "rule": "NetworkPolicy shop/web, ingress rule 0",
            "direction": "ingress",
            "index": 0,
            "name": "",
            "action": "allowed",
            "peers": ["192.0.2.0/24"],
            "ports": ["TCP/80"],
            "closed": False,
            "not_understood": "",
            "comes_to": "",
        }
    ]


PART = NetworkPolicyRecord(key("shop/broken"), Selector(), (), is_partial=True)


@pytest.mark.parametrize(
    ("name", "partial", "in_force"),
    [
        pytest.param("shop/web", None, "former", id="one that was read before"),
        pytest.param("shop/broken", None, "none", id="one that never was"),
        pytest.param("shop/broken", PART, "part", id="one of which a part can be"),
    ],
)
def test_what_cannot_be_read_is_listed_with_its_fault(
    node: PolicyNode, views: PolicyViews, name: str, partial: NetworkPolicyRecord | None, in_force: str
) -> None:
    node.model.apply(Malformed(Kind.NETWORK_POLICY, key(name), "spec.ingress[0]", "is no list", partial=partial))

    by_name = {f"{it['namespace']}/{it['name']}": (it["fault"], it["in_force"]) for it in views.policies()}

    assert by_name.pop(name) == ("spec.ingress[0]: is no list", in_force)
    assert set(by_name) | {name} == {"/guard", "shop/web", name}
    assert set(by_name.values()) == {("", "whole")}


def test_what_is_not_understood_is_listed_until_it_is_gone(node: PolicyNode, views: PolicyViews) -> None:
    closed = TierRule(Action.DENY, Rule(), unknown="spec.egress[1].to[0].nodes", written="Pass")
    odd = cluster_policy("odd", egress=[accept(), closed])

    def said() -> tuple[list[str], list[bool]]:
        (it,) = (it for it in views.policies() if it["name"] == "odd")
        assert it["fault"] == ""
        return it["not_understood"], [rule["closed"] for rule in it["rules"]]

    node.apply(Upsert(odd, not_understood(odd)))
    assert said() == (
        ["spec.egress[1].to[0].nodes: not understood, so that the rule denies everybody"],
        [False, True],
    )
    node.apply(cluster_policy("odd", egress=[accept()]))
    assert said() == ([], [False])
    node.apply(Upsert(odd, not_understood(odd)))
    node.delete(odd)
    assert not node.model.left_out


NODES = "spec.ingress[0].from[0].nodes"
CLOSED = {
    "Accept": (
        TierRule(Action.ACCEPT, Rule(peers=()), unknown=NODES, written="Accept"),
        ["Accept", True, NODES, "accepts nobody"],
        f"Accept, closed (not understood: {NODES})",
    ),
    "Pass": (
        TierRule(Action.DENY, Rule(), unknown=NODES, written="Pass"),
        ["Pass", True, NODES, "denies everybody"],
        f"Pass, closed (not understood: {NODES})",
    ),
    "one that cannot be read": (
        TierRule(Action.DENY, Rule(), written="Deny"),
        ["Deny", True, "", "denies everybody"],
        "Deny, closed (cannot be read)",
    ),
    "no action": (
        TierRule(Action.DENY, Rule(), written=""),
        ["", True, "", "denies everybody"],
        "?, closed (cannot be read)",
    ),
}


@pytest.mark.parametrize(("closed", "expected", "action"), CLOSED.values(), ids=CLOSED)
def test_a_closed_rule_is_shown_as_it_is_written_and_as_closed(
    node: PolicyNode, views: PolicyViews, capsys: pytest.CaptureFixture[str], closed: TierRule, expected, action: str
) -> None:
    node.apply(cluster_policy("odd", ingress=[closed]))
    (policy,) = (it for it in views.policies() if it["name"] == "odd")
    (rule,) = policy["rules"]

    assert [rule[name] for name in ("action", "closed", "not_understood", "comes_to")] == expected
    assert rule["peers"] == rule["ports"] == []
    _show(policy)
    row = capsys.readouterr().out.splitlines()[-1]
    assert re.split(r"\s{2,}", row.strip()) == ["ingress 0", "-", action, expected[-1], "-"]


DENIALS = {
    "both directions": ({"ingress": [], "egress": []}, ["egress", "ingress"]),
    "one of two": ({"ingress": [rule()], "egress": []}, ["egress"]),
    "none": ({"ingress": [rule()]}, []),
}


@pytest.mark.parametrize(("rules", "denied"), DENIALS.values(), ids=DENIALS)
def test_a_direction_without_a_rule_is_shown_to_allow_nobody(
    node: PolicyNode, views: PolicyViews, capsys: pytest.CaptureFixture[str], rules, denied
) -> None:
    node.apply(network_policy("shop/deny", **rules))
    (policy,) = (it for it in views.policies() if it["name"] == "deny")

    _show(policy)
    rows = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if "no rule" in row] == [[it, "-", "no rule", "allows nobody", "-"] for it in denied]


def test_endpoints_say_what_concerns_them(views: PolicyViews, node: PolicyNode) -> None:
    said = {(it["pod"], it["address"]): it for it in views.endpoints()}

    assert set(said) == {("shop/web", "10.1.0.1"), ("shop/web", "fd00::1"), ("shop/db", "10.1.0.2")}
    web, db = said["shop/web", "10.1.0.1"], said["shop/db", "10.1.0.2"]
    assert web["ingress"] == {"isolated_by": ["shop/web"], "policies": ["NetworkPolicy shop/web"]}
    assert web["egress"] == {"isolated_by": [], "policies": ["ClusterNetworkPolicy guard"]}
    assert db["ingress"] == {"isolated_by": [], "policies": []}
    assert (web["state"], web["reason"]) == ("enforced", "")


def test_an_endpoint_whose_policy_does_not_fit_says_so() -> None:
    node = PolicyNode(
        pod("shop/web", "10.1.0.1"),
        network_policy("shop/web", ingress=[rule(cidr("192.0.2.0/24"), ports=[tcp(80)])]),
        sizes=PolicySizes(policy=1),
    )

    (said,) = PolicyViews(node.model, node.planner).endpoints()

    assert said["state"] == "degraded"
    assert "map policy is full" in said["reason"]


TO_GUESTS = [deny(Peer(namespaces=Selector(), pods=selector(app="guest")))]
NEIGHBOURS = [pod("shop/a", "10.1.0.1", app="a"), pod("shop/b", "10.1.0.2", app="b")]
NO_ROOM = {
    "a block": (
        [network_policy("shop/p", selector(app="a"), ingress=[rule(cidr("10.9.0.0/16", "10.9.1.0/24"))])],
        PolicySizes(blocks=1),
        "map blocks is full",
    ),
    "a peer": (
        [
            cluster_policy("p", pods=selector(app="a"), ingress=TO_GUESTS),
            pod("shop/z", "10.1.1.9", app="guest", local=False),
        ],
        PolicySizes(identities=2),
        "map identities is full",
    ),
}


@pytest.mark.parametrize(("records", "sizes", "reason"), NO_ROOM.values(), ids=NO_ROOM)
def test_whom_the_maps_have_no_room_for_is_told_of_those_whose_policies_mean_it(
    records: list[PolicyRecord], sizes: PolicySizes, reason: str
) -> None:
    node = PolicyNode(
        *NEIGHBOURS, network_policy("shop/other", selector(app="b"), ingress=[rule()]), *records, sizes=sizes
    )
    views = PolicyViews(node.model, node.planner)

    endpoints = {it["pod"]: (it["state"], it["reason"]) for it in views.endpoints()}
    policies = {it["name"]: it["not_enforced"] for it in views.policies()}

    assert endpoints["shop/b"] == ("enforced", "")
    state, said = endpoints["shop/a"]
    assert (state, said.startswith(reason)) == ("degraded", True), said
    assert policies["other"] == []
    assert policies["p"] == [f"pod shop/a: {said}"]


def test_a_policy_names_the_pods_whose_verdicts_do_not_fit() -> None:
    node = PolicyNode(
        pod("shop/web", "10.1.0.1"),
        network_policy("shop/web", ingress=[rule(cidr("192.0.2.0/24"), ports=[tcp(80)])]),
        sizes=PolicySizes(policy=1),
    )

    (said,) = PolicyViews(node.model, node.planner).policies()

    (told,) = said["not_enforced"]
    assert told.startswith("pod shop/web: map policy is full")


def test_identities_count_the_addresses_that_have_them(views: PolicyViews) -> None:
    said = [(it["kind"], it["labels"].get("app"), it["block"], it["addresses"]) for it in views.identities()]

    assert sorted(said, key=str) == sorted(
        [
            ("block", None, "10.9.0.0/16", 0),
            ("block", None, "192.0.2.0/24", 0),
            ("pods", "db", None, 1),
            ("pods", "web", None, 3),
        ],
        key=str,
    )


@pytest.mark.parametrize(
    ("pod_name", "addresses"),
    [
        ("shop/web", ["10.1.0.1", "fd00::1"]),
        ("shop/far", ["10.1.1.1"]),
        ("shop/ended", []),
        ("shop/nobody", None),
        ("web", None),
    ],
)
def test_a_pod_is_found_by_its_name(
    views: PolicyViews, node: PolicyNode, pod_name: str, addresses: list[str] | None
) -> None:
    node.apply(pod("shop/ended"))

    assert views.pod_addresses(pod_name) == addresses


def test_a_rule_that_is_no_more_is_not_named(views: PolicyViews) -> None:
    assert views.explain(999, "ingress", 9_999) == ""
    assert views.explain(999, Direction.EGRESS.name.lower(), 0) == ""


NOW_NS = 1_700_000_000_000_000_000


@pytest.mark.parametrize(
    ("text", "ago_s"),
    [("5m", 300), ("1h30m", 5400), ("90s", 90), ("1.5m", 90), ("500ms", 0.5), ("2d", 172_800), ("99999d", None)],
)
def test_how_long_ago_is_read(text: str, ago_s: float | None) -> None:
    assert since_ns(text, NOW_NS) == (0 if ago_s is None else NOW_NS - round(ago_s * 1e9))


@pytest.mark.parametrize(
    "text", ["2023-11-14T22:13:20Z", "2023-11-14T23:13:20+01:00", "2023-11-14T22:13:20.000Z", "2023-11-14t22:13:20z"]
)
def test_times_are_read(text: str) -> None:
    assert since_ns(text, 0) == NOW_NS


def test_a_date_is_its_midnight_in_utc() -> None:
    assert since_ns("2023-11-14", 0) == since_ns("2023-11-14T00:00:00Z", 0)


@pytest.mark.parametrize(
    "text",
    ["", "m", "5", "5 m", "-5m", "2023-13-14", "20231114", "2023-11-14T22:13:20", "2023-11-14 22:13:20Z", "now", "5x"],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--since"):
        since_ns(text, NOW_NS)


@pytest.mark.parametrize(
    ("reason", "device", "why"),
    [("policy", "", "because"), ("untracked", "", "untracked: because"), ("held", "veth1", "held: because (veth1)")],
    ids=["policy", "another reason", "of a device"],
)
def test_a_line_has_pods_by_name_and_others_by_block(reason: str, device: str, why: str) -> None:
    nobody = {"namespace": "", "pod": "", "labels": None}
    flow = {
        "time": "t",
        "verdict": "dropped",
        "direction": "egress",
        "protocol": "ICMP",
        "source": {**nobody, "address": "10.1.0.1", "port": 0, "namespace": "shop", "pod": "web"},
        "destination": {**nobody, "address": "fd00::9", "port": 80, "labels": {"block": "fd00::/8"}},
        "reason": reason,
        "why": "because",
        "device": device,
    }

    assert row(flow) == (*("t", "dropped", "egress", "ICMP", "shop/web 10.1.0.1", "[fd00::9]:80 (in fd00::/8)", why),)


def test_a_policy_of_the_cluster_has_no_namespace() -> None:
    assert str(ObjectKey("", "guard")) == "guard"
