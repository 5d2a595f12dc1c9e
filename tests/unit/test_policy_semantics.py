"""What each form of a policy means, told for one client and one server, by the maps and by the reference."""

from __future__ import annotations

import pytest

from agent.core.addresses import parse_address
from agent.core.policy_records import Operator, Peer, PortRange, Rule, Tier
from agent.core.records import Protocol
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
    skip,
    tcp,
    udp,
)
from tests.policy_reference import Reference

TCP, UDP, SCTP, ICMP = 6, 17, 132, 1
CLIENT, SERVER, WORLD = "10.1.0.1", "10.1.0.2", "192.0.2.9"
NAMED = PortRange(Protocol.TCP, name="http")
EVERY_NAMESPACE = Peer(namespaces=selector())
RECORDS = (
    namespace("x", env="dev"),
    namespace("y", env="prod"),
    pod("x/client", CLIENT, "fd01::1", app="client", ports=[("http", 8080)]),
    pod("y/server", SERVER, "fd01::2", app="server", ports=[("http", 80), ("http", 53, Protocol.UDP), ("alt", 81)]),
)


def ingress(*rules: Rule, subject=None, name="y/p"):
    return network_policy(name, subject, ingress=rules)


def egress(*rules: Rule, subject=None, name="x/p"):
    return network_policy(name, subject, egress=rules)


def baseline(name="default", **rules):
    return cluster_policy(name, tier=Tier.BASELINE, **rules)


TO_80 = [(TCP, 80, True), (TCP, 81, False), (UDP, 80, False), (ICMP, 0, False)]
ALL = [(TCP, 80, True), (UDP, 80, True), (SCTP, 80, True), (ICMP, 0, True)]
NONE = [(TCP, 80, False), (UDP, 80, False), (SCTP, 80, False), (ICMP, 0, False)]
CASES = {
    "no policy": ([], ALL),
    "another namespace's policy": ([network_policy("z/p", ingress=[], egress=[])], ALL),
    "ingress isolated": ([ingress()], NONE),
    "egress isolated": ([egress()], NONE),
    "egress isolated at the server": ([egress(name="y/p")], ALL),
    "ingress isolated at the client": ([ingress(name="x/p")], ALL),
    "isolates others": ([ingress(subject=selector(app="other"))], ALL),
    "isolates by expression": ([ingress(subject=selector(need("app", Operator.NOT_IN, "client")))], NONE),
    "everybody, every port": ([ingress(rule())], ALL),
    "nobody": ([ingress(Rule(peers=()))], NONE),
    "no port": ([ingress(Rule(ports=()))], NONE),
    "own namespace's pods": ([ingress(rule(pods()))], NONE),
    "every namespace": ([ingress(rule(EVERY_NAMESPACE))], ALL),
    "namespace": ([ingress(rule(Peer(namespaces=selector(env="dev"))))], ALL),
    "other namespace": ([ingress(rule(Peer(namespaces=selector(env="prod"))))], NONE),
    "namespace's name": ([ingress(rule(Peer(namespaces=selector(**{"kubernetes.io/metadata.name": "x"}))))], ALL),
    "a namespace's label is not its pods'": ([ingress(rule(Peer(selector(), selector(env="dev"))))], NONE),
    "a pod's label is not its namespace's": ([ingress(rule(Peer(namespaces=selector(app="client"))))], NONE),
    "namespace and pod": ([ingress(rule(Peer(selector(env="dev"), selector(app="client"))))], ALL),
    "namespace and other pod": ([ingress(rule(Peer(selector(env="dev"), selector(app="server"))))], NONE),
    "namespace or pod": ([ingress(rule(Peer(selector(env="dev")), pods(app="server")))], ALL),
    "label there": ([ingress(rule(Peer(selector(), selector(need("app", Operator.EXISTS)))))], ALL),
    "label not there": ([ingress(rule(Peer(selector(), selector(need("app", Operator.DOES_NOT_EXIST)))))], NONE),
    "no such label, not in": ([ingress(rule(Peer(selector(), selector(need("tier", Operator.NOT_IN, "db")))))], ALL),
    "no such label, in": ([ingress(rule(Peer(selector(), selector(need("tier", Operator.IN, "db")))))], NONE),
    "own namespace's pods, out": ([egress(rule(pods()))], NONE),
    "block that holds the pod": ([ingress(rule(cidr("10.1.0.0/24")))], ALL),
    "block of another": ([ingress(rule(cidr("10.1.1.0/24")))], NONE),
    "excepted": ([ingress(rule(cidr("10.1.0.0/24", "10.1.0.0/30")))], NONE),
    "beside what is excepted": ([ingress(rule(cidr("10.1.0.0/24", "10.1.0.2/32")))], ALL),
    "excepted here, allowed there": (
        [ingress(rule(cidr("10.1.0.0/24", "10.1.0.0/30"))), ingress(rule(cidr("10.1.0.1/32")), name="y/q")],
        ALL,
    ),
    "all of IPv6 is not IPv4": ([ingress(rule(cidr("::/0")))], NONE),
    "port": ([ingress(rule(ports=[tcp(80)]))], TO_80),
    "port, out": ([egress(rule(ports=[tcp(80)]))], TO_80),
    "range": (
        [ingress(rule(ports=[tcp(80, 1024)]))],
        [(TCP, 79, False), (TCP, 80, True), (TCP, 1024, True), (TCP, 1025, False)],
    ),
    "protocol": (
        [ingress(rule(ports=[PortRange(Protocol.TCP)]))],
        [(TCP, 65535, True), (UDP, 1, False), (SCTP, 80, False)],
    ),
    "SCTP alone isolates": ([ingress(rule(ports=[PortRange(Protocol.SCTP)]))], [(SCTP, 80, True), (TCP, 80, False)]),
    "named": ([ingress(rule(ports=[NAMED]))], TO_80),
    "named, of the destination": ([egress(rule(ports=[NAMED]))], TO_80),
    "named, not of the source": ([egress(rule(EVERY_NAMESPACE, ports=[NAMED]))], [(TCP, 80, True), (TCP, 8080, False)]),
    "named, of another protocol": (
        [egress(rule(ports=[PortRange(Protocol.UDP, name="http")]))],
        [(UDP, 53, True), (TCP, 80, False), (UDP, 80, False)],
    ),
    "name that nobody gave": ([ingress(rule(ports=[PortRange(Protocol.TCP, name="nope")]))], NONE),
    "rules add up": (
        [ingress(rule(ports=[tcp(80)]), rule(ports=[udp(80)]))],
        [(TCP, 80, True), (UDP, 80, True), (TCP, 81, False)],
    ),
    "policies add up": ([ingress(), ingress(rule(ports=[tcp(80)]), name="y/q")], TO_80),
    "both ends": ([egress(rule(ports=[tcp(80), tcp(81)])), ingress(rule(ports=[tcp(80)]))], TO_80),
    "admin denies what a policy allows": ([cluster_policy("a", ingress=[deny()]), ingress(rule())], NONE),
    "admin accepts what a policy denies": ([cluster_policy("a", ingress=[accept(ports=[tcp(80)])]), ingress()], TO_80),
    "admin passes": ([cluster_policy("a", ingress=[skip(ports=[tcp(80)]), deny()]), ingress(rule())], TO_80),
    "priority before name": (
        [cluster_policy("a", priority=2, ingress=[deny()]), cluster_policy("b", priority=1, ingress=[accept()])],
        ALL,
    ),
    "rule order": ([cluster_policy("a", ingress=[accept(ports=[tcp(80)]), deny()])], TO_80),
    "precedence, not the longer prefix": (
        [cluster_policy("a", ingress=[deny(ports=[tcp(1, 1024)]), accept(ports=[tcp(80)])])],
        [(TCP, 80, False), (TCP, 1025, True)],
    ),
    "admin about other namespaces": ([cluster_policy("a", namespaces=selector(env="dev"), ingress=[deny()])], ALL),
    "admin about other pods": ([cluster_policy("a", pods=selector(app="client"), ingress=[deny()])], ALL),
    "admin, networks mean pods too": ([cluster_policy("a", egress=[deny(cidr("10.0.0.0/8"))])], NONE),
    "a pass leaves a tier at once": ([cluster_policy("a", ingress=[skip(), deny()])], ALL),
    "baseline": ([baseline(ingress=[deny()])], NONE),
    "baseline of whom a policy isolates": ([baseline(ingress=[deny()]), ingress(rule())], ALL),
    "baseline of whom a policy isolates the other way": ([baseline(ingress=[deny()]), egress(name="y/p")], NONE),
    "pass to baseline": ([cluster_policy("a", ingress=[skip()]), baseline(ingress=[deny()])], NONE),
    "baseline accepts": ([baseline(ingress=[accept(ports=[tcp(80)]), deny()])], TO_80),
}


@pytest.mark.parametrize(("policies", "expected"), CASES.values(), ids=CASES)
def test_a_client_reaches_a_server(policies, expected):
    node, reference = PolicyNode(*RECORDS, *policies), Reference([*RECORDS, *policies])
    client, server = parse_address(CLIENT), parse_address(SERVER)

    assert [
        (protocol, port, node.may_send(client, server, protocol, port)) for protocol, port, _ in expected
    ] == expected
    assert [
        (protocol, port, reference.may_send(client, server, protocol, port)) for protocol, port, _ in expected
    ] == expected


WORLD_CASES = {
    "every namespace is not the world": ([egress(rule(EVERY_NAMESPACE))], False),
    "everybody is": ([egress(rule())], True),
    "block": ([egress(rule(cidr("192.0.2.0/24")))], True),
    "excepted": ([egress(rule(cidr("192.0.2.0/24", "192.0.2.8/29")))], False),
    "a longer block of another policy": (
        [egress(rule(cidr("192.0.0.0/16"))), ingress(rule(cidr("192.0.2.9/32")))],
        True,
    ),
    "all of IPv6": ([egress(rule(cidr("::/0")))], False),
    "all of both": ([egress(rule(cidr("::/0"), cidr("0.0.0.0/0")))], True),
    "a port's name": ([egress(rule(ports=[NAMED]))], False),
}


@pytest.mark.parametrize(("policies", "expected"), WORLD_CASES.values(), ids=WORLD_CASES)
def test_a_client_reaches_the_world(policies, expected):
    node, reference = PolicyNode(*RECORDS, *policies), Reference([*RECORDS, *policies])
    ends = parse_address(CLIENT), parse_address(WORLD)

    assert node.may_send(*ends, TCP, 80) is expected
    assert reference.may_send(*ends, TCP, 80) is expected


def test_both_families_have_the_same_policy():
    node = PolicyNode(*RECORDS, ingress(rule(Peer(selector(env="dev")), ports=[tcp(80)])))

    assert node.may_send(parse_address("fd01::1"), parse_address("fd01::2"), TCP, 80)
    assert not node.may_send(parse_address("fd01::9"), parse_address("fd01::2"), TCP, 80)


@pytest.mark.parametrize("name", ["host", "world", "namespace", "label", "port", "identity", "any"])
def test_a_label_of_any_name_is_a_label(name):
    """Whoever has one is isolated and let in as by another."""
    named = {name: "yes"}
    records = [namespace("x"), pod("x/client", CLIENT, **named), pod("x/server", SERVER, **named)]
    node = PolicyNode(*records, network_policy("x/p", selector(**named), ingress=[rule(pods(**named))]))
    client, server, world = map(parse_address, (CLIENT, SERVER, WORLD))
    assert node.may_send(client, server, TCP, 80)
    assert not node.may_send(world, server, TCP, 80)

    node.apply(pod("x/client", CLIENT))
    assert not node.may_send(client, server, TCP, 80)


def test_a_pod_reaches_itself():
    node = PolicyNode(*RECORDS, ingress(), egress(name="y/q"))

    assert node.may_send(parse_address(SERVER), parse_address(SERVER), TCP, 80)
