"""A packet's life: from a client through a frontend to a backend, and the answer's way back, hop by hop.

Every kind of frontend, from every origin, under both traffic policies, to backends everywhere, in both families and all
protocols. What is expected follows from the table of origins and frontends in ``masquerades``, written down a second
time, and from where the backend is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import pytest
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from agent.core.abi import (
    DEVICE_PODS,
    DEVICE_PORT,
    POD_RANGE_PODS,
    Counter,
    FlowFlag,
    FrontendFlag,
    FrontendKind,
)
from tests.bpf import packet_path as at
from tests.bpf.harness import TC_ACT_REDIRECT, TC_ACT_UNSPEC, Ran
from tests.bpf.packet_path import PacketPath, to
from tests.bpf.packets import PROTOCOLS, End, difference, moved, packet, reply_to

CLIENT_PORT, TARGET = 4000, 8080
FRONTENDS = {
    FrontendKind.CLUSTER_IP: (("10.96.0.10", "fd00:10:96::10"), 80),
    FrontendKind.NODE_PORT: (at.NODE, 30080),
    FrontendKind.EXTERNAL_IP: (("198.51.100.10", "2001:db8:51::10"), 80),
    FrontendKind.LOAD_BALANCER: (("203.0.113.10", "2001:db8:113::10"), 80),
}
CLIENTS = {"pod": at.POD_ONE, "host": at.NODE, "outside": at.OUTSIDE}
BACKENDS = {"remote": at.REMOTE_POD, "local": at.POD_TWO, "own": at.NODE, "itself": at.POD_ONE}
FAMILIES = {"IPv4": 0, "IPv6": 1}
OF_THE_NODE = bytes(12)  # lo's own MAC addresses, twice


class Life(NamedTuple):
    """Who asks whom for what."""

    kind: FrontendKind
    policy: str
    origin: str
    backend_at: str
    family: str
    protocol: str

    def __str__(self) -> str:
        return "-".join((self.kind.name.lower(), *self[1:]))

    @property
    def client(self) -> End:
        return End(CLIENTS[self.origin][FAMILIES[self.family]], CLIENT_PORT)

    @property
    def frontend(self) -> End:
        addresses, port = FRONTENDS[self.kind]
        return End(addresses[FAMILIES[self.family]], port)

    @property
    def backend(self) -> End:
        return End(BACKENDS[self.backend_at][FAMILIES[self.family]], TARGET)

    @property
    def is_host(self) -> bool:
        return self.origin == "host"

    @property
    def is_masqueraded(self) -> bool:
        return self.backend_at != "own" and (self.backend_at == "itself" or masquerades(self))

    @property
    def is_to_itself(self) -> bool:
        """Whether the node asks one of its own addresses."""
        return self.is_host and self.kind is FrontendKind.NODE_PORT


def masquerades(life: Life) -> bool:
    """Whether the backend sees the node (reference: kube-proxy's table of origins and frontends)."""
    if life.is_host:
        return False  # the node's own address it sees anyway
    if life.kind is FrontendKind.CLUSTER_IP:
        return life.origin == "outside"
    return life.policy == "cluster"


def lives() -> Iterator[Life]:
    for kind, policy, origin, backend, family, protocol in product(
        FRONTENDS, ("cluster", "local"), CLIENTS, BACKENDS, FAMILIES, PROTOCOLS
    ):
        life = Life(kind, policy, origin, backend, family, protocol)
        if kind is FrontendKind.CLUSTER_IP and policy == "local":
            continue  # internalTrafficPolicy is the choice of the segment alone
        if origin == "outside" and policy == "local" and backend == "remote":
            continue  # the local policy has no such backend for it
        if (backend == "itself") != (origin == "pod") and backend == "itself":
            continue  # only a pod may be its own backend
        yield life


class Hops:
    """Takes packets along their way and compares each with what it should be there."""

    def __init__(self, path: PacketPath, life: Life) -> None:
        self.path = path
        self.life = life
        self.source = life.client
        local = FrontendFlag.EXTERNAL_LOCAL if life.policy == "local" else 0
        path.serve(life.protocol, life.frontend, inside=to(life.backend), kind=life.kind, flags=local)

    def there(self, sent: Packet) -> Packet:
        """A packet of the client's; returns it as the backend receives it."""
        life = self.life
        ran = self._leave(sent)
        if life.is_masqueraded and self.source == life.client:
            self.source = self._chosen_source(ran)
        is_routed = life.is_masqueraded and not life.is_host
        wanted = moved(sent, source=self.source, destination=life.backend, ttl=63 if is_routed else None)
        if life.is_host:
            self._check_sent_by_node(ran, wanted)
        else:
            check(ran, TC_ACT_REDIRECT if is_routed else TC_ACT_UNSPEC, wanted)
        if not is_routed and life.backend_at in ("remote", "local"):
            self._pass(self.path.egress(self._backend_device(), wanted), wanted)
        return wanted

    def _leave(self, sent: Packet) -> Ran:
        if self.life.is_to_itself:
            return self.path.loopback(sent)
        if self.life.is_host:
            return self.path.egress("eth0", sent)
        return self.path.ingress("one" if self.life.origin == "pod" else "eth0", sent)

    def _chosen_source(self, ran: Ran) -> End:
        chosen = Ether(ran.packet)[2].sport
        assert chosen in at.SOURCE_PORTS
        return End(at.NODE[FAMILIES[self.life.family]], chosen)

    def _check_sent_by_node(self, ran: Ran, wanted: Packet) -> None:
        if self.life.backend_at != "own":
            check(ran, TC_ACT_REDIRECT, wanted)
        elif self.life.is_to_itself:
            check(ran, TC_ACT_UNSPEC, wanted)
        else:
            check(ran, TC_ACT_REDIRECT, delivered(wanted))

    def _backend_device(self) -> str:
        return {"remote": "eth0", "local": "two", "itself": "one"}[self.life.backend_at]

    def _client_device(self) -> str:
        return "one" if self.life.origin == "pod" else "eth0"

    def back(self, answer: Packet) -> None:
        """The backend's answer."""
        life = self.life
        wanted = moved(answer, source=life.frontend, destination=life.client)
        if life.backend_at == "own":
            ran = self.path.loopback(answer) if life.is_host else self.path.egress(self._client_device(), answer)
            check(ran, TC_ACT_UNSPEC, wanted)
            return
        ran = self.path.ingress(self._backend_device(), answer)
        if life.is_to_itself:
            check(ran, TC_ACT_REDIRECT, delivered(wanted))
        elif life.is_host:
            check(ran, TC_ACT_UNSPEC, wanted)
        elif life.is_masqueraded:
            check(ran, TC_ACT_REDIRECT, moved(wanted, ttl=63))
        else:
            self._pass(ran, answer)
            check(self.path.egress(self._client_device(), answer), TC_ACT_UNSPEC, wanted)

    def _pass(self, ran: Ran, same: Packet) -> None:
        check(ran, TC_ACT_UNSPEC, same)


def delivered(wanted: Packet) -> Packet:
    """A packet as it comes out of lo."""
    return Ether(OF_THE_NODE + bytes(wanted)[12:])


def check(ran: Ran, verdict: int, wanted: Packet) -> None:
    assert difference(ran.packet, wanted) == ""
    assert ran.verdict == verdict


@pytest.mark.parametrize("life", list(lives()), ids=str)
def test_there_and_back(path, life):
    hops = Hops(path, life)

    first = hops.there(packet(life.protocol, life.client, life.frontend))
    hops.back(reply_to(first))
    second = hops.there(packet(life.protocol, life.client, life.frontend, flags="A", payload=b"more"))
    hops.back(reply_to(second, flags="A"))
    hops.back(reply_to(second, flags="FA", payload=b""))
    hops.there(packet(life.protocol, life.client, life.frontend, flags="FA", payload=b""))

    assert path.counted() == {Counter.FLOWS: 1}
    assert len(path.flows()) == 2


@pytest.mark.parametrize("family", ["IPv4"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("policy", ["cluster", "local"])
@pytest.mark.parametrize("backend_at", ["remote", "local", "own"])
def test_a_node_port_on_loopback(path, backend_at, policy, protocol, family):
    """127.0.0.1 means nothing to a pod: the node asks in its own name, whatever the policy."""
    client, frontend = End("127.0.0.1", CLIENT_PORT), End("127.0.0.1", 30080)
    backend = End(BACKENDS[backend_at][0], TARGET)
    local = FrontendFlag.EXTERNAL_LOCAL if policy == "local" else 0
    path.serve(protocol, frontend, inside=to(backend), kind=FrontendKind.NODE_PORT, flags=local)
    sent = packet(protocol, client, frontend)

    ran = path.loopback(sent)

    if backend_at == "own":
        forward = moved(sent, destination=backend)
        check(ran, TC_ACT_UNSPEC, forward)
        answer = reply_to(forward)
        check(path.loopback(answer), TC_ACT_UNSPEC, moved(answer, source=frontend, destination=client))
        return
    source = End(at.NODE[0], Ether(ran.packet)[2].sport)
    assert source.port in at.SOURCE_PORTS
    forward = moved(sent, source=source, destination=backend)
    check(ran, TC_ACT_REDIRECT, forward)
    answer = reply_to(forward)
    wanted = delivered(moved(answer, source=frontend, destination=client))
    check(path.ingress("eth0" if backend_at == "remote" else "two", answer), TC_ACT_REDIRECT, wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_masqueraded_with_the_address_of_the_device_it_leaves_by(path, protocol, family):
    number = FAMILIES[family]
    client, frontend = End(at.OUTSIDE[number], CLIENT_PORT), End(at.NODE[number], 30080)
    backend = End(at.SECOND_REMOTE_POD[number], TARGET)
    path.serve(protocol, frontend, inside=to(backend), kind=FrontendKind.NODE_PORT)
    sent = packet(protocol, client, frontend)

    ran = path.ingress("eth0", sent)

    source = End(at.NODE_SECOND[number], Ether(ran.packet)[2].sport)
    check(ran, TC_ACT_REDIRECT, moved(sent, source=source, destination=backend, ttl=63))
    answer = reply_to(Ether(ran.packet))
    wanted = moved(answer, source=frontend, destination=client, ttl=63)
    check(path.ingress("eth1", answer), TC_ACT_REDIRECT, wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("origin", ["pod", "host", "outside"])
def test_a_cluster_ip_that_hides_every_client(path, origin, family):
    """masqueradeAll: pods are seen as the node; what the node itself sends has its address anyway."""
    life = Life(FrontendKind.CLUSTER_IP, "cluster", origin, "remote", family, "tcp")
    path.serve("tcp", life.frontend, inside=to(life.backend), flags=FrontendFlag.MASQUERADE)
    sent = packet("tcp", life.client, life.frontend)

    ran = path.egress("eth0", sent) if life.is_host else path.ingress("one" if origin == "pod" else "eth0", sent)

    source = End(at.NODE[FAMILIES[family]], CLIENT_PORT if life.is_host else Ether(ran.packet)[2].sport)
    wanted = moved(sent, source=source, destination=life.backend, ttl=None if life.is_host else 63)
    check(ran, TC_ACT_REDIRECT, wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("origin", "answer"), [("pod", "inside"), ("host", "inside"), ("outside", "outside")], ids=str)
@pytest.mark.parametrize("kind", FRONTENDS, ids=lambda kind: kind.name.lower())
def test_inside_and_outside_have_backends_of_their_own(path, kind, origin, answer, family):
    number = FAMILIES[family]
    ends = {"inside": End(at.REMOTE_POD[number], TARGET), "outside": End(at.POD_TWO[number], TARGET)}
    life = Life(kind, "local", origin, "remote", family, "tcp")
    flags = 0 if kind is FrontendKind.CLUSTER_IP else FrontendFlag.EXTERNAL_LOCAL
    path.serve("tcp", life.frontend, inside=to(ends["inside"]), outside=to(ends["outside"]), kind=kind, flags=flags)
    sent = packet("tcp", life.client, life.frontend)

    if life.is_to_itself:
        ran = path.loopback(sent)
    else:
        ran = path.egress("eth0", sent) if life.is_host else path.ingress("one" if origin == "pod" else "eth0", sent)

    assert Ether(ran.packet)[1].dst == ends[answer].address


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("knows", [0, POD_RANGE_PODS], ids=["not a pod's", "other ranges are pods'"])
def test_who_is_no_pod_is_a_stranger(path, knows, family):
    """Somebody says where pods are, and it is not here: a ClusterIP is masqueraded."""
    path.no_pods()
    path.pods_in(*(("0.0.0.0/0", "::/0") if not knows else ("10.9.0.0/16", "fd09::/16")), flags=knows)
    life = Life(FrontendKind.CLUSTER_IP, "cluster", "pod", "remote", family, "tcp")
    path.serve("tcp", life.frontend, inside=to(life.backend))

    ran = path.ingress("one", packet("tcp", life.client, life.frontend))

    assert ran.verdict == TC_ACT_REDIRECT
    assert Ether(ran.packet)[1].src == at.NODE[FAMILIES[family]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("kind", "flags", "backend_at", "is_masqueraded"),
    [
        pytest.param(FrontendKind.CLUSTER_IP, 0, "remote", False, id="a ClusterIP"),
        pytest.param(FrontendKind.CLUSTER_IP, FrontendFlag.MASQUERADE, "remote", True, id="masqueradeAll"),
        pytest.param(FrontendKind.CLUSTER_IP, 0, "itself", True, id="its own ClusterIP"),
        pytest.param(FrontendKind.NODE_PORT, 0, "remote", True, id="a NodePort"),
        pytest.param(FrontendKind.EXTERNAL_IP, 0, "remote", True, id="an externalIP"),
        pytest.param(FrontendKind.LOAD_BALANCER, FrontendFlag.EXTERNAL_LOCAL, "local", False, id="the policy Local"),
    ],
)
def test_who_may_be_a_pod_is_served_as_outside_and_a_cluster_ip_keeps_its_address(
    path, kind, flags, backend_at, is_masqueraded, protocol, family
):
    """Nobody says where pods are: as under kube-proxy, a ClusterIP is not masqueraded then, for anybody."""
    path.unknown_pods()
    life = Life(kind, "cluster", "pod", backend_at, family, protocol)
    elsewhere = End(at.SECOND_REMOTE_POD[FAMILIES[family]], TARGET)
    path.serve(protocol, life.frontend, inside=to(elsewhere), outside=to(life.backend), kind=kind, flags=flags)
    sent = packet(protocol, life.client, life.frontend)

    ran = path.ingress("one", sent)

    seen = Ether(ran.packet)
    assert (seen[1].src != life.client.address) == is_masqueraded
    assert life.backend == (seen[1].dst, seen[2].dport)
    if not is_masqueraded:
        check(ran, TC_ACT_UNSPEC, moved(sent, destination=life.backend))
        answer = packet(protocol, life.backend, life.client, flags="SA")
        check(path.egress("one", answer), TC_ACT_UNSPEC, moved(answer, source=life.frontend))


@pytest.mark.parametrize("family", FAMILIES)
def test_pods_by_the_device_they_come_in_by(path, family):
    """detectLocalMode BridgeInterface or InterfaceNamePrefix."""
    path.no_pods()
    path.masquerade(path.ifindex["one"], flags=DEVICE_PODS)
    life = Life(FrontendKind.CLUSTER_IP, "cluster", "pod", "remote", family, "tcp")
    path.serve("tcp", life.frontend, inside=to(life.backend))
    sent = packet("tcp", life.client, life.frontend)

    check(path.ingress("one", sent), TC_ACT_UNSPEC, moved(sent, destination=life.backend))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_flows_are_spread_over_the_backends(path, count):
    backends = [End(f"10.180.1.{10 + number}", TARGET) for number in range(count)]
    frontend = End("10.96.0.10", 80)
    path.serve("tcp", frontend, inside=to(*backends))
    flows = 50 * count

    hits = [
        Ether(path.ingress("one", packet("tcp", End(at.POD_ONE[0], 5000 + number), frontend)).packet)[1].dst
        for number in range(flows)
    ]

    shares = [hits.count(backend.address) for backend in backends]
    chi_square = sum((share - 50) ** 2 / 50 for share in shares)
    assert sum(shares) == flows
    assert chi_square < 40  # six degrees of freedom: once in two million choices of ports


def test_flow_entries_say_what_becomes_of_packets(path):
    life = Life(FrontendKind.NODE_PORT, "cluster", "outside", "remote", "IPv4", "tcp")
    hops = Hops(path, life)
    first = hops.there(packet("tcp", life.client, life.frontend))
    hops.back(reply_to(first))

    forward, reply = sorted(path.flows(), key=lambda flow: flow.flags & FlowFlag.REPLY)

    assert (life.client, life.frontend) == forward.asked
    assert (hops.source, life.backend) == forward.becomes
    assert (life.backend, hops.source) == reply.asked
    assert (life.frontend, life.client) == reply.becomes
    assert {path.ifindex["eth0"]} == {forward.device, reply.device}
    assert forward.flags == FlowFlag.MASQUERADED | FlowFlag.REPLIED
    assert reply.flags == FlowFlag.MASQUERADED | FlowFlag.REPLIED | FlowFlag.REPLY


@pytest.mark.parametrize("is_port", [False, True], ids=["device", "bridge port"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frame_for_another_host_is_left_alone(path, family, is_port):
    """A bridge floods what is for a host it does not know; only at its ports may the node be who it is for."""
    path.masquerade(path.ifindex["eth0"], *at.NODE, flags=DEVICE_PORT if is_port else 0)
    life = Life(FrontendKind.NODE_PORT, "cluster", "outside", "remote", family, "udp")
    path.serve("udp", life.frontend, inside=to(life.backend), kind=life.kind)
    sent = packet("udp", life.client, life.frontend)
    sent.dst = "02:00:00:00:00:77"

    ran = path.ingress("eth0", sent)

    if is_port:
        assert ran.verdict == TC_ACT_REDIRECT
    else:
        check(ran, TC_ACT_UNSPEC, sent)
