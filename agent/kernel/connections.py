"""The sweep of subjects' connections: entries that were silent too long.

As of tracked flows (conntrack.py): each entry is read again right before it is deleted.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from agent.core.connections import Expiry
from agent.core.flows import Timeouts
from agent.kernel import bpf
from agent.kernel.map_walk import EMPTY_PERIOD_S, PERIOD_S, MapWalk


class _Pass(MapWalk):
    """One walk over the map, and what is over at that time."""

    def __init__(self, connections: bpf.Map, expiry: Expiry) -> None:
        super().__init__(connections, expiry.suspects)
        self.expiry = expiry


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
        self._pass: _Pass | None = None

    @property
    def due_at(self) -> float:
        """When the next turn is to be taken, in monotonic seconds."""
        return 0.0 if self._pass else self._due_at

    def turn(self, now: float) -> None:
        """Do a slice of work. Raises: OSError."""
        current = self._pass = self._pass or _Pass(self._map, Expiry(self._timeouts, int(now)))
        try:
            is_done = current.turn(functools.partial(self._decide, current.expiry))
        except BaseException:
            self._end(now + PERIOD_S)
            raise
        if is_done:
            self._on_pass(current.entries)
            self._end(now + (PERIOD_S if current.entries else EMPTY_PERIOD_S))

    def _end(self, due_at: float) -> None:
        self._pass = None
        self._due_at = due_at

    def _decide(self, expiry: Expiry, keys: list[bytes]) -> None:
        """Delete what is over of these."""
        self.deleted += self._map.delete_present([key for key in keys if self._is_over(expiry, key)])

    def _is_over(self, expiry: Expiry, key: bytes) -> bool:
        value = self._map.lookup(key)
        return value is not None and expiry.is_over(key, value)
