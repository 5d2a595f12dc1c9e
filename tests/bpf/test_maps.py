"""MapStore and bpf(2) against the kernel's maps."""

from __future__ import annotations

import errno
import itertools
import os
import sys
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.abi import (
    BASE_DROP,
    BASE_REJECT,
    SLOT,
    U32,
    U64,
    Counter,
    Frontend,
    FrontendFlag,
    FrontendKind,
    MapKind,
    MapSizes,
    map_specs,
    pack_header,
    pack_source_range,
)
from agent.core.addresses import AddressRange, parse_address
from agent.core.plan import KernelState, Plan
from agent.errors import DataplaneError
from agent.kernel import bpf
from agent.kernel.maps import MapStore
from tests.bpf.conftest import SIZES, SPECS
from tests.builders import frontend, pods


def u32(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


def ids(store: MapStore) -> dict[str, int]:
    return {name: opened.info.id for name, opened in store.maps.items()}


def new_map(kind: bpf.MapType, entries: int = 8, value_size: int = 8) -> bpf.Map:
    flags = bpf.NO_PREALLOC if kind is bpf.MapType.HASH else 0
    return bpf.Map(bpf.map_create(kind, 4, value_size, entries, flags, "test"))


# MapStore


def test_maps_are_made_as_specified(store):
    for spec in SPECS:
        info = store.maps[spec.name].info

        assert (info.key_size, info.value_size, info.max_entries) == (spec.key.size, spec.value.size, spec.max_entries)
        assert info.name == spec.name[:15]


def test_the_shared_segments_are_there_from_the_start(store):
    segments = store.maps["segments"]

    assert segments.lookup(u32(BASE_REJECT)) == pack_header(0, drop=False)
    assert segments.lookup(u32(BASE_DROP)) == pack_header(0, drop=True)


def test_opening_again_adopts_every_map(store, bpffs):
    again = MapStore.open(bpffs / "maps", SPECS)

    assert ids(again) == ids(store)
    again.close()


CHANGES = [
    pytest.param(spec, change, id=f"{change}-{spec.name}")
    for change, spec in itertools.product(("value size", "entries", "kind"), SPECS)
    if change != "value size" or spec.kind not in {MapKind.RINGBUF, MapKind.PROG_ARRAY}  # which the kernel decides
]


@pytest.mark.parametrize(("spec", "change"), CHANGES)
def test_a_map_that_is_not_as_specified_is_made_anew_and_the_others_stay(store, bpffs, spec, change):
    sizes = {"key": U32, "value": U32, "max_entries": 8} if spec.kind is MapKind.RINGBUF else {}
    changed = {
        "value size": replace(spec, value=U64 if spec.value.size != 8 else SLOT),
        "entries": replace(spec, max_entries=spec.max_entries * 2),
        "kind": replace(spec, kind=MapKind.LRU_HASH if spec.kind is not MapKind.LRU_HASH else MapKind.HASH, **sizes),
    }[change]
    path = bpffs / "maps" / spec.name
    path.unlink()
    flags = bpf.NO_PREALLOC if changed.kind in {MapKind.HASH, MapKind.LPM_TRIE} else 0
    kind = bpf.MapType[changed.kind.name]
    foreign = bpf.map_create(kind, changed.key.size, changed.value.size, changed.max_entries, flags, spec.name)
    bpf.obj_pin(foreign, path)
    os.close(foreign)

    again = MapStore.open(bpffs / "maps", SPECS)

    # Frontends and segments mean nothing without each other.
    anew = {"frontends", "segments"} if spec.name in {"frontends", "segments"} else {spec.name}
    assert {name for name in ids(again) if ids(again)[name] != ids(store)[name]} == anew
    assert again.maps[spec.name].info.max_entries == spec.max_entries
    assert again.maps[spec.name].info.value_size == spec.value.size
    again.close()


def test_what_holds_the_state_of_sockets_is_carried_over_to_another_layout(store, bpffs):
    larger = map_specs(replace(SIZES, segments=512, peer_origins=128))
    again = MapStore.open(bpffs / "larger", larger, former=(bpffs / "maps",))

    shared = {name for name in ids(again) if ids(again)[name] == ids(store)[name]}
    stateful = {"socket_origins", "conntrack", "connections", "counters", "policy_counters", "policy_states"}
    assert shared == stateful, "peer_origins changed; the others hold no state"
    again.close()


def test_a_directory_that_cannot_hold_maps_is_a_dataplane_error(tmp_path):
    with pytest.raises(DataplaneError, match="frontends"):
        MapStore.open(tmp_path, SPECS)


def test_a_map_larger_than_the_kernel_allows_is_a_dataplane_error(bpffs):
    with pytest.raises(DataplaneError, match="segments"):
        MapStore.open(bpffs / "maps", map_specs(MapSizes(segments=2**32 - 1)))


def test_a_plan_is_written_and_read_back(store):
    slots = b"".join(pods(3))
    value = Frontend(5, 16, 16).pack()
    plan = Plan(backends=[(17, slots)], headers=[(16, pack_header(3, drop=False))], frontends={frontend(): value})
    store.apply(plan)

    assert store.read_state() == KernelState({frontend(): Frontend(5, 16, 16)}, {16: (slots, False)})
    assert store.writes == {"segments": 4, "frontends": 1}

    store.apply(Plan(removed_frontends={frontend(): None, frontend(port=9): None}))

    assert store.read_state() == KernelState({}, {})
    assert store.writes == {"segments": 4, "frontends": 2}, "one that was not there is not counted"


def test_both_segments_of_a_frontend_and_its_source_ranges_are_read_back(store):
    ranges = [pack_source_range(5, *AddressRange.parse(text)) for text in ("10.0.0.0/8", "fd00::/8")]
    value = Frontend(5, 16, 24, 60, FrontendKind.LOAD_BALANCER | FrontendFlag.SOURCE_RANGES)
    one, two = pods(2)
    plan = Plan(
        source_ranges=dict.fromkeys(ranges),
        backends=[(17, one), (25, two)],
        headers=[(base, pack_header(1, drop=False)) for base in (16, 24)],
        frontends={frontend(): value.pack()},
    )
    store.apply(plan)

    segments = {16: (one, False), 24: (two, False)}
    assert store.read_state() == KernelState({frontend(): value}, segments, frozenset(ranges))
    inside = pack_source_range(5, parse_address("10.255.0.1"), 128)
    assert store.maps["source_ranges"].lookup(inside) == u32(1)
    assert store.maps["source_ranges"].lookup(pack_source_range(6, parse_address("10.255.0.1"), 128)) is None

    gone = pack_source_range(5, *AddressRange.parse("192.0.2.0/24"))
    store.apply(Plan(removed_source_ranges=dict.fromkeys([ranges[0], gone])))
    assert store.read_state().source_ranges == {ranges[1]}
    assert store.writes["source_ranges"] == 3, "one that was not there is not counted"


def test_an_empty_plan_writes_nothing(store):
    store.apply(Plan())

    assert store.writes.total() == 0


def test_a_write_that_the_kernel_refuses_is_a_dataplane_error_and_what_was_written_stays(store):
    backends = [(17, pods(1)[0]), (SIZES.segments, pods(1)[0])]
    plan = Plan(backends=backends, headers=[(16, pack_header(1, drop=False))])

    with pytest.raises(DataplaneError):
        store.apply(plan)

    assert store.maps["segments"].lookup(u32(17)) == pods(1)[0]
    assert store.maps["segments"].lookup(u32(16)) == bytes(SLOT.size)


def test_a_full_map_refuses(store):
    entries = {
        frontend(port=1 + i): Frontend(1, 0, 0).pack() for i in range(store.maps["frontends"].info.max_entries + 1)
    }

    with pytest.raises(DataplaneError):
        store.apply(Plan(frontends=entries))


@pytest.mark.parametrize("base", [SIZES.segments - 1, SIZES.segments, 2**32 - 1], ids=["last", "end", "far"])
def test_segments_that_make_no_sense_are_left_out(store, base):
    if base < SIZES.segments:
        store.maps["segments"].update(u32(base), pack_header(7, drop=False))
    store.maps["frontends"].update(frontend(), Frontend(1, base, base).pack())

    assert store.read_state().segments == {}


def test_counters_are_summed_over_cpus(store):
    per_cpu = array("Q", range(1, bpf.possible_cpus() + 1))
    store.maps["counters"].update(u32(Counter.REJECTED), per_cpu.tobytes())

    assert store.read_counters() == dict.fromkeys(Counter, 0) | {Counter.REJECTED: sum(per_cpu)}


def test_existing_maps_open_for_reading(store, bpffs):
    again = MapStore.open_existing(bpffs / "maps")

    assert ids(again) == ids(store)
    again.close()


# The system call itself.

KINDS = pytest.mark.parametrize("kind", [bpf.MapType.HASH, bpf.MapType.ARRAY, bpf.MapType.LRU_HASH])


@KINDS
def test_lookup_and_update(kind):
    opened = new_map(kind)
    opened.update(u32(3), b"abcdefgh")

    assert opened.lookup(u32(3)) == b"abcdefgh"
    assert opened.lookup(u32(99)) is None
    assert opened.info == bpf.MapInfo(kind, opened.info.id, 4, 8, 8, opened.info.flags, "test")
    opened.close()


def test_delete_says_whether_it_was_there():
    opened = new_map(bpf.MapType.HASH)
    opened.update(u32(3), bytes(8))

    assert opened.delete(u32(3))
    assert not opened.delete(u32(3))
    opened.close()


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
@KINDS
def test_batches_read_every_entry_once(kind, count):
    count = max(count, 1) if kind is bpf.MapType.ARRAY else count
    opened = new_map(kind, max(count, 1))
    entries = {u32(i): (i * 7).to_bytes(8, "big") for i in range(count)}
    opened.update_batch(b"".join(entries), b"".join(entries.values()), count)

    read = [pair for keys, values, n in opened.batches(64) for pair in _pairs(keys, values, n)]
    if kind is not bpf.MapType.LRU_HASH:  # which may evict before it is full
        assert len(read) == count
        assert dict(read) == dict(opened.items()) == entries
    assert dict(read).items() <= entries.items()
    opened.close()


def _pairs(keys: bytes, values: bytes, count: int) -> list[tuple[bytes, bytes]]:
    return [(keys[i * 4 : i * 4 + 4], values[i * 8 : i * 8 + 8]) for i in range(count)]


def test_a_batch_that_fails_leaves_what_came_before():
    opened = new_map(bpf.MapType.ARRAY, 4)

    with pytest.raises(OSError, match="MAP_UPDATE_BATCH") as raised:
        opened.update_batch(u32(0) + u32(9) + u32(1), b"a" * 8 + b"b" * 8 + b"c" * 8, 3)

    assert raised.value.errno == errno.E2BIG
    assert (opened.lookup(u32(0)), opened.lookup(u32(1))) == (b"a" * 8, bytes(8))
    opened.close()


def test_delete_batch():
    opened = new_map(bpf.MapType.HASH)
    opened.update_batch(u32(1) + u32(2) + u32(3), bytes(24), 3)
    opened.delete_batch(u32(1) + u32(3), 2)

    assert [key for key, _ in opened.items()] == [u32(2)]
    opened.close()


def test_per_cpu_values_are_padded_to_eight_bytes():
    opened = new_map(bpf.MapType.PERCPU_ARRAY, 2, value_size=4)
    value = b"".join(u32(cpu + 1) + bytes(4) for cpu in range(bpf.possible_cpus()))
    opened.update(u32(1), value)

    assert opened.lookup(u32(1)) == value
    assert dict(opened.items())[u32(1)] == value
    opened.close()


def test_pins(bpffs: Path):
    opened = new_map(bpf.MapType.HASH)
    bpf.obj_pin(opened.fd, bpffs / "pin")
    again = bpf.Map(bpf.obj_get(bpffs / "pin"))

    assert again.info.id == opened.info.id
    with pytest.raises(FileExistsError):
        bpf.obj_pin(opened.fd, bpffs / "pin")
    with pytest.raises(FileNotFoundError):
        bpf.obj_get(bpffs / "none")
    opened.close()
    again.close()


def test_a_bad_descriptor_says_what_was_asked():
    with pytest.raises(OSError, match="OBJ_GET_INFO_BY_FD"):
        bpf.map_info(2**20)
