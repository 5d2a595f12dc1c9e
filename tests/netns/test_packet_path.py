"""The packet path with real packets: every frontend, from pods, from the node, and from a client outside the cluster.

One node of two has the agent. With ``socketLB: off`` everything is translated packet by packet; with ``all`` only what
the socket hooks do not see.
"""

from __future__ import annotations

import socket
import sys
from functools import partial

import pytest

from tests.lab import netns
from tests.lab.offload import Offload, switch
from tests.lab.polling import until
from tests.lab.processes import end
from tests.lab.scene import SIZES, Scene
from tests.lab.traffic import PACKET_MODES, Answer, churning
from tests.netns.everywhere import (
    KINDS,
    ORIGINS,
    POD_RANGES,
    client_address,
    clients_of,
    is_masqueraded,
    own_addresses,
    publish,
)
from tests.requirements import require_root

FAMILIES = [pytest.param(0, id="IPv4"), pytest.param(1, id="IPv6")]
REFUSED = Answer(error="ECONNREFUSED")


@pytest.fixture(scope="module", params=["off", "all"])
def stage(request):
    """Two nodes, the first with the agent: its scene, and clients at all origins."""
    require_root()
    with Scene(web=2, nodes=2, socketLB=request.param, clusterCIDR=POD_RANGES, mapSizes=SIZES) as scene:
        outsiders = [scene.lab.outsider() for _ in range(2)]
        clients = clients_of(scene, outsiders[0].client())
        yield scene, clients


@pytest.fixture(scope="module")
def spread(stage):
    """A Service over two pods of this node and one of the other."""
    scene, _ = stage
    return publish(scene, "spread", [*scene.web, *scene.far])


@pytest.fixture(scope="module")
def local(stage):
    """The same with the external traffic policy Local."""
    scene, _ = stage
    return publish(scene, "local", [*scene.web, *scene.far], "Local")


def names(scene, *, with_far=True):
    return {pod.name for pod in scene.web} | ({pod.name for pod in scene.far} if with_far else set())


@pytest.fixture
def unaided(stage):
    """The same, on a node whose devices complete no checksums: the kernel does, and who receives checks."""
    scene, _ = stage
    place = scene.node.netns
    with netns.entered(place):
        devices = [name for _, name in socket.if_nameindex() if name.startswith(("eth", "v"))]
    for device in devices:
        switch(place, device, Offload.TX_CHECKSUM, is_on=False)
    yield stage
    for device in devices:
        switch(place, device, Offload.TX_CHECKSUM, is_on=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["tcp", "udp"])
@pytest.mark.parametrize("origin", ORIGINS)
def test_a_checksum_that_is_yet_to_be_completed_stays_right(unaided, spread, origin, mode, family):
    """What starts behind a veth has only the addresses in its checksum: nothing else may be added to that here."""
    _, clients = unaided
    address, port = spread.at("NodePort", family)

    answers = clients[origin].ask_often(mode, address, port, 10)

    assert {answer.error for answer in answers} == {""}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", PACKET_MODES)
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_answers_in_the_name_of_the_service(stage, spread, kind, origin, mode, family):
    scene, clients = stage
    address, port = spread.at(kind, family)

    answers = clients[origin].ask_often(mode, address, port, 30)

    assert {answer.error for answer in answers} == {""}
    assert {answer.name for answer in answers} == names(scene)
    told = {answer.source if "-" in mode or mode == "sctp" else answer.peer for answer in answers}
    assert told == {(address, port)}
    seen = {answer.client for answer in answers}
    masqueraded = is_masqueraded(kind, "Cluster", origin)
    if not (masqueraded and scene.agent.config["socketLB"] == "all" and origin == "pod"):
        assert seen <= (own_addresses(scene) if masqueraded else client_address(scene, origin, family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", PACKET_MODES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_outside_the_local_policy_keeps_to_the_node_and_the_client_s_address(stage, local, kind, mode, family):
    scene, clients = stage
    address, port = local.at(kind, family)

    answers = clients["outside"].ask_often(mode, address, port, 20)

    assert {answer.error for answer in answers} == {""}
    assert {answer.name for answer in answers} == names(scene, with_far=False)
    assert {answer.client for answer in answers} == {scene.lab.outsiders[0].addresses[family]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", PACKET_MODES)
@pytest.mark.parametrize("origin", ["pod", "host"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_inside_the_local_policy_means_the_whole_cluster(stage, local, kind, origin, mode, family):
    scene, clients = stage
    address, port = local.at(kind, family)

    answers = clients[origin].ask_often(mode, address, port, 30)

    assert {answer.name for answer in answers} == names(scene)
    assert {answer.client for answer in answers} <= client_address(scene, origin, family)


@pytest.fixture(scope="module")
def elsewhere(stage):
    """A Service with the external traffic policy Local and no backend here."""
    scene, _ = stage
    return publish(scene, "elsewhere", scene.far, "Local")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", PACKET_MODES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_without_a_local_backend_the_local_policy_is_silent_outside(stage, elsewhere, kind, mode, family):
    _, clients = stage
    address, port = elsewhere.at(kind, family)

    assert clients["outside"].is_unanswered(mode, address, port)
    for origin in ("pod", "host"):
        assert clients[origin].ask(mode, address, port).name == "far-2"


@pytest.fixture(scope="module")
def empty(stage):
    """A Service with nobody behind it."""
    scene, _ = stage
    return publish(scene, "empty", [])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["tcp", "udp", "sctp"])
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_behind_a_service_refuses(stage, empty, kind, origin, mode, family):
    """TCP by a reset, the others by ICMP."""
    _, clients = stage

    assert clients[origin].ask(mode, *empty.at(kind, family)) == REFUSED


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["tcp", "udp", "sctp"])
@pytest.mark.parametrize("origin", ORIGINS)
def test_an_undefined_port_of_a_cluster_ip_refuses(stage, spread, origin, mode, family):
    _, clients = stage
    address, _ = spread.at("ClusterIP", family)

    assert clients[origin].ask(mode, address, 81) == REFUSED


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", PACKET_MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pod_reaches_itself_through_its_service(stage, kind, mode, family):
    scene, _ = stage
    itself = scene.node.pods.get("narcissus") or scene.node.add_pod("narcissus", 8080)
    service = publish(scene, "hairpin", [itself])
    client = itself.client()
    try:
        answer = client.ask(mode, *service.at(kind, family))
    finally:
        client.close()

    assert answer.error == ""
    assert answer.name == "narcissus"


@pytest.mark.parametrize("mode", PACKET_MODES)
def test_a_node_port_on_loopback(stage, spread, mode):
    """Over IPv4; ::1 is never one."""
    scene, clients = stage
    port = spread.frontends["NodePort"][1]

    answers = clients["host"].ask_often(mode, "127.0.0.1", port, 20)

    assert {answer.error for answer in answers} == {""}
    assert {answer.name for answer in answers} == names(scene)
    assert clients["host"].ask("tcp", "::1", port) == REFUSED


_BIND = """
import errno, socket, sys
address, port, kind = sys.argv[1], int(sys.argv[2]), getattr(socket, sys.argv[3])
try:
    socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind).bind((address, port))
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "127.0.0.1", "::1"])
@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
def test_a_node_port_is_not_for_processes_of_the_node(stage, spread, kind, address):
    """They would be hidden by it without a word."""
    scene, _ = stage
    port = spread.frontends["NodePort"][1]
    counted = partial(scene.agent.metric, "ebproxy_dataplane_events_total", event="node_port_taken")
    before = counted()

    def bind(place, number):
        return place.run(sys.executable, "-c", _BIND, address, str(number), kind).stdout.strip()

    assert bind(scene.node.host, port) == "EADDRINUSE"
    assert counted() > before
    assert bind(scene.node.host, port + 2000) == ""
    assert bind(scene.shopper.place, port) == ""


@pytest.fixture(scope="module")
def far_server(stage):
    """A server outside, of no Service: its name and addresses."""
    scene, _ = stage
    outsider = scene.lab.outsiders[1]
    server = outsider.serve(8080)
    yield outsider
    end(server)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["tcp", "udp"])
@pytest.mark.parametrize("began", ["before", "after"])
def test_a_connection_of_the_node_s_own_keeps_its_port(stage, far_server, began, mode, family):
    """It had its port before that became a NodePort: what comes back by it is an answer, and no client's question."""
    scene, clients = stage
    name = f"late-{began}-{mode}-{family}"
    port = 30_000 + int(scene.ips(name)[0].rsplit(".", 1)[1])
    sock = clients["host"].open(mode, (4, 6)[family])
    sock.bind(port)
    if began == "before":
        sock.connect(far_server.addresses[family], 8080)
    service = publish(scene, name, scene.web)
    if began == "after":
        sock.connect(far_server.addresses[family], 8080)

    assert service.at("NodePort", family)[1] == port
    assert [sock.ask() for _ in range(3)] == [far_server.name] * 3
    assert clients["outside"].ask(mode, *service.at("NodePort", family)).name in names(scene, with_far=False)
    sock.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["tcp", "udp"])
def test_a_node_port_follows_the_node_s_addresses(stage, spread, mode, family):
    scene, clients = stage
    port = spread.frontends["NodePort"][1]
    address, bits = (("172.30.0.77", 24), ("fd00:172:30::77", 64))[family]
    netns.configure(scene.node.netns, [f"addr add {address}/{bits} dev eth0 {'nodad' if family else ''}"])
    try:
        took = until(lambda: clients["outside"].ask(mode, address, port, 0.2).name, "the NodePort is there", 1)
        assert took in names(scene)
        assert clients["pod"].ask(mode, address, port).name
    finally:
        netns.configure(scene.node.netns, [f"addr del {address}/{bits} dev eth0"])
    frontend = f"{f'[{address}]' if family else address}:{port}/{mode.upper()}"
    until(lambda: scene.agent.count(frontend) is None, "the NodePort is gone", 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_with_affinity_keeps_its_backend(stage, family):
    scene, clients = stage
    service = publish(scene, "sticky", [*scene.web, *scene.far], sessionAffinity="ClientIP")

    for origin in ORIGINS:
        for mode in ("tcp", "udp"):
            answers = [a for kind in KINDS[1:] for a in clients[origin].ask_often(mode, *service.at(kind, family), 8)]
            assert {answer.error for answer in answers} == {""}
            assert len({answer.name for answer in answers}) == 1, (origin, mode)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["tcp", "udp"])
def test_source_ranges(stage, mode, family):
    """Of the load balancer's addresses alone, and for every client."""
    scene, clients = stage
    ranges = [f"{scene.lab.outsiders[0].addresses[0]}/32", f" {scene.lab.outsiders[0].addresses[1]}/128 "]
    service = publish(scene, "ranged", scene.web, loadBalancerSourceRanges=ranges)
    stranger = scene.lab.outsiders[1].client()
    try:
        balanced, node_port = service.at("LoadBalancer", family), service.at("NodePort", family)
        assert clients["outside"].ask(mode, *balanced).name in names(scene)
        for excluded in (stranger, clients["pod"]):
            assert excluded.is_unanswered(mode, *balanced)
            assert excluded.ask(mode, *node_port).name in names(scene)
    finally:
        stranger.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("kind", KINDS)
def test_large_datagrams(stage, spread, kind, origin, family):
    """2000 bytes there and back: in fragments on every link."""
    scene, clients = stage
    if (scene.agent.config["socketLB"], kind, origin) == ("off", "NodePort", "host"):
        pytest.xfail("what the node sends to itself is as large as lo allows, and no program can cut it")

    answers = [clients[origin].ask("udp", *spread.at(kind, family), size=2000) for _ in range(6)]

    assert {(answer.error, answer.size) for answer in answers} == {("", 2000)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("kind", KINDS)
def test_transfers(stage, spread, kind, origin, family):
    """Three megabytes there and back, as large segments: through offload, and to every backend."""
    scene, clients = stage
    answers = [clients[origin].ask("tcp", *spread.at(kind, family), size=3_000_000) for _ in range(6)]

    assert {answer.error for answer in answers} == {""}
    assert {answer.size for answer in answers} == {3_000_000}
    assert {answer.name for answer in answers} <= names(scene)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mode", "size"), [("tcp", 500_000), ("udp", 1450)])
def test_a_narrow_hop_behind_the_node_is_discovered(stage, mode, size, family):
    """The other node's way to its pod takes less than the uplinks: the client outside hears of it, by a NodePort."""
    scene, clients = stage
    service = publish(scene, "narrow", scene.far)
    address = scene.far[0].addresses[family]
    route = f"route replace {address} dev v10 src {scene.lab.nodes[1].addresses[family]}"
    netns.configure(scene.lab.nodes[1].netns, [f"{route} mtu 1300"])
    try:
        # A datagram that is too large is lost, and says so: the next one is cut by the client.
        ask = partial(clients["outside"].ask, mode, *service.at("NodePort", family), 1, size=size)
        until(lambda: ask().size == size, "the client has learnt the MTU", 5)
    finally:
        netns.configure(scene.lab.nodes[1].netns, [route])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_session_stays_with_its_backend(stage, family):
    """From outside, through a NodePort: datagrams of one socket, whatever happens to the Service's endpoints."""
    scene, clients = stage
    service = publish(scene, "session", scene.web)
    sock = clients["outside"].open("udp", (4, 6)[family])
    sock.connect(*service.at("NodePort", family))
    first = sock.ask()
    port = sock.client_port()

    publish(scene, "session", [*scene.web, *scene.far])

    assert {sock.ask() for _ in range(20)} == {first}
    assert sock.client_port() == port
    sock.close()


def test_the_agent_may_be_restarted_under_load(stage, spread):
    """From outside and from a pod, new connections and held ones: none fails."""
    scene, _ = stage
    outside = [(mode, *spread.at("NodePort", family)) for mode in ("tcp", "udp") for family in (0, 1)]
    inside = [(mode, *spread.at("ClusterIP", family)) for mode in ("tcp", "udp") for family in (0, 1)]
    places = {scene.lab.outsiders[0].place: outside, scene.shopper.place: inside}
    for leave in (scene.agent.stop, scene.agent.kill):
        churns = [churning(place, targets, rate=100) for place, targets in places.items()]
        with churns[0] as first, churns[1] as second:
            leave()
            scene.agent.start().wait()
            first.wait_for(20)
            second.wait_for(20)
            tallies = [first.stop(), second.stop()]
        assert [tally.errors for tally in tallies] == [{}, {}]
        assert all(tally.held > 0 for tally in tallies)
