"""The dataplane as a whole: hooks on a cgroup of the test's own, from first start over migration to removal."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.abi import BASE_REJECT, Frontend
from agent.core.plan import Plan
from agent.errors import DataplaneError
from agent.kernel import attach, bpf, dataplane
from agent.kernel.dataplane import Dataplane, DataplaneOptions
from agent.kernel.programs import BIND_HOOKS, SOCKET_HOOKS, ProgramOptions
from tests.bpf.conftest import SIZES
from tests.builders import frontend
from tests.lab.polling import until

Open = Callable[..., Dataplane]


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


def test_a_layout_that_was_cut_short_hides_no_other(opened, bpffs):
    plane = opened()
    plane.activate()
    (plane.root / "000000000000").mkdir()

    assert dataplane.active_layout(bpffs) == plane.directory


def test_without_socket_hooks_none_stays_attached(opened, cgroup):
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


def test_removing_nothing_is_no_error(bpffs):
    assert dataplane.remove(bpffs) == []
