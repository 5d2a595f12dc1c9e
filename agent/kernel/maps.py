"""MapStore: the pinned maps of one layout, the only place that writes them.

Maps live at ``<bpffs>/ebproxy/<layout>/<map>``. They are created, or opened and validated, here; BCC never owns one.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter as Tally
from collections.abc import Callable
from pathlib import Path

from agent.core.abi import (
    BASE_DROP,
    BASE_REJECT,
    FIRST_FREE_SLOT,
    MAGLEV_FREE,
    MAGLEV_TABLE,
    Counter,
    Frontend,
    MapKind,
    MapSpec,
    pack_header,
    unpack_header,
)
from agent.core.plan import KernelState, Plan
from agent.errors import DataplaneError
from agent.kernel import bpf

_TYPES = {
    MapKind.HASH: (bpf.MapType.HASH, bpf.NO_PREALLOC),
    MapKind.ARRAY: (bpf.MapType.ARRAY, 0),
    MapKind.PERCPU_ARRAY: (bpf.MapType.PERCPU_ARRAY, 0),
    MapKind.LRU_HASH: (bpf.MapType.LRU_HASH, 0),
    MapKind.LPM_TRIE: (bpf.MapType.LPM_TRIE, bpf.NO_PREALLOC),
    MapKind.RINGBUF: (bpf.MapType.RINGBUF, 0),
    MapKind.PROG_ARRAY: (bpf.MapType.PROG_ARRAY, 0),
}


MAGLEV_NOWHERE = MAGLEV_FREE * (MAGLEV_TABLE.size // len(MAGLEV_FREE))
"""A table that leads to no backend: the programs choose at random instead."""


def _table_key(number: int) -> bytes:
    return (number - 1).to_bytes(4, sys.byteorder)


def _is_alike(info: bpf.MapInfo, spec: MapSpec) -> bool:
    """Whether a map is as specified, but perhaps of another size."""
    kind, flags = _TYPES[spec.kind]
    found = (info.type, info.key_size, info.value_size, info.flags)
    return found == (kind, spec.key.size, spec.value.size, flags)


def open_valid(path: Path, spec: MapSpec, *, of_any_size: bool = False) -> bpf.Map | None:
    """Open a pinned map; None where there is none, or one that is not as specified."""
    try:
        opened = bpf.Map(bpf.obj_get(path))
    except FileNotFoundError:
        return None
    if _is_alike(opened.info, spec) and (of_any_size or opened.info.max_entries == spec.max_entries):
        return opened
    opened.close()
    return None


class MapStore:
    """The maps of one layout, by name. ``writes`` counts entries written and deleted, by map, since start.

    ``build_table`` writes the Maglev table of a number for a segment's backends; where nobody builds any, tables lead
    nowhere.
    """

    def __init__(self, maps: dict[str, bpf.Map]) -> None:
        self.maps = maps
        self.writes: Tally[str] = Tally()
        self.build_table: Callable[[int, bytes], None] = lambda number, _: self.write_table(number, MAGLEV_NOWHERE)

    @classmethod
    def open(cls, directory: Path, specs: tuple[MapSpec, ...], former: tuple[Path, ...] = ()) -> MapStore:
        """Open the maps pinned in a layout's directory; create and pin what is not there.

        A map that holds the state of sockets or connections is shared with a ``former`` layout that has one just like
        it, so that they go on as they were after a migration (``Takeover``: of another size). Raises: DataplaneError.
        """
        directory.mkdir(parents=True, exist_ok=True)
        _drop_halves(directory, specs)
        maps = {}
        for spec in specs:
            try:
                maps[spec.name] = _open_or_create(directory, spec, former)
            except OSError as error:
                raise DataplaneError(f"map {spec.name} in {directory}: {error}") from error
        store = cls(maps)
        store._write_shared_segments()
        return store

    @classmethod
    def open_existing(cls, directory: Path) -> MapStore:
        """Open every map pinned in a directory, for reading. Raises: OSError."""
        pins = (path for path in sorted(directory.iterdir()) if path.is_file())
        return cls({path.name: bpf.Map(bpf.obj_get(path)) for path in pins})

    def close(self) -> None:
        """Close the descriptors; the pins keep the maps."""
        for opened in self.maps.values():
            opened.close()

    def _write_shared_segments(self) -> None:
        for base, drop in ((BASE_REJECT, False), (BASE_DROP, True)):
            key, header = base.to_bytes(4, sys.byteorder), pack_header(0, drop=drop)
            if self.maps["segments"].lookup(key) != header:
                self.maps["segments"].update(key, header)

    def apply(self, plan: Plan) -> None:
        """Carry a plan out, phase after phase. Raises: DataplaneError; what was written before stays."""
        try:
            self._allow(plan.source_ranges)
            self._write_segments([start for start, _ in plan.backends], [slots for _, slots in plan.backends])
            for number, backends in plan.tables.items():
                self.build_table(number, backends)
            self._write_segments([base for base, _ in plan.headers], [header for _, header in plan.headers])
            self._write_frontends(plan.frontends)
            self._delete("frontends", plan.removed_frontends)
            self._delete("source_ranges", plan.removed_source_ranges)
        except OSError as error:
            raise DataplaneError(f"writing maps: {error}") from error

    def _write_segments(self, starts: list[int], runs: list[bytes]) -> None:
        size = self.maps["segments"].info.value_size
        indexes = array("I")
        for start, slots in zip(starts, runs, strict=True):
            indexes.extend(range(start, start + len(slots) // size))
        self.maps["segments"].update_batch(indexes.tobytes(), b"".join(runs), len(indexes))
        self.writes["segments"] += len(indexes)

    def _write_frontends(self, entries: dict[bytes, bytes]) -> None:
        self.maps["frontends"].update_batch(b"".join(entries), b"".join(entries.values()), len(entries))
        self.writes["frontends"] += len(entries)

    def _allow(self, keys: dict[bytes, None]) -> None:
        if keys:
            allowed = (1).to_bytes(4, sys.byteorder)
            self.maps["source_ranges"].update_batch(b"".join(keys), allowed * len(keys), len(keys))
            self.writes["source_ranges"] += len(keys)

    def _delete(self, name: str, keys: dict[bytes, None]) -> None:
        if keys:
            self.writes[name] += self.maps[name].delete_present(list(keys))

    def write_table(self, number: int, table: bytes) -> None:
        """Write a Maglev table. Raises: OSError."""
        self.maps["maglev_tables"].update(_table_key(number), table)
        self.writes["maglev_tables"] += 1

    def read_table(self, number: int) -> bytes:
        """Read a Maglev table. Raises: OSError."""
        return self.maps["maglev_tables"].lookup(_table_key(number)) or b""

    def read_state(self) -> KernelState:
        """Read back frontends, the segments they lead to (but those that make no sense), and source ranges."""
        frontends = {key: Frontend.unpack(value) for key, value in self.maps["frontends"].items()}
        bases = {base for frontend in frontends.values() for base in (frontend.inside, frontend.outside)}
        ranges = frozenset(key for key, _ in self.maps["source_ranges"].items())
        segments, tables = self._read_segments(bases)
        return KernelState(frontends, segments, ranges, tables)

    def read_segments(self, bases: set[int]) -> dict[int, tuple[bytes, bool]]:
        """Read whole segments: backends end to end, and whether an empty one is silent."""
        return self._read_segments(bases)[0]

    def _read_segments(self, bases: set[int]) -> tuple[dict[int, tuple[bytes, bool]], dict[int, int]]:
        """Read whole segments, and the numbers of the tables that their headers name."""
        opened = self.maps["segments"]
        size, capacity = opened.info.value_size, opened.info.max_entries
        segments: dict[int, tuple[bytes, bool]] = {}
        tables: dict[int, int] = {}
        if not bases:
            return segments, tables
        image = b"".join(values[: count * size] for _, values, count in opened.batches(16_384))
        for base in bases:
            if not FIRST_FREE_SLOT <= base < capacity:
                continue
            count, drop, table = unpack_header(image[base * size : (base + 1) * size])
            if base + 1 + count <= capacity:
                segments[base] = (image[(base + 1) * size : (base + 1 + count) * size], drop)
                if table:
                    tables[base] = table
        return segments, tables

    def read_counters(self) -> dict[Counter, int]:
        """Sum the counters over CPUs."""
        totals = {}
        for counter in Counter:
            raw = self.maps["counters"].lookup(counter.to_bytes(4, sys.byteorder)) or b""
            totals[counter] = sum(array("Q", raw))
        return totals


def _drop_halves(directory: Path, specs: tuple[MapSpec, ...]) -> None:
    """Unpin frontends without their segments, and the other way round: each means nothing alone."""
    pair = [spec for spec in specs if spec.name in {"frontends", "segments"}]
    opened = [open_valid(directory / spec.name, spec) for spec in pair]
    for found in filter(None, opened):
        found.close()
    if None in opened:
        for spec in pair:
            (directory / spec.name).unlink(missing_ok=True)


def _open_or_create(directory: Path, spec: MapSpec, former: tuple[Path, ...]) -> bpf.Map:
    path = directory / spec.name
    opened = open_valid(path, spec)
    if opened:
        return opened
    path.unlink(missing_ok=True)
    kind, flags = _TYPES[spec.kind]
    created = _carried_over(spec, former) or bpf.Map(
        bpf.map_create(kind, spec.key.size, spec.value.size, spec.max_entries, flags, spec.name)
    )
    bpf.obj_pin(created.fd, path)
    return created


def _carried_over(spec: MapSpec, former: tuple[Path, ...]) -> bpf.Map | None:
    if not spec.carries_over:
        return None
    return next(filter(None, (open_valid(old / spec.name, spec) for old in former)), None)
