"""Walking a large map a little at a time, on a thread that has other work: what sweeps have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice

from agent.kernel import bpf

PERIOD_S = 10.0
"""Between walks; no timeout of an entry is shorter."""
EMPTY_PERIOD_S = 30.0
"""After one that found nothing at all."""
_BATCH = 1_024
_CHUNK = 32
_TURN_S = 0.001

Choose = Callable[[bytes, bytes, int], list[bytes]]
"""Takes the keys and the values of a batch, end to end, and how many; returns the keys that are worth a second look."""


class MapWalk:
    """One walk over a map. ``entries`` and ``busy_s``: what it came by and cost so far."""

    def __init__(self, walked: bpf.Map, choose: Choose) -> None:
        self.entries = 0
        self.busy_s = 0.0
        self._batches = walked.batches(_BATCH)
        self._choose = choose
        self._suspects: Iterator[bytes] = iter(())

    def turn(self, decide: Callable[[list[bytes]], None]) -> bool:
        """Work for about a millisecond, handing over what was chosen; returns whether that was all.

        Raises: OSError.
        """
        began = time.perf_counter()
        try:
            while time.perf_counter() - began < _TURN_S:
                keys = list(islice(self._suspects, _CHUNK))
                if keys:
                    decide(keys)
                elif not self._advance():
                    return True
        finally:
            self.busy_s += time.perf_counter() - began
        return False

    def _advance(self) -> bool:
        """Take the next batch in hand; False = that was all."""
        for keys, values, count in self._batches:
            self.entries += count
            self._suspects = iter(self._choose(keys, values, count))
            return True
        return False
