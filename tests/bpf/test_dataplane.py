"""The dataplane as a whole: hooks on a cgroup of the test's own, from first start over migration to removal."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.abi import BASE_REJECT, FLOW, TUPLE, Frontend
from agent.core.addresses import format_address
from agent.core.network import Network, PodDetection, range_entries
from agent.core.plan import Plan
from agent.errors import DataplaneError
from agent.kernel import attach, bpf, dataplane
from agent.kernel.dataplane import Dataplane, DataplaneOptions
from agent.kernel.netlink import Netlink, read_network
from agent.kernel.programs import BIND_HOOKS, SOCKET_HOOKS, ProgramOptions
from agent.kernel.tc import Clsact
from tests.bpf.conftest import SIZES
from tests.builders import frontend
from tests.lab import netns
from tests.lab.polling import until

Open = Callable[..., Dataplane]
_numbers = itertools.count()


@pytest.fixture
def every() -> list[Dataplane]:
    """The dataplanes that are open."""
    return []


@pytest.fixture
def opened(bpffs: Path, cgroup: Path, every: list[Dataplane]) -> Iterator[Open]:
    """Open dataplanes over one bpffs and one cgroup; at the end, remove them."""

    def open_dataplane(**changes: object) -> Dataplane:
        sizes = changes.pop("sizes", SIZES)
        options = DataplaneOptions(bpffs, changes.pop("cgroup", cgroup), sizes, **changes)  # type: ignore[arg-type]
        for former in every:
            fcntl.flock(former._lock, fcntl.LOCK_UN)  # as the kernel does when an agent is killed
        every.append(Dataplane(options))
        return every[-1]

    yield open_dataplane
    for dataplane_ in every:
        dataplane_.close()
    dataplane.remove(bpffs)


def attached(cgroup: Path) -> dict[bpf.AttachType, tuple[int, ...]]:
    fd = os.open(cgroup, os.O_RDONLY)
    try:
        return {hook: bpf.prog_query(fd, hook) for hook in SOCKET_HOOKS}
    finally:
        os.close(fd)


def ids(plane: Dataplane) -> dict[bpf.AttachType, tuple[int, ...]]:
    return {hook: (bpf.prog_info(fd).id,) for hook, fd in plane.programs.sockets.items()}


def link_ids(plane: Dataplane) -> dict[str, int]:
    found = {}
    for pin in (plane.root / "links").iterdir():
        with attach.closing(bpf.obj_get(pin)) as link:
            found[pin.name] = bpf.link_info(link).id
    return found


def exists(kind: str, ident: int) -> bool:
    command = bpf.Command.PROG_GET_FD_BY_ID if kind == "program" else bpf.Command.MAP_GET_FD_BY_ID
    try:
        os.close(bpf.bpf(command, bpf._attr("=III", ident, 0, 0)))
    except FileNotFoundError:
        return False
    return True


def test_nothing_is_attached_before_it_is_activated(opened, cgroup):
    plane = opened()

    assert not plane.is_migrating
    assert attached(cgroup) == dict.fromkeys(SOCKET_HOOKS, ())


def test_a_first_start_attaches_every_hook_and_the_next_adopts_all(opened, cgroup):
    first = opened()
    assert first.activate() == len(SOCKET_HOOKS)
    assert attached(cgroup) == ids(first)
    links = link_ids(first)

    second = opened()

    assert not second.is_migrating
    assert second.activate() == 0
    assert attached(cgroup) == ids(second) == ids(first)
    assert link_ids(second) == links


def test_a_hook_somebody_detached_is_attached_again(opened, cgroup):
    plane = opened()
    plane.activate()
    (plane.root / "links" / "connect4").unlink()
    until(lambda: attached(cgroup)[bpf.AttachType.CONNECT4] == (), "the hook is empty")

    assert plane.activate() == 1
    assert attached(cgroup) == ids(plane)


def test_other_programs_take_the_links_over_and_the_former_go(opened, cgroup):
    first = opened()
    first.activate()
    links, former = link_ids(first), ids(first)
    second = opened(programs=ProgramOptions(remember_peer=False))
    assert not second.is_migrating, "the same maps: nothing to fill first"

    assert second.activate() == len(SOCKET_HOOKS)
    assert attached(cgroup) == ids(second) != former
    assert link_ids(second) == links, "links are updated, not made anew"
    assert len(list(second.directory.glob("programs_*"))) == 1


def test_another_layout_is_filled_before_the_hooks_turn_to_it(opened, cgroup):
    first = opened()
    first.activate()
    first.store.apply(Plan(frontends={frontend(): Frontend(1, BASE_REJECT, BASE_REJECT).pack()}))
    links = link_ids(first)
    second = opened(sizes=replace(SIZES, segments=512))

    assert second.is_migrating
    assert attached(cgroup) == ids(first), "until it is activated the former forward"
    assert dataplane.active_layout(first.options.bpffs) == first.directory
    assert second.store.maps["socket_origins"].info.id == first.store.maps["socket_origins"].info.id
    second.activate()

    assert attached(cgroup) == ids(second)
    assert link_ids(second) == links
    assert dataplane.layouts(second.root) == [second.directory]
    assert dataplane.active_layout(first.options.bpffs) == second.directory
    assert not second.is_migrating


def test_maps_that_were_replaced_are_filled_before_the_hooks_turn_to_them(opened):
    opened().activate()
    (opened().directory / "frontends").unlink()

    assert opened().is_migrating


def test_what_begins_while_the_hooks_turn_goes_on(opened, monkeypatch):
    first = opened()
    first.activate()
    former = first.store.maps["conntrack"]
    before, meanwhile, later = (bytes([number]) * former.info.key_size for number in (1, 2, 3))
    former.update(before, bytes(former.info.value_size))
    prove = dataplane.selftest.prove_hook_fires

    def begin_meanwhile(*arguments: object) -> None:
        prove(*arguments)  # type: ignore[arg-type]
        former.update(meanwhile, bytes(former.info.value_size))

    monkeypatch.setattr(dataplane.selftest, "prove_hook_fires", begin_meanwhile)
    second = opened(sizes=replace(SIZES, conntrack=2048))
    second.activate()
    former.update(later, bytes(former.info.value_size))
    second.former.copy(is_older=True)

    assert {key for key, _ in second.store.maps["conntrack"].items()} == {before, meanwhile}


def test_a_former_that_goes_on_is_copied_again(opened):
    """The agent ended before its hooks turned."""
    first = opened()
    first.activate()
    former = first.store.maps["conntrack"]
    key, (old, new) = bytes(former.info.key_size), (bytes([n]) * former.info.value_size for n in (1, 2))
    second = opened(sizes=replace(SIZES, conntrack=2048))
    second.store.maps["conntrack"].update(key, old)
    former.update(key, new)

    second.activate()

    assert second.store.maps["conntrack"].lookup(key) == new


def test_a_layout_that_was_cut_short_hides_no_other(opened, bpffs):
    plane = opened()
    plane.activate()
    (plane.root / "000000000000").mkdir()

    assert dataplane.active_layout(bpffs) == plane.directory


def test_where_sockets_are_not_translated_only_node_ports_are_kept(opened, cgroup):
    opened().activate()
    off = opened(socket_lb=False)
    off.activate()

    assert {hook: found for hook, found in attached(cgroup).items() if found} == {
        hook: ids(off)[hook] for hook in BIND_HOOKS
    }
    assert {pin.name for pin in (off.root / "links").glob("*")} == {hook.name.lower() for hook in BIND_HOOKS}
    assert opened(socket_lb=False).activate() == 0
    assert opened().activate() == len(SOCKET_HOOKS) - len(BIND_HOOKS)


def test_without_a_cgroup_no_hook_stays_attached(opened, cgroup):
    opened().activate()
    off = opened(cgroup=None)
    off.activate()

    assert attached(cgroup) == dict.fromkeys(SOCKET_HOOKS, ())
    assert not list((off.root / "links").glob("*"))


def test_the_self_test_works_in_a_map_that_is_full_of_what_the_planner_allows(opened):
    """A node that is full must be able to start its agent again."""
    plane = opened()
    limit = SIZES.frontends - 1
    value = Frontend(1, BASE_REJECT, BASE_REJECT).pack()
    plane.store.apply(Plan(frontends={frontend(port=1 + i): value for i in range(limit)}))

    plane.activate()

    assert len(plane.store.read_state().frontends) == limit


def test_the_self_test_leaves_nothing_in_the_map(opened):
    plane = opened()
    plane.activate()

    assert plane.store.read_state().frontends == {}


def test_a_cgroup_that_is_not_there_is_a_dataplane_error(opened, tmp_path):
    with pytest.raises(DataplaneError, match="attaching to cgroup"):
        opened(cgroup=tmp_path / "none").activate()


def test_links_of_a_cgroup_that_is_gone_are_replaced(opened, cgroup):
    gone = cgroup.with_name(cgroup.name + "-gone")
    gone.mkdir()
    try:
        opened(cgroup=gone).activate()
    finally:
        gone.rmdir()
    plane = opened()
    plane.activate()

    assert attached(cgroup) == ids(plane)


def test_one_agent_at_a_time(opened, bpffs):
    plane = opened()
    plane.activate()

    with pytest.raises(DataplaneError, match="another agent"):
        Dataplane(plane.options)
    with pytest.raises(DataplaneError, match="another agent"):
        dataplane.remove(bpffs)
    assert plane.activate() == 0, "nothing was touched"


@pytest.mark.parametrize("lost", ["frontends", "segments"])
def test_frontends_without_their_segments_mean_nothing(opened, cgroup, lost):
    """The programs go on with the maps they have; new ones are filled before the hooks turn."""
    first = opened()
    first.activate()
    before = ids(first)
    (first.directory / lost).unlink()
    second = opened()

    assert second.is_migrating
    assert second.store.read_state().frontends == {}
    for name in ("frontends", "segments"):
        assert second.store.maps[name].info.id != first.store.maps[name].info.id
    assert attached(cgroup) == before


def test_a_foreign_pin_among_the_links_does_not_stop_the_removal(opened, bpffs, cgroup):
    plane = opened()
    plane.activate()
    bpf.obj_pin(plane.store.maps["counters"].fd, plane.root / "links" / "foreign")
    fcntl.flock(plane._lock, fcntl.LOCK_UN)

    dataplane.remove(bpffs)

    assert attached(cgroup) == dict.fromkeys(SOCKET_HOOKS, ())
    assert not plane.root.exists()


def test_removal_leaves_nothing(opened, bpffs, cgroup, every):
    plane = opened()
    plane.activate()
    maps = [map_.info.id for map_ in plane.store.maps.values()]
    programs = [ident for (ident,) in ids(plane).values()]
    plane.close()
    dataplane.remove(bpffs)
    every.remove(plane)

    assert attached(cgroup) == dict.fromkeys(SOCKET_HOOKS, ())
    assert not list(bpffs.glob("*"))
    # The kernel frees them when the last reader's grace period is over.
    until(lambda: not any(exists("map", ident) for ident in maps), "maps are gone")
    until(lambda: not any(exists("program", ident) for ident in programs), "programs are gone")


@pytest.fixture
def namespace() -> Iterator[str]:
    """Move the test into a namespace of its own, with the devices v0 and v1."""
    name = f"ebproxy-test-dp-{os.getpid()}-{next(_numbers)}"
    with contextlib.ExitStack() as ends:
        ends.callback(netns.remove, name)
        netns.add(name)
        netns.configure(name, ["link add v0 type veth peer name v1", "addr add 192.0.2.1/24 dev v0"])
        ends.enter_context(netns.entered(name))
        yield name


def network() -> Network:
    with Netlink() as netlink:
        return read_network(netlink)


def packet_programs(plane: Dataplane) -> dict[str, int]:
    return {name: bpf.prog_info(fd).id for name, fd in plane.programs.packets.items()}


def on_devices(plane: Dataplane) -> dict[tuple[str, str], int]:
    """Ask the kernel which of our programs runs where."""
    found = plane.packet_path.attachment.attached()
    return {(socket.if_indextoname(hook.device), hook.direction.name): ident for hook, ident in found.items()}


def expected(plane: Dataplane, *devices: str) -> dict[tuple[str, str], int]:
    ours = packet_programs(plane)
    both = {"INGRESS": ours["tc_ingress"], "EGRESS": ours["tc_egress"]}
    found = {(device, direction): ident for device in devices for direction, ident in both.items()}
    return found | {("lo", "EGRESS"): ours["tc_loopback"]}


def addresses(plane: Dataplane) -> set[str]:
    return {format_address(key) for key, _ in plane.store.maps["node_addresses"].items()}


def device_addresses(plane: Dataplane) -> dict[str, str]:
    """Read the IPv4 addresses to masquerade with, by device; "node" stands for the node's own."""
    found = {}
    for key, value in plane.store.maps["devices"].items():
        ifindex = int.from_bytes(key, "little")
        found[socket.if_indextoname(ifindex) if ifindex else "node"] = format_address(value[:16])
    return found


FORMS = pytest.mark.parametrize("clsact", [False, True], ids=["tcx", "clsact"])


@FORMS
def test_devices_are_followed(opened, namespace, clsact):
    plane = opened(clsact=clsact)
    plane.follow(network(), None)
    assert on_devices(plane) == {}, "nothing is attached before it is activated"
    assert addresses(plane) == {"127.0.0.1", "::1", "192.0.2.1"}, "but the maps are written"
    plane.activate()
    assert on_devices(plane) == expected(plane, "v0", "v1")
    assert device_addresses(plane) == {"node": "192.0.2.1", "v0": "192.0.2.1"}

    netns.configure(namespace, ["link add d0 type veth peer name d1", "addr add 198.51.100.1/24 dev d0"])
    plane.follow(network(), None)
    while plane.is_behind:
        plane.catch_up()
    assert on_devices(plane) == expected(plane, "v0", "v1", "d0", "d1")
    assert addresses(plane) == {"127.0.0.1", "::1", "192.0.2.1", "198.51.100.1"}
    assert device_addresses(plane) == {"node": "192.0.2.1", "v0": "192.0.2.1", "d0": "198.51.100.1"}

    netns.configure(namespace, ["link del d0", "addr del 192.0.2.1/24 dev v0"])
    plane.follow(network(), None)
    assert on_devices(plane) == expected(plane, "v0", "v1")
    assert addresses(plane) == {"127.0.0.1", "::1"}
    assert device_addresses(plane) == {}
    assert plane.faults == ()


@FORMS
def test_what_runs_on_devices_is_adopted(opened, namespace, clsact):
    first = opened(clsact=clsact)
    first.follow(network(), None)
    first.activate()
    before = on_devices(first)

    second = opened(clsact=clsact)
    assert not second.is_migrating
    second.follow(network(), None)
    assert second.activate() == 0

    assert on_devices(second) == before
    assert second.store.writes.total() == 0


@FORMS
def test_another_layout_takes_devices_over(opened, namespace, clsact):
    """Also where no socket hook says that another layout is in use."""
    first = opened(clsact=clsact, cgroup=None)
    first.follow(network(), None)
    first.activate()
    flow = bytes(TUPLE.size), bytes(FLOW.size)
    first.store.maps["conntrack"].update(*flow)

    second = opened(clsact=clsact, cgroup=None, sizes=replace(SIZES, segments=512))
    second.follow(network(), None)

    assert second.is_migrating
    assert on_devices(second) == expected(first, "v0", "v1"), "until it is activated the former forward"
    assert dataplane.active_layout(first.options.bpffs) == first.directory
    second.activate()
    assert on_devices(second) == expected(second, "v0", "v1")
    assert dataplane.layouts(second.root) == [second.directory]
    assert second.store.maps["conntrack"].lookup(flow[0]) == flow[1], "tracked flows go on"


@pytest.mark.parametrize("later", [False, True], ids=["to links", "to filters"])
def test_another_way_to_attach_leaves_nothing_of_the_former(opened, namespace, later):
    first = opened(clsact=not later)
    first.follow(network(), None)
    first.activate()

    second = opened(clsact=later)
    second.follow(network(), None)
    second.activate()

    assert on_devices(first) == {}
    assert on_devices(second) == expected(second, "v0", "v1")


@FORMS
def test_what_somebody_did_to_the_node_is_undone(opened, namespace, clsact):
    plane = opened(clsact=clsact)
    plane.follow(network(), ("10.1.0.0/16",))
    plane.activate()
    assert plane.reattach() == 0
    before = {name: dict(plane.store.maps[name].items()) for name in ("node_addresses", "devices", "pod_ranges")}

    for name, entries in before.items():
        plane.store.maps[name].delete(next(iter(entries)))
    plane.store.maps["node_addresses"].update(bytes(15) + b"\7", b"\1\0\0\0")
    plane.packet_path.attachment.detach(next(iter(plane.packet_path.attachment.attached())))

    assert plane.reattach() == 5
    assert {name: dict(plane.store.maps[name].items()) for name in before} == before
    assert on_devices(plane) == expected(plane, "v0", "v1")


@pytest.mark.parametrize(
    ("pods", "node", "there"),
    [
        pytest.param(
            PodDetection(("10.0.0.0/8", "fd00::/16")), ("10.1.0.0/16",), {"10.0.0.0/8", "fd00::/16"}, id="ranges"
        ),
        pytest.param(PodDetection(), ("10.1.0.0/16", "fd01::/16"), {"10.1.0.0/16", "fd01::/16"}, id="the Node's"),
        pytest.param(
            PodDetection(("10.0.0.0/8",)), ("10.1.0.0/16", "fd01::/16"), {"10.0.0.0/8", "fd01::/16"}, id="one of each"
        ),
        pytest.param(PodDetection(), None, {"10.9.0.0/16", "fd09::/16"}, id="a Node that is not known yet: as before"),
        pytest.param(
            PodDetection(("10.0.0.0/8",)), None, {"10.9.0.0/16", "fd09::/16"}, id="not known yet, and one is needed"
        ),
    ],
)
def test_the_ranges_of_pods(opened, namespace, pods, node, there):
    plane = opened(pods=pods)
    for entry in range_entries(PodDetection(("10.9.0.0/16", "fd09::/16")), ()).items():
        plane.store.maps["pod_ranges"].update(*entry)

    plane.follow(network(), node)

    assert dict(plane.store.maps["pod_ranges"].items()) == range_entries(PodDetection(tuple(there)), ())


@pytest.mark.parametrize("pods", [PodDetection(), PodDetection(bridge="br0")], ids=["nobody", "devices"])
def test_without_ranges_of_pods(opened, namespace, pods):
    plane = opened(pods=pods)

    plane.follow(network(), ())

    there = dict(plane.store.maps["pod_ranges"].items())
    assert there == range_entries(pods, ())
    assert bool(there) == pods.needs_node


def test_what_tells_pods_is_said_once(opened, namespace, caplog):
    plane = opened(pods=PodDetection(("fd01::/16",)))

    for node in (None, (), (), ("10.1.0.0/16",), ("10.1.0.0/16",)):
        plane.follow(network(), node)

    said = [record.message.split(": ")[1] for record in caplog.records if record.name == "ebproxy.dataplane"]
    assert [text.split(" ", 1)[0] for text in said] == ["neither", "clusterCIDR"]


def test_more_addresses_than_there_is_room_for_are_a_fault_and_no_failure(opened, namespace):
    plane = opened(sizes=replace(SIZES, node_addresses=2))

    plane.follow(network(), None)
    plane.activate()

    assert [fault for fault in plane.faults if "node_addresses" in fault]
    assert on_devices(plane) == expected(plane, "v0", "v1")
    netns.configure(namespace, ["addr del 192.0.2.1/24 dev v0"])
    plane.follow(network(), None)
    assert plane.faults == ()
    assert addresses(plane) == {"127.0.0.1", "::1"}


@FORMS
def test_removal_leaves_nothing_on_devices(opened, bpffs, every, namespace, clsact):
    plane = opened(clsact=clsact)
    plane.follow(network(), None)
    plane.activate()
    programs = list(packet_programs(plane).values())
    plane.close()
    dataplane.remove(bpffs)
    every.remove(plane)

    assert Clsact().attached() == {}
    for device in network().devices:
        assert [bpf.prog_query(device.ifindex, direction) for direction in bpf.Direction] == [(), ()]
    assert not list(bpffs.glob("*"))
    until(lambda: not any(exists("program", ident) for ident in programs), "programs are gone")


def test_removing_nothing_is_no_error(bpffs):
    assert dataplane.remove(bpffs) == []
