"""Which device leads to a pod, as netlink tells it: by a route of its own, or behind a bridge."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agent.core.addresses import parse_address
from agent.core.network import Network
from agent.kernel.netlink import Netlink, ask_device, read_network
from tests.lab import netns
from tests.lab.lab import Lab, Node, Pod
from tests.requirements import require_root


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    require_root()
    with Lab(2) as made:
        for node in made.nodes:
            node.add_pod("one", 8080)
            node.add_pod("two", 8080)
        yield made


@pytest.fixture
def bridged(lab: Lab) -> Node:
    return lab.nodes[0]


@pytest.fixture
def routed(lab: Lab) -> Node:
    return lab.nodes[1]


def ask(node: Node, address: str) -> tuple[str, bool] | None:
    """Ask on a node; returns the device's name."""
    with netns.entered(node.netns), Netlink() as netlink:
        network = read_network(netlink)
        bridges = {device.ifindex for device in network.devices if device.kind == "bridge"}
        found = ask_device(netlink, parse_address(address), bridges)
    return found and (name_of(network, found[0]), found[1])


def name_of(network: Network, ifindex: int) -> str:
    return next(device.name for device in network.devices if device.ifindex == ifindex)


def device_of(pod: Pod) -> str:
    return f"v{pod.number}"


def test_a_route_to_the_pod_alone_tells(routed):
    for pod in routed.pods.values():
        assert [ask(routed, address) for address in pod.addresses] == [(device_of(pod), True)] * 2


def test_behind_a_bridge_a_pod_is_known_once_it_has_spoken(bridged):
    pod, silent = bridged.add_pod("new", 8080), bridged.add_pod("silent", 8080)
    assert [ask(bridged, address) for address in (*pod.addresses, *silent.addresses)] == [None] * 4
    client = bridged.client()
    for address in pod.addresses:
        assert client.ask("tcp", address, 8080).name == "new"

    assert [ask(bridged, address) for address in pod.addresses] == [(device_of(pod), False)] * 2
    assert [ask(bridged, address) for address in silent.addresses] == [None] * 2


@pytest.mark.parametrize("number", [0, 1], ids=["bridged", "routed"])
def test_what_leads_elsewhere_is_no_pods_device(lab, number):
    node, other = lab.nodes[number], lab.nodes[1 - number]

    assert ask(node, "192.0.2.1") is None, "a default route"
    assert ask(node, "2001:db8::1") is None
    assert ask(node, node.addresses[0]) is None, "the node's own"
    assert [ask(node, address) for address in next(iter(other.pods.values())).addresses] == [None] * 2, "by a gateway"
