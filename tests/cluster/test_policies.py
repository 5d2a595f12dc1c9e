"""NetworkPolicy over two nodes: truth tables over real connections, for everything the upstream suite asks of it.

Each table asks every pod about every pod, in TCP, UDP and SCTP, both families, directly and by way of Services; so a
case of the upstream suite that is repeated there for UDP and SCTP is one table here, unless ports tell them apart.
Source: test/e2e/network/netpol of Kubernetes.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.policy_cluster import ADDRESSES, PolicyCluster, asked
from tests.cluster.policy_tables import Allows, Question
from tests.lab.lab import POD_RANGES
from tests.lab.manifests import Object, network_policy

pytestmark = pytest.mark.timeout(300)  # the first test of each mode starts the agents

Rule = dict[str, Any]
EVERYBODY: Rule = {}
DEFAULT_LABEL = "kubernetes.io/metadata.name"


def ingress(*rules: Rule, app: str = "a", ns: str = "x", name: str = "in") -> Object:
    """Let just these in; about x/a unless told. ``app`` "": the whole namespace."""
    return network_policy(name, app, namespace=ns, ingress=list(rules), policyTypes=["Ingress"])


def egress(*rules: Rule, app: str = "a", ns: str = "x", name: str = "out") -> Object:
    """Let it out to just these; about x/a unless told. ``app`` "": the whole namespace."""
    return network_policy(name, app, namespace=ns, egress=list(rules), policyTypes=["Egress"])


def pods(app: str) -> Object:
    return {"podSelector": {"matchLabels": {"app": app}}}


def spaces(ns: str, label: str = "ns") -> Object:
    return {"namespaceSelector": {"matchLabels": {label: ns}}}


def matching(key: str, operator: str, *values: str) -> Object:
    """Write a selector of one expression."""
    return {"matchExpressions": [{"key": key, "operator": operator, **({"values": list(values)} if values else {})}]}


def port(number: int | str | None = None, protocol: str = "", last: int | None = None) -> Object:
    said = {"port": number, "protocol": protocol or None, "endPort": last}
    return {key: value for key, value in said.items() if value is not None}


def blocks(*pairs: tuple[str, str]) -> list[Object]:
    """Write blocks, of IPv4 and IPv6, of texts that are a network or a network and its exception."""
    return [{"ipBlock": {"cidr": cidr, **({"except": [hole]} if hole else {})}} for cidr, hole in pairs]


def address_of(pod: str, family: int) -> str:
    return f"{ADDRESSES[pod][family == 6]}/{128 if family == 6 else 32}"


def around(pod: str) -> list[tuple[str, str]]:
    """Name the 16 addresses of each family that a pod's is among; nobody else's are on its node."""
    v4, v6 = ADDRESSES[pod]
    return [(f"{v4.rsplit('.', 1)[0]}.0/28", ""), (f"{v6.rsplit(':', 1)[0]}:/120", "")]


WITHOUT_ONE = list(zip(POD_RANGES, (address_of("y/b", 4), address_of("y/b", 6)), strict=True))
ONE = [(address_of("y/b", family), "") for family in (4, 6)]


def into(pod: str, allows: Allows) -> Allows:
    """Judge what goes to a pod, or to a namespace; all else passes."""
    return lambda it: allows(it) if it.destination.startswith(pod) else True


def out_of(pod: str, allows: Allows) -> Allows:
    """Judge what comes from a pod, or from a namespace; all else passes."""
    return lambda it: allows(it) if it.source.startswith(pod) else True


def never(_: Question) -> bool:
    return False


def always(_: Question) -> bool:
    return True


def at(number: int, protocol: str = "tcp") -> Allows:
    return lambda it: (it.protocol, it.port) == (protocol, number)


Case = tuple[list[Object], Allows]
DENIALS: dict[str, Case] = {
    "default deny of ingress": ([ingress(app="")], into("x", never)),
    "default deny of everything": (
        [network_policy("both", namespace="x", policyTypes=["Ingress", "Egress"])],
        lambda it: "x" not in (it.from_namespace, it.to_namespace),
    ),
    "policyTypes default to ingress": ([network_policy("plain", namespace="x")], into("x", never)),
    "policyTypes default to both where there is egress": (
        [network_policy("plain", "a", namespace="x", egress=[{"to": [pods("b")]}])],
        lambda it: it.destination != "x/a" and (it.source != "x/a" or it.destination == "x/b"),
    ),
    "egress denied by selector": ([egress()], out_of("x/a", never)),
    "egress denied to a whole namespace's pods": ([egress(app="")], out_of("x", never)),
    "egress denied though the server allows": (
        [egress(), ingress(EVERYBODY, app="", ns="y")],
        out_of("x/a", never),
    ),
}
PEERS: dict[str, Case] = {
    "pods of the own namespace": (
        [ingress({"from": [pods("b")]})],
        into("x/a", lambda it: it.source == "x/b"),
    ),
    "for a target in a namespace that is denied": (
        [ingress(app="", name="none"), ingress(EVERYBODY)],
        into("x", lambda it: it.destination == "x/a"),
    ),
    "pods of all namespaces": (
        [ingress({"from": [{"namespaceSelector": {}}]})],
        always,
    ),
    "another namespace only": ([ingress({"from": [spaces("y")]})], into("x/a", lambda it: it.from_namespace == "y")),
    "expressions about pods": (
        [ingress({"from": [{"podSelector": matching("app", "In", "b")}]})],
        into("x/a", lambda it: it.source == "x/b"),
    ),
    "expressions about namespaces": (
        [ingress({"from": [{"namespaceSelector": matching("ns", "NotIn", "x", "z")}]})],
        into("x/a", lambda it: it.from_namespace == "y"),
    ),
    "pods or namespaces": (
        [ingress({"from": [pods("b"), spaces("y")]})],
        into("x/a", lambda it: it.source == "x/b" or it.from_namespace == "y"),
    ),
    "pods and namespaces": (
        [ingress({"from": [pods("b") | spaces("y")]})],
        into("x/a", lambda it: it.source == "y/b"),
    ),
    "several of both": (
        [
            ingress(
                {
                    "from": [
                        {
                            "namespaceSelector": matching("ns", "NotIn", "x"),
                            "podSelector": matching("app", "NotIn", "a"),
                        },
                        {"namespaceSelector": matching("ns", "In", "x"), "podSelector": matching("app", "In", "c")},
                    ]
                }
            )
        ],
        into("x/a", lambda it: it.source in {"y/b", "y/c", "z/b", "z/c", "x/c"}),
    ),
    "any of several pods": (
        [ingress({"from": [pods("b"), pods("c")]})],
        into("x/a", lambda it: it.is_within),
    ),
    "a pod of another namespace": (
        [ingress({"from": [pods("a") | spaces("y")], "ports": [port(80), port(80, "UDP"), port(80, "SCTP")]})],
        into("x/a", lambda it: it.source == "y/a" and it.port == 80),
    ),
    "a namespace's default label": (
        [ingress({"from": [spaces("y", DEFAULT_LABEL)]})],
        into("x/a", lambda it: it.from_namespace == "y"),
    ),
    "expressions about a namespace's default label": (
        [ingress({"from": [{"namespaceSelector": matching(DEFAULT_LABEL, "NotIn", "x")}]})],
        into("x/a", lambda it: it.from_namespace != "x"),
    ),
    "other namespaces denied": ([ingress({"from": [{"podSelector": {}}]}, app="")], into("x", lambda it: it.is_within)),
    "an empty list is everybody": ([ingress({"from": [], "ports": []})], always),
}
PORT_CASES: dict[str, tuple[list[Object], str, Allows]] = {
    "numbered, TCP": ([ingress({"from": [spaces("y")], "ports": [port(81)]})], "y", at(81)),
    "numbered, UDP": ([ingress({"from": [spaces("y")], "ports": [port(81, "UDP")]})], "y", at(81, "udp")),
    "numbered, SCTP": ([ingress({"from": [spaces("y")], "ports": [port(81, "SCTP")]})], "y", at(81, "sctp")),
    "any port of one protocol": (
        [ingress({"from": [spaces("y")], "ports": [port(protocol="TCP")]})],
        "y",
        lambda it: it.protocol == "tcp",
    ),
    "named": ([ingress({"ports": [port("serve-80-tcp")]})], "", at(80)),
    "named, UDP": ([ingress({"ports": [port("serve-81-udp", "UDP")]})], "", at(81, "udp")),
    "named, from a namespace": ([ingress({"from": [spaces("z")], "ports": [port("web")]})], "z", at(80)),
    "a name of the other protocol": ([ingress({"ports": [port("serve-81-udp")]})], "", never),
    "from a port to its endPort": ([ingress({"ports": [port(81, last=90)]})], "", at(81)),
    "SCTP is not TCP": ([ingress({"ports": [port(80, "SCTP")]})], "", at(80, "sctp")),
    "SCTP alone isolates": ([ingress({"ports": [port(9999, "SCTP")]})], "", never),
    "UDP is not TCP": ([ingress({"ports": [port(80, "UDP")]})], "", at(80, "udp")),
}
EGRESS: dict[str, Case] = {
    "to a named port": (
        # Resolved at the destination: another number at every b.
        [egress({"ports": [port("web")]})],
        out_of("x/a", lambda it: it.protocol == "tcp" and it.port == (81 if it.destination[-1] == "b" else 80)),
    ),
    "to a pod of another namespace": (
        [egress({"to": [spaces("y") | pods("a")]})],
        out_of("x/a", lambda it: it.destination == "y/a"),
    ),
    "to a block": (
        [egress({"to": blocks(*ONE)})],
        out_of("x/a", lambda it: it.destination == "y/b"),
    ),
    "to a block around pods": (
        [egress({"to": blocks(*around("x/b"))})],
        out_of("x/a", lambda it: ADDRESSES[it.destination][0].startswith("10.180.2.")),
    ),
    "to a block but for a pod": (
        [egress({"to": blocks(*WITHOUT_ONE)})],
        out_of("x/a", lambda it: it.destination != "y/b"),
    ),
    "to the exception of a block, by another policy": (
        [egress({"to": blocks(*WITHOUT_ONE)}), egress({"to": blocks(*ONE)}, name="more")],
        always,
    ),
    "to a block of IPv4 alone": (
        [egress({"to": blocks(ONE[0])})],
        out_of("x/a", lambda it: it.destination == "y/b" and it.family == 4),
    ),
    "from a block but for a pod": (
        [ingress({"from": blocks(*WITHOUT_ONE)})],
        into("x/a", lambda it: it.source != "y/b"),
    ),
}
COMBINATIONS: dict[str, Case] = {
    "stacked": (
        [
            ingress({"from": [spaces("y")], "ports": [port(80)]}),
            network_policy(
                "more",
                namespace="x",
                podSelector=matching("app", "In", "a", "b"),
                ingress=[{"from": [spaces("z")], "ports": [port(81)]}],
            ),
        ],
        lambda it: {
            "x/a": (it.from_namespace, it.protocol, it.port) in {("y", "tcp", 80), ("z", "tcp", 81)},
            "x/b": (it.from_namespace, it.protocol, it.port) == ("z", "tcp", 81),
        }.get(it.destination, True),
    ),
    "allow all": ([ingress(EVERYBODY, app="")], always),
    "several, one of which lets everybody in": (
        [ingress({"from": [pods("b")], "ports": [port(80)]}, app=""), ingress(EVERYBODY, app="", name="all")],
        always,
    ),
    "several, one of which lets out to everybody": (
        [egress({"to": [pods("b")], "ports": [port(80)]}, app=""), egress(EVERYBODY, app="", name="all")],
        always,
    ),
    "ingress and egress together": (
        [
            network_policy(
                "both",
                "a",
                namespace="x",
                ingress=[{"ports": [port(80)]}],
                egress=[{"to": [spaces("y")], "ports": [port(81)]}],
                policyTypes=["Ingress", "Egress"],
            )
        ],
        lambda it: (
            at(80)(it)
            if it.destination == "x/a"
            else (at(81)(it) and it.to_namespace == "y")
            if it.source == "x/a"
            else True
        ),
    ),
    "directions are independent": (
        [ingress({"from": [pods("b")]}, {"from": [spaces("y")]}), egress()],
        lambda it: it.source != "x/a" and (it.destination != "x/a" or it.source == "x/b" or it.from_namespace == "y"),
    ),
}


def expand(cases: dict[str, tuple[list[Object], str, Allows]]) -> dict[str, Case]:
    """Complete cases about the ports of x/a: their policies, from whose namespace (all: ""), and at which ports."""
    return {
        name: (policies, into("x/a", lambda it, ns=ns, ports=ports: it.source.startswith(ns) and ports(it)))
        for name, (policies, ns, ports) in cases.items()
    }


TABLES = {
    f"{title}: {name}": case
    for title, cases in {
        "deny": DENIALS,
        "peers": PEERS,
        "ports": expand(PORT_CASES),
        "egress": EGRESS,
        "combined": COMBINATIONS,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", TABLES)
def test_who_is_answered(policies: PolicyCluster, case: str) -> None:
    described, allows = TABLES[case]
    policies.set(*described)

    policies.tables.expect(allows)


def test_a_policy_is_updated(policies: PolicyCluster) -> None:
    for ns, number in (("y", 80), ("z", 80), ("z", 81)):
        policies.set(ingress({"from": [spaces(ns)], "ports": [port(number)]}))

        policies.tables.expect(into("x/a", lambda it, ns=ns, number=number: it.from_namespace == ns and at(number)(it)))


def test_policies_are_deleted(policies: PolicyCluster) -> None:
    """Each takes with it what it allowed; the last one takes the isolation."""
    described = [egress(app="", name="out"), egress({"to": [spaces("y")]}, app="", name="more"), ingress(ns="z")]
    tables: list[Allows] = [
        lambda it: it.destination != "z/a" and (it.from_namespace != "x" or it.to_namespace == "y"),
        lambda it: it.destination != "z/a" and it.from_namespace != "x",
        lambda it: it.from_namespace != "x",
        always,
    ]
    for left, allows in zip((described, [described[0], described[2]], described[:1], []), tables, strict=True):
        policies.set(*left)

        policies.tables.expect(allows)


def test_a_namespace_is_relabelled(policies: PolicyCluster) -> None:
    policies.set(ingress({"from": [spaces("blue", "colour")]}))
    policies.tables.expect(into("x/a", never))

    policies.label_namespace("y", colour="blue")
    policies.tables.expect(into("x/a", lambda it: it.from_namespace == "y"))

    policies.label_namespace("y", colour="red")
    policies.label_namespace("z", colour="blue")
    policies.tables.expect(into("x/a", lambda it: it.from_namespace == "z"))

    policies.label_namespace("z", colour=None)
    policies.tables.expect(into("x/a", never))


@pytest.mark.parametrize("pod", ["x/b", "x/c"], ids=["of another node", "of the same node"])
def test_a_client_is_relabelled(policies: PolicyCluster, pod: str) -> None:
    """It is let in by a label, and no more without it."""
    policies.set(ingress({"from": [{"podSelector": {"matchLabels": {"role": "guest"}}}]}))
    policies.tables.expect(into("x/a", never))

    policies.label_pod(pod, role="guest")
    policies.tables.expect(into("x/a", lambda it: it.source == pod))

    policies.label_pod(pod, role="stranger")
    policies.tables.expect(into("x/a", never))


def test_a_server_is_relabelled(policies: PolicyCluster) -> None:
    """It comes under a policy by a label, in both directions, and out of it."""
    described = network_policy("locked", namespace="y", policyTypes=["Ingress", "Egress"])
    described["spec"]["podSelector"] = {"matchLabels": {"locked": "yes"}}
    policies.set(described)
    policies.tables.expect(always)

    for pod in ("y/a", "y/b"):
        policies.label_pod(pod, locked="yes")
        policies.tables.expect(lambda it, pod=pod: pod not in (it.source, it.destination))
        policies.label_pod(pod, locked=None)
        policies.tables.expect(always)


def test_nodes_reach_their_own_pods_alone(policies: PolicyCluster) -> None:
    """The kubelet's probes are from the own node; other nodes are no pods, and are let in by their addresses."""
    one, two = policies.hosts
    policies.set(ingress(app=""))
    policies.tables.expect(into("x", never))
    assert asked(one, "x/a") == asked(two, "x/b") == {"answered"}
    assert asked(two, "x/a") == asked(one, "x/b") == {""}

    other = policies.lab.nodes[1].addresses
    policies.set(ingress({"from": blocks((f"{other[0]}/32", ""), (f"{other[1]}/128", ""))}, app=""))
    policies.tables.expect(into("x", never))
    assert asked(one, "x/a") == asked(two, "x/b") == asked(two, "x/a") == {"answered"}
    assert asked(one, "x/b") == {""}
