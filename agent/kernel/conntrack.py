"""The sweep of tracked flows: entries that were silent too long, and UDP flows that stick to what is gone.

One pass walks the whole map in batches, a slice of about a millisecond a turn, so that a change of endpoints never
waits for it. It runs on the reconciler's thread. Reading by batches leaves the order of eviction alone.

An entry that looks over is read again, with its pair, right before both are deleted. A packet may still come by in
between, within a millisecond: its flow is then entered anew by the next one, as if the packet had been that much later.
"""

from __future__ import annotations

import functools
import time
from collections import Counter as Tally
from collections.abc import Callable, Container, Iterable, Mapping
from typing import NamedTuple

from agent.core.addresses import family_of
from agent.core.flows import Flow, Losses, Sweep, Timeouts, UdpServices, udp_ends
from agent.core.plan import Placement
from agent.core.records import Family, ObjectKey
from agent.kernel import bpf
from agent.kernel.map_walk import EMPTY_PERIOD_S, PERIOD_S, MapWalk
from agent.kernel.sockets import StaleSockets

_REST_FACTOR = 10
"""A pass that was asked for begins this many times the cost of the last one after it, at the earliest."""


class Undecided(NamedTuple):
    """What a former agent left and nobody has claimed yet: service ids, and UDP frontends as 18 bytes."""

    ids: frozenset[int]
    frontends: frozenset[bytes]


class Swept(NamedTuple):
    """What a pass cost and found; ``stale``: entries deleted because what they lead to is gone."""

    duration_s: float
    entries: int
    stale: Mapping[Family, int]


class _Pass(MapWalk):
    """One walk over the map, and what it is to find. ``stale``: how many entries led to what is gone."""

    def __init__(self, conntrack: bpf.Map, sweep: Sweep) -> None:
        super().__init__(conntrack, sweep.suspects)
        self.sweep = sweep
        self.stale: Tally[Family] = Tally()


class FlowSweep:
    """Keeps the conntrack map free of what is over. ``note`` what is planned; take a ``turn`` whenever it ``is_due``.

    ``deleted`` counts entries, by why: ``silent`` or ``stale``.
    """

    def __init__(self, conntrack: bpf.Map, timeouts: Timeouts, sockets: StaleSockets, services: UdpServices) -> None:
        self.services = services
        self.sockets = sockets
        self.deleted: Tally[str] = Tally()
        self.on_pass: Callable[[Swept], None] = lambda _: None
        """Called after each pass."""
        self._due_at = time.monotonic() + PERIOD_S
        self._map = conntrack
        self._timeouts = timeouts
        self._pass: _Pass | None = None
        self._is_asked = False
        self._checks_sockets = False
        self._rest_until = 0.0

    def note(self, key: ObjectKey, placements: Iterable[Placement]) -> None:
        """Take in what a Service has in the kernel now; what it lost is looked for from the next turn on."""
        self._lose(self.services.note(key, placements))

    def note_all(self, keys: Container[ObjectKey]) -> None:
        """Forget the Services that are not among these."""
        for key in self.services.missing(keys):
            self.note(key, ())

    def note_removed(self, frontends: Iterable[bytes]) -> None:
        """Take in that frontends of whoever are gone."""
        self._lose({end: None for end in udp_ends(frontends) if end not in self.services.serving_at})

    def check_all(self) -> None:
        """Look for everything that sticks, sockets included: what happened before now was not noted."""
        self._checks_sockets = True
        self._ask()

    def _lose(self, losses: Losses) -> None:
        if losses:
            self.sockets.request(losses)
            self._ask()

    def _ask(self) -> None:
        self._is_asked = True
        if self._pass is None:
            self._due_at = min(self._due_at, self._rest_until)

    @property
    def due_at(self) -> float:
        """When the next turn is to be taken, in monotonic seconds."""
        return 0.0 if self._pass else self._due_at

    def turn(self, now: float, find_undecided: Callable[[], Undecided | None]) -> None:
        """Do a slice of work. Asks what is undecided (None = everything: only silence counts). Raises: OSError."""
        current = self._pass = self._pass or self._begin(now, find_undecided())
        try:
            is_done = current.turn(functools.partial(self._decide, current))
        except BaseException:
            self._end(now + PERIOD_S)
            raise
        if is_done:
            self.on_pass(Swept(current.busy_s, current.entries, current.stale))
            self._rest_until = now + _REST_FACTOR * current.busy_s
            self._end(now + (PERIOD_S if current.entries else EMPTY_PERIOD_S))

    def _begin(self, now: float, undecided: Undecided | None) -> _Pass:
        self._is_asked = False
        if undecided is None:
            sweep = Sweep(self._timeouts, int(now))
        else:
            sweep = Sweep(self._timeouts, int(now), self.services, undecided.ids)
            if self._checks_sockets:
                self._checks_sockets = False
                self.sockets.request_all(undecided.frontends)
        return _Pass(self._map, sweep)

    def _end(self, due_at: float) -> None:
        self._pass = None
        self._due_at = due_at
        if self._is_asked:
            self._ask()

    def _decide(self, current: _Pass, keys: list[bytes]) -> None:
        """Delete what is over of these."""
        doomed: dict[bytes, bool] = {}
        for key in keys:
            for flow in self._over(current.sweep, key):
                doomed[flow.key] = current.sweep.is_stale(flow)
        self._map.delete_present(list(doomed))
        for key, is_stale in doomed.items():
            self.deleted["stale" if is_stale else "silent"] += 1
            if is_stale:
                current.stale[family_of(key[:16])] += 1

    def _over(self, sweep: Sweep, key: bytes) -> tuple[Flow, ...]:
        """Read an entry and its pair anew; returns those to delete."""
        flow = self._read(key)
        if flow is None:
            return ()
        pair = self._read(flow.pair_key)
        if pair is not None and not pair.is_pair_of(flow):
            pair = None  # another flow took its place
        if not sweep.is_over(flow, pair):
            return ()
        return (flow, pair) if pair else (flow,)

    def _read(self, key: bytes) -> Flow | None:
        value = self._map.lookup(key)
        return Flow.unpack(key, value) if value is not None else None
