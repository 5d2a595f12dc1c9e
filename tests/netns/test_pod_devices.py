"""Which device leads to a pod, as netlink tells it: by a route of its own, or behind a bridge, asked for if need be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agent.core.addresses import parse_address
from agent.core.network import Network
from agent.kernel.neighbours import ask_device, solicit
from agent.kernel.netlink import Netlink, read_network
from tests.lab import netns
from tests.lab.lab import Lab, Node, Pod
from tests.lab.polling import until
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
        found = ask_device(netlink, parse_address(address), bridges(network))
    return found and (name_of(network, found[0]), found[1])


def make_ask(node: Node, *addresses: str) -> None:
    """Have a node's kernel ask for addresses."""
    with netns.entered(node.netns), Netlink() as netlink:
        network = read_network(netlink)
        for address in addresses:
            solicit(netlink, parse_address(address), bridges(network))


def bridges(network: Network) -> set[int]:
    return {device.ifindex for device in network.devices if device.kind == "bridge"}


def neighbours(node: Node) -> str:
    return netns.ip("-n", node.netns, "neigh", "show")


def hear(node: Node, address: str) -> tuple[str, bool]:
    """Wait until a node knows where an address is."""
    return until(lambda: ask(node, address), f"{address} is heard", 1) or ("", False)


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


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_a_pod_that_never_speaks_is_known_once_the_kernel_was_made_to_ask(bridged, family):
    pod = bridged.add_pod(f"silent-{family}")

    make_ask(bridged, pod.addresses[family])

    assert hear(bridged, pod.addresses[family]) == (device_of(pod), False)
    assert ask(bridged, pod.addresses[1 - family]) is None


def forget_ports(node: Node) -> None:
    netns.configure(node.netns, ["link set br0 type bridge fdb_flush"])


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_a_neighbour_whose_port_was_forgotten_is_asked_for_anew(bridged, family):
    pod = bridged.pods["one"]
    address = pod.addresses[family]
    make_ask(bridged, address)
    hear(bridged, address)
    forget_ports(bridged)
    assert ask(bridged, address) is None
    assert f"{address} dev br0 lladdr" in neighbours(bridged)

    make_ask(bridged, address)

    assert hear(bridged, address) == (device_of(pod), False)


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_an_address_that_is_another_pods_now_is_found_there(bridged, family):
    """The neighbour of the pod before is known still, and nobody has that link address."""
    pod = bridged.pods["two"]
    address = pod.addresses[family]
    netns.configure(bridged.netns, [f"neigh replace {address} dev br0 lladdr 02:00:5e:00:99:01 nud reachable"])

    make_ask(bridged, address)

    assert hear(bridged, address) == (device_of(pod), False)


def test_a_neighbour_that_somebody_has_set_stays(bridged):
    entry = "10.180.1.99 dev br0 lladdr 02:00:5e:00:99:02"
    netns.configure(bridged.netns, [f"neigh add {entry} nud permanent"])

    make_ask(bridged, "10.180.1.99")

    assert f"{entry} PERMANENT" in neighbours(bridged)


def test_the_address_of_a_port_itself_is_no_pods(bridged):
    pod = bridged.pods["one"]
    port = netns.ip("-n", bridged.netns, "-br", "link", "show", "dev", device_of(pod)).split()[2]
    netns.configure(bridged.netns, [f"neigh replace 10.180.1.98 dev br0 lladdr {port} nud reachable"])

    assert ask(bridged, "10.180.1.98") is None


def test_nothing_is_asked_for_that_is_behind_no_bridge(lab, bridged, routed):
    elsewhere = ["192.0.2.1", "2001:db8::1", *next(iter(routed.pods.values())).addresses]
    before = neighbours(bridged), neighbours(routed)

    make_ask(bridged, *elsewhere, "172.30.0.77", *bridged.addresses)
    make_ask(routed, *routed.pods["one"].addresses)

    assert (neighbours(bridged), neighbours(routed)) == before
