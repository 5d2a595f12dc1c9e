"""Sockets of pods and of the node reach the backends of a Service, and are told what they asked for."""

from __future__ import annotations

import pytest

from tests.lab.manifests import WEB, Endpoint, Port, endpoint_slice, service
from tests.lab.polling import until
from tests.lab.traffic import MODES, Answer

PLACES = ("pod", "host")
SOCKETS = ("IPv4", "IPv6", "IPv4-mapped")
MULTI = (Port("a", 80, 8080), Port("b", 443, 8081), Port("a-udp", 80, 8080, "UDP"), Port("b-udp", 53, 8081, "UDP"))
REMOTE = [Endpoint("10.180.2.77", "node-2"), Endpoint("fd00:10:180:2::77", "node-2")]


def asked(ips, socket):
    """The address to ask: it makes the socket."""
    return {"IPv4": ips[0], "IPv6": ips[1], "IPv4-mapped": f"::ffff:{ips[0]}"}[socket]


@pytest.fixture(scope="module")
def web(scene):
    """The ClusterIPs of a Service with every pod behind it."""
    return scene.publish("web", scene.web)


@pytest.fixture(scope="module")
def empty(scene):
    """The ClusterIPs of a Service with nobody behind it."""
    return scene.publish("empty", [])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("socket", SOCKETS)
def test_a_backend_answers_in_the_name_of_the_service(scene, web, place, mode, socket):
    address = asked(web, socket)

    answer = scene.clients[place].ask(mode, address, 80)

    assert answer.name in {pod.name for pod in scene.web}
    assert answer.port == 8080
    told = answer.source if mode == "udp-unconnected" else answer.peer
    assert told == (address, 80)
    if mode == "udp":
        assert answer.source == (address, 80)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("socket", SOCKETS[:2])
def test_the_backend_sees_the_client_itself(scene, web, place, socket):
    """A translated socket speaks from its own address: there is no source NAT."""
    family = SOCKETS.index(socket)
    gateways = ("10.180.1.1", "fd00:10:180:1::1")  # what the node has on its pods' bridge

    answer = scene.clients[place].ask("tcp", asked(web, socket), 80)

    assert answer.client == (scene.shopper.addresses if place == "pod" else gateways)[family]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("socket", SOCKETS)
@pytest.mark.parametrize("place", PLACES)
def test_nobody_behind_a_service_refuses(scene, empty, place, mode, socket):
    assert Answer(error="ECONNREFUSED") == scene.clients[place].ask(mode, asked(empty, socket), 80)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_backends_get_equal_shares(scene, web, mode, family):
    count = 600

    spread = scene.pod.spread(mode, web[family], 80, count)

    expected = count / len(scene.web)
    assert {pod.name for pod in scene.web} == set(spread)
    chi_square = sum((share - expected) ** 2 / expected for share in spread.values())
    assert chi_square < 30  # two degrees of freedom: once in three million runs of an even choice


@pytest.mark.parametrize("mode", MODES)
def test_an_address_that_is_no_service_is_left_alone(scene, web, mode):
    pod = scene.web[0]

    answer = scene.pod.ask(mode, pod.v4, 8080)

    assert (pod.name, (pod.v4, 8080)) == (answer.name, answer.source if mode == "udp-unconnected" else answer.peer)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_a_port_that_the_service_does_not_have_refuses(scene, web, place, mode, family):
    assert Answer(error="ECONNREFUSED") == scene.clients[place].ask(mode, web[family], 81)


@pytest.mark.parametrize(("mode", "port", "target"), [("tcp", 80, 8080), ("tcp", 443, 8081), ("udp", 53, 8081)])
@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_each_port_of_a_service_has_its_own_target(scene, mode, port, target, family):
    ips = scene.publish("multi", scene.web, MULTI)

    answer = scene.pod.ask(mode, ips[family], port)

    assert ((ips[family], port), target) == (answer.peer, answer.port)


@pytest.mark.parametrize("family", [4, 6])
def test_slices_of_a_service_add_up(scene, name, family):
    """A pod a slice, one of them in two slices: it counts once."""
    pods = [*scene.web, scene.web[0]]
    slices = [
        endpoint_slice(name, [pod.endpoint(family)], name=f"{name}-{number}", ipv6=family == 6)
        for number, pod in enumerate(pods)
    ]
    ip = scene.ips(name)[family == 6]
    scene.manifests.write(name, service(name, [ip]), *slices)
    scene.agent.wait_for(f"{f'[{ip}]' if family == 6 else ip}:80/TCP", 3)

    assert {pod.name for pod in scene.web} == set(scene.pod.spread("tcp", ip, 80, 100))


def test_slices_may_name_another_target_port_each(scene, name):
    """As during a rolling update that changes the port."""
    ip = scene.ips(name)[0]
    port = [Port("http", 80, 8080)]
    moved = [Port("http", 80, 8081)]
    scene.manifests.write(
        name,
        service(name, [ip], port),
        endpoint_slice(name, [scene.web[0].endpoint()], port, name="old"),
        endpoint_slice(name, [scene.web[1].endpoint()], moved, name="new"),
    )
    scene.agent.wait_for(f"{ip}:80/TCP", 2)

    answers = {(answer.name, answer.port) for answer in scene.pod.ask_often("tcp", ip, 80, 50)}

    assert {("web-1", 8080), ("web-2", 8081)} == answers


@pytest.mark.parametrize(
    ("conditions", "answers"),
    [
        ([{}, {"ready": False, "serving": False}, {}], {"web-1", "web-3"}),
        ([{"ready": False, "terminating": True}] * 3, {"web-1", "web-2", "web-3"}),
        ([{"ready": False, "terminating": True}, {}, {"ready": False}], {"web-2"}),
        ([{"ready": False, "serving": False, "terminating": True}] * 3, {"ECONNREFUSED"}),
    ],
    ids=["ready ones", "all terminating", "one ready", "none serving"],
)
def test_conditions_choose_the_endpoints(scene, name, conditions, answers):
    ip = scene.ips(name)[0]
    endpoints = [pod.endpoint(**given) for pod, given in zip(scene.web, conditions, strict=True)]
    scene.manifests.write(name, service(name, [ip]), endpoint_slice(name, endpoints))
    scene.agent.wait_for(f"{ip}:80/TCP", 0 if answers == {"ECONNREFUSED"} else len(answers))

    assert answers == set(scene.host.spread("tcp", ip, 80, 60))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
def test_local_traffic_policy_stays_on_the_node(scene, name, place, mode):
    ips = scene.write(name, [scene.web[0], *REMOTE], internalTrafficPolicy="Local")
    scene.wait_for(name, 1)

    assert scene.clients[place].spread(mode, ips[0], 80, 30) == {"web-1": 30}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_local_traffic_policy_without_a_local_endpoint_is_silence(scene, name, mode, family):
    """The packet path drops and counts it: the client may time out."""
    ips = scene.write(name, REMOTE, internalTrafficPolicy="Local")
    scene.wait_for(name, 0)

    assert scene.pod.is_unanswered(mode, ips[family], 80)


def test_a_service_follows_its_endpoints(scene, name):
    """From none to three and back, in place and by moving; the answers agree at every size."""
    for count in (0, 1, 3, 2, 1, 0, 2):
        ips = scene.publish(name, scene.web[:count])
        expected = {pod.name for pod in scene.web[:count]} or {"ECONNREFUSED"}
        for ip in ips:
            assert expected == set(scene.pod.spread("tcp", ip, 80, 40)), count


def test_a_replaced_endpoint_answers_in_the_place_of_the_old(scene, name):
    ips = scene.publish(name, scene.web[:1])
    assert scene.pod.ask("tcp", ips[0], 80).name == "web-1"

    scene.write(name, scene.web[1:2])

    at = until(lambda: scene.pod.ask("tcp", ips[0], 80).name == "web-2", "the new one answers")
    assert at
    assert scene.pod.spread("tcp", ips[0], 80, 20) == {"web-2": 20}


def test_a_held_connection_outlives_changes_of_its_service(scene, name):
    ips = scene.publish(name, scene.web[:1])
    held = scene.pod.open("tcp", 4)
    held.connect(ips[0], 80)
    assert held.ask() == "web-1"

    scene.publish(name, scene.web[1:])
    assert held.ask() == "web-1"
    assert held.peer() == (ips[0], 80)

    scene.withdraw(name)
    assert held.ask() == "web-1"
    assert held.peer() == (ips[0], 80)
    held.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_deleted_service_is_no_longer_translated(scene, name, mode):
    ips = scene.publish(name, scene.web)
    assert scene.host.ask(mode, ips[0], 80).name

    scene.withdraw(name)

    assert all(scene.host.is_unanswered(mode, ip, 80) for ip in ips)


def test_the_older_of_two_services_keeps_a_shared_address(scene, name):
    """And the other gets it once the older is gone."""
    ip = scene.ips(name)[0]
    younger = service(f"{name}-b", [ip])
    older = service(f"{name}-a", [ip])
    younger["metadata"]["creationTimestamp"] = "2024-05-02T00:00:00Z"
    older["metadata"]["creationTimestamp"] = "2024-05-01T00:00:00Z"
    scene.manifests.write(f"{name}-b", younger, endpoint_slice(f"{name}-b", [scene.web[1].endpoint()]))
    scene.agent.wait_for(f"{ip}:80/TCP", 1)
    assert scene.pod.ask("tcp", ip, 80).name == "web-2"

    scene.manifests.write(f"{name}-a", older, endpoint_slice(f"{name}-a", [scene.web[0].endpoint()]))
    until(lambda: scene.pod.ask("tcp", ip, 80).name == "web-1", "the older one has the address")

    scene.manifests.remove(f"{name}-a")
    until(lambda: scene.pod.ask("tcp", ip, 80).name == "web-2", "the younger one has it back")
    scene.manifests.remove(f"{name}-b")
    until(scene.agent.is_settled, "nothing is degraded any more")


def test_a_process_of_the_node_may_be_a_backend(scene, name):
    """As the API server is behind the Service `kubernetes`: an endpoint with the node's own address."""
    scene.node.serve("on-the-host", 6443)
    port = [Port("https", 443, 6443)]
    endpoints = [Endpoint(address, scene.node.name) for address in scene.node.addresses]
    ips = scene.write(name, endpoints, port)
    scene.wait_for(name, 1, port)

    for client in scene.clients.values():
        assert [client.ask("tcp", ip, 443).name for ip in ips] == ["on-the-host"] * 2


def test_a_pod_reaches_itself_through_its_service(scene, name):
    ips = scene.publish(name, scene.web[:1])
    client = scene.web[0].client()

    answers = [client.ask(mode, ip, 80) for mode in MODES for ip in ips]

    client.close()
    assert [answer.name for answer in answers] == ["web-1"] * 6


def test_both_protocols_share_a_port_and_not_their_backends(scene, name):
    ip = scene.ips(name)[0]
    scene.manifests.write(
        name,
        service(name, [ip]),
        endpoint_slice(name, [scene.web[0].endpoint()], WEB[:1], name=f"{name}-tcp"),
        endpoint_slice(name, [scene.web[1].endpoint()], WEB[1:], name=f"{name}-udp"),
    )
    scene.agent.wait_for(f"{ip}:80/TCP", 1)
    scene.agent.wait_for(f"{ip}:80/UDP", 1)

    assert [scene.pod.ask(mode, ip, 80).name for mode in MODES] == ["web-1", "web-2", "web-2"]
