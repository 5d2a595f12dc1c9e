"""Services that change: created, deleted, of another type, with other ports, labels and endpoints; and nodes that do.

Source: test/e2e/network/{service,endpointslice,networking}.go of Kubernetes.
"""

from __future__ import annotations

import time

import pytest

from tests.cluster.nodes import COUNT
from tests.cluster.three_nodes import KINDS, endpoints, outcome
from tests.lab import netns
from tests.lab.manifests import Port

pytestmark = pytest.mark.timeout(300)
FAMILIES = [pytest.param(0, id="IPv4"), pytest.param(1, id="IPv6")]
ALL_WEB = {"web-1", "web-2", "web-3"}
PLAIN = {"type": "ClusterIP"}
NODE_PORT = {"type": "NodePort"}
NOBODY = {"ECONNREFUSED", "timeout"}  # Linux itself refuses datagrams only so often
SILENCE_S = 0.2


def answers(cluster, service, kind="ClusterIP", mode="tcp", **options):
    """Who answers every client, in both families."""
    return {
        outcome(client, mode, service.at(kind, family), **options)
        for client in cluster.clients.values()
        for family in (0, 1)
    }


def is_silent(cluster, address, port):
    """Whether nobody is there for pods, nodes and outside."""
    return all(c.is_unanswered("tcp", address, port) for c in (cluster.pods[1], cluster.hosts[2], cluster.outside))


def test_services_come_go_and_come_back(cluster, make_service):
    """The deleted one is gone, others stay, and at the same address it comes back."""
    stays, goes = make_service(), make_service()
    stays.publish(cluster.web[:1])
    goes.publish(cluster.web[1:2])
    assert answers(cluster, goes) == {"web-2"}

    goes.delete()
    cluster.sync()
    assert is_silent(cluster, *goes.at("ClusterIP", 0))
    assert is_silent(cluster, *goes.at("LoadBalancer", 1))
    assert outcome(cluster.outside, "tcp", goes.at("NodePort", 0)) == "ECONNREFUSED"
    assert answers(cluster, stays) == {"web-1"}

    goes.publish(cluster.web[2:])
    for kind in KINDS:
        assert answers(cluster, goes, kind) == {"web-3"}
        assert answers(cluster, stays, kind) == {"web-1"}


def test_two_services_over_the_same_pods(cluster, make_service):
    first, second = make_service().publish(cluster.web), make_service().publish(cluster.web)

    assert answers(cluster, first) | answers(cluster, second) == ALL_WEB
    first.delete()
    cluster.sync()
    assert answers(cluster, second, "NodePort") <= ALL_WEB


def test_ports_come_and_go(cluster, service):
    service.publish(cluster.web[:1])
    http, udp = service.ports
    more = Port("more", 443, 8081)
    service.ports = (http, udp, more)
    service.publish(cluster.web[:1])
    for client in cluster.clients.values():
        for ip in service.ips:
            assert client.ask("tcp", ip, 443).port == 8081
            assert client.ask("tcp", ip, 80).port == 8080

    service.ports = (more, udp)
    service.publish(cluster.web[:1])

    for client in cluster.clients.values():
        for ip in service.ips:
            assert client.ask("tcp", ip, 443).port == 8081
            assert outcome(client, "tcp", (ip, 80)) == "ECONNREFUSED"
            assert outcome(client, "udp", (ip, 80)) == "web-1"


@pytest.mark.parametrize("mode", ["tcp", "udp"])
def test_a_node_port_moves_and_goes(cluster, service, mode):
    service.publish(cluster.web[:1], **NODE_PORT)
    old = [service.at("NodePort", family, node) for family in (0, 1) for node in range(COUNT)]
    service.node_port += 1_000
    service.ports = service.in_protocols("TCP", "UDP")
    service.publish(cluster.web[:1], **NODE_PORT)
    new = [service.at("NodePort", family, node) for family in (0, 1) for node in range(COUNT)]

    for client in cluster.clients.values():
        assert {outcome(client, mode, target, SILENCE_S) for target in old} <= NOBODY
        assert {outcome(client, mode, target) for target in new} == {"web-1"}
    service.publish(cluster.web[:1], **PLAIN)
    for client in cluster.clients.values():
        assert {outcome(client, mode, target, SILENCE_S) for target in new} <= NOBODY
        assert outcome(client, mode, service.at("ClusterIP", 0)) == "web-1"


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_external_names_become_services_and_back(cluster, service, kind):
    """What a type does not have is gone."""
    for _ in range(2):
        service.publish(cluster.web[:1], type="ExternalName")
        assert is_silent(cluster, *service.at("ClusterIP", 0))
        assert outcome(cluster.outside, "tcp", service.at("NodePort", 0)) == "ECONNREFUSED"

        service.publish(cluster.web[:1], type=kind)
        assert answers(cluster, service, "ClusterIP") == {"web-1"}
        assert answers(cluster, service, "NodePort") == {"web-1" if kind == "NodePort" else "ECONNREFUSED"}


def test_a_label_that_gives_a_service_to_another_proxy(cluster, service):
    label = {"service.kubernetes.io/service-proxy-name": "other"}
    service.publish(cluster.web[:1], labels=label)
    assert is_silent(cluster, *service.at("ClusterIP", 0))

    service.publish(cluster.web[:1])
    assert answers(cluster, service) == {"web-1"}

    service.publish(cluster.web[:1], labels=label)
    assert is_silent(cluster, *service.at("ClusterIP", 1))
    assert outcome(cluster.outside, "tcp", service.at("NodePort", 0)) == "ECONNREFUSED"


def test_a_label_that_says_slices_are_of_a_headless_service(cluster, service):
    """Its slices count for nothing while they have it."""
    labelled = service.slices(cluster.web[:1])
    for piece in labelled:
        piece["metadata"]["labels"]["service.kubernetes.io/headless"] = ""
    service.publish(slices=labelled)
    assert answers(cluster, service) == {"ECONNREFUSED"}

    service.publish(cluster.web[:1])
    assert answers(cluster, service) == {"web-1"}

    service.publish(slices=labelled)
    assert answers(cluster, service, "NodePort") == {"ECONNREFUSED"}


def test_a_slice_moves_to_another_service_by_its_label(cluster, make_service):
    """Its endpoints go from the one to the other at once, and back."""
    first, second = make_service(), make_service()
    described, staying = first.describe(), first.slices(cluster.web[:1])
    first.publish(slices=[*staying, *first.slices(cluster.web[1:2], name="-moving")])
    second.publish()
    assert answers(cluster, second) == {"ECONNREFUSED"}

    for owner, of_first, of_second in ((second, {"web-1"}, {"web-2"}), (first, {"web-1", "web-2"}, {"ECONNREFUSED"})):
        moving = first.slices(cluster.web[1:2], name="-moving")
        for piece in moving:
            piece["metadata"]["labels"]["kubernetes.io/service-name"] = owner.name
        first.write(described, [*staying, *moving])
        cluster.sync()

        for client in (cluster.pods[0], cluster.outside):
            for family in (0, 1):
                assert set(client.spread("tcp", *first.at("ClusterIP", family), 40)) == of_first
        assert answers(cluster, second) == of_second


def test_a_headless_service_has_no_frontends(cluster, service):
    ip = service.ips[0]
    service.publish(cluster.web[:1], ips=["None"], type="ClusterIP")

    assert is_silent(cluster, ip, 80)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["tcp", "udp"])
def test_endpoints_become_ready_and_unready(cluster, service, mode, kind):
    unready = endpoints(cluster.web[:1], ready=False, serving=False)
    service.publish([*unready, *cluster.web[2:]])
    assert answers(cluster, service, kind, mode) == {"web-3"}

    service.set_backends([*cluster.web[:1], *endpoints(cluster.web[2:], ready=False, serving=False)])
    assert answers(cluster, service, kind, mode) == {"web-1"}

    service.set_backends(unready)
    assert answers(cluster, service, kind, mode) == {"ECONNREFUSED"}


def test_unready_and_terminating_endpoints_that_are_published(cluster, service):
    """publishNotReadyAddresses: the slices call them ready, terminating ones too; without it they are not."""
    states = [*endpoints(cluster.web[:1]), *endpoints(cluster.web[1:2], ready=True, serving=True, terminating=True)]
    service.publish(states, publishNotReadyAddresses=True)
    found = [cluster.outside.spread("tcp", *service.at("NodePort", family), 40) for family in (0, 1)]
    assert [set(spread) for spread in found] == [{"web-1", "web-2"}] * 2

    states = [*endpoints(cluster.web[:1]), *endpoints(cluster.web[1:2], ready=False, serving=True, terminating=True)]
    service.publish(states)
    assert answers(cluster, service) == {"web-1"}


@pytest.mark.parametrize("kind", KINDS)
def test_another_target_port(cluster, service, kind):
    service.publish(cluster.web[:1])
    service.ports = tuple(port._replace(target=8081) for port in service.ports)
    service.publish(cluster.web[:1])

    for client in cluster.clients.values():
        for mode in ("tcp", "udp"):
            assert {client.ask(mode, *service.at(kind, family)).port for family in (0, 1)} == {8081}


def test_ports_and_endpoints_spread_over_slices(cluster, service):
    """A port in one slice, another port in another; and one port's endpoints in several."""
    http, udp = service.ports
    more = Port("more", 443, 8081)
    service.ports = (http, udp, more)
    pieces = service.slices(cluster.web[:1], [http, udp], "-a")
    pieces += service.slices(cluster.web[1:2], [more], "-b")
    pieces += service.slices(cluster.web[2:], [http, more], "-c")
    service.publish(slices=pieces)

    for family in (0, 1):
        ip = service.ips[family]
        for client in (cluster.pods[0], cluster.hosts[1], cluster.outside):
            assert set(client.spread("tcp", ip, 80, 30)) == {"web-1", "web-3"}
            assert set(client.spread("udp", ip, 80, 8)) == {"web-1"}
            assert set(client.spread("tcp", ip, 443, 30)) == {"web-2", "web-3"}


def test_a_named_target_port_is_another_number_for_each_pod(cluster, service):
    """Each slice has its own."""
    http, udp = service.ports
    pieces = service.slices(cluster.web[:1], [http, udp], "-a")
    pieces += service.slices(cluster.web[1:2], [http._replace(target=8081), udp], "-b")
    service.publish(slices=pieces)

    for client in cluster.clients.values():
        for family in (0, 1):
            said = client.ask_often("tcp", *service.at("ClusterIP", family), 30)
            assert {(answer.name, answer.port) for answer in said} == {("web-1", 8080), ("web-2", 8081)}


@pytest.mark.parametrize("kind", KINDS)
def test_two_protocols_at_one_port(cluster, service, kind):
    """They lead to different ports; each goes without the other."""
    tcp, udp = service.ports
    service.ports = (tcp, udp._replace(target=8081))
    service.publish(cluster.web[:1])
    for client in cluster.clients.values():
        for family in (0, 1):
            assert client.ask("tcp", *service.at(kind, family)).port == 8080
            assert client.ask("udp", *service.at(kind, family)).port == 8081

    service.ports = (tcp,)
    service.publish(cluster.web[:1])

    assert answers(cluster, service, kind, "tcp") == {"web-1"}
    if kind in ("ClusterIP", "NodePort"):
        assert answers(cluster, service, kind, "udp") == {"ECONNREFUSED"}


@pytest.mark.parametrize("family", FAMILIES)
def test_node_ports_follow_the_addresses_of_nodes_within_a_second(cluster, service, family):
    service.publish(cluster.web)
    node, agent = cluster.nodes[1], cluster.agents[1]
    address, bits = (("172.30.0.77", 24), ("fd00:172:30::77", 64))[family]
    frontend = f"{f'[{address}]' if family else address}:{service.node_port}/TCP"
    added = time.monotonic()
    netns.configure(node.netns, [f"addr add {address}/{bits} dev eth0 {'nodad' if family else ''}"])
    try:
        assert cluster.outside.first_reply(address, service.node_port, sorted(ALL_WEB)) - added < 1
        for client in cluster.clients.values():
            assert outcome(client, "udp", (address, service.node_port)) in ALL_WEB
    finally:
        netns.configure(node.netns, [f"addr del {address}/{bits} dev eth0"])

    agent.wait_for(frontend, None, 1)
    assert answers(cluster, service, "NodePort") <= ALL_WEB
