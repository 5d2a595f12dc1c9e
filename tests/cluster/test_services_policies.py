"""Whom a Service lets in, and which of its endpoints each client gets.

Traffic policies and their health checks, terminating endpoints, traffic distribution, affinity, source ranges.
Source: test/e2e/network/{service,loadbalancer,traffic_distribution}.go of Kubernetes.
"""

from __future__ import annotations

import time
from itertools import product

import pytest

from tests.cluster.api_driver import NODES
from tests.cluster.nodes import COUNT, health_status
from tests.cluster.three_nodes import KINDS, ZONES, endpoints, outcome
from tests.lab.manifests import Endpoint
from tests.lab.polling import until
from tests.lab.processes import end
from tests.lab.traffic import PACKET_MODES

pytestmark = pytest.mark.timeout(300)
FAMILIES = [pytest.param(0, id="IPv4"), pytest.param(1, id="IPv6")]
ALL_WEB = {"web-1", "web-2", "web-3"}
EXTERNAL_KINDS = KINDS[1:]
INTERNAL_LOCAL = {"internalTrafficPolicy": "Local"}
TERMINATING = {"ready": False, "terminating": True}
SILENCE_S = 0.2


def of_node(cluster, number):
    """The pod's and the host's client of a node, from 0."""
    return cluster.pods[number], cluster.hosts[number]


def silence(client, mode, target):
    """Who answers, "silent" if nobody does, not even with a refusal."""
    said = outcome(client, mode, target, SILENCE_S)
    # ENOBUFS: a raw socket is told that its packet was dropped before it left its own node.
    return "silent" if said == "timeout" or (mode, said) == ("sctp", "ENOBUFS") else said


def external_local(service):
    """The fields of the external traffic policy Local."""
    return {"externalTrafficPolicy": "Local", "healthCheckNodePort": service.health_port}


def health(cluster, service):
    """What each node's health check says to a load balancer; 0 = nobody listens."""
    outside = cluster.outsider.netns
    return [health_status(outside, node.addresses[0], service.health_port) for node in cluster.nodes]


@pytest.mark.parametrize("mode", PACKET_MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_internal_policy_local(cluster, service, family, mode):
    """Pods and nodes get the endpoint of their node; where there is none, silence."""
    service.ports = service.in_protocols("TCP", "UDP", "SCTP")
    service.publish([cluster.web[0], cluster.web[2]], **INTERNAL_LOCAL)
    target = service.at("ClusterIP", family)

    for number, wanted in enumerate(["web-1", "silent", "web-3"]):
        for client in of_node(cluster, number):
            said = {silence(client, mode, target)}
            if wanted != "silent":
                said |= set(client.spread(mode, *target, 6))
            assert said == {wanted}, number
    assert outcome(cluster.pods[1], mode, service.at("NodePort", family, 1)) in ALL_WEB


@pytest.mark.parametrize("mode", ["tcp", "udp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_internal_policy_local_with_an_endpoint_in_the_network_of_its_node(cluster, service, family, mode):
    node = cluster.nodes[1]
    server = node.serve("host-web", 8080)
    try:
        backends = [Endpoint(address, node.name) for address in node.addresses]
        service.publish(backends, **INTERNAL_LOCAL)
        asked = [
            {silence(client, mode, service.at("ClusterIP", family)) for client in of_node(cluster, number)}
            for number in range(COUNT)
        ]
    finally:
        end(server)

    assert asked == [{"silent"}, {"host-web"}, {"silent"}]


@pytest.mark.parametrize("mode", PACKET_MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_external_policy_local(cluster, service, family, mode):
    """Outside: the node's own endpoint, which sees the client, or silence. Pods and nodes get what there is."""
    service.ports = service.in_protocols("TCP", "UDP", "SCTP")
    service.publish(cluster.web[:1], **external_local(service))

    for kind in EXTERNAL_KINDS:
        answer = cluster.outside.ask(mode, *service.at(kind, family))
        assert (answer.name, answer.client) == ("web-1", cluster.outsider.addresses[family]), kind
    for number in range(COUNT):
        target = service.at("NodePort", family, number)
        assert silence(cluster.outside, mode, target) == ("silent" if number else "web-1")
        for kind in EXTERNAL_KINDS:
            pod, host = (client.ask(mode, *service.at(kind, family, number)) for client in of_node(cluster, number))
            assert (pod.name, host.name) == ("web-1", "web-1"), kind
            assert pod.client == cluster.shoppers[number].addresses[family], kind


@pytest.mark.parametrize("family", FAMILIES)
def test_the_external_policy_flips(cluster, service, family):
    """Health checks, NodePorts and short-circuits follow, there and back."""

    def outside():
        return [silence(cluster.outside, "tcp", service.at("NodePort", family, number)) for number in range(COUNT)]

    for _ in range(2):
        service.publish(cluster.web[1:2])
        assert outside() == ["web-2"] * COUNT
        until(lambda: health(cluster, service) == [0] * COUNT, "no health check listens")

        service.publish(cluster.web[1:2], **external_local(service))
        assert outside() == ["silent", "web-2", "silent"]
        until(lambda: health(cluster, service) == [503, 200, 503], "the node with the endpoint is healthy")
        inside = [
            outcome(c, "tcp", service.at("NodePort", family, n)) for n in range(COUNT) for c in of_node(cluster, n)
        ]
        assert inside == ["web-2"] * 2 * COUNT


def test_health_checks_follow_endpoints(cluster, service):
    """Only those that are ready count; terminating ones are sent traffic all the same."""
    service.publish(cluster.web[:1], **external_local(service))
    until(lambda: health(cluster, service) == [200, 503, 503], "of the first node")

    service.set_backends(cluster.web[1:])
    until(lambda: health(cluster, service) == [503, 200, 200], "of the others")

    service.set_backends(endpoints(cluster.web[:1], **TERMINATING))
    until(lambda: health(cluster, service) == [503] * COUNT, "of none")
    for family in (0, 1):
        assert outcome(cluster.outside, "tcp", service.at("NodePort", family)) == "web-1"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["Cluster", "Local"])
@pytest.mark.parametrize("side", ["internal", "external"])
def test_terminating_endpoints_serve_when_none_is_ready(cluster, service, side, policy, family):
    """On the first node one that terminates, then on the third a ready one; on the second one that serves no more."""
    spec = {f"{side}TrafficPolicy": policy}
    if spec == {"externalTrafficPolicy": "Local"}:
        spec = external_local(service)
    ended = endpoints(cluster.web[1:2], ready=False, serving=False, terminating=True)
    leaving = [*endpoints(cluster.web[:1], **TERMINATING), *ended]

    def asked():
        if side == "internal":
            return [silence(client, "tcp", service.at("ClusterIP", family)) for client in cluster.pods]
        return [silence(cluster.outside, "tcp", service.at("NodePort", family, number)) for number in range(COUNT)]

    service.publish(leaving, **spec)
    assert asked() == (["web-1"] * COUNT if policy == "Cluster" else ["web-1", "silent", "silent"])

    service.set_backends([*leaving, *endpoints(cluster.web[2:])])
    assert asked() == (["web-3"] * COUNT if policy == "Cluster" else ["web-1", "silent", "web-3"])


def hinted(cluster, service, pods, levels):
    """Slices whose endpoints are for their own node, or zone, or both; ``levels`` for each pod."""
    pieces = service.slices(pods)
    for piece in pieces:
        for pod, endpoint, level in zip(pods, piece["endpoints"], levels, strict=True):
            zone = ZONES[pod.node.number - 1]
            names = {"forNodes": [{"name": pod.node.name}], "forZones": [{"name": zone}]}
            endpoint["zone"] = zone
            endpoint["hints"] = {key: names[key] for key in level}
    return pieces


NODE, ZONE = ("forNodes",), ("forZones",)
BOTH = NODE + ZONE
DISTRIBUTIONS = {
    "zones": ((1, 2, 3), [ZONE] * 3, [{1, 3}, {2}, {1, 3}]),
    "nodes": ((1, 2, 3), [BOTH] * 3, [{1}, {2}, {3}]),
    "a node without any: its zone": ((1, 2), [BOTH] * 2, [{1}, {2}, {1}]),
    "a zone without any: all": ((1, 3), [BOTH] * 2, [{1}, {1, 3}, {3}]),
    "one without a hint for nodes: zones": ((1, 2, 3), [BOTH, ZONE, BOTH], [{1, 3}, {2}, {1, 3}]),
    "one without any hint: all": ((1, 2, 3), [BOTH, (), BOTH], [{1, 2, 3}] * 3),
}


@pytest.mark.parametrize(("numbers", "levels", "wanted"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_traffic_keeps_to_its_node_or_zone(cluster, service, numbers, levels, wanted):
    """Zones are those of the first and third node, and of the second."""
    pods = [cluster.web[number - 1] for number in numbers]
    service.publish(slices=hinted(cluster, service, pods, levels))

    for number, names in enumerate(wanted):
        for client in of_node(cluster, number):
            for family in (0, 1):
                said = client.spread("tcp", *service.at("ClusterIP", family), 40)
                assert set(said) == {f"web-{name}" for name in names}, number


def test_traffic_leaves_its_zone_when_the_zone_loses_its_endpoints(cluster, service):
    service.publish(slices=hinted(cluster, service, cluster.web, [ZONE] * 3))
    target = service.at("ClusterIP", 0)
    assert set(cluster.pods[1].spread("tcp", *target, 20)) == {"web-2"}

    pieces = hinted(cluster, service, cluster.web, [ZONE] * 3)
    for piece in pieces:
        piece["endpoints"][1]["conditions"] = {"ready": False, "serving": False, "terminating": False}
    service.publish(slices=pieces)

    assert set(cluster.pods[1].spread("tcp", *target, 40)) == {"web-1", "web-3"}


@pytest.fixture
def relabel(cluster):
    """Give the first node another zone, as its label; it gets its own back."""

    def label(zone):
        labels = {"topology.kubernetes.io/zone": zone}
        cluster.api.patch(NODES, cluster.nodes[0].name, {"metadata": {"labels": labels}})

    yield label
    label(ZONES[0])


def test_traffic_follows_the_zone_of_its_node(cluster, service, relabel):
    """Of a node that changes its zone; what keeps its own keeps its endpoints."""
    service.publish(slices=hinted(cluster, service, cluster.web, [ZONE] * 3))

    for zone, names in ((ZONES[1], {"web-2"}), (ZONES[0], {"web-1", "web-3"})):
        relabel(zone)
        for client, family in product(of_node(cluster, 0), (0, 1)):
            target = service.at("ClusterIP", family)
            until(lambda: outcome(client, "tcp", target) in names, f"{names} answer")  # noqa: B023
            assert set(client.spread("tcp", *target, 40)) == names
        assert set(cluster.pods[2].spread("tcp", *service.at("ClusterIP", 0), 40)) == {"web-1", "web-3"}


def sticky(timeout_s):
    """The fields of an affinity."""
    return {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": timeout_s}}}


def chosen(cluster, service, kind, mode, count=8):
    """The names that each client got, by where it is and the family."""
    return {
        (place, family): set(client.spread(mode, *service.at(kind, family), count))
        for place, client in cluster.clients.items()
        for family in (0, 1)
    }


@pytest.mark.parametrize("mode", ["tcp", "udp"])
@pytest.mark.parametrize("kind", KINDS)
def test_affinity_is_switched_on_and_off(cluster, service, kind, mode):
    for _ in range(2):
        service.publish(cluster.web, **sticky(600))
        assert {len(names) for names in chosen(cluster, service, kind, mode).values()} == {1}

        service.publish(cluster.web)
        assert set.union(*chosen(cluster, service, kind, mode).values()) == ALL_WEB


def test_affinity_chooses_anew_when_its_endpoint_is_gone(cluster, service):
    service.publish(cluster.web, **sticky(600))
    before = chosen(cluster, service, "ClusterIP", "tcp")

    service.set_backends(cluster.web[1:])

    after = chosen(cluster, service, "ClusterIP", "tcp")
    assert all(len(names) == 1 and names <= {"web-2", "web-3"} for names in after.values())
    assert {who: names for who, names in before.items() if names != {"web-1"}}.items() <= after.items()


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_affinity_times_out_after_the_last_connection(cluster, service, kind):
    timeout_s = 1
    service.publish(cluster.web, **sticky(timeout_s))
    target = service.at(kind, 0)
    started = time.monotonic()
    names = set()
    while time.monotonic() - started < 2.5 * timeout_s:
        names |= set(cluster.pods[0].spread("tcp", *target, 4))
    assert len(names) == 1

    def has_changed():
        before = chosen(cluster, service, kind, "tcp", 1)
        asked = time.monotonic()
        until(lambda: time.monotonic() - asked > timeout_s + 1, "the time is over")  # the clock ticks in seconds
        return chosen(cluster, service, kind, "tcp", 1) != before

    until(has_changed, "somebody gets another endpoint", 4 * (timeout_s + 1))


def lets_in(cluster, service, kind, mode, family):
    """Who is let in."""
    return {
        place
        for place, client in cluster.clients.items()
        if silence(client, mode, service.at(kind, family)) != "silent"
    }


ONLY = {
    "a pod": (lambda cluster: cluster.shoppers[0].addresses, {"pod-1"}),
    "a node": (lambda cluster: cluster.nodes[1].addresses, {"host-2"}),
    "a client outside": (lambda cluster: cluster.outsider.addresses, {"outside"}),
    "the pods of a node": (lambda cluster: cluster.nodes[2].pod_ranges, {"pod-3"}),
}


@pytest.mark.parametrize("mode", ["tcp", "udp"])
@pytest.mark.parametrize(("addresses", "allowed"), ONLY.values(), ids=ONLY)
def test_source_ranges_let_in(cluster, service, addresses, allowed, mode):
    """At the load balancer's address; other frontends are open to everybody."""
    ranges = [each if "/" in each else f"{each}/{128 if ':' in each else 32}" for each in addresses(cluster)]
    service.publish(cluster.web, loadBalancerSourceRanges=ranges)

    for family in (0, 1):
        assert lets_in(cluster, service, "LoadBalancer", mode, family) == allowed
        for kind in ("ClusterIP", "NodePort", "externalIP"):
            assert lets_in(cluster, service, kind, mode, family) == cluster.clients.keys()


def test_source_ranges_change(cluster, service):
    """None of a family leaves that family open; a range of everything opens both."""
    everybody = cluster.clients.keys()
    v4, v6 = (f"{address}/{bits}" for address, bits in zip(cluster.outsider.addresses, (32, 128), strict=True))
    for ranges, wanted in (
        ([v4], [{"outside"}, everybody]),
        ([v4, v6], [{"outside"}, {"outside"}]),
        (["0.0.0.0/0", v6], [everybody, {"outside"}]),
        ([], [everybody, everybody]),
    ):
        service.publish(cluster.web, loadBalancerSourceRanges=ranges)
        assert [lets_in(cluster, service, "LoadBalancer", "tcp", family) for family in (0, 1)] == wanted, ranges
