"""UDP that never sticks: when a backend goes, whoever is connected to it is told, and flows to it move."""

from __future__ import annotations

import pytest

from tests.lab.manifests import WEB, Port
from tests.lab.polling import until
from tests.lab.scene import SIZES
from tests.lab.traffic import RemoteError

GONE = {"ready": False, "serving": False, "terminating": True}
DRAINING = {"ready": False, "serving": True, "terminating": True}
OTHER_TARGET = tuple(port._replace(target=8081) for port in WEB)
OTHER_PORT = tuple(port._replace(number=81) for port in WEB)
TCP_ONLY = (Port("http", 80, 8080),)


def with_conditions(pod, **conditions):
    """An endpoint of each family: a slice takes those of its own."""
    return [pod.endpoint(family, **conditions) for family in (4, 6)]


def connected(client, address, port=80):
    """A connected socket that has been answered."""
    sock = client.open("udp", 6 if ":" in address else 4)
    sock.connect(address, port)
    assert sock.ask()
    return sock


def is_told(sock):
    """Whether a socket was disconnected."""
    try:
        sock.peer()
    except RemoteError as error:
        return str(error) == "ENOTCONN"
    return False


def ask_again(sock):
    """Ask as who repeats what was lost does: an answer under way may be, while its flow moves."""
    sock._client.call(sock._number, "settimeout", 0.2)
    try:
        return sock.ask()
    except RemoteError as error:
        return str(error)


def refused(sock, method, *arguments):
    with pytest.raises(RemoteError) as caught:
        sock._client.call(sock._number, method, *arguments)
    return str(caught.value)


@pytest.fixture
def canary(scene, name):
    """Tells when the agent has looked: what it does to other sockets, it did by then."""
    ips = scene.publish(f"{name}-canary", scene.web[:1])
    sock = connected(scene.pod, ips[0])

    def sing():
        scene.write(f"{name}-canary", scene.web[1:2])
        until(lambda: is_told(sock), "the agent looks for stale sockets")

    return sing


CHANGES = {
    "replaced": lambda s, n: s.write(n, s.web[1:2]),
    "scaled-to-zero": lambda s, n: s.write(n, []),
    "deleted": lambda s, n: s.manifests.remove(n),
    "not-serving": lambda s, n: s.write(n, [*with_conditions(s.web[0], **GONE), s.web[1]]),
    "target-port-changed": lambda s, n: s.write(n, s.web[:1], OTHER_TARGET),
    "port-changed": lambda s, n: s.write(n, s.web[:1], OTHER_PORT),
    "port-deleted": lambda s, n: s.write(n, s.web[:1], TCP_ONLY),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("who", ["pod", "host"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_connected_socket_is_told_when_its_backend_goes(scene, name, family, who, change):
    address = scene.publish(name, scene.web[:1])[family == 6]
    sock = connected(scene.clients[who], address)

    change(scene, name)

    until(lambda: is_told(sock), "the socket is disconnected")
    assert refused(sock, "recv", 10) == "ECONNABORTED"
    assert refused(sock, "sendall", "?\n") == "EDESTADDRREQ"


@pytest.mark.parametrize("family", [4, 6])
def test_the_same_socket_recovers_by_connecting_again(scene, name, family):
    address = scene.publish(name, scene.web[:1])[family == 6]
    sock = connected(scene.pod, address)
    scene.write(name, scene.web[1:2])
    until(lambda: is_told(sock), "the socket is disconnected")

    assert refused(sock, "recv", 10) == "ECONNABORTED"
    sock.connect(address, 80)

    assert sock.ask() == "web-2"
    assert sock.peer() == (address, 80)


def test_a_mapped_address_is_one_of_ipv4(scene, name):
    address = f"::ffff:{scene.publish(name, scene.web[:1])[0]}"
    sock = connected(scene.pod, address)

    scene.write(name, scene.web[1:2])

    until(lambda: is_told(sock), "the socket is disconnected")


def test_nobody_else_is_touched(scene, name, canary):
    """Unconnected sockets, TCP, sockets of other backends and services, and those that connected by themselves."""
    ips = scene.publish(name, scene.web[:1])
    backend = scene.web[0].v4
    other = scene.publish(f"{name}-other", scene.web[:1])
    unconnected = scene.pod.open("udp", 4)
    assert unconnected.ask_at(ips[0], 80)[0] == "web-1"
    direct, elsewhere = connected(scene.pod, backend, 8080), connected(scene.pod, other[0])
    turned = connected(scene.pod, ips[0])
    turned.connect(backend, 8080)
    tcp = scene.pod.open("tcp", 4)
    tcp.connect(ips[0], 80)
    stuck = connected(scene.pod, ips[0])

    scene.write(name, scene.web[1:2])
    until(lambda: is_told(stuck), "the socket that is meant is disconnected")
    canary()

    assert [sock.ask() for sock in (direct, elsewhere, turned, tcp)] == ["web-1"] * 4
    assert tcp.peer() == (ips[0], 80)
    assert unconnected.ask_at(ips[0], 80)[0] == "web-2"


@pytest.mark.parametrize("family", [4, 6])
def test_a_backend_that_terminates_and_serves_keeps_its_sockets(scene, name, canary, family):
    address = scene.publish(name, scene.web[:1])[family == 6]
    sock = connected(scene.pod, address)

    scene.write(name, [*with_conditions(scene.web[0], **DRAINING), scene.web[1]])
    until(lambda: scene.pod.ask("udp", address, 80).name == "web-2", "new ones go to the other")
    canary()

    assert sock.ask() == "web-1"
    assert sock.peer() == (address, 80)

    scene.write(name, [*with_conditions(scene.web[0], **GONE), scene.web[1]])
    until(lambda: is_told(sock), "it no longer serves")


@pytest.mark.parametrize("change", [CHANGES["replaced"], CHANGES["scaled-to-zero"], CHANGES["deleted"]])
def test_what_went_while_no_agent_ran(make_scene, change):
    scene = make_scene(web=2)
    ips = [scene.publish(name, scene.web[:1]) for name in ("web", "stays")]
    stuck, stays = connected(scene.pod, ips[0][0]), connected(scene.pod, ips[1][1])
    scene.agent.kill()
    change(scene, "web")
    assert stuck.ask() == "web-1"

    scene.agent.start().wait()

    until(lambda: is_told(stuck), "the socket is disconnected")
    assert stays.ask() == "web-1"
    assert scene.agent.metric("ebproxy_stale_sockets_total", outcome="destroyed") == 1


def test_sockets_that_found_their_slot_taken(make_scene):
    scene = make_scene(web=2, mapSizes=SIZES | {"socketOrigins": 2})
    ips = scene.publish("web", scene.web[:1])
    socks = [connected(scene.pod, ips[number % 2]) for number in range(8)]

    scene.write("web", scene.web[1:2])

    until(lambda: all(is_told(sock) for sock in socks), "every socket is disconnected")


def test_without_the_capability_only_the_nodes_own_sockets(make_scene):
    """Said once, counted, and no reason to fail."""
    scene = make_scene(web=2)
    scene.agent.stop()
    scene.agent.wrapper = ("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", "--")
    scene.agent.start().wait()
    ips = scene.publish("web", scene.web[:1])
    for target in (scene.web[1:2], scene.web[:1]):
        own, pods = connected(scene.host, ips[0]), connected(scene.pod, ips[0])
        scene.write("web", target)
        until(lambda sock=own: is_told(sock), "the node's own socket is disconnected")
        assert pods.peer() == (ips[0], 80)

    assert scene.agent.metric("ebproxy_stale_sockets_total", outcome="unreached") > 0
    assert scene.agent.log.read_text(encoding="utf-8").count("other network namespaces cannot be looked after") == 1


@pytest.mark.parametrize("family", [4, 6])
def test_a_flow_of_the_packet_path_moves(make_scene, family):
    """Without socket hooks nobody has to be told: the next datagram goes to another backend."""
    scene = make_scene(web=2, socketLB="off")
    address = scene.publish("web", scene.web[:1])[family == 6]
    sock = connected(scene.pod, address)
    assert sock.ask() == "web-1"

    scene.write("web", scene.web[1:2])

    until(lambda: ask_again(sock) == "web-2", "the flow moves")
    assert sock.peer() == (address, 80)
    until(lambda: scene.agent.metric("ebproxy_flow_entries_deleted_total", reason="stale") >= 2, "it is counted")
