"""What pods, namespaces and policies come to: records, and faults that name their field."""

import json

import msgspec
import pytest

from agent.core.addresses import parse_address
from agent.core.events import Malformed, Upsert
from agent.core.policy_records import (
    EVERYTHING,
    Action,
    ClusterPolicyRecord,
    IpBlock,
    NamedPort,
    NamespaceRecord,
    NetworkPolicyRecord,
    Operator,
    Peer,
    PodRecord,
    PortRange,
    Prefix,
    Requirement,
    Rule,
    Selector,
    Tier,
    TierRule,
)
from agent.core.records import POLICY_KINDS, SERVICE_KINDS, Kind, ObjectKey, Protocol
from agent.sources.decode import UNNAMED, Decoder

KEY = ObjectKey("shop", "web")
CREATED = "2025-01-01T00:00:00Z"
TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP


@pytest.fixture(scope="module")
def decoder():
    return Decoder("here", policy=True)


def decode(decoder, kind, value):
    """Decode from JSON, and find that a YAML parser's values come to the same."""
    event = decoder.decode(kind, json.dumps(value).encode()).event

    assert decoder.decode_object(kind, value) == event
    return event


def record(decoder, kind, value):
    event = decode(decoder, kind, value)
    assert isinstance(event, Upsert), event
    return event.record


def metadata(**tweaks):
    return {"name": "web", "namespace": "shop", "resourceVersion": "7", "creationTimestamp": CREATED, **tweaks}


def at(*texts):
    return tuple(parse_address(text) for text in texts)


def prefix(text, bits):
    return Prefix(parse_address(text), bits)


def one(key, *values, operator=Operator.IN):
    return Requirement(key, operator, frozenset(values))


def chosen(**labels):
    return Selector(tuple(one(key, value) for key, value in sorted(labels.items())))


APP = {"matchLabels": {"app": "web"}}
APP_SELECTOR = chosen(app="web")


TWO_OF_A_FAMILY = {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]}

# Pods


def pod(spec=None, status=None, **tweaks):
    return {
        "metadata": metadata(labels={"app": "web", "a/b": ""}, **tweaks),
        "spec": {"nodeName": "here", "containers": [{"name": "main", "image": "x"}], **(spec or {})},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}], **(status or {})},
    }


def port(number, name=None, protocol=None):
    return {"containerPort": number, **({"name": name} if name else {}), **({"protocol": protocol} if protocol else {})}


PLAIN = PodRecord(KEY, at("10.0.0.1"), (("a/b", ""), ("app", "web")), is_local=True, created=CREATED)
NOWHERE = {"addresses": ()}


@pytest.mark.parametrize(
    ("value", "changes"),
    [
        pytest.param(pod(), {}, id="a running pod of this node"),
        pytest.param(pod({"nodeName": "there"}), {"is_local": False}, id="of another node"),
        pytest.param(pod({"nodeName": None}), {"is_local": False}, id="of no node yet"),
        pytest.param(pod(deletionTimestamp=CREATED), {"is_terminating": True}, id="terminating, with its address"),
        pytest.param(pod(deletionTimestamp=None), {}, id="null deletion timestamp"),
        pytest.param(
            pod(status={"podIPs": [{"ip": "fd00::1"}, {"ip": "10.0.0.1"}]}),
            {"addresses": at("fd00::1", "10.0.0.1")},
            id="both families",
        ),
        pytest.param(pod(status={"podIPs": None}), {}, id="podIP alone"),
        pytest.param(pod(status={"podIPs": [], "podIP": ""}), NOWHERE, id="no address yet"),
        pytest.param(pod(status={"podIPs": [{}], "podIP": None}), NOWHERE, id="an empty entry"),
        pytest.param(pod() | {"status": None}, NOWHERE, id="no status"),
        pytest.param(pod(status={"phase": "Pending"}), {}, id="Pending, with an address"),
        pytest.param(pod(status={"phase": "Unknown"}), {}, id="Unknown keeps its address"),
        pytest.param(pod(status={"phase": "Succeeded"}), NOWHERE, id="Succeeded"),
        pytest.param(pod(status={"phase": "Failed"}), NOWHERE, id="Failed"),
        pytest.param(pod({"hostNetwork": True}), NOWHERE, id="hostNetwork"),
        pytest.param(pod({"hostNetwork": False}), {}, id="hostNetwork false"),
        pytest.param(pod() | {"spec": None}, {"is_local": False}, id="no spec"),
        pytest.param(pod() | {"metadata": metadata(labels=None)}, {"labels": ()}, id="no labels"),
    ],
)
def test_pods(decoder, value, changes):
    assert record(decoder, Kind.POD, value) == msgspec.structs.replace(PLAIN, **changes)


@pytest.mark.parametrize(
    ("spec", "ports"),
    [
        pytest.param({"containers": [{"ports": [port(80, "http")]}]}, [("http", TCP, 80)], id="TCP by default"),
        pytest.param({"containers": [{"ports": [port(80, "http", "")]}]}, [("http", TCP, 80)], id="empty protocol"),
        pytest.param({"containers": [{"ports": [port(80)]}, {"ports": None}, {}]}, [], id="without a name"),
        pytest.param(
            {"containers": [{"ports": [port(53, "dns", "UDP"), port(53, "dns", "TCP"), port(9, "s", "SCTP")]}]},
            [("dns", UDP, 53), ("dns", TCP, 53), ("s", SCTP, 9)],
            id="one name in several protocols",
        ),
        pytest.param(
            {"containers": [{"ports": [port(80, "http")]}, {"ports": [port(81, "http"), port(82, "other")]}]},
            [("http", TCP, 80), ("other", TCP, 82)],
            id="the first of a name counts",
        ),
        pytest.param(
            {
                "initContainers": [
                    {"restartPolicy": "Always", "ports": [port(70, "side"), port(71, "http")]},
                    {"ports": [port(72, "once")]},
                    {"restartPolicy": "OnFailure", "ports": [port(73, "again")]},
                ],
                "containers": [{"ports": [port(80, "http")]}],
            },
            [("http", TCP, 80), ("side", TCP, 70)],
            id="sidecars have ports, after the containers; other init containers do not",
        ),
    ],
)
def test_named_ports(decoder, spec, ports):
    assert record(decoder, Kind.POD, pod(spec)).ports == tuple(NamedPort(*it) for it in ports)


def test_what_pods_have_in_common_is_one_object():
    decoder = Decoder("here", policy=True)
    ports = {"containers": [{"ports": [port(80, "http")]}]}
    first, second = (record(decoder, Kind.POD, pod(ports, {"podIP": ip, "podIPs": None})) for ip in ("10.1.1.1", "::2"))

    assert first.labels is second.labels
    assert first.ports is second.ports


# Namespaces

NAME_LABEL = "kubernetes.io/metadata.name"


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (None, ((NAME_LABEL, "shop"),)),
        ({NAME_LABEL: "shop", "team": "a", "env": "b"}, (("env", "b"), (NAME_LABEL, "shop"), ("team", "a"))),
        ({NAME_LABEL: "another"}, ((NAME_LABEL, "shop"),)),
    ],
    ids=["without labels", "sorted", "the name's label is the name"],
)
def test_namespaces(decoder, labels, wanted):
    value = {"metadata": {"name": "shop", "labels": labels}, "status": {"phase": "Active"}}

    assert record(decoder, Kind.NAMESPACE, value) == NamespaceRecord(ObjectKey("", "shop"), wanted)


# Selectors


def expression(key, operator, values=None):
    return {"key": key, "operator": operator, **({} if values is None else {"values": values})}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        pytest.param({}, EVERYTHING, id="empty"),
        pytest.param({"matchLabels": {}, "matchExpressions": []}, EVERYTHING, id="empty parts"),
        pytest.param({"matchLabels": None, "matchExpressions": None}, EVERYTHING, id="null parts"),
        pytest.param({"matchLabels": {"b": "", "a": "1"}}, chosen(a="1", b=""), id="labels, sorted"),
        pytest.param(
            {"matchExpressions": [expression("a", "In", ["2", "1", "2"])]}, Selector((one("a", "1", "2"),)), id="In"
        ),
        pytest.param(
            {"matchExpressions": [expression("a", "NotIn", ["1"])]},
            Selector((one("a", "1", operator=Operator.NOT_IN),)),
            id="NotIn",
        ),
        pytest.param(
            {"matchExpressions": [expression("a", "Exists"), expression("b", "DoesNotExist", [])]},
            Selector((one("a", operator=Operator.EXISTS), one("b", operator=Operator.DOES_NOT_EXIST))),
            id="Exists and DoesNotExist",
        ),
        pytest.param(
            {"matchLabels": {"a": "1"}, "matchExpressions": [expression("a", "In", ["1"])]},
            chosen(a="1"),
            id="what is said twice",
        ),
    ],
)
def test_selectors(decoder, said, wanted):
    assert record(decoder, Kind.NETWORK_POLICY, policy(podSelector=said)).subject == wanted


# NetworkPolicies


def policy(**spec):
    return {"metadata": metadata(), "spec": {"podSelector": APP, **spec}}


def ingress(*peers, **rule):
    return policy(ingress=[{"from": list(peers), **rule}])


def allowing(*rules):
    return {"ingress": tuple(rules)}


PORTS = [{"port": 80}]
PORT_80 = PortRange(TCP, 80, 80)


@pytest.mark.parametrize(
    ("value", "directions"),
    [
        pytest.param(policy(), {"ingress": ()}, id="no rules: ingress is denied"),
        pytest.param(policy(egress=[]), {"ingress": ()}, id="empty egress does not imply Egress"),
        pytest.param(policy(egress=[{}]), {"ingress": (), "egress": (Rule(),)}, id="egress rules imply Egress"),
        pytest.param(policy(policyTypes=[]), {"ingress": ()}, id="empty types are as absent"),
        pytest.param(policy(policyTypes=None, ingress=None), {"ingress": ()}, id="null"),
        pytest.param(policy(policyTypes=["Egress"]), {"egress": ()}, id="Egress alone"),
        pytest.param(policy(policyTypes=["Egress"], ingress=[{}]), {"egress": ()}, id="rules that do not count"),
        pytest.param(policy(policyTypes=["Ingress"], egress=[{}]), {"ingress": ()}, id="egress that does not count"),
        pytest.param(policy(policyTypes=["Ingress", "Egress"]), {"ingress": (), "egress": ()}, id="both denied"),
        pytest.param(policy(ingress=[{}]), allowing(Rule()), id="an empty rule allows everything"),
        pytest.param(policy(ingress=[{"from": [], "ports": []}]), allowing(Rule()), id="empty lists are as absent"),
        pytest.param(policy(ingress=[{"from": None, "ports": None}]), allowing(Rule()), id="null lists"),
        pytest.param(
            policy(ingress=[{"ports": PORTS}, {"from": [{"podSelector": {}}]}]),
            allowing(Rule(None, (PORT_80,)), Rule((Peer(pods=EVERYTHING),), None)),
            id="several rules, in order",
        ),
    ],
)
def test_directions(decoder, value, directions):
    found = record(decoder, Kind.NETWORK_POLICY, value)

    assert found == NetworkPolicyRecord(KEY, APP_SELECTOR, **{"ingress": None, "egress": None, **directions})


MAPPED = Prefix(parse_address("0.0.0.0"), 96)
"""All of IPv4, as it is held among the addresses of IPv6."""


def block(cidr, *excepts):
    return {"ipBlock": {"cidr": cidr, **({"except": list(excepts)} if excepts else {})}}


@pytest.mark.parametrize(
    ("said", "peers"),
    [
        pytest.param({"podSelector": APP}, [Peer(None, APP_SELECTOR)], id="pods of the policy's namespace"),
        pytest.param({"podSelector": {}}, [Peer(None, EVERYTHING)], id="all pods of the policy's namespace"),
        pytest.param({"namespaceSelector": APP}, [Peer(APP_SELECTOR, None)], id="namespaces"),
        pytest.param({"namespaceSelector": {}}, [Peer(EVERYTHING, None)], id="all namespaces"),
        pytest.param(
            {"namespaceSelector": {}, "podSelector": APP}, [Peer(EVERYTHING, APP_SELECTOR)], id="pods of namespaces"
        ),
        pytest.param(block("10.0.0.0/8"), [Peer(block=IpBlock(prefix("10.0.0.0", 104)))], id="block"),
        pytest.param(block("10.1.2.3/8"), [Peer(block=IpBlock(prefix("10.0.0.0", 104)))], id="host bits are cut"),
        pytest.param(block("0.0.0.0/0"), [Peer(block=IpBlock(prefix("0.0.0.0", 96)))], id="all of IPv4"),
        pytest.param(block("::/0"), [Peer(block=IpBlock(prefix("::", 0), (MAPPED,)))], id="all of IPv6, none of IPv4"),
        pytest.param(block("::/95"), [Peer(block=IpBlock(prefix("::", 95)))], id="beside IPv4"),
        pytest.param(block("fd00::7/128"), [Peer(block=IpBlock(prefix("fd00::7", 128)))], id="one address"),
        pytest.param(
            block("10.0.0.0/8", "10.1.0.0/16", "10.2.3.4/31", "10.1.0.0/16"),
            [Peer(block=IpBlock(prefix("10.0.0.0", 104), (prefix("10.1.0.0", 112), prefix("10.2.3.4", 127))))],
            id="but for others",
        ),
        pytest.param({}, [], id="nothing we know matches nobody"),
        pytest.param({"serviceSelector": APP}, [], id="a field we do not know matches nobody"),
    ],
)
def test_peers(decoder, said, peers):
    found = record(decoder, Kind.NETWORK_POLICY, ingress(said))
    out = record(decoder, Kind.NETWORK_POLICY, policy(policyTypes=["Egress"], egress=[{"to": [said]}]))

    assert found.ingress == out.egress == (Rule(tuple(peers)),)


@pytest.mark.parametrize(
    ("said", "ports"),
    [
        pytest.param({}, PortRange(TCP), id="all of TCP"),
        pytest.param({"protocol": "UDP"}, PortRange(UDP), id="all of a protocol"),
        pytest.param({"protocol": "", "port": 80}, PORT_80, id="TCP by default"),
        pytest.param({"protocol": "SCTP", "port": 80}, PortRange(SCTP, 80, 80), id="SCTP"),
        pytest.param({"port": 80, "endPort": 80}, PORT_80, id="a range of one"),
        pytest.param({"port": 1, "endPort": 65535}, PortRange(TCP, 1, 65535), id="a range"),
        pytest.param({"port": "http"}, PortRange(TCP, name="http"), id="named"),
        pytest.param({"port": "p-80x", "protocol": "UDP"}, PortRange(UDP, name="p-80x"), id="named, UDP"),
    ],
)
def test_ports(decoder, said, ports):
    assert record(decoder, Kind.NETWORK_POLICY, policy(ingress=[{"ports": [said, said]}])).ingress == (
        Rule(None, (ports,)),
    )


FROM = "spec.ingress[0].from[0]"
PORT = "spec.ingress[0].ports[0]"
CIDR_TO = "spec.egress[0].to[0].ipBlock.cidr"


def having(*requirements):
    return policy(podSelector={"matchExpressions": list(requirements)})


def ported(**said):
    return policy(ingress=[{"ports": [said]}])


@pytest.mark.parametrize(
    ("value", "changes", "field", "reason"),
    [
        pytest.param(pod(status={"podIPs": [{"ip": "x"}]}), NOWHERE, "status.podIPs[0].ip", "'x' is not", id="podIPs"),
        pytest.param(
            pod(status={"podIPs": [{"ip": "10.0.0.1"}, {"ip": "x"}]}), {}, "status.podIPs[1].ip", "'x' is not", id="one"
        ),
        pytest.param(pod(status={"podIPs": 5}), {}, "status.podIPs", "no list", id="no list of podIPs"),
        pytest.param(pod(status={"podIPs": None, "podIP": "x"}), NOWHERE, "status.podIP", "'x' is not", id="podIP"),
        pytest.param(
            pod(status={"podIP": "::ffff:10.0.0.1", "podIPs": []}), NOWHERE, "status.podIP", "form", id="mapped"
        ),
        pytest.param(pod(status=TWO_OF_A_FAMILY), {}, "status.podIPs[1].ip", "two", id="family"),
        pytest.param(
            pod({"containers": [{"ports": [port(70000), port(80, "http"), port(81, 5)]}]}),
            {"ports": (NamedPort("http", TCP, 80),)},
            "spec.containers[0].ports[0].containerPort, spec.containers[0].ports[2].name",
            "<= 65535",
            id="container ports",
        ),
        pytest.param(
            pod({"initContainers": ["x", {"restartPolicy": "Always", "ports": [port(80, "http"), port(0)]}]}),
            {"ports": (NamedPort("http", TCP, 80),)},
            "spec.initContainers[0], spec.initContainers[1].ports[1].containerPort",
            ">= 1",
            id="init containers",
        ),
        pytest.param(
            pod() | {"metadata": metadata(labels={"a": 1, "app": "web"})},
            {"labels": (("app", "web"),)},
            "metadata.labels.a",
            "str",
            id="label",
        ),
        pytest.param(
            pod({"hostNetwork": True, "containers": 5}, {"podIP": "x"}), NOWHERE, "spec.containers", "list", id="host"
        ),
    ],
)
def test_what_is_bad_in_a_pod_costs_itself(decoder, value, changes, field, reason):
    event = decode(decoder, Kind.POD, value)

    assert isinstance(event, Upsert), event
    assert event.record == msgspec.structs.replace(PLAIN, **changes)
    assert ", ".join(it.field for it in event.left_out) == field
    assert any(reason in it.reason for it in event.left_out)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        pytest.param(pod({"nodeName": 5}), "spec.nodeName", id="node"),
        pytest.param(pod({"hostNetwork": "yes"}), "spec.hostNetwork", id="hostNetwork"),
        pytest.param(pod(status={"phase": 5}), "status.phase", id="phase"),
        pytest.param(pod() | {"status": 5}, "status", id="status"),
    ],
)
def test_of_a_pod_of_whose_addresses_nobody_knows_whose_they_are_nothing_is_read(decoder, value, field):
    event = decode(decoder, Kind.POD, value)

    assert isinstance(event, Malformed), event
    assert (event.kind, event.key, event.field, event.partial) == (Kind.POD, KEY, field, None)


@pytest.mark.parametrize(
    ("value", "field", "reason"),
    [
        pytest.param(
            having(expression("a", "Like", ["1"])),
            "spec.podSelector.matchExpressions[0].operator",
            "'Like'",
            id="operator",
        ),
        pytest.param(
            having(expression("a", "Exists"), expression("a", "Exists", ["1"])),
            "spec.podSelector.matchExpressions[1].values",
            "not empty, and the operator is Exists",
            id="values with Exists",
        ),
        pytest.param(
            ingress({"podSelector": {"matchExpressions": [expression("a", "NotIn")]}}),
            f"{FROM}.podSelector.matchExpressions[0].values",
            "empty, and the operator is NotIn",
            id="NotIn without values",
        ),
        pytest.param(policy(policyTypes=["Both"]), "spec.policyTypes[0]", "'Both'", id="type"),
        pytest.param({"metadata": metadata()}, "spec", "missing", id="no spec"),
        pytest.param(ported(port=0), "spec.ingress[0].ports[0].port", ">= 1", id="port 0"),
        pytest.param(ported(port=70000), "spec.ingress[0].ports[0].port", "65535", id="70000"),
        pytest.param(
            ported(port=1, endPort=70000), "spec.ingress[0].ports[0].endPort", "65535", id="end"
        ),
        pytest.param(ported(port=80, endPort=79), f"{PORT}.endPort", "79 is less", id="backwards"),
        pytest.param(
            ported(port="http", endPort=90), f"{PORT}.endPort", "not a number", id="from a name"
        ),
        pytest.param(ported(endPort=90), f"{PORT}.endPort", "no port", id="from nothing"),
        pytest.param(ported(port="80"), f"{PORT}.port", "neither", id="a number as text"),
        pytest.param(ported(port=""), f"{PORT}.port", "neither", id="an empty name"),
        pytest.param(ported(port="x" * 16), f"{PORT}.port", "neither", id="too long a name"),
        pytest.param(
            ported(protocol="ICMP"), "spec.ingress[0].ports[0].protocol", "ICMP", id="protocol"
        ),
        pytest.param(
            ingress(block("10.0.0.0/8") | {"podSelector": {}}), FROM, "an ipBlock and", id="both"
        ),
        pytest.param(
            ingress(block("10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/16")),
            f"{FROM}.ipBlock.except[1]",
            "'11.0.0.0/16' is not within '10.0.0.0/8'",
            id="except outside",
        ),
        pytest.param(
            ingress(block("10.0.0.0/8", "10.0.0.0/8")), f"{FROM}.ipBlock.except[0]", "all", id="all"
        ),
        pytest.param(
            ingress(block("10.0.0.0/8", "0.0.0.0/0")), f"{FROM}.ipBlock.except[0]", "all", id="more"
        ),
        pytest.param(
            ingress(block("::/0", "10.0.0.0/8")), f"{FROM}.ipBlock.except[0]", "within", id="other family"
        ),
        pytest.param(
            policy(egress=[{"to": [block("10.0.0.0")]}]), CIDR_TO, "range", id="to"
        ),
        *(
            pytest.param(ingress(block(text)), f"{FROM}.ipBlock.cidr", "range", id=text or "empty")
            for text in (
                "", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/255.0.0.0", "10.0.0.0/08", "fe80::%1/64",
                "fd00::/129", "10.0.0.0/8 ", "10.0.0/8", "::ffff:10.0.0.0/104", "10.0.0.0/\u0668",
            )
        ),
    ],
)  # fmt: skip
def test_policy_faults(decoder, value, field, reason):
    event = decode(decoder, Kind.NETWORK_POLICY, value)

    assert isinstance(event, Malformed), event
    assert (event.kind, event.key, event.field) == (Kind.NETWORK_POLICY, KEY, field)
    assert reason in event.reason


# ClusterNetworkPolicies

CLUSTER_KEY = ObjectKey("", "web")


def cluster_policy(**spec):
    return {
        "metadata": {"name": "web"},
        "spec": {"tier": "Admin", "priority": 10, "subject": {"namespaces": {}}, **spec},
    }


def cluster_record(**changes):
    return ClusterPolicyRecord(**{
        "key": CLUSTER_KEY, "tier": Tier.ADMIN, "priority": 10, "namespaces": EVERYTHING, **changes
    })  # fmt: skip


ALL = {"namespaces": {}}
EVERY_POD = Peer(EVERYTHING)


def tiered(action, *rules, direction="egress", **rule):
    peers = "to" if direction == "egress" else "from"
    return cluster_policy(**{direction: [{"action": action, peers: list(rules) or [ALL], **rule}]})


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        pytest.param(cluster_policy(), cluster_record(), id="no rules"),
        pytest.param(
            cluster_policy(tier="Baseline", priority=0),
            cluster_record(tier=Tier.BASELINE, priority=0),
            id="Baseline, the least priority",
        ),
        pytest.param(cluster_policy(priority=1000), cluster_record(priority=1000), id="the greatest"),
        pytest.param(
            cluster_policy(subject={"namespaces": APP}), cluster_record(namespaces=APP_SELECTOR), id="namespaces"
        ),
        pytest.param(
            cluster_policy(subject={"pods": {"namespaceSelector": {}, "podSelector": APP}}),
            cluster_record(pods=APP_SELECTOR),
            id="subject pods",
        ),
        pytest.param(
            cluster_policy(subject={"pods": {"podSelector": {}}}), cluster_record(pods=EVERYTHING), id="all pods"
        ),
        pytest.param(
            tiered("Deny", {"namespaces": APP}, direction="ingress", name="no-web"),
            cluster_record(ingress=(TierRule(Action.DENY, Rule((Peer(APP_SELECTOR),)), "no-web"),)),
            id="from namespaces",
        ),
        pytest.param(
            tiered("Pass", {"pods": {"namespaceSelector": APP, "podSelector": {}}}),
            cluster_record(egress=(TierRule(Action.PASS, Rule((Peer(APP_SELECTOR, EVERYTHING),))),)),
            id="to pods",
        ),
        pytest.param(
            tiered("Accept", {"networks": ["::/0"]}),
            cluster_record(egress=(TierRule(Action.ACCEPT, Rule((Peer(block=IpBlock(prefix("::", 0), (MAPPED,))),))),)),
            id="to all of IPv6, none of IPv4",
        ),
        pytest.param(
            tiered("Accept", {"networks": ["10.0.0.0/8", "fd00::/8"]}, ALL),
            cluster_record(
                egress=(
                    TierRule(
                        Action.ACCEPT,
                        Rule((
                            Peer(block=IpBlock(prefix("10.0.0.0", 104))),
                            Peer(block=IpBlock(prefix("fd00::", 8))),
                            EVERY_POD,
                        )),
                    ),
                ),
            ),
            id="to networks, and others",
        ),
    ],
)  # fmt: skip
def test_cluster_policies(decoder, value, wanted):
    assert record(decoder, Kind.CLUSTER_NETWORK_POLICY, value) == wanted


@pytest.mark.parametrize(
    ("said", "ports"),
    [
        pytest.param([], None, id="empty is as absent"),
        pytest.param([{"tcp": {}}], (PortRange(TCP),), id="all of TCP"),
        pytest.param([{"udp": {"destinationPort": {"number": 53}}}], (PortRange(UDP, 53, 53),), id="a port"),
        pytest.param(
            [{"sctp": {"destinationPort": {"range": {"start": 1, "end": 9}}}}, {"tcp": {}}],
            (PortRange(SCTP, 1, 9), PortRange(TCP)),
            id="a range, and others",
        ),
        pytest.param(
            [{"destinationNamedPort": "http"}],
            tuple(PortRange(protocol, name="http") for protocol in Protocol),
            id="a name is of any protocol",
        ),
    ],
)
def test_protocols(decoder, said, ports):
    found = record(decoder, Kind.CLUSTER_NETWORK_POLICY, tiered("Accept", protocols=said))

    assert found.egress == (TierRule(Action.ACCEPT, Rule((EVERY_POD,), ports)),)


UNKNOWN = [
    pytest.param("egress", {"to": [ALL, {"nodes": {}}]}, "to[1].nodes", id="nodes, experimental"),
    pytest.param("ingress", {"from": [{"nodes": {}}]}, "from[0].nodes", id="nodes, of ingress"),
    pytest.param("egress", {"to": [{"domainNames": ["*.example"]}]}, "to[0].domainNames", id="names, experimental"),
    pytest.param("egress", {"to": [{}]}, "to[0]", id="no field"),
    pytest.param("egress", {"to": [{"networks": []}]}, "to[0].networks", id="empty networks"),
    pytest.param("ingress", {"from": [{"networks": ["10.0.0.0/8"]}]}, "from[0]", id="networks, of ingress"),
    pytest.param("ingress", {"from": [ALL], "protocols": [{"tcp": {}}, {"icmp": {}}]}, "protocols[1]", id="a protocol"),
    pytest.param(
        "ingress",
        {"from": [ALL], "protocols": [{"tcp": {"destinationPort": {}}}]},
        "protocols[0].tcp.destinationPort",
        id="a port",
    ),
]


@pytest.mark.parametrize(("direction", "rule", "unknown"), UNKNOWN)
def test_a_rule_with_an_unknown_part_is_closed_and_the_part_is_named(decoder, direction, rule, unknown):
    """Source: ClusterNetworkPolicyIngressPeer, "fail closed"."""
    said = [{"action": action, "name": "odd", **rule} for action in ("Accept", "Deny", "Pass")]
    event = decoder.decode_object(Kind.CLUSTER_NETWORK_POLICY, cluster_policy(**{direction: said}))

    fields = [f"spec.{direction}[{index}].{unknown}" for index in range(3)]
    closed = (Action.ACCEPT, Rule(peers=())), (Action.DENY, Rule()), (Action.DENY, Rule())
    assert getattr(event.record, direction) == tuple(
        TierRule(*it, "odd", field) for it, field in zip(closed, fields, strict=True)
    )
    comes_to = ("accepts nobody", "denies everybody", "denies everybody")
    assert event.left_out == tuple(
        (field, f"not understood, so that the rule {it}") for field, it in zip(fields, comes_to, strict=True)
    )


def test_of_what_is_understood_nothing_is_left_out(decoder):
    event = decoder.decode_object(Kind.CLUSTER_NETWORK_POLICY, tiered("Deny", {"networks": ["::/0"]}, ALL))

    assert event.left_out == ()


TO = "spec.egress[0].to[0]"
PROTOCOL = "spec.egress[0].protocols[0]"


@pytest.mark.parametrize(
    ("value", "field", "reason"),
    [
        pytest.param(cluster_policy(priority=-1), "spec.priority", ">= 0", id="priority below"),
        pytest.param(cluster_policy(priority=1001), "spec.priority", "<= 1000", id="priority above"),
        pytest.param(cluster_policy(tier="Middle"), "spec.tier", "'Middle'", id="tier"),
        pytest.param(cluster_policy(subject={}), "spec.subject", "neither", id="no subject"),
        pytest.param(
            cluster_policy(subject={"namespaces": {}, "pods": {}}), "spec.subject", "more than", id="subjects"
        ),
        pytest.param(tiered("Allow"), "spec.egress[0].action", "'Allow'", id="action"),
        pytest.param(cluster_policy(egress=[{"action": "Deny"}]), "spec.egress[0].to", "empty", id="no peers"),
        pytest.param(tiered("Deny", {"namespaces": {}, "pods": {}}), TO, "more than one", id="two peers in one"),
        pytest.param(tiered("Deny", {"namespaces": {}, "networks": ["::/0"]}), TO, "more than one", id="and networks"),
        pytest.param(
            tiered("Deny", {"namespaces": {}, "nodes": {}}), TO, "more than one of namespaces, nodes", id="nodes"
        ),
        pytest.param(
            tiered("Deny", {"networks": ["::/0"], "domainNames": ["*.example"]}),
            TO,
            "more than one of networks, domainNames",
            id="and names",
        ),
        pytest.param(tiered("Deny", {"networks": ["10.0.0.0"]}), f"{TO}.networks[0]", "range", id="network"),
        pytest.param(
            tiered("Deny", {"pods": {"podSelector": {"matchExpressions": [expression("a", "In")]}}}),
            f"{TO}.pods.podSelector.matchExpressions[0].values",
            "empty",
            id="selector",
        ),
        pytest.param(tiered("Deny", protocols=[{"tcp": {}, "udp": {}}]), PROTOCOL, "more than one", id="two protocols"),
        pytest.param(
            tiered("Deny", protocols=[{"tcp": {"destinationPort": {"number": 1, "range": {"start": 1, "end": 2}}}}]),
            f"{PROTOCOL}.tcp.destinationPort",
            "number and range",
            id="number and range",
        ),
        pytest.param(
            tiered("Deny", protocols=[{"tcp": {"destinationPort": {"range": {"start": 3, "end": 2}}}}]),
            f"{PROTOCOL}.tcp.destinationPort.range.end",
            "2 is less than start, 3",
            id="range backwards",
        ),
        pytest.param(
            tiered("Deny", protocols=[{"tcp": {"destinationPort": {"number": 70000}}}]),
            "spec.egress[0].protocols[0].tcp.destinationPort.number",
            "65535",
            id="port 70000",
        ),
        pytest.param(
            tiered("Deny", protocols=[{"destinationNamedPort": "A"}]),
            f"{PROTOCOL}.destinationNamedPort",
            "neither",
            id="port name",
        ),
    ],
)
def test_cluster_faults(decoder, value, field, reason):
    event = decode(decoder, Kind.CLUSTER_NETWORK_POLICY, value)

    assert isinstance(event, Malformed), event
    assert (event.kind, event.key, event.field) == (Kind.CLUSTER_NETWORK_POLICY, CLUSTER_KEY, field)
    assert reason in event.reason


# All of them


@pytest.mark.parametrize("kind", sorted(POLICY_KINDS))
def test_without_a_name(decoder, kind):
    assert decode(decoder, kind, {"metadata": {}, "spec": {}}).key == UNNAMED


def test_off_nothing_of_policy_is_decoded():
    assert set(Decoder("here").kinds) == SERVICE_KINDS
    assert set(Decoder("here", policy=True).kinds) == SERVICE_KINDS | POLICY_KINDS
