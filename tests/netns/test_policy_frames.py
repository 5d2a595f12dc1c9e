"""What a pod writes on its device by itself, past its kernel: frames that are made to get past policy.

Each is followed by one that is allowed and takes the same way: once that has arrived, the one before would have.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from tests.lab import manifests, netns
from tests.lab.lab import Outsider, Pod
from tests.lab.manifests import Object, network_policy
from tests.lab.polling import until
from tests.netns.policies import PolicyScene, policy_scene, questions
from tests.requirements import require_root

ALLOWED, DENIED = 7777, 7776
MARK = b"hidden in here"
ASKED, HOST = questions(modes=["tcp"], ports=[8080]), questions(["host"], ["tcp"], [8080])
_ALL_PROTOCOLS = 3


class Wire:
    """The first device of a namespace, past its kernel."""

    def __init__(self, namespace: str, device: str = "eth0") -> None:
        with netns.entered(namespace):
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
        self.socket.bind((device, 0))
        self.socket.settimeout(5)
        self.mac = ":".join(f"{byte:02x}" for byte in self.socket.getsockname()[4])

    def send(self, frame: Packet) -> None:
        self.socket.send(bytes(frame))

    def until(self, last: bytes) -> list[bytes]:
        """Read the frames that come in, until one that holds this. Raises: TimeoutError."""
        found = []
        while not found or last not in found[-1]:
            frame, origin = self.socket.recvfrom(4096)
            if origin[2] != socket.PACKET_OUTGOING:
                found.append(frame)
        return found


class Wires:
    """A pod that may send datagrams to one port of the server and of a client outside, and whoever hears it."""

    def __init__(self, shop: PolicyScene, outsider: Outsider, ends: ExitStack) -> None:
        self.shop, self.outsider = shop, outsider
        self._ends = ends
        self.guest, self.web, self.outside = (
            self.open(it) for it in (shop.guest.netns, shop.web.netns, outsider.netns)
        )
        self.bridge = self.open(shop.scene.node.netns, "br0")
        self._turn = 0

    def open(self, namespace: str, device: str = "eth0") -> Wire:
        made = Wire(namespace, device)
        self._ends.callback(made.socket.close)
        return made

    def is_let_through(self, pod: Pod, sender: Wire, hidden: Packet, receiver: Wire) -> bool:
        """Whether what a pod sends arrives at the server or outside."""
        self._turn += 1
        last = f"turn {self._turn} of {pod.name}".encode()
        target, mac = self.shop.web.v4, self.web.mac
        if receiver is self.outside:
            target, mac = self.outsider.addresses[0], self.bridge.mac
        hidden.src, hidden.dst = sender.mac, mac
        sender.send(hidden)
        sender.send(Ether(src=sender.mac, dst=mac) / IP(src=pod.v4, dst=target) / UDP(sport=9, dport=ALLOWED) / last)
        return any(MARK in frame for frame in receiver.until(last))


def only_datagrams(name: str, outsider: Outsider, namespace: str) -> Object:
    to = [{"podSelector": {}, "namespaceSelector": {}}, {"ipBlock": {"cidr": f"{outsider.addresses[0]}/32"}}]
    rule = {"to": to, "ports": [{"port": ALLOWED, "protocol": "UDP"}]}
    return network_policy(name, egress=[rule], policyTypes=["Ingress", "Egress"], namespace=namespace)


@contextmanager
def placed(shop: PolicyScene) -> Iterator[Wires]:
    """Wait until every pod's device is known, and its policy is in force."""
    outsider = shop.scene.lab.outsider()
    for pod in (shop.web, shop.shopper, shop.guest):
        for address in pod.addresses:
            shop.clients["host"].ask("udp", address, ALLOWED, 0.05)
    until(lambda: shop.agent.metric("ebproxy_policy_unplaced_pods") == 0, "every device is known", 20)
    rule = {"ports": [{"port": ALLOWED, "protocol": "UDP"}]}
    server = network_policy("web", "web", ingress=[rule], policyTypes=["Ingress"])
    shop.set(only_datagrams("guest", outsider, namespace="inn"), server)
    shop.wait_for(HOST, ASKED)
    with ExitStack() as ends:
        yield Wires(shop, outsider, ends)


@pytest.fixture(scope="module")
def wires() -> Iterator[Wires]:
    require_root()
    with policy_scene(flowSample=1) as shop, placed(shop) as made:
        yield made


RECEIVERS = pytest.mark.parametrize("where", ["the-server", "outside"])


def receiver_of(wires: Wires, where: str) -> tuple[Wire, tuple[str, str]]:
    if where == "outside":
        return wires.outside, wires.outsider.addresses
    return wires.web, wires.shop.web.addresses


@RECEIVERS
def test_what_is_allowed_arrives(wires, where):
    """So that what does not, was dropped."""
    receiver, (address, _) = receiver_of(wires, where)
    sent = Ether() / IP(src=wires.shop.guest.v4, dst=address) / UDP(sport=9, dport=ALLOWED) / MARK

    assert wires.is_let_through(wires.shop.guest, wires.guest, sent, receiver)


@RECEIVERS
@pytest.mark.parametrize("port", [ALLOWED, DENIED], ids=["allowed", "denied"])
@pytest.mark.parametrize("tags", [0, 1, 2, 3])
def test_tags_hide_nothing(wires, tags, port, where):
    """Each kernel on the way takes some off; with two or more, policy sees no IP, and lets none of it pass."""
    receiver, (address, _) = receiver_of(wires, where)
    sent: Packet = IP(src=wires.shop.guest.v4, dst=address) / UDP(sport=9, dport=port) / MARK
    for _ in range(tags):
        sent = Dot1Q(vlan=0) / sent

    is_let_through = wires.is_let_through(wires.shop.guest, wires.guest, Ether() / sent, receiver)

    assert is_let_through == (port == ALLOWED and tags < 2)


def _error(wires: Wires, address: str, _: str) -> Packet:
    """Quote a connection of another pod's."""
    peer = (wires.shop.scene.node.addresses[0], 9)
    with netns.entered(wires.shop.shopper.netns):
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with asking:
        asking.connect(peer)
        asking.send(b"x")
        quoted = IP(src=peer[0], dst=wires.shop.shopper.v4) / UDP(sport=peer[1], dport=asking.getsockname()[1]) / MARK
    return IP(src=wires.shop.guest.v4, dst=address) / ICMP(type=3, code=3) / quoted


def _discovery(kind: int, hops: int, source: str = "") -> Callable[[Wires, str, str], Packet]:
    def build(wires: Wires, _: str, address: str) -> Packet:
        body = Raw(bytes([kind, 0, 0, 0]) + MARK)
        return IPv6(src=source or wires.shop.guest.v6, dst=address, hlim=hops, nh=58) / body

    return build


def _datagram(source: Callable[[Wires], str]) -> Callable[[Wires, str, str], Packet]:
    return lambda wires, v4, _: IP(src=source(wires), dst=v4) / UDP(sport=9, dport=ALLOWED) / MARK


HOSTILE: dict[str, Callable[[Wires, str, str], Packet]] = {
    "as-another-pod": _datagram(lambda wires: wires.shop.shopper.v4),
    "as-the-node": _datagram(lambda wires: wires.shop.scene.node.addresses[0]),
    "error-about-others": _error,
    "routed-discovery": _discovery(135, 64),
    "discovery-behind-a-router": _discovery(136, 64, "2001:db8::bad"),
    "in-the-name-of-others": _discovery(136, 255, "2001:db8::bad"),
    "router-advertisement": _discovery(134, 255, "fe80::1"),
    "redirect": _discovery(137, 255, "fe80::1"),
    "mapped": lambda wires, v4, v6: (
        IPv6(src=f"::ffff:{wires.shop.guest.v4}", dst=v6) / UDP(sport=9, dport=ALLOWED) / MARK
    ),
    "link-local-to-global": lambda wires, v4, v6: IPv6(src="fe80::1", dst=v6) / UDP(sport=9, dport=ALLOWED) / MARK,
}


@RECEIVERS
@pytest.mark.parametrize("build", HOSTILE.values(), ids=HOSTILE)
def test_nothing_arrives_that_says_to_be_something_else(wires, build, where):
    receiver, addresses = receiver_of(wires, where)
    sent = Ether() / build(wires, *addresses)

    assert not wires.is_let_through(wires.shop.guest, wires.guest, sent, receiver)


def test_who_is_not_known_speaks_for_nobody_who_is(wires):
    """Its own address is not checked yet; those of pods that are known to be elsewhere are, and the node's."""
    node = wires.shop.scene.node
    pod = node.add_pod("stranger")
    wire = wires.open(pod.netns)
    for source in (wires.shop.shopper.v4, wires.shop.web.v4, node.addresses[0]):
        sent = Ether() / IP(src=source, dst=wires.shop.web.v4) / UDP(sport=9, dport=ALLOWED) / MARK
        assert not wires.is_let_through(pod, wire, sent, wires.web)


def test_no_stream_is_begun_in_its_midst(wires):
    """By a pod that came after the agent's first start."""
    pod = wires.shop.scene.node.add_pod("late")
    wire = wires.open(pod.netns)
    known = manifests.pod(pod.name, pod.node.name, pod.addresses, "late", namespace="inn")
    wires.shop.scene.manifests.write("late", known)
    address = wires.outsider.addresses[0]
    refused = Ether() / IP(src=pod.v4, dst=address) / UDP(sport=9, dport=DENIED) / MARK
    until(lambda: not wires.is_let_through(pod, wire, refused, wires.outside), "its policy is in force")

    for source, destination in ((80, 443), (80, 40_000), (40_000, 443), (40_000, 50_000)):
        stream = TCP(sport=source, dport=destination, flags="PA", seq=1, ack=1) / MARK
        sent = Ether() / IP(src=pod.v4, dst=address) / stream
        assert not wires.is_let_through(pod, wire, sent, wires.outside), (source, destination)
