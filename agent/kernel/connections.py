"""The sweep of subjects' connections: entries that were silent too long.

As of tracked flows (conntrack.py): each entry is read again right before it is deleted.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from agent.core.connections import Expiry
from agent.core.flows import Timeouts
from agent.kernel import bpf
from agent.kernel.map_walk import EMPTY_PERIOD_S, PERIOD_S, MapWalk


class ConnectionSweep:
    """Keeps the map free of what is over; take a ``turn`` whenever it is due. ``on_pass`` is told how many there were.

    ``deleted`` counts entries since start.
    """

    def __init__(self, connections: bpf.Map, timeouts: Timeouts, on_pass: Callable[[int], None]) -> None:
        self.deleted = 0
        self._map = connections
        self._timeouts = timeouts
        self._on_pass = on_pass
        self._due_at = time.monotonic() + PERIOD_S
        self._expiry = Expiry(timeouts, 0)
        self._walk: MapWalk | None = None

    @property
    def due_at(self) -> float:
        """When the next turn is to be taken, in monotonic seconds."""
        return 0.0 if self._walk else self._due_at

    def turn(self, now: float) -> None:
        """Do a slice of work. Raises: OSError."""
        walk = self._walk or self._begin(now)
        try:
            is_done = walk.turn(self._decide)
        except BaseException:
            self._end(now + PERIOD_S)
            raise
        if is_done:
            self._on_pass(walk.entries)
            self._end(now + (PERIOD_S if walk.entries else EMPTY_PERIOD_S))

    def _begin(self, now: float) -> MapWalk:
        self._expiry = Expiry(self._timeouts, int(now))
        self._walk = MapWalk(self._map, self._expiry.suspects)
        return self._walk

    def _end(self, due_at: float) -> None:
        self._walk = None
        self._due_at = due_at

    def _decide(self, keys: list[bytes]) -> None:
        """Delete what is over of these."""
        self.deleted += self._map.delete_present([key for key in keys if self._is_over(key)])

    def _is_over(self, key: bytes) -> bool:
        value = self._map.lookup(key)
        return value is not None and self._expiry.is_over(key, value)
