"""The sweep of subjects' connections: entries that were silent too long.

As of tracked flows (conntrack.py): one pass walks the map in batches, a slice of about a millisecond a turn, on the
reconciler's thread, and reads each entry again right before it is deleted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice

from agent.core.connections import Expiry
from agent.core.flows import Timeouts
from agent.kernel import bpf

PERIOD_S = 10.0
"""Between passes; no timeout is shorter."""
_EMPTY_PERIOD_S = 30.0
_BATCH = 1_024
_CHUNK = 32
_TURN_S = 0.001


class _Pass:
    """One walk over the map. ``suspects``: keys of the slice in hand that were not decided yet."""

    def __init__(self, expiry: Expiry, batches: Iterator[tuple[bytes, bytes, int]]) -> None:
        self.expiry = expiry
        self.entries = 0
        self.suspects: Iterator[bytes] = iter(())
        self._batches = batches

    def advance(self) -> bool:
        """Take the next slice in hand; False = that was all."""
        for keys, values, count in self._batches:
            self.entries += count
            self.suspects = iter(self.expiry.suspects(keys, values, count))
            return True
        return False


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
        current = self._pass = self._pass or _Pass(Expiry(self._timeouts, int(now)), self._map.batches(_BATCH))
        try:
            is_done = self._slice(current)
        except BaseException:
            self._end(now + PERIOD_S)
            raise
        if is_done:
            self._on_pass(current.entries)
            self._end(now + (PERIOD_S if current.entries else _EMPTY_PERIOD_S))

    def _end(self, due_at: float) -> None:
        self._pass = None
        self._due_at = due_at

    def _slice(self, current: _Pass) -> bool:
        """Work for about a millisecond; returns whether the pass is done."""
        began = time.perf_counter()
        while time.perf_counter() - began < _TURN_S:
            if not self._decide(current) and not current.advance():
                return True
        return False

    def _decide(self, current: _Pass) -> bool:
        """Decide about a chunk of the slice in hand, and delete what is over; False = nothing was left of it."""
        keys = list(islice(current.suspects, _CHUNK))
        self.deleted += self._map.delete_present([key for key in keys if self._is_over(current.expiry, key)])
        return bool(keys)

    def _is_over(self, expiry: Expiry, key: bytes) -> bool:
        value = self._map.lookup(key)
        return value is not None and expiry.is_over(key, value)
