"""The kernel's maps in memory: what MapStore does to the real ones, one write at a time.

A verified fake: ``tests/bpf/test_fake_maps.py`` runs the same plans through it and through MapStore.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator
from typing import NamedTuple

from agent.core.abi import (
    BASE_DROP,
    BASE_REJECT,
    FIRST_FREE_SLOT,
    SLOT,
    Frontend,
    pack_header,
    unpack_header,
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


class FakeMaps:
    """The maps ``frontends`` and ``segments``, of given capacities.

    ``fail_after``: so many more writes succeed, and the next one raises; None = all succeed.
    ``watcher`` is called after every single write.
    """

    def __init__(self, segment_slots: int = 64, frontend_limit: int = 16) -> None:
        self.frontends: dict[bytes, bytes] = {}
        self.segments = [EMPTY] * segment_slots
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
        for start, slots in (*plan.backends, *plan.headers):
            for index, slot in enumerate(split_slots(slots), start=start):
                yield lambda index=index, slot=slot: self._write_slot(index, slot)
        for key, value in plan.frontends.items():
            yield lambda key=key, value=value: self._write_frontend(key, value)
        for key in plan.removed_frontends:
            yield lambda key=key: self._delete_frontend(key)

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

    def _delete_frontend(self, key: bytes) -> None:
        self.writes["frontends"] += self.frontends.pop(key, None) is not None

    def read_state(self) -> KernelState:
        """Read back frontends and the segments they lead to; entries that make no sense are left out."""
        frontends = {key: Frontend.unpack(value) for key, value in self.frontends.items()}
        segments = {}
        for base in {frontend.inside for frontend in frontends.values()}:
            if FIRST_FREE_SLOT <= base < len(self.segments):
                count, drop = unpack_header(self.segments[base])
                if base + 1 + count <= len(self.segments):
                    segments[base] = (b"".join(self.segments[base + 1 : base + 1 + count]), drop)
        return KernelState(frontends, segments)

    def answer(self, key: bytes) -> Answer | None:
        """Say what a client of a frontend gets, reading as the programs do; None = no such frontend."""
        value = self.frontends.get(key)
        if value is None:
            return None
        base = Frontend.unpack(value).inside
        count, drop = unpack_header(self.segments[base])
        return Answer(frozenset(self.segments[base + 1 : base + 1 + count]), drop if not count else False)

    def answers(self) -> dict[bytes, Answer | None]:
        """Say so for every frontend."""
        return {key: self.answer(key) for key in self.frontends}

    def copy(self) -> FakeMaps:
        """Copy the contents, without watcher and failure."""
        twin = FakeMaps(len(self.segments), self.frontend_limit)
        twin.frontends, twin.segments = dict(self.frontends), list(self.segments)
        return twin


class Invariant:
    """Watches a plan being applied, and fails the test at the first write after which a client could be led astray.

    A program reads a frontend, then the header it leads to, then a backend behind that, and any number of writes may
    happen in between: so whatever was led to since the plan began must stay whole until it ends.
    """

    def __init__(self, maps: FakeMaps, plan: Plan) -> None:
        self.maps = maps
        self.before = maps.answers()
        after = maps.copy()
        after.apply(plan)
        self.after = after.answers()
        by_id = {Frontend.unpack(value).service: self.after[key] for key, value in after.frontends.items()}
        for key in self.before.keys() - self.after.keys():
            # One that goes, of a service port that stays, may see what that becomes until it is gone.
            self.after[key] = by_id.get(Frontend.unpack(maps.frontends[key]).service)
        self.staying = maps.frontends.keys() & after.frontends.keys()
        self.seen: dict[bytes, dict[int, int]] = {}
        self.check()

    def check(self) -> None:
        """Check every frontend."""
        for key, value in self.maps.frontends.items():
            base = Frontend.unpack(value).inside
            count, _ = unpack_header(self.maps.segments[base])
            seen = self.seen.setdefault(key, {})
            seen[base] = max(seen.get(base, 0), count)
            self._check_answer(key)
            for base, count in seen.items():
                self._check_slots(key, base, count)
        assert self.staying <= self.maps.frontends.keys(), "a frontend that stays was away for a moment"

    def _check_answer(self, key: bytes) -> None:
        before, after, now = self.before.get(key), self.after.get(key), self.maps.answer(key)
        assert now is not None
        if before == after:
            assert now == before, "an untouched service noticed"
        if not now.backends:
            assert now in (before, after), "refused or silent although there are backends before and after"

    def _check_slots(self, key: bytes, base: int, count: int) -> None:
        assert base + 1 + count <= len(self.maps.segments), "a segment reaches over the end"
        allowed: set[bytes] = set()
        for answer in (self.before.get(key), self.after.get(key)):
            allowed |= answer.backends if answer else frozenset()
        for slot in self.maps.segments[base + 1 : base + 1 + count]:
            assert slot in allowed, "a client got a backend its service has neither before nor after"


def apply_watched(maps: FakeMaps, plan: Plan) -> None:
    """Apply a plan to the maps, checking the invariant after every write. Raises: DataplaneError."""
    invariant = Invariant(maps, plan)
    maps.watcher = invariant.check
    try:
        maps.apply(plan)
    finally:
        maps.watcher = lambda: None
