"""The node's network: which devices get programs, what packets leave with, what the maps say of it."""

from __future__ import annotations

import ipaddress
import sys

import pytest

from agent.core.abi import ADDRESS_RANGE, DEVICE, DEVICE_PODS, DEVICE_PORT, POD_RANGE_PODS, POD_RANGE_UNKNOWN
from agent.core.addresses import format_address, parse_address
from agent.core.network import (
    LOOPBACK,
    AddressFlag,
    Device,
    DevicePatterns,
    LocalAddress,
    Network,
    PodDetection,
    address_entries,
    device_entries,
    range_entries,
)

LINK, HOST = 253, 254
LO = Device(1, "lo", hardware=LOOPBACK)
ETH0 = Device(2, "eth0")
BRIDGE = Device(3, "br0", "bridge")
POD = Device(4, "veth1", "veth", master=3, master_kind="bridge")
DEVICES = (
    LO,
    ETH0,
    BRIDGE,
    POD,
    Device(5, "bond0", "bond"),
    Device(6, "eth1", master=5, master_kind="bond"),
    Device(7, "team0", "team"),
    Device(8, "eth2", master=7, master_kind="team"),
    Device(9, "vxlan1", "vxlan"),
    Device(10, "eth0.7", "vlan"),
    Device(11, "wg0", "wireguard", hardware=65534),
    Device(12, "cali1", "veth", master=13, master_kind="vrf"),
)


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        pytest.param(DevicePatterns(), "eth0 veth1 bond0 team0 vxlan1 eth0.7 cali1", id="all that can"),
        pytest.param(DevicePatterns(("eth*", "cali1")), "eth0 eth0.7 cali1", id="patterns"),
        pytest.param(DevicePatterns(("br0", "eth1", "lo", "wg0")), "", id="none is forced on one that cannot"),
        pytest.param(DevicePatterns((), ("veth*", "*.7")), "eth0 bond0 team0 vxlan1 cali1", id="excluded"),
        pytest.param(DevicePatterns(("eth0",), ("eth?",)), "", id="what is excluded wins"),
        pytest.param(DevicePatterns(("ETH0",)), "", id="names have case"),
    ],
)
def test_which_devices_get_programs(patterns, chosen):
    assert chosen.split() == [device.name for device in patterns.choose(DEVICES)]


def address(text, device=2, scope=0, flags=0):
    return LocalAddress(parse_address(text), device, 128, scope, AddressFlag(flags))


def masquerade(*addresses, sources=()):
    """Choose, and write as ``{ifindex: (IPv4, IPv6)}``, "" for none."""
    network = Network(DEVICES, addresses, frozenset(map(parse_address, sources)))
    return {
        ifindex: tuple(format_address(chosen) if any(chosen) else "" for chosen in pair)
        for ifindex, pair in network.masquerade_addresses().items()
    }


@pytest.mark.parametrize(
    ("addresses", "chosen"),
    [
        pytest.param([address("192.0.2.1"), address("192.0.2.2")], ("192.0.2.1", ""), id="the first"),
        pytest.param([address("192.0.2.1"), address("fd00::1")], ("192.0.2.1", "fd00::1"), id="of each family"),
        pytest.param(
            [address("192.0.2.1", flags=AddressFlag.SECONDARY), address("192.0.2.2")],
            ("192.0.2.2", ""),
            id="primary before secondary",
        ),
        pytest.param(
            [address("fd00::1", flags=AddressFlag.DEPRECATED), address("fd00::2", flags=AddressFlag.SECONDARY)],
            ("", "fd00::2"),
            id="temporary before deprecated",
        ),
        pytest.param([address("fd00::1", flags=AddressFlag.DEPRECATED)], ("", "fd00::1"), id="deprecated before none"),
        pytest.param([address("fd00::1", flags=AddressFlag.TENTATIVE)], None, id="not while it is tentative"),
        pytest.param([address("fd00::1", flags=AddressFlag.DAD_FAILED)], None, id="not one that is somebody else's"),
        pytest.param([address("192.0.2.1", scope=200), address("192.0.2.2")], ("192.0.2.2", ""), id="wide scope first"),
        pytest.param([address("192.0.2.1", scope=LINK)], None, id="not of the link only"),
        pytest.param([address("169.254.1.1")], None, id="not link-local though its scope is global"),
        pytest.param([address("fe80::1", scope=LINK)], None, id="not link-local of IPv6"),
    ],
)
def test_what_packets_leave_a_device_with(addresses, chosen):
    found = masquerade(*addresses)

    assert chosen == found.get(2)
    assert chosen == found.get(0)


@pytest.mark.parametrize(
    ("sources", "node"),
    [
        pytest.param(["198.51.100.9"], "198.51.100.9", id="what the default route leaves from"),
        pytest.param([], "192.0.2.1", id="else the first that is not of lo"),
        pytest.param(["203.0.113.5"], "203.0.113.5", id="also one of lo"),
    ],
)
def test_what_the_node_masquerades_with(sources, node):
    on_lo = address("203.0.113.5", device=1)
    loopback = address("127.0.0.1", device=1, scope=HOST)
    found = masquerade(loopback, on_lo, address("192.0.2.1"), address("198.51.100.9"), sources=sources)

    assert (node, "") == found[0]
    assert found[2] == ("192.0.2.1", "")


def test_an_address_of_lo_is_better_than_none():
    assert masquerade(address("203.0.113.5", device=1)) == {1: ("203.0.113.5", ""), 0: ("203.0.113.5", "")}


def test_what_reaches_the_node():
    """All of it, loopback included; of IPv6, no link-local address."""
    texts = ("127.0.0.1", "::1", "192.0.2.1", "169.254.1.1", "fd00::1", "fe80::1")
    failed = address("fd00::2", flags=AddressFlag.DAD_FAILED)
    network = Network(DEVICES, (*map(address, texts), address("192.0.2.1", device=3), failed))

    assert set(texts) - {"fe80::1"} == {format_address(found) for found in network.local}
    assert dict.fromkeys(network.local, b"\1\0\0\0") == address_entries(network)


@pytest.mark.parametrize(
    ("pods", "devices", "needs_node"),
    [
        pytest.param(PodDetection(), set(), True, id="by the Node's ranges"),
        pytest.param(PodDetection(("10.0.0.0/8", "fd00::/16")), set(), False, id="by ranges"),
        pytest.param(PodDetection(("fd00::/16",)), set(), True, id="by ranges of one family, and the Node's"),
        pytest.param(PodDetection(bridge="br0"), {3, 4}, False, id="by a bridge and its ports"),
        pytest.param(PodDetection(bridge="br1"), set(), False, id="by a bridge that is not there"),
        pytest.param(PodDetection(prefix="cali"), {12}, False, id="by a prefix"),
    ],
)
def test_the_devices_that_pods_come_by(pods, devices, needs_node):
    entries = device_entries(Network(DEVICES, (address("192.0.2.1", device=4),)), pods)

    flags = {int.from_bytes(key, "little"): DEVICE.packer.unpack(value) for key, value in entries.items()}
    ports = {device.ifindex for device in DEVICES if device.master_kind == "bridge"}
    assert devices == {ifindex for ifindex, (*_, flag) in flags.items() if flag & DEVICE_PODS}
    assert ports == {ifindex for ifindex, (*_, flag) in flags.items() if flag & DEVICE_PORT}
    assert {0, 4} | ports | devices == flags.keys()
    assert parse_address("192.0.2.1") == flags[4][0]
    assert bytes(16) == flags[4][1]
    assert needs_node == pods.needs_node


@pytest.mark.parametrize(
    ("text", "bits", "first"),
    [
        ("10.180.1.0/24", 120, "10.180.1.0"),
        ("0.0.0.0/0", 96, "0.0.0.0"),
        ("10.1.2.3/16", 112, "10.1.0.0"),
        ("fd00:10::/32", 32, "fd00:10::"),
        ("::/0", 0, "::"),
    ],
)
def test_a_range_is_counted_in_bits_of_128(text, bits, first):
    entries = range_entries(PodDetection((text,)), ())

    assert entries[ADDRESS_RANGE.packer.pack(bits, parse_address(first))] == b"\1\0\0\0"


ALL_V4, ALL_V6 = (96, "0.0.0.0"), (0, "::")
PODS, UNKNOWN = POD_RANGE_PODS, POD_RANGE_UNKNOWN


@pytest.mark.parametrize(
    ("ranges", "node", "entries"),
    [
        pytest.param(
            ["10.0.0.0/8", "fd00::/16"],
            ["10.1.0.0/16", "fd01::/16"],
            {(104, "10.0.0.0"): PODS, (16, "fd00::"): PODS},
            id="those that were told",
        ),
        pytest.param(
            [], ["10.1.0.0/16", "fd01::/16"], {(112, "10.1.0.0"): PODS, (16, "fd01::"): PODS}, id="the Node's"
        ),
        pytest.param(
            ["fd00::/16"],
            ["10.1.0.0/16", "fd01::/16"],
            {(112, "10.1.0.0"): PODS, (16, "fd00::"): PODS},
            id="one of each",
        ),
        pytest.param(["fd00::/16"], [], {ALL_V4: UNKNOWN, (16, "fd00::"): PODS}, id="IPv4 is unknown"),
        pytest.param(
            ["10.0.0.0/8"], ["10.1.0.0/16"], {(104, "10.0.0.0"): PODS, ALL_V6: UNKNOWN, ALL_V4: 0}, id="IPv6 is unknown"
        ),
        pytest.param([], [], {ALL_V4: UNKNOWN, ALL_V6: UNKNOWN}, id="both are unknown"),
        pytest.param(["10.0.0.0/8", "::/0"], [], {(104, "10.0.0.0"): PODS, ALL_V6: PODS, ALL_V4: 0}, id="all of IPv6"),
        pytest.param(["0.0.0.0/0", "::/0"], [], {ALL_V4: PODS, ALL_V6: PODS}, id="all there is"),
    ],
)
def test_where_pods_are_is_told_for_each_family(ranges, node, entries):
    wanted = {ADDRESS_RANGE.packer.pack(bits, parse_address(text)): flags for (bits, text), flags in entries.items()}

    found = range_entries(PodDetection(tuple(ranges)), node)
    assert wanted == {key: int.from_bytes(value, sys.byteorder) for key, value in found.items()}
    assert range_entries(PodDetection(tuple(ranges), bridge="br0"), node) == {}


BOTH_SPOKEN = (address("192.0.2.1", device=4), address("fd00::1", device=4))


@pytest.mark.parametrize(
    ("pods", "node", "spoken", "said"),
    [
        pytest.param(PodDetection(("10.0.0.0/8", "fd00::/16")), [], BOTH_SPOKEN, [], id="ranges"),
        pytest.param(PodDetection(bridge="br0"), [], BOTH_SPOKEN, [], id="devices"),
        pytest.param(
            PodDetection(),
            ["10.1.0.0/16", "fd01::/16"],
            BOTH_SPOKEN,
            ["IPv4: clusterCIDR is not set: this Node's podCIDRs (10.1.0.0/16)", "IPv6: clusterCIDR is not set"],
            id="the Node's",
        ),
        pytest.param(
            PodDetection(is_by_node=True),
            ["10.1.0.0/16"],
            BOTH_SPOKEN,
            ["IPv6: neither clusterCIDR nor"],
            id="the Node's, as asked for",
        ),
        pytest.param(PodDetection(("10.0.0.0/8",)), [], BOTH_SPOKEN, ["IPv6: neither"], id="one family"),
        pytest.param(PodDetection(("10.0.0.0/8",)), [], BOTH_SPOKEN[:1], [], id="the only family of the node"),
        pytest.param(PodDetection(), [], BOTH_SPOKEN, ["IPv4: neither", "IPv6: neither"], id="none"),
    ],
)
def test_what_stands_in_for_ranges_is_said(pods, node, spoken, said):
    found = list(pods.remarks(Network(DEVICES, spoken), node))

    assert len(found) == len(said)
    assert all(remark.startswith(start) for remark, start in zip(found, said, strict=True))


def test_addresses_that_another_proxy_gave_the_node_are_not_its_own():
    """kube-proxy in IPVS mode leaves every ClusterIP on a device."""
    devices = (Device(2, "eth0"), Device(3, "kube-ipvs0", "dummy"))
    network = Network(devices, (address("192.0.2.1", device=2), address("10.96.0.1", device=3)))

    assert network.local == {parse_address("192.0.2.1")}


@pytest.mark.parametrize(
    ("pods", "own", "expected"),
    [
        (PodDetection(("10.0.0.0/8",)), [], {"10.0.0.0/8": 1, "::/0": 4, "0.0.0.0/0": 0}),
        (
            PodDetection(("10.0.0.0/8", "fd00::/16")),
            ["10.1.0.0/24"],
            {"10.0.0.0/8": 1, "fd00::/16": 1, "10.1.0.0/24": 3},
        ),
        (PodDetection(("10.1.0.0/24", "fd00::/16")), ["10.1.0.0/24"], {"10.1.0.0/24": 3, "fd00::/16": 1}),
        (
            PodDetection(("10.0.0.0/8", "fd00::/16")),
            ["11.1.0.0/24"],
            {"10.0.0.0/8": 1, "fd00::/16": 1, "11.1.0.0/24": 2},
        ),
        (
            PodDetection(("10.1.0.0/24", "fd00::/16")),
            ["10.0.0.0/8"],
            {"10.1.0.0/24": 1, "fd00::/16": 1, "10.0.0.0/8": 2},
        ),
        (PodDetection(bridge="br0"), ["fd00:1::/64"], {"fd00:1::/64": 2}),
        (
            PodDetection(("::/0",)),
            ["10.1.0.0/24", "fd00::/64"],
            {"::/0": 1, "0.0.0.0/0": 0, "10.1.0.0/24": 3, "fd00::/64": 3},
        ),
    ],
    ids=["none", "within", "the same", "elsewhere", "around", "by device", "of everything"],
)
def test_the_longest_prefix_says_whose_pods_are_there(pods, own, expected):
    written = {range_key(text): flags.to_bytes(4, "little") for text, flags in expected.items()}

    assert range_entries(pods, own, own) == written


def range_key(text: str) -> bytes:
    network = ipaddress.ip_network(text)
    bits = network.prefixlen + (96 if network.version == 4 else 0)
    return ADDRESS_RANGE.packer.pack(bits, parse_address(str(network.network_address)))
