"""What the upstream end-to-end suite asks of Services, over an overlay (VXLAN) between three nodes, with real sockets.

Nodes that are routed to each other have their own modules (``test_services_*``).
Source: test/e2e/network of Kubernetes: service.go, networking.go, conntrack.go, traffic_distribution.go, dual_stack.go.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest

from tests.cluster.fleet import Fleet, follow
from tests.cluster.nodes import COUNT, health_status
from tests.lab.manifests import Endpoint, endpoint_slice
from tests.lab.polling import until
from tests.lab.traffic import MODES, PACKET_MODES
from tests.requirements import require_root

FAMILIES = [pytest.param(0, id="IPv4"), pytest.param(1, id="IPv6")]
STAGES = {"off, overlay": {"socketLB": "off", "overlay": True}}
ALL_WEB = {"web-1", "web-2", "web-3"}
_serial = itertools.count()


@pytest.fixture(scope="module", params=list(STAGES))
def fleet(request):
    require_root()
    with Fleet(**STAGES[request.param]) as made:
        yield made


@pytest.fixture
def service(fleet):
    """A Service that no other test uses."""
    made = fleet.service(f"svc-{next(_serial)}")
    yield made
    made.withdraw()


@pytest.fixture(scope="module")
def everywhere(fleet):
    """A Service over the pods of all nodes."""
    return fleet.service("everywhere").publish(fleet.web)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", PACKET_MODES)
@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort", "externalIP", "LoadBalancer"])
def test_every_node_reaches_every_backend(fleet, everywhere, kind, mode, family):
    """Pods, nodes, and a client outside: through the frontends of every node."""
    for place, client in fleet.clients.items():
        node = int(place[-1]) - 1 if place != "outside" else 0
        answers = client.ask_often(mode, *everywhere.at(kind, family, node), 24)
        assert {answer.error for answer in answers} == {""}, place
        assert {answer.name for answer in answers} == ALL_WEB, place


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", PACKET_MODES)
def test_the_node_ports_of_all_nodes(fleet, everywhere, mode, family):
    """From everywhere to everywhere: a pod asks other nodes, too."""
    for client in (fleet.outside, fleet.pods[0], fleet.hosts[1]):
        for node in range(COUNT):
            answers = client.ask_often(mode, *everywhere.at("NodePort", family, node), 16)
            assert {answer.error for answer in answers} == {""}
            assert {answer.name for answer in answers} == ALL_WEB


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["tcp", "udp"])
def test_external_traffic_policy_local_and_back(fleet, service, mode, family):
    """One local backend, on the second node: only its node answers outside, and keeps the client's address."""
    service.publish(fleet.web[1:2], externalTrafficPolicy="Local", healthCheckNodePort=32_100)

    answer = fleet.outside.ask(mode, *service.at("NodePort", family, 1))
    assert (answer.name, answer.client) == ("web-2", fleet.outsider.addresses[family])
    for node in (0, 2):
        assert fleet.outside.is_unanswered(mode, *service.at("NodePort", family, node))
        assert fleet.pods[node].ask(mode, *service.at("NodePort", family, node)).name == "web-2"
        assert fleet.hosts[node].ask(mode, *service.at("NodePort", family, node)).name == "web-2"
    assert [health(node, 32_100) for node in fleet.nodes] == [503, 200, 503]

    service.publish(fleet.web[1:2])
    for node in range(COUNT):
        follow(lambda: fleet.outside.ask(mode, *service.at("NodePort", family, node), 0.3), "web-2")  # noqa: B023
    until(lambda: {health(node, 32_100) for node in fleet.nodes} == {0}, "no health check listens")


def health(node, port: int) -> int:
    """Ask for a Service's health on a node; 0 = nobody listens."""
    return health_status(node.netns, "127.0.0.1", port)


@pytest.mark.parametrize("mode", MODES)
def test_internal_traffic_policy_local(fleet, service, mode):
    service.publish([*fleet.web[:1], *fleet.web[2:]], internalTrafficPolicy="Local")
    follow(lambda: fleet.pods[0].ask(mode, *service.at("ClusterIP", 0), 0.3), "web-1")
    follow(lambda: fleet.pods[2].ask(mode, *service.at("ClusterIP", 0), 0.3), "web-3")

    assert fleet.hosts[0].spread(mode, *service.at("ClusterIP", 0), 12) == {"web-1": 12}
    silent = fleet.pods[1].ask(mode, *service.at("ClusterIP", 0), 0.3)
    assert silent.error in ("timeout", "ETIMEDOUT")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["tcp", "udp"])
def test_endpoints_in_the_network_of_their_node(fleet, service, mode, family):
    """hostNetwork pods: reached by the node's own address, from itself and from others."""
    node = fleet.nodes[1]
    server = node.serve("host-web", 8080)
    try:
        service.publish([Endpoint(address, node.name) for address in node.addresses])
        for place, client in fleet.clients.items():
            answer = client.ask(mode, *service.at("ClusterIP", family))
            assert answer.name == "host-web", (place, answer)
        for number in range(COUNT):
            assert fleet.outside.ask(mode, *service.at("NodePort", family, number)).name == "host-web"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_terminating_endpoints_serve_when_none_is_ready(fleet, service, kind, policy):
    """Under each traffic policy, inside and outside; not when one is ready."""
    ready = [pod.endpoint(family) for pod in fleet.web[2:] for family in (4, 6)]
    leaving = [pod.endpoint(f, ready=False, terminating=True) for pod in fleet.web[:1] for f in (4, 6)]
    field = "internalTrafficPolicy" if kind == "ClusterIP" else "externalTrafficPolicy"
    client = fleet.pods[0] if kind == "ClusterIP" else fleet.outside
    service.publish(leaving, **{field: policy})
    follow(lambda: client.ask("tcp", *service.at(kind, 0), 0.3), "web-1")
    assert client.spread("tcp", *service.at(kind, 0), 8) == {"web-1": 8}

    service.write(*service.objects([*leaving, *ready], **{field: policy}))

    # Of the policy Local, the ready one is on another node.
    wanted = "web-3" if policy == "Cluster" else "web-1"
    follow(lambda: client.ask("tcp", *service.at(kind, 0), 0.3), wanted)
    assert client.spread("tcp", *service.at(kind, 0), 8) == {wanted: 8}


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
@pytest.mark.parametrize("origin", ["pod", "host", "outside"])
@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_move_on_when_their_backend_goes(fleet, service, family, origin, kind):
    """One socket, one source port: the flow is not pinned to who is gone."""
    service.publish(fleet.web[1:2])
    client = {"pod": fleet.pods[0], "host": fleet.hosts[0], "outside": fleet.outside}[origin]
    ask = lambda: client.ask("udp", *service.at(kind, family), 0.3, source_port=4321)  # noqa: E731
    follow(ask, "web-2")

    service.publish(fleet.web[2:])

    follow(ask, "web-3")


@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_after_scale_to_zero_and_back(fleet, service, family):
    """The flow to the last backend does not outlive it: the client is refused, then served by the next one."""
    service.publish(fleet.web[1:2])
    ask = lambda: fleet.outside.ask("udp", *service.at("NodePort", family), 0.3, source_port=4322)  # noqa: E731
    follow(ask, "web-2")

    service.publish([])
    follow(ask, "ECONNREFUSED")
    service.publish(fleet.web[2:])

    follow(ask, "web-3")


def test_a_new_target_port_is_followed_by_datagrams(fleet, service):
    service.publish(fleet.web[:1])
    ask = lambda: fleet.outside.ask("udp", *service.at("NodePort", 0), 0.3, source_port=4323)  # noqa: E731
    assert follow(ask, "web-1").port == 8080

    service.ports = tuple(port._replace(target=8081) for port in service.ports)
    service.publish(fleet.web[:1])

    until(lambda: ask().port == 8081, "the new port answers")


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_unready_endpoints_are_not_used(fleet, service, kind):
    """Until they are ready."""
    unready = [pod.endpoint(f, ready=False, serving=False) for pod in fleet.web[:1] for f in (4, 6)]
    service.write(*service.objects(unready))
    service.wait_for(0)
    for place, client in fleet.clients.items():
        assert client.ask("tcp", *service.at(kind, 0)).error == "ECONNREFUSED", place

    service.publish(fleet.web[:1])

    for client in fleet.clients.values():
        follow(lambda: client.ask("tcp", *service.at(kind, 0), 0.5), "web-1")  # noqa: B023


def test_types_change_and_change_back(fleet, service):
    """ClusterIP, NodePort, ExternalName, and again: what a type does not have is gone."""
    node_port, cluster_ip = service.at("NodePort", 0, 1), service.at("ClusterIP", 0)
    plain = {"externalIPs": [], "ingress": ()}
    for _ in range(2):
        service.publish(fleet.web, type="NodePort", **plain)
        follow(lambda: fleet.outside.ask("tcp", *node_port, 0.3), fleet.outside.ask("tcp", *node_port).name)

        service.ports = tuple(port._replace(node_port=0) for port in service.ports)
        service.publish(fleet.web, type="ClusterIP", **plain)
        until(lambda: fleet.outside.ask("tcp", *node_port, 0.3).error == "ECONNREFUSED", "the NodePort is gone")
        assert fleet.pods[0].ask("tcp", *cluster_ip).name in ALL_WEB

        service.write(*service.objects(fleet.web, type="ExternalName", externalName="example.invalid", **plain))
        service.wait_for(None)
        assert fleet.pods[0].is_unanswered("tcp", *cluster_ip)
        service.ports = tuple(port._replace(node_port=service.node_port) for port in service.ports)


@pytest.mark.parametrize("label", ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"])
def test_a_label_that_gives_the_service_to_somebody_else(fleet, service, label):
    service.publish(fleet.web)
    objects = service.objects(fleet.web)
    labelled = [
        {**o, "metadata": {**o["metadata"], "labels": o["metadata"].get("labels", {}) | {label: ""}}} for o in objects
    ]

    service.write(*labelled)
    service.wait_for(None if "proxy-name" in label else 0)
    service.publish(fleet.web)

    assert fleet.pods[0].ask("tcp", *service.at("ClusterIP", 0)).name in ALL_WEB


@pytest.mark.parametrize("level", ["forZones", "forNodes"])
def test_traffic_keeps_to_its_zone_or_node(fleet, service, level):
    """With hints on every endpoint; zones are those of odd and of even nodes."""
    objects = service.objects(fleet.web)
    for piece in objects[1:]:
        for node, endpoint in zip(fleet.nodes, piece["endpoints"], strict=True):
            name = node.name if level == "forNodes" else f"zone-{node.number % 2}"
            endpoint["hints"] = {level: [{"name": name}]}
    service.write(*objects)
    wanted = (
        [{"web-1", "web-3"}, {"web-2"}, {"web-1", "web-3"}]
        if level == "forZones"
        else [{f"web-{n}"} for n in (1, 2, 3)]
    )

    for number, answers in enumerate(wanted):
        for family in (0, 1):
            client = fleet.pods[number]
            until(lambda: set(client.spread("tcp", *service.at("ClusterIP", family), 16)) == answers, f"{answers}")  # noqa: B023


def test_ports_come_and_go(fleet, service):
    service.publish(fleet.web)
    address = service.ips[0]
    assert fleet.pods[0].ask("tcp", address, 443).error == "ECONNREFUSED"
    before = service.ports
    service.ports = (*before, before[0]._replace(name="more", number=443, target=8081, node_port=0))

    service.publish(fleet.web)
    assert until(lambda: fleet.pods[0].ask("tcp", address, 443).port, "the new port answers") == 8081
    service.ports = before
    service.publish(fleet.web)

    follow(lambda: fleet.pods[0].ask("tcp", address, 443), "ECONNREFUSED")
    assert fleet.pods[0].ask("tcp", address, 80).name in ALL_WEB


@pytest.mark.parametrize("family", FAMILIES)
def test_endpoints_spread_over_slices(fleet, service, family):
    """One slice a pod."""
    objects = service.objects([])[:1]
    for pod in fleet.web:
        for number in (4, 6):
            name = f"{service.name}-{pod.name}-{number}"
            objects.append(
                endpoint_slice(service.name, [pod.endpoint(number)], service.ports, name=name, ipv6=number == 6)
            )
    service.write(*objects)
    service.wait_for(3)

    assert set(fleet.outside.spread("tcp", *service.at("NodePort", family), 24)) == ALL_WEB


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["tcp", "udp"])
@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort", "LoadBalancer"])
def test_much_to_say(fleet, everywhere, kind, mode, family):
    """Datagrams of 2000 bytes and transfers of a megabyte, to every node's backend."""
    size = 2000 if mode == "udp" else 1_000_000
    for client in (fleet.pods[0], fleet.pods[1], fleet.outside):
        if mode == "udp" and fleet.lab.overlay and client is fleet.outside:
            ask = partial(client.ask, mode, *everywhere.at(kind, family), 1, size=size)
            until(lambda: ask().size == size, "the client learns the MTU of the overlay")  # noqa: B023
        answers = [client.ask(mode, *everywhere.at(kind, family), size=size) for _ in range(6)]
        assert {(answer.error, answer.size) for answer in answers} == {("", size)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["tcp", "udp"])
def test_direct_server_return(fleet, service, mode, family):
    """By annotation: backends see the client, on whichever node they are, and answer it themselves."""
    service.publish(fleet.web, annotations={"ebproxy.io/forwarding-mode": "dsr"})
    address = service.at("NodePort", family)

    answers = [fleet.outside.ask(mode, *address) for _ in range(24)]

    assert {answer.error for answer in answers} == {""}
    assert {answer.name for answer in answers} == ALL_WEB
    assert {answer.client for answer in answers} == {fleet.outsider.addresses[family]}


@pytest.mark.parametrize("family", FAMILIES)
def test_maglev_chooses_alike_on_every_node(fleet, service, family):
    """By annotation: a client's flow gets one backend, whichever node it comes by."""
    service.publish(fleet.web, annotations={"ebproxy.io/algorithm": "maglev"})
    ports = itertools.count(5000)

    def choose() -> set[str]:
        source, names = next(ports), set()
        for node in fleet.nodes:
            fleet.outsider.route(service.balanced[family], node)
            names.add(fleet.outside.ask("udp", *service.at("LoadBalancer", family), source_port=source).name)
        return names

    # The first table of a node waits for its program to be compiled.
    until(lambda: all(len(choose()) == 1 for _ in range(12)), "the tables are built", 30)
    chosen = [choose() for _ in range(24)]

    assert {len(names) for names in chosen} == {1}
    assert set.union(*chosen) == ALL_WEB
