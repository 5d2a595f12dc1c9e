"""What becomes of flows: datagrams whose backend goes, segments that are late, packets too large, rolling updates.

Source: test/e2e/network/{conntrack,networking,loadbalancer}.go of Kubernetes.
"""

from __future__ import annotations

import select
import socket
import time
from contextlib import ExitStack
from functools import partial

import pytest

from tests.cluster.nodes import COUNT
from tests.cluster.three_nodes import KINDS
from tests.lab import netns, speech
from tests.lab.polling import until
from tests.lab.processes import Place, end
from tests.lab.scene import TARGETS
from tests.lab.traffic import Client, RemoteError, churning, family_of

pytestmark = pytest.mark.timeout(300)
FAMILIES = [pytest.param(0, id="IPv4"), pytest.param(1, id="IPv6")]
ALL_WEB = {"web-1", "web-2", "web-3"}
MEGABYTES = 3_000_000
REMOTE = ("172.31.0.2", "fd00:172:31::2")
NARROW_MTU = 1300
IP_MTU_DISCOVER, IP_PMTUDISC_DONT = 10, 0
TOLD = ("ECONNABORTED", "EDESTADDRREQ", "ENOTCONN")


class Session:
    """One socket of a client that asks again and again, as who repeats what was lost.

    A connected one that is told that its backend is gone connects again, to the same address.
    """

    def __init__(self, client: Client, protocol: str, target: tuple[str, int], *, connected: bool = True) -> None:
        self._client = client
        self._target = list(target)
        self._connected = connected
        self._number = client.open(protocol, family_of(target[0]))._number
        self._call("settimeout", 0.2)
        if connected:
            self._call("connect", self._target)

    def ask(self) -> str:
        """Ask once: name and port of who answered, or the error."""
        try:
            if self._connected:
                self._call("sendall", "?\n")
                return _who(self._call("recv", 4096))
            self._call("sendto", "?\n", self._target)
            return _who(self._call("recvfrom", 4096)[0])
        except RemoteError as error:
            if str(error) in TOLD:
                self._connect_again()
            return str(error)

    def seen(self) -> tuple[str, int]:
        """What the server sees of the client."""
        self._call("sendall", "?\n")
        words = self._call("recv", 4096).split()
        return words[2], int(words[3])

    def close(self) -> None:
        """Close the socket."""
        self._call("close")

    def _connect_again(self) -> None:
        try:
            self._call("connect", self._target)
        except RemoteError as error:
            if str(error) != "ECONNREFUSED":  # nobody there for now: the next question is sent to nobody, and so on
                raise

    def _call(self, method: str, *arguments: object):
        return self._client.call(self._number, method, *arguments)


def _who(said: str) -> str:
    return ":".join(said.split()[:2])


def origins(cluster) -> dict[str, Client]:
    """A client of each sort, the first node's."""
    return {"pod": cluster.pods[0], "host": cluster.hosts[0], "outside": cluster.outside}


@pytest.fixture
def sessions(cluster):
    """Open sessions in both families from some clients; they are closed at the end."""
    opened: list[Session] = []

    def open_all(service, kind, protocol="udp", *, connected=True, places=("pod", "host", "outside")):
        made = {
            (place, family): Session(origins(cluster)[place], protocol, service.at(kind, family), connected=connected)
            for place in places
            for family in (0, 1)
        }
        opened.extend(made.values())
        return made

    yield open_all
    for session in opened:
        session.close()


def all_say(sessions, wanted: str) -> None:
    """Wait until every session is told this."""
    until(lambda: {s.ask() for s in sessions.values()} == {wanted}, f"{wanted} answers all sessions")


@pytest.fixture(scope="module")
def spare(cluster):
    """Another pod on the first node."""
    pod = cluster.nodes[0].add_pod("spare", *TARGETS)
    yield pod
    end(pod.server)


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "unconnected"])
@pytest.mark.parametrize("kind", KINDS)
def test_datagrams_go_on_while_backends_cycle(cluster, service, sessions, kind, connected):
    """One socket from the first backend to the last; the old ones still answer, and are asked no more."""
    service.publish(cluster.web[:1])
    opened = sessions(service, kind, connected=connected)
    all_say(opened, "web-1:8080")

    for pods in (cluster.web[1:2], cluster.web[2:], cluster.web[:1]):
        service.set_backends(pods)
        all_say(opened, f"{pods[0].name}:8080")


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "unconnected"])
@pytest.mark.parametrize("kind", KINDS)
def test_datagrams_go_on_after_there_was_nobody(cluster, service, sessions, kind, connected):
    service.publish(cluster.web[:1])
    opened = sessions(service, kind, connected=connected)
    all_say(opened, "web-1:8080")

    service.set_backends([])
    until(lambda: not any("web" in session.ask() for session in opened.values()), "nobody answers")
    service.set_backends(cluster.web[2:])

    all_say(opened, "web-3:8080")


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "unconnected"])
def test_datagrams_go_on_with_the_internal_policy_local(cluster, service, sessions, spare, connected):
    service.publish(cluster.web[:1], internalTrafficPolicy="Local")
    opened = sessions(service, "ClusterIP", connected=connected, places=("pod", "host"))
    all_say(opened, "web-1:8080")

    service.set_backends([spare, cluster.web[1]])

    all_say(opened, "spare:8080")


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_datagrams_follow_another_target_port(cluster, service, sessions, kind):
    service.publish(cluster.web[:1])
    opened = sessions(service, kind)
    all_say(opened, "web-1:8080")

    service.ports = tuple(port._replace(target=8081) for port in service.ports)
    service.set_backends(cluster.web[:1])

    all_say(opened, "web-1:8081")


def test_datagrams_stay_with_an_endpoint_that_terminates_and_serves(cluster, service, sessions):
    service.publish(cluster.web[:1])
    opened = {**sessions(service, "ClusterIP"), "NodePort": sessions(service, "NodePort")["outside", 0]}
    all_say(opened, "web-1:8080")

    leaving = [cluster.web[0].endpoint(family, ready=False, terminating=True) for family in (4, 6)]
    service.set_backends([*leaving, cluster.web[1]])

    assert {session.ask() for session in opened.values()} == {"web-1:8080"}
    service.set_backends(cluster.web[1:2])
    all_say(opened, "web-2:8080")


@pytest.mark.parametrize("kind", KINDS)
def test_connections_stay_with_their_backend(cluster, service, sessions, kind):
    """TCP is never moved: whoever is connected decides when to end it."""
    service.publish(cluster.web[1:2])
    opened = sessions(service, kind, "tcp")
    assert {session.ask() for session in opened.values()} == {"web-2:8080"}

    service.set_backends(cluster.web[2:])
    service.set_backends([])

    assert {session.ask() for session in opened.values()} == {"web-2:8080"}


def inject(pod, port: int, client: tuple[str, int], payload: bytes) -> None:
    """Send a segment from a server's address that is far outside the connection's window."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6

    family = socket.AF_INET6 if ":" in client[0] else socket.AF_INET
    layer = IPv6 if ":" in client[0] else IP
    source = pod.addresses[family == socket.AF_INET6]
    segment = TCP(sport=port, dport=client[1], flags="A", seq=4_000_000_000, ack=1, window=1000) / payload
    packet = layer(bytes(layer(src=source, dst=client[0]) / segment))
    with netns.entered(pod.netns):
        raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP)
    with raw:
        raw.sendto(bytes(packet[TCP]), (client[0], 0))


def tap(place: Place) -> socket.socket:
    """Hear what arrives at a namespace's eth0."""
    with netns.entered(place.netns):
        heard = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        heard.bind(("eth0", 0))
    return heard


def is_heard(heard: socket.socket, payload: bytes, limit_s: float = 5) -> bool:
    """Whether a packet with this payload arrives."""
    deadline = time.monotonic() + limit_s
    while (rest := deadline - time.monotonic()) > 0 and select.select([heard], [], [], rest)[0]:
        if payload in heard.recv(1 << 16):
            return True
    return False


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
@pytest.mark.parametrize("origin", ["pod", "outside"])
def test_a_segment_out_of_the_window_does_not_reset_the_connection(cluster, service, sessions, origin, kind, family):
    """It reaches the client in the Service's name, or the client would answer with a reset (k#74839)."""
    service.publish(cluster.web[1:2])
    place = cluster.shoppers[0].place if origin == "pod" else cluster.outsider.place
    session = sessions(service, kind, "tcp", places=(origin,))[origin, family]
    seen = session.seen()

    with tap(place) as heard:
        inject(cluster.web[1], TARGETS[0], seen, b"out of the window")
        assert is_heard(heard, b"out of the window")

    for _ in range(3):
        assert session.ask() == "web-2:8080"


@pytest.fixture(scope="module")
def everywhere(cluster):
    """A Service over a pod on each node."""
    service = cluster.service()
    yield service.publish(cluster.web)
    service.delete()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["udp", "udp-unconnected"])
@pytest.mark.parametrize("kind", KINDS)
def test_datagrams_in_fragments(cluster, everywhere, kind, mode, family):
    """2000 bytes, there and back."""
    for place, client in cluster.clients.items():
        for _ in range(4):
            answer = client.ask(mode, *everywhere.at(kind, family), size=2000)
            assert (answer.error, answer.size) == ("", 2000), place


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_large_transfers(cluster, everywhere, kind, family):
    """Some megabytes, there and back."""
    for place, client in origins(cluster).items():
        answer = client.ask("tcp", *everywhere.at(kind, family), size=MEGABYTES)
        assert (answer.error, answer.size) == ("", MEGABYTES), place


@pytest.fixture(scope="module")
def remote(cluster):
    """A client behind the fabric, with a hop on the way that takes no more than NARROW_MTU bytes."""
    lab = cluster.lab
    name, cgroup = f"{lab.word}-remote", lab.cgroup / "remote"
    netns.add(name)
    cgroup.mkdir()
    lines = [f"link add remote type veth peer name eth0 netns {name}", "link set remote up"]
    lines += ["addr add 172.31.0.1/24 dev remote", "addr add fd00:172:31::1/64 dev remote nodad"]
    netns.configure(lab.fabric.netns, [*lines, *(f"route add {a} dev remote mtu lock {NARROW_MTU}" for a in REMOTE)])
    lines = ["link set eth0 up", f"addr add {REMOTE[0]}/24 dev eth0", f"addr add {REMOTE[1]}/64 dev eth0 nodad"]
    lines += ["route add default via 172.31.0.1", "route add default via fd00:172:31::1"]
    netns.configure(name, lines)
    client = Client(Place(name, cgroup))
    yield client
    client.close()
    netns.remove(name)
    cgroup.rmdir()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["Cluster", "Local"])
@pytest.mark.parametrize("number", [0, 1], ids=["bridged", "routed"])
def test_paths_with_a_narrow_hop_behind_the_node(cluster, service, remote, number, policy, family):
    """The error about a reply that is too large finds the backend, which sends smaller ones."""
    spec = {"healthCheckNodePort": service.health_port} if policy == "Local" else {}
    service.publish([cluster.web[number]], externalTrafficPolicy=policy, **spec)
    nodes = [number] if policy == "Local" else range(COUNT)
    for node in nodes:
        answer = remote.ask("tcp", *service.at("NodePort", family, node), size=300_000)
        assert (answer.error, answer.size) == ("", 300_000), node
    for option in ("-4", "-6"):
        netns.ip("-n", cluster.web[number].netns, option, "route", "flush", "cache")


@pytest.fixture(scope="module")
def narrow(cluster):
    """A pod that its node reaches by a route of NARROW_MTU."""
    pod = cluster.nodes[1].add_pod("narrow", *TARGETS)
    for address, source in zip(pod.addresses, pod.node.addresses, strict=True):
        route = f"route replace {address} dev v{pod.number} src {source} mtu lock {NARROW_MTU}"
        netns.configure(pod.node.netns, [route])
    yield pod
    end(pod.server)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_paths_with_a_narrow_hop_before_the_backend(cluster, service, narrow, kind, family):
    """The error about a request that is too large finds the client."""
    service.publish([narrow])
    for place, client in cluster.clients.items():
        for node in range(COUNT) if kind == "NodePort" else [0]:
            # Linux tells of a smaller MTU on a route to the node itself only to IPv4 connections that begin later.
            is_own = kind == "NodePort" and place == f"host-{node + 1}"
            if is_own:
                client.ask("tcp", *service.at(kind, family, node), 0.5, size=300_000)
            answer = client.ask("tcp", *service.at(kind, family, node), size=300_000)
            assert (answer.error, answer.size) == ("", 300_000), (place, node)


def test_datagrams_that_may_be_cut_are_cut_where_the_way_is_narrow(cluster, service, narrow):
    """Whoever sends IPv4 without Don't Fragment does not listen to complaints about it."""
    service.publish([narrow])
    asked = speech.question(10, NARROW_MTU).decode()
    device = f"v{narrow.number}"
    netns.configure(narrow.node.netns, [f"link set {device} mtu {NARROW_MTU}"])
    sock = cluster.outside.open("udp", 4)
    try:
        call = partial(cluster.outside.call, sock._number)
        call("setsockopt", socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        for node in range(COUNT):
            call("connect", list(service.at("NodePort", 0, node)))
            call("sendall", asked)
            assert speech.read_reply(asked.encode(), call("recv", 4096).encode()).name == "narrow", node
    finally:
        sock.close()
        netns.configure(narrow.node.netns, [f"link set {device} mtu 1500"])


def test_a_rolling_update_loses_no_request(cluster, service):
    """Every pod is replaced: the new one ready before the old one ends, which ends when nobody is sent to it."""
    old = [node.add_pod(f"old-{node.number}", *TARGETS) for node in cluster.nodes]
    service.publish(old)
    cluster_ips = [("tcp-once", *service.at("ClusterIP", family)) for family in (0, 1)]
    node_ports = [("tcp-once", *service.at("NodePort", family, n)) for family in (0, 1) for n in range(COUNT)]
    balanced = [("tcp-once", *service.at("LoadBalancer", family)) for family in (0, 1)]
    everything = [*cluster_ips, *node_ports, *balanced]
    places = [*(pod.place for pod in cluster.shoppers[:2]), cluster.nodes[2].host, cluster.outsider.place]
    with ExitStack() as stack:
        churns = [stack.enter_context(churning(place, everything, rate=60)) for place in places]
        new = []
        for number, node in enumerate(cluster.nodes):
            new.append(node.add_pod(f"new-{node.number}", *TARGETS))
            leaving = [old[number].endpoint(family, ready=False, terminating=True) for family in (4, 6)]
            service.set_backends([*new, *old[number:]])
            service.set_backends([*new, *leaving, *old[number + 1 :]])
            service.set_backends([*new, *old[number + 1 :]])
            for churn in churns:
                churn.wait_for(len(everything))  # what was under way is over
            end(old[number].server)
        tallies = [churn.stop() for churn in churns]

    assert [tally.errors for tally in tallies] == [{}] * len(places)
    assert all(tally.made > COUNT * len(everything) for tally in tallies)
    for client in cluster.clients.values():
        assert set(client.spread("tcp", *service.at("ClusterIP", 0), 40)) == {pod.name for pod in new}
    for pod in new:
        end(pod.server)
