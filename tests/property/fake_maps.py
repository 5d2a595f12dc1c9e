"""The kernel's maps in memory: what MapStore does to the real ones, one write at a time.

A verified fake: ``tests/bpf/test_fake_maps.py`` runs the same plans through it and through MapStore.
"""

from __future__ import annotations

import sys
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from typing import NamedTuple

from agent.core.abi import (
    BASE_DROP,
    BASE_REJECT,
    FIRST_FREE_SLOT,
    SLOT,
    Frontend,
    FrontendFlag,
    pack_header,
    unpack_header,
    unpack_source_range,
)
from agent.core.plan import KernelState, Plan, split_slots
from agent.errors import DataplaneError

EMPTY = bytes(SLOT.size)


class Answer(NamedTuple):
    """What a client of a frontend gets: one of ``backends``, or, where there are none, silence or a refusal."""

    backends: frozenset[bytes]
    is_silent: bool = False


REFUSED = Answer(frozenset())
SILENT = Answer(frozenset(), is_silent=True)


class Answers(NamedTuple):
    """What clients inside and outside the cluster get of a frontend, and which source ranges limit them; None = none.

    ``value``: what it is otherwise, affinity and flags.
    """

    inside: Answer
    outside: Answer
    ranges: frozenset[bytes] | None
    value: tuple[int, int]


class FakeMaps:
    """The maps ``frontends``, ``segments`` and ``source_ranges``, of given capacities.

    ``fail_after``: so many more writes succeed, and the next one raises; None = all succeed.
    ``watcher`` is called after every single write.
    """

    def __init__(self, segment_slots: int = 64, frontend_limit: int = 16, source_range_limit: int = 64) -> None:
        self.frontends: dict[bytes, bytes] = {}
        self.source_ranges: dict[bytes, bytes] = {}
        self.source_range_limit = source_range_limit
        self.segments = [EMPTY] * segment_slots
        self.tables: dict[int, bytes] = {}
        """By number, the backends a Maglev table was built for."""
        self.frontend_limit = frontend_limit
        self.writes: Tally[str] = Tally()
        self.fail_after: int | None = None
        self.watcher: Callable[[], None] = lambda: None
        self.segments[BASE_REJECT] = pack_header(0, drop=False)
        self.segments[BASE_DROP] = pack_header(0, drop=True)

    def apply(self, plan: Plan) -> None:
        """Carry a plan out, phase after phase, as MapStore does. Raises: DataplaneError."""
        for write in self.steps(plan):
            if self.fail_after is not None:
                if self.fail_after == 0:
                    raise DataplaneError("writing maps: as the test asked")
                self.fail_after -= 1
            write()
            self.watcher()

    def steps(self, plan: Plan) -> Iterator[Callable[[], None]]:
        """List a plan's writes in MapStore's order, one entry each."""
        for key in plan.source_ranges:
            yield lambda key=key: self._allow(key)
        yield from self._slots(plan.backends)
        for number, backends in plan.tables.items():
            yield lambda number=number, backends=backends: self._build_table(number, backends)
        yield from self._slots(plan.headers)
        for key, value in plan.frontends.items():
            yield lambda key=key, value=value: self._write_frontend(key, value)
        for key in plan.removed_frontends:
            yield lambda key=key: self._delete("frontends", self.frontends, key)
        for key in plan.removed_source_ranges:
            yield lambda key=key: self._delete("source_ranges", self.source_ranges, key)

    def _slots(self, runs: list[tuple[int, bytes]]) -> Iterator[Callable[[], None]]:
        for start, slots in runs:
            for index, slot in enumerate(split_slots(slots), start=start):
                yield lambda index=index, slot=slot: self._write_slot(index, slot)

    def _build_table(self, number: int, backends: bytes) -> None:
        self.writes["maglev_tables"] += 1
        self.tables[number] = backends

    def _write_slot(self, index: int, slot: bytes) -> None:
        if index >= len(self.segments):
            raise DataplaneError("writing maps: [Errno 7] Argument list too long")
        self.segments[index] = slot
        self.writes["segments"] += 1

    def _write_frontend(self, key: bytes, value: bytes) -> None:
        if key not in self.frontends and len(self.frontends) >= self.frontend_limit:
            raise DataplaneError("writing maps: [Errno 7] Argument list too long")
        self.frontends[key] = value
        self.writes["frontends"] += 1

    def _allow(self, key: bytes) -> None:
        if key not in self.source_ranges and len(self.source_ranges) >= self.source_range_limit:
            raise DataplaneError("writing maps: [Errno 28] No space left on device")
        self.source_ranges[key] = (1).to_bytes(4, sys.byteorder)
        self.writes["source_ranges"] += 1

    def _delete(self, name: str, entries: dict[bytes, bytes], key: bytes) -> None:
        self.writes[name] += entries.pop(key, None) is not None

    def read_state(self) -> KernelState:
        """Read back frontends, the segments they lead to (but those that make no sense), and source ranges."""
        frontends = {key: Frontend.unpack(value) for key, value in self.frontends.items()}
        segments, tables = {}, {}
        for base in {base for frontend in frontends.values() for base in (frontend.inside, frontend.outside)}:
            if FIRST_FREE_SLOT <= base < len(self.segments):
                count, drop, table = unpack_header(self.segments[base])
                if base + 1 + count <= len(self.segments):
                    segments[base] = (b"".join(self.segments[base + 1 : base + 1 + count]), drop)
                    if table:
                        tables[base] = table
        return KernelState(frontends, segments, frozenset(self.source_ranges), tables)

    def table_of(self, base: int) -> int:
        """Say which table clients outside choose by in a segment; 0 = none."""
        return unpack_header(self.segments[base]).table

    def answer(self, key: bytes) -> Answer | None:
        """Say what a client inside the cluster gets of a frontend, reading as the programs do; None = no such one."""
        value = self.frontends.get(key)
        return None if value is None else self.answer_at(Frontend.unpack(value).inside)

    def outside(self, key: bytes) -> Answer | None:
        """Say what a client outside the cluster gets."""
        value = self.frontends.get(key)
        return None if value is None else self.answer_at(Frontend.unpack(value).outside)

    def answer_at(self, base: int) -> Answer:
        """Say what a client gets of a segment."""
        count, drop, *_ = unpack_header(self.segments[base])
        return Answer(frozenset(self.segments[base + 1 : base + 1 + count]), drop if not count else False)

    def ranges(self, key: bytes) -> frozenset[bytes] | None:
        """Say which source ranges a frontend answers, without the service; None = it looks at none."""
        frontend = Frontend.unpack(self.frontends[key])
        if not frontend.flags & FrontendFlag.SOURCE_RANGES:
            return None
        unpacked = map(unpack_source_range, self.source_ranges)
        return frozenset(address + bytes([bits]) for ident, address, bits in unpacked if ident == frontend.service)

    def answers(self) -> dict[bytes, Answers]:
        """Say all of it for every frontend."""
        found = {}
        for key, value in self.frontends.items():
            frontend = Frontend.unpack(value)
            rest = (frontend.affinity_timeout, frontend.flags)
            inside, outside = self.answer_at(frontend.inside), self.answer_at(frontend.outside)
            found[key] = Answers(inside, outside, self.ranges(key), rest)
        return found

    def copy(self) -> FakeMaps:
        """Copy the contents, without watcher and failure."""
        twin = FakeMaps(len(self.segments), self.frontend_limit, self.source_range_limit)
        twin.frontends, twin.segments = dict(self.frontends), list(self.segments)
        twin.source_ranges, twin.tables = dict(self.source_ranges), dict(self.tables)
        return twin


class Side(NamedTuple):
    """A frontend as clients on one side of the cluster's border see it."""

    key: bytes
    is_inside: bool

    def base(self, value: bytes) -> int:
        """Read the segment they are led to."""
        frontend = Frontend.unpack(value)
        return frontend.inside if self.is_inside else frontend.outside


class Invariant:
    """Watches a plan being applied, and fails the test at the first write after which a client could be led astray.

    A program reads a frontend, then the header it leads to, then a backend behind that, and any number of writes may
    happen in between: so whatever was led to since the plan began must stay whole until it ends.

    A client may get what it got before, what it gets after, and what the segment it was led to becomes: one whose
    frontend goes, or turns to the other policy's segment, sees that edited until it does.
    """

    def __init__(self, maps: FakeMaps, plan: Plan) -> None:
        self.maps = maps
        after = maps.copy()
        after.apply(plan)
        self.allowed: dict[Side, list[Answer]] = {}
        for holder in (maps, after):
            for key, value in holder.frontends.items():
                for side in (Side(key, is_inside=True), Side(key, is_inside=False)):
                    answers = self.allowed.setdefault(side, [])
                    answers.append(holder.answer_at(side.base(value)))
                    if holder is maps:
                        answers.append(after.answer_at(side.base(value)))
        self.ranges = {
            key: {holder.ranges(key) for holder in (maps, after) if key in holder.frontends}
            for key in maps.frontends.keys() | after.frontends.keys()
        }
        self.staying = maps.frontends.keys() & after.frontends.keys()
        self.backends = {
            side: frozenset[bytes]().union(*(answer.backends for answer in answers))
            for side, answers in self.allowed.items()
        }
        self.seen: dict[Side, dict[int, int]] = {}
        self.check()

    def check(self) -> None:
        """Check every frontend."""
        for key, value in self.maps.frontends.items():
            for side in (Side(key, is_inside=True), Side(key, is_inside=False)):
                base = side.base(value)
                count, *_ = unpack_header(self.maps.segments[base])
                seen = self.seen.setdefault(side, {})
                seen[base] = max(seen.get(base, 0), count)
                self._check_answer(side, base)
                for base, count in seen.items():
                    self._check_slots(side, base, count)
            self._check_ranges(key)
        assert self.staying <= self.maps.frontends.keys(), "a frontend that stays was away for a moment"

    def _check_answer(self, side: Side, base: int) -> None:
        allowed, now = self.allowed[side], self.maps.answer_at(base)
        if len(set(allowed)) == 1:
            assert now == allowed[0], "an untouched service noticed"
        if not now.backends:
            assert now in allowed, "refused or silent although there are backends before and after"

    def _check_slots(self, side: Side, base: int, count: int) -> None:
        assert base + 1 + count <= len(self.maps.segments), "a segment reaches over the end"
        slots = self.maps.segments[base + 1 : base + 1 + count]
        assert self.backends[side].issuperset(slots), "a client got a backend its service has neither before nor after"

    def _check_ranges(self, key: bytes) -> None:
        allowed, now = self.ranges[key], self.maps.ranges(key)
        if now is None:
            assert None in allowed, "everybody gets through"
            return
        limits = [ranges for ranges in allowed if ranges is not None]
        assert limits, "a frontend looks at source ranges that nobody wants"
        assert now <= frozenset[bytes]().union(*limits), "a client gets through that may not"
        assert now >= limits[0].intersection(*limits), "a client is kept out that may come"


def apply_watched(maps: FakeMaps, plan: Plan) -> None:
    """Apply a plan to the maps, checking the invariant after every write. Raises: DataplaneError."""
    invariant = Invariant(maps, plan)
    maps.watcher = invariant.check
    try:
        maps.apply(plan)
    finally:
        maps.watcher = lambda: None
