"""Devices and addresses of a node, followed while they come and go; what is attached outlives the agent."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import pytest

from agent.core.abi import DEVICE, DEVICE_PODS
from agent.core.addresses import format_address
from agent.kernel import bpf
from agent.kernel.attach import closing
from agent.kernel.bpf import Direction
from tests.lab import netns
from tests.lab.lab import GATEWAYS
from tests.lab.polling import until

AT_ONCE_S = 1
BOTH = ["tc_ingress", "tc_egress"]


@pytest.fixture
def lone(make_scene):
    """A node whose agent compares the kernel with what it wants often."""
    return make_scene(web=1, driftCheckPeriod="100ms")


def configure(scene, *lines):
    netns.configure(scene.node.netns, list(lines))


def programs(scene, device):
    """Name the programs that a device of the node runs, ingress first; None = there is no such device."""
    with netns.entered(scene.node.netns), contextlib.suppress(OSError):
        ifindex = socket.if_nametoindex(device)
        return [_name(ident) for direction in Direction for ident in bpf.prog_query(ifindex, direction)]
    return None


def _name(ident):
    with closing(bpf.prog_fd_by_id(ident)) as program:
        return bpf.prog_info(program).name


def pins(scene):
    directory = scene.agent.bpffs / "ebproxy" / "links" / "tcx"
    return {path.name for path in directory.glob("*")}


def link_ids(scene):
    found = {}
    for path in (scene.agent.bpffs / "ebproxy" / "links" / "tcx").glob("*"):
        with closing(bpf.obj_get(path)) as link:
            found[path.name] = bpf.tcx_info(link).id
    return found


def ifindex(scene, device):
    with netns.entered(scene.node.netns):
        return socket.if_nametoindex(device)


def addresses(scene):
    with scene.agent.maps() as store:
        return {format_address(key) for key, _ in store.maps["node_addresses"].items()}


def device(scene, ifindex):
    """Read what the map says of a device: its IPv4 address and its flags."""
    with scene.agent.maps() as store:
        value = store.maps["devices"].lookup(ifindex.to_bytes(4, "little"))
    ipv4, _, flags = DEVICE.packer.unpack(value or bytes(DEVICE.size))
    return format_address(ipv4), flags


def lo_settings(scene):
    with netns.entered(scene.node.netns):
        root = Path("/proc/sys/net/ipv4/conf/lo")
        return {name: (root / name).read_text().strip() for name in ("accept_local", "route_localnet")}


def test_every_device_of_the_node_runs_the_packet_path(scene):
    veth = f"v{scene.web[0].number}"

    assert programs(scene, "eth0") == programs(scene, veth) == BOTH
    assert programs(scene, "br0") == [], "its ports see the packets"
    assert programs(scene, "lo") == ["tc_loopback"]
    assert lo_settings(scene) == {"accept_local": "1", "route_localnet": "1"}


def test_a_device_that_appears_gets_programs_at_once_and_one_that_goes_leaves_no_pin(scene):
    for number in range(5):
        name = f"x{number}"
        configure(scene, f"link add {name} type veth peer name y{number}")
        appeared_at = time.monotonic()
        until(lambda name=name: programs(scene, name) == BOTH, f"{name} has its programs")
        assert time.monotonic() - appeared_at < AT_ONCE_S
        index = ifindex(scene, name)
        both = {f"{index}_ingress", f"{index}_egress"}
        until(lambda both=both: both <= pins(scene), "what is attached is pinned right after")

        configure(scene, f"link del {name}")

        until(lambda both=both: not pins(scene) & both, "its pins are gone")


def test_many_devices_at_once(scene):
    before = pins(scene)
    names = [f"m{number}" for number in range(40)]
    configure(scene, *(f"link add {name} type veth peer name {name}p" for name in names))

    until(lambda: all(programs(scene, name) == BOTH for name in names), "all have their programs")

    configure(scene, *(f"link del {name}" for name in names))
    until(lambda: pins(scene) == before, "their pins are gone")


def test_a_pod_that_comes_is_served(make_scene):
    scene = make_scene(web=1, socketLB="off")
    ips = scene.publish("web", scene.web)

    late = scene.node.add_pod("late")

    veth = f"v{late.number}"
    until(lambda: programs(scene, veth) == BOTH, "its device has its programs")
    assert late.client().ask("tcp", ips[0], 80).name == "web-1"


@pytest.mark.parametrize("address", ["172.30.0.77", "fd00:172:30::77"])
def test_addresses_are_followed(scene, address):
    bits = 64 if ":" in address else 24
    assert address not in addresses(scene)

    configure(scene, f"addr add {address}/{bits} dev eth0")
    until(lambda: address in addresses(scene), "it is the node's own", AT_ONCE_S)
    configure(scene, f"addr del {address}/{bits} dev eth0")

    until(lambda: address not in addresses(scene), "it is nobody's", AT_ONCE_S)


def test_what_devices_masquerade_with_is_followed(scene):
    eth0, node = ifindex(scene, "eth0"), scene.node.addresses[0]
    assert device(scene, eth0) == device(scene, 0) == (node, 0)

    configure(scene, f"addr del {node}/24 dev eth0", "addr add 172.30.0.99/24 dev eth0")

    until(lambda: device(scene, eth0) == ("172.30.0.99", 0), "the new one", AT_ONCE_S)
    # The default route went with the address that its gateway was reached from.
    restored = (f"addr add {node}/24 dev eth0", f"route add default via {GATEWAYS[0]} dev eth0")
    configure(scene, "addr del 172.30.0.99/24 dev eth0", *restored)
    until(lambda: device(scene, eth0) == (node, 0), "the old one", AT_ONCE_S)


def test_what_somebody_detached_is_healed_and_counted(lone):
    index = ifindex(lone, "eth0")
    pin = lone.agent.bpffs / "ebproxy" / "links" / "tcx" / f"{index}_egress"
    assert lone.agent.metric("ebproxy_drift_entries_total") == 0

    with closing(bpf.obj_get(pin)) as link:
        bpf.link_detach(link)

    until(lambda: programs(lone, "eth0") == BOTH, "it is attached again")
    until(lambda: lone.agent.metric("ebproxy_drift_entries_total") == 1, "that is counted")


def test_entries_of_the_node_that_somebody_changed_are_healed(lone):
    before = addresses(lone)
    with lone.agent.maps() as store:
        store.maps["node_addresses"].delete(next(iter(store.maps["node_addresses"].items()))[0])
        store.maps["node_addresses"].update(b"\x20" + bytes(15), b"\1\0\0\0")

    until(lambda: addresses(lone) == before, "they are as they were")


def test_devices_that_changed_while_no_agent_ran(make_scene):
    """Links of those that stayed are kept: nothing is detached in between."""
    scene = make_scene(web=2)
    stays, goes = (f"v{pod.number}" for pod in scene.web)
    stayed = {f"{ifindex(scene, stays)}_ingress", f"{ifindex(scene, stays)}_egress"}
    gone = {f"{ifindex(scene, goes)}_ingress", f"{ifindex(scene, goes)}_egress"}
    before = link_ids(scene)
    scene.agent.kill()
    assert programs(scene, stays) == BOTH, "the kernel goes on"
    configure(scene, f"link del {goes}", "link add late type veth peer name late1")
    assert programs(scene, "late") == []

    scene.agent.start().wait()

    until(lambda: programs(scene, "late") == BOTH, "the new one has its programs")
    after = link_ids(scene)
    assert {name: after[name] for name in stayed} == {name: before[name] for name in stayed}
    assert not gone & after.keys()


def test_which_devices_is_configuration(make_scene):
    scene = make_scene(web=1, devices=["eth*", "v*"], excludeDevices=[f"v{11}"])
    veths = {pod.name: f"v{pod.number}" for pod in (*scene.web, scene.shopper)}
    assert set(veths.values()) == {"v10", "v11"}

    configure(scene, "link add other type veth peer name other1")
    configure(scene, "link add eth7 type veth peer name eth8")

    until(lambda: programs(scene, "eth7") == BOTH, "what fits has its programs")
    assert programs(scene, "eth0") == programs(scene, "v10") == BOTH
    assert programs(scene, "v11") == programs(scene, "other") == []


@pytest.mark.parametrize(
    ("config", "flagged"),
    [
        pytest.param({}, set(), id="addresses tell"),
        pytest.param(
            {"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "br0"}},
            {"br0", "v10", "v11"},
            id="a bridge",
        ),
        pytest.param(
            {"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"interfaceNamePrefix": "v"}},
            {"v10", "v11"},
            id="a prefix",
        ),
    ],
)
def test_the_devices_that_pods_come_by_are_told(make_scene, config, flagged):
    scene = make_scene(web=1, **config)

    names = ("lo", "eth0", "br0", "v10", "v11")
    found = {name for name in names if device(scene, ifindex(scene, name))[1] & DEVICE_PODS}
    assert found == flagged
    with scene.agent.maps() as store:
        assert bool(dict(store.maps["pod_ranges"].items())) == (not config)


def test_cleanup_leaves_devices_and_lo_as_they_were(make_scene):
    scene = make_scene(web=1)
    devices = ("eth0", "lo", f"v{scene.web[0].number}")
    assert all(programs(scene, name) for name in devices)
    scene.agent.stop()
    assert all(programs(scene, name) for name in devices), "an agent that stops leaves everything"
    scene.agent.start().wait()
    scene.agent.stop()

    assert scene.agent.cli("cleanup").returncode == 0

    assert [programs(scene, name) for name in devices] == [[], [], []]
    assert lo_settings(scene) == {"accept_local": "0", "route_localnet": "0"}
