"""Behind which device a pod is: what routes say, what was heard, and what stays known."""

from __future__ import annotations

import math
from collections.abc import Container

import pytest

from agent.core.abi import POD_DEVICE, U32
from agent.core.addresses import parse_address
from agent.core.network import Device, Network
from agent.kernel.pod_devices import PodDevices, pack_pod_device

A4, A6, B4, B6 = map(parse_address, ("10.0.0.1", "fd00::1", "10.0.0.2", "fd00::2"))
A, B = (A4, A6), (B4, B6)
VETHS = {11: Device(11, "veth1", "veth"), 12: Device(12, "veth2", "veth"), 13: Device(13, "veth3", "veth")}
BRIDGE, UPLINK = Device(2, "cni0", "bridge"), Device(3, "eth0")


class Maps:
    """Stands for NodeMaps."""

    def __init__(self) -> None:
        self.entries: dict[bytes, bytes] = {}
        self.writes = 0

    def write(self, name: str, entries: dict[bytes, bytes]) -> int:
        assert name == "pod_devices"
        self.writes += self.entries != entries
        self.entries = dict(entries)
        return 0

    def forget(self) -> None:
        pass


class Node:
    """A node whose routes (configured) and bridge (heard) a test changes."""

    def __init__(self) -> None:
        self.maps = Maps()
        self.routes: dict[bytes, int] = {}
        self.heard: dict[bytes, int] = {}
        self.asked: list[bytes] = []
        self.solicited: list[bytes] = []
        self.now = 100.0
        self.devices = dict(VETHS)
        self.start()

    def start(self) -> None:
        self.finder = PodDevices(self.maps, dict(self.maps.entries), self.ask, self.solicit)  # type: ignore[arg-type]

    def ask(self, address: bytes, bridges: Container[int]) -> tuple[int, bool] | None:
        assert BRIDGE.ifindex in bridges
        assert UPLINK.ifindex not in bridges
        self.asked.append(address)
        if address in self.routes:
            return self.routes[address], True
        return (self.heard[address], False) if address in self.heard else None

    def solicit(self, address: bytes, bridges: Container[int]) -> None:
        assert BRIDGE.ifindex in bridges
        assert UPLINK.ifindex not in bridges
        self.solicited.append(address)

    def turn(
        self, *pods: tuple[bytes, ...], without_room: Container[bytes] = (), is_new: bool = True
    ) -> dict[int, tuple[bytes, ...]]:
        network = Network((BRIDGE, UPLINK, *self.devices.values()))
        self.finder.turn(self.now, network, pods, without_room, is_new=is_new)
        return {
            U32.packer.unpack(device)[0]: POD_DEVICE.packer.unpack(value) for device, value in self.maps.entries.items()
        }


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.mark.parametrize("how", ["routes", "heard"])
@pytest.mark.parametrize("known", [A, (A4,), (A6,)], ids=["both families", "IPv4", "IPv6"])
def test_one_family_tells_of_both(node, how, known):
    getattr(node, how).update(dict.fromkeys(known, 11))

    assert node.turn(A, B) == {11: A}
    assert node.finder.missing == 1


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [((A4,), (A4, bytes(16))), ((A6,), (bytes(16), A6)), ((A6, A4), (A4, A6))],
    ids=["IPv4", "IPv6", "both"],
)
def test_a_pod_has_of_a_family_what_it_has(addresses, expected):
    assert POD_DEVICE.packer.unpack(pack_pod_device(addresses)) == expected


@pytest.mark.parametrize(
    ("without_room", "expected"),
    [((), {11: A, 12: B}), ((B4,), {11: A, 12: B}), (B, {11: A}), ((*A, *B), {})],
    ids=["all fit", "one of its addresses does", "one does not", "none does"],
)
def test_who_has_no_room_among_the_subjects_has_none_here(node, without_room, expected):
    node.routes |= {A4: 11, B4: 12}

    assert node.turn(A, B, without_room=without_room) == expected
    assert node.finder.places.keys() == {*A, *B}, "it is known, for when there is room"


def test_who_has_no_room_still_makes_a_device_nobodys(node):
    node.routes |= {A4: 11, B4: 11}

    assert node.turn(A, B, without_room=B) == {}


@pytest.mark.parametrize("device", [2, 3, 99], ids=["the bridge", "no pod's kind", "gone"])
def test_only_devices_of_pods_count(node, device):
    node.heard[A4] = device

    assert node.turn(A) == {}


def test_families_that_disagree_tell_nothing(node):
    node.routes |= {A4: 11, A6: 12}

    assert node.turn(A) == {}


def test_a_device_that_several_pods_are_routed_to_is_nobodys(node):
    node.routes |= {A4: 11, B4: 11}

    assert node.turn(A, B) == {}


def test_who_speaks_for_another_does_not_take_its_place(node):
    """It neither frees itself from its own name, nor gets the other's."""
    node.heard |= {A4: 11}
    node.turn(A)
    node.heard |= {A4: 12, B4: 11}

    assert node.turn(A, B) == {11: A}


def test_routes_win_over_what_was_known(node):
    node.heard[A4] = 11
    node.turn(A)
    node.routes[A4] = 12

    assert node.turn(A) == {12: A}


@pytest.mark.parametrize("change", ["the pod goes", "the device goes", "its address changes"])
def test_nothing_is_known_longer_than_it_exists(node, change):
    node.heard[A4] = 11
    node.turn(A)
    if change == "the device goes":
        del node.devices[11]
    node.heard.clear()

    assert node.turn(*{"the pod goes": [], "the device goes": [A]}.get(change, [(A4,)])) == {}


def test_what_was_heard_once_stays_known_also_to_the_next_agent(node):
    node.heard[A4] = 11
    node.turn(A)
    node.heard.clear()
    node.start()
    node.asked.clear()

    assert node.turn(A, is_new=False) == {11: A}
    assert node.asked == []
    assert node.maps.writes == 1


def test_places_are_told_by_address(node):
    node.routes |= {A4: 11, B6: 12}
    node.turn(A, (B6,))

    assert node.finder.places == {A4: 11, A6: 11, B6: 12}


def test_pods_that_were_not_found_are_looked_for_less_and_less_often(node):
    waits = []
    node.routes[A4] = 11
    node.turn(A, B)
    for _ in range(10):
        waits.append(node.finder.due_at - node.now)
        node.now = node.finder.due_at
        node.asked.clear()
        node.turn(A, B, is_new=False)
        assert set(node.asked) == set(B)

    assert waits == sorted(waits)
    assert waits[0] <= 0.1
    assert waits[-1] == 5
    assert sum(waits[:4]) < 2
    node.heard[B6] = 12
    node.turn(A, B, is_new=False)
    assert node.finder.due_at == math.inf
    assert node.finder.missing == 0


def test_the_kernel_is_made_to_ask_for_just_the_pods_that_are_not_known(node):
    node.routes[A4] = 11
    node.turn(A, B)
    assert sorted(node.solicited) == sorted(B)
    node.solicited.clear()
    node.turn(A, B, is_new=False)
    assert sorted(node.solicited) == sorted(B), "until it is known"
    node.solicited.clear()
    node.heard[B4] = 12
    node.turn(A, B, is_new=False)

    assert node.solicited == []
    assert node.maps.entries.keys() == {U32.packer.pack(11), U32.packer.pack(12)}


def test_a_new_pod_is_asked_for_at_once_and_soon_again(node):
    for _ in range(10):
        node.turn(A, is_new=False)
    node.solicited.clear()
    node.turn(A, B)

    assert set(B) <= set(node.solicited)
    assert node.finder.due_at - node.now <= 0.1


def test_whose_device_goes_is_asked_for(node):
    node.heard[A4] = 11
    node.turn(A)
    del node.devices[11]
    node.turn(A)

    assert sorted(node.solicited) == sorted(A)


def test_what_answers_for_a_pod_whose_device_is_known_changes_nothing(node):
    """Neither at once nor later, and not at an agent that starts anew: who answered first keeps its place."""
    node.heard[A4] = 11
    node.turn(A)
    node.heard |= {A4: 12, A6: 12}
    for is_new in (True, False):
        assert node.turn(A, is_new=is_new) == {11: A}
    node.start()

    assert node.turn(A) == {11: A}
    assert node.solicited == []


def test_who_answers_for_one_that_is_not_known_gets_no_second_name(node):
    node.heard[B4] = 12
    node.turn(B)
    node.heard[A4] = 12

    assert node.turn(A, B) == {12: B}
    assert sorted(node.solicited) == sorted(A)
    node.heard[A4] = 11
    assert node.turn(A, B, is_new=False) == {11: A, 12: B}
