"""What a socket asked for is remembered for as long as the socket is, and no longer."""

from __future__ import annotations

import pytest

from tests.lab.scene import SIZES, Scene
from tests.requirements import require_root

SOCKETS = 24


@pytest.fixture(scope="module")
def tiny():
    """A node whose origin slots are two, so that most sockets find theirs taken."""
    require_root()
    with Scene(web=2, mapSizes=SIZES | {"socketOrigins": 2}) as made:
        for name in ("one", "two"):
            made.publish(name, made.web)
        yield made


def taken(agent):
    """Count the sockets remembered: in slots, and in the LRU map."""
    with agent.maps() as store:
        slots = sum(any(value[:8]) for _, value in store.maps["socket_origins"].items())
        return slots, sum(1 for _ in store.maps["peer_origins"].items())


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("family", [4, 6])
def test_sockets_that_collide_all_know_what_they_asked_for(tiny, protocol, family):
    spilled = tiny.agent.metric("ebproxy_dataplane_events_total", event="origin_spilled")
    opened = []
    for number in range(SOCKETS):
        address = tiny.ips("one" if number % 2 else "two")[family == 6]
        sock = tiny.pod.open(protocol, family)
        sock.connect(address, 80)
        opened.append((sock, address))

    assert [(address, 80) for _, address in opened] == [sock.peer() for sock, _ in opened]
    assert {"web-1", "web-2"} == {sock.ask() for sock, _ in opened}
    now_spilled = tiny.agent.metric("ebproxy_dataplane_events_total", event="origin_spilled")
    assert now_spilled - spilled >= SOCKETS - 2
    for sock, _ in opened:
        sock.close()
    assert taken(tiny.agent) == (0, 0)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_closed_socket_gives_its_slot_back(scene, name, protocol, family):
    ips = scene.publish(name, scene.web)
    before = taken(scene.agent)
    opened = [scene.pod.open(protocol, family) for _ in range(8)]
    for sock in opened:
        sock.connect(ips[family == 6], 80)
    now = taken(scene.agent)
    assert now[0] > before[0]
    assert sum(now) == sum(before) + 8, "where another socket has the slot the other map has it"

    for sock in opened:
        sock.close()

    assert taken(scene.agent)[0] == before[0]


def test_a_process_that_is_killed_gives_its_slots_back(scene, name):
    ips = scene.publish(name, scene.web)
    before = taken(scene.agent)
    client = scene.shopper.client()
    for _ in range(4):
        client.open("tcp", 4).connect(ips[0], 80)
    now = taken(scene.agent)
    assert now[0] > before[0]
    assert sum(now) == sum(before) + 4, "where another socket has the slot the other map has it"

    client.close()

    assert taken(scene.agent)[0] == before[0]


@pytest.mark.parametrize("family", [4, 6])
def test_a_socket_connected_elsewhere_knows_its_new_peer(scene, name, family):
    """UDP sockets may be connected again: to each backend in turn, which the Service may have chosen before."""
    address = scene.publish(name, scene.web)[family == 6]
    sock = scene.pod.open("udp", family)
    for pod in scene.web:
        sock.connect(address, 80)
        assert sock.peer() == (address, 80)
        assert sock.ask()
        direct = pod.addresses[family == 6]
        sock.connect(direct, 8080)
        assert sock.peer() == (direct, 8080)
        assert sock.ask() == pod.name
    sock.close()


@pytest.mark.parametrize("family", [4, 6])
def test_a_socket_connected_to_one_service_after_another(scene, name, family):
    first = scene.publish(name, scene.web[:1])[family == 6]
    second = scene.publish(f"{name}-second", scene.web[:1])[family == 6]
    sock = scene.pod.open("udp", family)

    for address in (first, second, first):
        sock.connect(address, 80)
        assert (address, 80) == sock.peer()
        assert sock.ask() == "web-1"
    sock.close()


@pytest.mark.parametrize("family", [4, 6])
def test_one_socket_asks_many_services(scene, name, family):
    """As a DNS client does: each answer comes from where the question went."""
    addresses = [scene.publish(f"{name}-{number}", [pod])[family == 6] for number, pod in enumerate(scene.web)]
    sock = scene.pod.open("udp", family)

    for _ in range(3):
        for pod, address in zip(scene.web, addresses, strict=True):
            assert (pod.name, (address, 80)) == sock.ask_at(address, 80)
    sock.close()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("place", ["pod", "host"])
def test_one_socket_asks_services_over_one_backend(scene, name, place, family):
    """Each answer comes from where its question went, also of questions that were asked at once."""
    addresses = [scene.publish(f"{name}-{number}", scene.web[:1])[family == 6] for number in range(3)]
    sock = scene.clients[place].open("udp", family)

    for _ in range(2):
        assert {(address, 80) for address in addresses} == sock.ask_at_once([(address, 80) for address in addresses])
    for address in addresses[::-1]:
        assert sock.ask_at(address, 80) == ("web-1", (address, 80))
    sock.close()


@pytest.mark.parametrize("family", [4, 6])
def test_a_datagram_socket_stays_with_its_backend(scene, name, family):
    """As a flow does under connection tracking."""
    address = scene.publish(name, scene.web)[family == 6]
    sock = scene.pod.open("udp", family)

    assert len({sock.ask_at(address, 80) for _ in range(20)}) == 1
    sock.close()


def test_without_the_memory_connections_go_on(make_scene):
    """`rememberPeer: false` gives up getpeername for TCP alone."""
    scene = make_scene(web=1, rememberPeer=False)
    ips = scene.publish("web", scene.web)

    tcp, udp, unconnected = (scene.pod.ask(mode, ips[0], 80) for mode in ("tcp", "udp", "udp-unconnected"))

    assert (scene.web[0].v4, 8080) == tcp.peer
    assert (ips[0], 80) == udp.peer == udp.source == unconnected.source


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("asked", ["connect", "sendto"])
def test_a_socket_that_turns_to_the_backend_itself_knows_its_backend(scene, name, family, asked):
    """The very backend the Service had chosen, and no longer by way of the Service."""
    ip = scene.publish(name, scene.web[:1])[family == 6]
    backend = scene.web[0].endpoint(family).address
    sock = scene.pod.open("udp", family)
    if asked == "connect":
        sock.connect(ip, 80)
        assert sock.peer() == (ip, 80)
    else:
        assert sock.ask_at(ip, 80) == ("web-1", (ip, 80))
        assert sock.ask_at(backend, 8080) == ("web-1", (backend, 8080))
        assert sock.ask_at(ip, 80) == ("web-1", (ip, 80))

    sock.connect(backend, 8080)

    assert sock.peer() == (backend, 8080)
    sock.close()
