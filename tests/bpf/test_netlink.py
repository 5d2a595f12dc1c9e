"""rtnetlink on a real kernel: what is read is what `ip` shows, and what changes is told."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.core.addresses import format_address
from agent.core.network import AddressFlag, Network
from agent.kernel import netlink
from agent.kernel.follower import NetworkFollower
from agent.kernel.netlink import Kind, Netlink, read_network
from tests.lab import netns
from tests.lab.polling import until
from tests.requirements import require_root

_numbers = itertools.count()
DEVICES = [
    "link add v0 type veth peer name v1",
    "link add br0 type bridge",
    "link set v1 master br0",
    "link add vx0 type vxlan id 7 dstport 4789",
    "link set v0 up",
    "link set v1 up",
    "link set br0 up",
]


@pytest.fixture
def namespace() -> Iterator[str]:
    """Move the test into a namespace of its own."""
    require_root()
    name = f"ebproxy-test-nl-{os.getpid()}-{next(_numbers)}"
    with contextlib.ExitStack() as ends:
        ends.callback(netns.remove, name)
        netns.add(name)
        ends.enter_context(netns.entered(name))
        yield name


def read() -> Network:
    with Netlink() as opened:
        return read_network(opened)


def names() -> set[str]:
    return {device.name for device in read().devices}


def test_devices_are_those_that_ip_shows(namespace):
    netns.configure(namespace, DEVICES)
    shown = json.loads(netns.ip("-n", namespace, "-j", "-d", "link"))

    found = {device.name: device for device in read().devices}

    assert {"lo", "v0", "v1", "br0", "vx0"} <= found.keys()
    assert found.keys() == {link["ifname"] for link in shown}
    for link in shown:
        device = found[link["ifname"]]
        assert device.ifindex == link["ifindex"]
        assert device.kind == link.get("linkinfo", {}).get("info_kind", "")
        assert device.master_kind == link.get("linkinfo", {}).get("info_slave_kind", "")
        assert device.master == (found[link["master"]].ifindex if "master" in link else 0)
        assert (device.hardware == 1) == (link["link_type"] == "ether")
        assert (device.hardware == 772) == (link["link_type"] == "loopback")


def test_addresses_are_those_that_ip_shows(namespace):
    netns.configure(
        namespace,
        [
            *DEVICES,
            "addr add 192.0.2.1/24 dev v0",
            "addr add 192.0.2.2/24 dev v0",
            "addr add 10.0.0.1 peer 10.0.0.2/32 dev br0",
            "addr add 169.254.1.1/32 dev v0 scope link",
            "addr add fd00::1/64 dev v0 nodad",
            "addr add fd00::2/128 dev v0 nodad preferred_lft 0",
        ],
    )
    shown = [
        (link["ifindex"], address["local"], address["prefixlen"], address["scope"], bool(address.get("secondary")))
        for link in json.loads(netns.ip("-n", namespace, "-j", "addr"))
        for address in link["addr_info"]
    ]
    scopes = {0: "global", 253: "link", 254: "host"}

    found = [
        (
            address.device,
            format_address(address.address),
            address.prefix_bits - (96 if address.is_ipv4 else 0),
            scopes[address.scope],
            bool(address.flags & AddressFlag.SECONDARY),
        )
        for address in read().addresses
    ]

    assert sorted(found) == sorted(shown)
    assert (socket.if_nametoindex("v0"), "192.0.2.2", 24, "global", True) in found
    deprecated = {format_address(each.address) for each in read().addresses if each.flags & AddressFlag.DEPRECATED}
    assert deprecated == {"fd00::2"}


@pytest.mark.parametrize(
    ("routes", "sources"),
    [
        pytest.param([], set(), id="none"),
        pytest.param(["route add default via 192.0.2.254"], {"192.0.2.1"}, id="the device's address"),
        pytest.param(
            ["route add default via 192.0.2.254 src 198.51.100.1"], {"198.51.100.1"}, id="a source of its own"
        ),
        pytest.param(
            ["route add default via 192.0.2.254", "route add default via fd00::fe"],
            {"192.0.2.1", "fd00::1"},
            id="both families",
        ),
        pytest.param(["route add 10.0.0.0/8 via 192.0.2.254"], set(), id="other routes do not count"),
    ],
)
def test_what_the_default_routes_leave_from(namespace, routes, sources):
    addresses = ["192.0.2.1/24 dev v0", "198.51.100.1/32 dev lo", "fd00::1/64 dev v0 nodad"]
    netns.configure(namespace, [*DEVICES, *(f"addr add {address}" for address in addresses), *routes])

    found = read()

    assert {format_address(address) for address in found.sources} == sources
    assert found.uplinks == ({socket.if_nametoindex("v0")} if sources else frozenset())


def test_a_refusal_is_an_error_with_its_number(namespace):
    with Netlink() as opened, pytest.raises(OSError, match="No such device") as raised:
        opened.do(Kind.SET_LINK, netlink._LINK.pack(socket.AF_UNSPEC, 0, 9999, 0, 0))

    assert isinstance(raised.value, OSError)


def settings(device: str = "lo") -> dict[str, str]:
    root = Path("/proc/sys/net/ipv4/conf", device)
    return {path.name: path.read_text().strip() for path in root.iterdir()}


def test_lo_is_opened_and_closed_again_and_nothing_else_is_touched(namespace):
    before, others = settings(), settings("default")
    assert (before["accept_local"], before["route_localnet"]) == ("0", "0")

    opened = netlink.open_loopback()

    assert set(opened) == {"accept_local", "route_localnet"}
    assert settings() == before | dict.fromkeys(opened, "1")
    assert settings("default") == others
    assert netlink.open_loopback() == (), "an agent that starts again changed nothing"
    netlink.close_loopback(opened)
    assert settings() == before


def test_what_was_open_before_stays_open(namespace):
    Path("/proc/sys/net/ipv4/conf/lo/accept_local").write_text("1")

    opened = netlink.open_loopback()
    netlink.close_loopback(opened)

    assert opened == ("route_localnet",)
    assert settings()["accept_local"] == "1"


@pytest.fixture
def told(namespace: str) -> Iterator[tuple[NetworkFollower, list[Network]]]:
    """Give a follower that is not started, and what it will tell."""
    heard: list[Network] = []
    follower = NetworkFollower(heard.append)
    yield follower, heard
    follower.stop()


def last_names(heard: list[Network]) -> set[str]:
    return {device.name for device in heard[-1].devices}


@pytest.mark.parametrize(
    ("before", "change", "holds"),
    [
        pytest.param([], "link add v0 type veth peer name v1", lambda: "v0" in names(), id="a device comes"),
        pytest.param(DEVICES, "link del v0", lambda: "v0" not in names(), id="a device goes"),
        pytest.param(DEVICES, "link set v1 nomaster", None, id="a port leaves its bridge"),
        pytest.param(DEVICES, "addr add 192.0.2.1/24 dev v0", None, id="an address"),
        pytest.param(DEVICES, "addr add fd00::1/64 dev v0 nodad", None, id="an IPv6 address"),
        pytest.param(
            [*DEVICES, "addr add 192.0.2.1/24 dev v0"], "addr del 192.0.2.1/24 dev v0", None, id="an address goes"
        ),
        pytest.param(
            [*DEVICES, "addr add 192.0.2.1/24 dev v0"], "route add default via 192.0.2.9", None, id="a default route"
        ),
        pytest.param(
            [*DEVICES, "addr add fd00::1/64 dev v0 nodad"], "route add default via fd00::9", None, id="an IPv6 default"
        ),
    ],
)
def test_a_change_is_told_at_once(namespace, told, before, change, holds):
    follower, heard = told
    if before:
        netns.configure(namespace, before)
    follower.start()
    until(lambda: heard[-1] == read(), "what was there first is told")
    count = len(heard)

    netns.configure(namespace, [change])
    changed_at = time.monotonic()

    until(lambda: len(heard) > count and heard[-1] == read(), "the change is told")
    assert time.monotonic() - changed_at < 1
    assert holds is None or holds()


def test_a_burst_costs_few_readings(namespace, told):
    follower, heard = told
    lines = [f"link add a{number} type veth peer name b{number}" for number in range(50)]
    netns.configure(namespace, lines)

    follower.start()

    until(lambda: {f"b{number}" for number in range(50)} <= last_names(heard), "all are told")
    assert len(heard) <= 3


def test_messages_that_were_lost_are_made_up_for(namespace, told):
    """The socket overflows before anybody reads it."""
    follower, heard = told
    follower._told.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    netns.configure(namespace, [f"link add a{number} type veth peer name b{number}" for number in range(50)])
    with pytest.raises(OSError, match="No buffer space"):
        follower._told.socket.recv(1 << 17, socket.MSG_PEEK)
    netns.configure(namespace, ["link add late0 type veth peer name late1"])

    follower.start()

    until(lambda: "late1" in last_names(heard), "all are told")


def test_other_routes_cost_no_reading(namespace, told):
    """A node that speaks BGP sees thousands."""
    follower, heard = told
    netns.configure(namespace, [*DEVICES, "addr add 192.0.2.1/24 dev v0"])
    follower.start()
    until(lambda: heard[-1] == read(), "what was there first is told")
    readings = []
    follower._read = lambda: readings.append(1)  # type: ignore[method-assign]

    netns.configure(namespace, ["route add 10.1.0.0/16 via 192.0.2.9"])
    netns.configure(namespace, ["addr add 192.0.2.77/24 dev v0"])

    until(lambda: readings, "the address is noticed, which came after the route")
    assert len(readings) == 1


def test_a_follower_that_never_started_can_be_stopped(told):
    follower, heard = told

    assert heard == []
    follower.stop()
