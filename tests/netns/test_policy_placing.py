"""Behind a bridge, policy knows the devices of pods that never speak to the node: nobody here does, but the kernel."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from agent.core.abi import POD_DEVICE, U32
from agent.core.addresses import parse_address
from tests.lab import manifests, netns
from tests.lab.lab import Pod
from tests.lab.manifests import network_policy
from tests.lab.polling import until
from tests.netns.policies import PolicyScene, policy_scene, questions
from tests.requirements import require_root

PORT = 7000
ALL_NODES = "ff02::1"
_SILENCE_S = 0.5


@pytest.fixture(scope="module")
def shop() -> Iterator[PolicyScene]:
    require_root()
    with policy_scene(driftCheckPeriod="1h") as scene:
        yield scene


def places(shop: PolicyScene) -> dict[bytes, str]:
    """Read which device each address is behind, by the maps."""
    with netns.entered(shop.scene.node.netns):
        names = dict(socket.if_nameindex())
    with shop.agent.maps() as store:
        found = list(store.maps["pod_devices"].items())
    return {
        address: names.get(U32.packer.unpack(key)[0], "gone")
        for key, value in found
        for address in POD_DEVICE.packer.unpack(value)
        if any(address)
    }


def expected(*pods: Pod) -> dict[bytes, str]:
    return {parse_address(address): f"v{pod.number}" for pod in pods for address in pod.addresses}


def wait_until_placed(shop: PolicyScene, *pods: Pod, limit_s: float = 1) -> None:
    until(lambda: places(shop).items() >= expected(*pods).items(), "the devices of pods are known", limit_s)


def know(shop: PolicyScene, pod: Pod) -> None:
    """Have the agent know one pod more."""
    subjects = shop.agent.metric("ebproxy_policy_subjects")
    shop.scene.manifests.write(pod.name, manifests.pod(pod.name, shop.scene.node.name, pod.addresses, "more"))
    until(lambda: shop.agent.metric("ebproxy_policy_subjects") == subjects + 2, "the pod is known")


def test_pods_that_were_there_before_the_agent_are_placed(shop):
    wait_until_placed(shop, shop.web, shop.shopper, shop.guest)

    assert shop.agent.metric("ebproxy_policy_unplaced_pods") == 0


def test_a_new_pod_is_placed_within_a_second(shop):
    pod = shop.scene.node.add_pod("new")
    know(shop, pod)

    wait_until_placed(shop, pod)


def test_a_pod_that_answers_late_is_placed_then(shop):
    """Its device is down when it becomes known, as while a node's network is being set up."""
    pod = shop.scene.node.add_pod("late")
    netns.configure(pod.netns, ["link set eth0 down"])
    know(shop, pod)
    assert shop.agent.metric("ebproxy_policy_unplaced_pods") == 1
    netns.configure(pod.netns, ["link set eth0 up"])

    wait_until_placed(shop, pod, limit_s=10)


def link_local(pod: Pod) -> str:
    listed = netns.ip("-n", pod.netns, "-o", "-6", "addr", "show", "dev", "eth0", "scope", "link")
    return listed.split("inet6 ")[1].split("/")[0]


def make_socket(pod: Pod, kind: socket.SocketKind) -> socket.socket:
    with netns.entered(pod.netns):
        made = socket.socket(socket.AF_INET6, kind)
    made.settimeout(_SILENCE_S)
    return made


def connects(pod: Pod, other: Pod) -> bool:
    """Whether a pod can connect to another's link-local address."""
    with make_socket(other, socket.SOCK_STREAM) as server, make_socket(pod, socket.SOCK_STREAM) as client:
        server.bind(("::", PORT))
        server.listen()
        with contextlib.suppress(TimeoutError):
            client.connect((link_local(other), PORT, 0, index_of_eth0(pod)))
            return True
        return False


def hears_all(pod: Pod, other: Pod) -> bool:
    """Whether another pod hears what a pod says to all on the link."""
    with make_socket(other, socket.SOCK_DGRAM) as server, make_socket(pod, socket.SOCK_DGRAM) as client:
        server.bind(("::", PORT))
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index_of_eth0(pod))
        client.sendto(b"?", (ALL_NODES, PORT))
        with contextlib.suppress(TimeoutError):
            return bool(server.recvfrom(10))
        return False


def index_of_eth0(pod: Pod) -> int:
    with netns.entered(pod.netns):
        return socket.if_nametoindex("eth0")


def test_who_is_denied_everything_reaches_nobody_by_the_link(shop):
    """None of the pods has spoken to the node, and link-local addresses are nobody's to policy: devices decide."""
    shop.set()
    wait_until_placed(shop, shop.web, shop.shopper, shop.guest)
    shop.wait_for(questions(["guest"], ["tcp"]), questions(["guest"], ["tcp"]))
    assert connects(shop.guest, shop.web)
    assert hears_all(shop.guest, shop.web)

    shop.set(network_policy("quarantine", namespace="inn", policyTypes=["Ingress", "Egress"]))
    shop.wait_for(set(), questions(["guest"], ["tcp"]))

    assert not connects(shop.guest, shop.web), "not out"
    assert not hears_all(shop.guest, shop.web)
    assert not connects(shop.shopper, shop.guest), "nor in"
    assert not hears_all(shop.shopper, shop.guest)
    assert not hears_all(shop.shopper, shop.guest), "nor once others on the link have heard it"
    assert connects(shop.shopper, shop.web), "nobody else is meant"


# The settings that let a socket have any source. Source: include/uapi/linux/in.h, in6.h.
_TRANSPARENT = ((socket.IPPROTO_IP, 19), (socket.IPPROTO_IPV6, 75))


def spoofed(shop: PolicyScene) -> float:
    return shop.agent.metric("ebproxy_policy_dropped_packets_total", reason="spoofed")


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("whom", ["shopper", "node"])
def test_who_never_speaks_to_the_node_cannot_speak_for_others(shop, family, whom):
    """A pod's address would lend its identity, and the node's is allowed everywhere."""
    wait_until_placed(shop, shop.web, shop.shopper, shop.guest)
    before = spoofed(shop)
    source = {"shopper": shop.shopper, "node": shop.scene.node}[whom].addresses[family]
    with netns.entered(shop.guest.netns):
        client = socket.socket((socket.AF_INET, socket.AF_INET6)[family], socket.SOCK_DGRAM)
    with client:
        client.setsockopt(*_TRANSPARENT[family], 1)
        client.bind((source, 0))
        client.sendto(b"?", (shop.web.addresses[family], PORT))

    until(lambda: spoofed(shop) == before + 1, "the packet is dropped and counted", 2)


@contextlib.contextmanager
def answering(shop: PolicyScene, thief: Pod, victim: Pod) -> Iterator[None]:
    """Have a pod answer for another's addresses, and the node believe it."""
    hardware = netns.ip("-n", thief.netns, "-br", "link", "show", "dev", "eth0").split()[2]
    netns.configure(thief.netns, [f"addr add {address} dev eth0" for address in victim.addresses])
    stolen = [f"neigh replace {address} dev br0 lladdr {hardware} nud reachable" for address in victim.addresses]
    netns.configure(shop.scene.node.netns, stolen)
    try:
        yield
    finally:
        netns.configure(thief.netns, [f"addr del {address} dev eth0" for address in victim.addresses])
        netns.configure(shop.scene.node.netns, [f"neigh del {address} dev br0" for address in victim.addresses])


def test_who_answers_for_another_does_not_take_its_place(shop):
    wait_until_placed(shop, shop.web, shop.guest)
    with answering(shop, shop.guest, shop.web):
        pod = shop.scene.node.add_pod("later")
        know(shop, pod)
        wait_until_placed(shop, pod)
        assert places(shop).items() >= expected(shop.web, shop.guest).items(), "after everything was looked at anew"
        shop.agent.stop()
        shop.agent.start().wait()

        assert places(shop).items() >= expected(shop.web, shop.guest).items(), "to the next agent"
