"""Every kind of frontend, asked from everywhere: who answers, and what it sees of who asked.

Source: test/e2e/network/{service,networking,dual_stack}.go of Kubernetes.
"""

from __future__ import annotations

import pytest

from tests.cluster.nodes import COUNT
from tests.cluster.three_nodes import KINDS, endpoints, outcome
from tests.lab.manifests import Endpoint
from tests.lab.processes import end
from tests.lab.traffic import MODES, PACKET_MODES

pytestmark = pytest.mark.timeout(300)
FAMILIES = [pytest.param(0, id="IPv4"), pytest.param(1, id="IPv6")]
ALL_WEB = {"web-1", "web-2", "web-3"}
ALL_PROTOCOLS = ("TCP", "UDP", "SCTP")


def own_node(place: str) -> int:
    """Which node's NodePorts a client asks first, from 0."""
    return 0 if place == "outside" else int(place[-1]) - 1


@pytest.fixture(scope="module")
def everywhere(cluster):
    """A Service over a pod on each node, in every protocol."""
    service = cluster.service()
    service.ports = service.in_protocols(*ALL_PROTOCOLS)
    yield service.publish(cluster.web)
    service.delete()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", PACKET_MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_client_reaches_every_backend(cluster, everywhere, kind, mode, family):
    answered = set()
    for place, client in cluster.clients.items():
        target = everywhere.at(kind, family, own_node(place))
        answers = client.ask_often(mode, *target, 12)
        assert {answer.name or answer.error for answer in answers} <= ALL_WEB, place
        told = {answer.source if mode in ("sctp", "udp-unconnected") else answer.peer for answer in answers}
        assert told == {target}, place
        answered |= {answer.name for answer in answers}

    assert answered == ALL_WEB


@pytest.mark.parametrize("mode", ["tcp", "udp"])
def test_a_node_port_on_every_address_of_every_node(cluster, everywhere, mode):
    """TCP and UDP at the same port; also the addresses that pods have for a gateway, and 127.0.0.1 for the node."""
    addresses = [address for node in cluster.nodes for address in node.addresses]
    for node in cluster.nodes:
        if node.is_bridged:
            for gateway in (f"10.180.{node.number}.1", f"fd00:10:180:{node.number}::1"):
                cluster.outsider.route(gateway, node)
                addresses.append(gateway)
    port = everywhere.node_port

    asked = {
        (place, a): outcome(client, mode, (a, port)) for place, client in cluster.clients.items() for a in addresses
    }
    asked |= {(n, "127.0.0.1"): outcome(host, mode, ("127.0.0.1", port)) for n, host in enumerate(cluster.hosts)}
    asked |= {(2, "169.254.1.1"): outcome(cluster.pods[1], mode, ("169.254.1.1", port))}

    assert {who: what for who, what in asked.items() if what not in ALL_WEB} == {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", PACKET_MODES)
def test_cluster_ips_keep_the_address_of_pods(cluster, everywhere, mode, family):
    """Of nodes too: one of their own."""
    target = everywhere.at("ClusterIP", family)

    for shopper, client in zip(cluster.shoppers, cluster.pods, strict=True):
        answers = client.ask_often(mode, *target, 8)
        assert {answer.client for answer in answers} == {shopper.addresses[family]}
    for node, host in zip(cluster.nodes, cluster.hosts, strict=True):
        own = {*node.addresses, f"10.180.{node.number}.1", f"fd00:10:180:{node.number}::1"}
        assert {answer.client for answer in host.ask_often(mode, *target, 8)} <= own


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", PACKET_MODES)
def test_an_endpoint_reaches_itself(cluster, make_service, mode, family):
    """Through every frontend, and the NodePorts of other nodes."""
    for number, pod in enumerate(cluster.web[:2]):
        service = make_service()
        service.ports = service.in_protocols(*ALL_PROTOCOLS)
        service.publish([pod])
        targets = [service.at(kind, family, number) for kind in KINDS]
        targets += [service.at("NodePort", family, node) for node in range(COUNT)]
        client = pod.client()
        try:
            assert {target: outcome(client, mode, target) for target in targets} == dict.fromkeys(targets, pod.name)
        finally:
            client.close()


@pytest.mark.parametrize("mode", ["tcp", "udp"])
def test_endpoints_in_the_network_of_their_node(cluster, service, mode):
    """hostNetwork pods: from pods and nodes, their own among them, and from outside through every node."""
    node = cluster.nodes[1]
    server = node.serve("host-web", 8080)
    try:
        service.publish([Endpoint(address, node.name) for address in node.addresses])
        targets = [service.at(kind, family) for kind in KINDS for family in (0, 1)]
        targets += [service.at("NodePort", family, number) for family in (0, 1) for number in range(COUNT)]
        asked = {(p, t): outcome(client, mode, t) for p, client in cluster.clients.items() for t in targets}
    finally:
        end(server)

    assert {who: what for who, what in asked.items() if what != "host-web"} == {}


@pytest.mark.parametrize("backends", ["none", "unready"])
@pytest.mark.parametrize("mode", ["tcp", "udp", "sctp"])
def test_without_endpoints_every_frontend_refuses(cluster, service, mode, backends):
    """At once: TCP by a reset, the others by ICMP."""
    service.ports = service.in_protocols(*ALL_PROTOCOLS)
    service.publish([] if backends == "none" else endpoints(cluster.web, ready=False, serving=False))

    asked = {
        (place, kind, family): outcome(client, mode, service.at(kind, family, own_node(place)))
        for place, client in cluster.clients.items()
        for kind in KINDS
        for family in (0, 1)
    }

    assert {who: what for who, what in asked.items() if what != "ECONNREFUSED"} == {}


@pytest.mark.parametrize("mode", ["tcp", "udp", "sctp"])
def test_an_undefined_port_of_a_cluster_ip_refuses(cluster, everywhere, mode):
    asked = {
        (place, address): outcome(client, mode, (address, 81))
        for place, client in cluster.clients.items()
        for address in everywhere.ips
    }

    assert {who: what for who, what in asked.items() if what != "ECONNREFUSED"} == {}


@pytest.mark.parametrize("mode", ["VIP", "Proxy"])
def test_an_address_of_a_load_balancer_that_proxies_is_its_own(cluster, service, mode):
    service.publish(cluster.web, ingress=[{"ip": ip, "ipMode": mode} for ip in service.balanced])

    for client in cluster.clients.values():
        for target in (service.at("LoadBalancer", 0), service.at("LoadBalancer", 1)):
            if mode == "VIP":
                assert outcome(client, "tcp", target) in ALL_WEB
            else:
                assert client.is_unanswered("tcp", *target)


@pytest.mark.parametrize("mode", ["tcp", "udp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_service_of_one_family(cluster, service, family, mode):
    """The other family's addresses and NodePorts are nobody's."""
    ips = (service.ips[family],)
    service.publish(cluster.web, ips=ips, externalIPs=[service.external[family]])

    for place, client in cluster.clients.items():
        for kind in ("ClusterIP", "NodePort", "externalIP"):
            assert outcome(client, mode, service.at(kind, family, own_node(place))) in ALL_WEB, (place, kind)
    other = service.at("NodePort", 1 - family)
    assert outcome(cluster.outside, mode, other) == "ECONNREFUSED"
    assert cluster.pods[0].is_unanswered(mode, service.ips[1 - family], 80)


@pytest.mark.parametrize("mode", MODES)
def test_a_service_whose_first_family_is_ipv6(cluster, service, mode):
    service.publish(cluster.web, ips=service.ips[::-1])

    for client in cluster.clients.values():
        for family in (0, 1):
            assert outcome(client, mode, service.at("ClusterIP", family)) in ALL_WEB
