"""Allocate segments: blocks of slots in one array.

A block has the size of a power of two, or of three quarters of one: a Service that grows moves rarely, and less than a
third of its slots is not used. What is free below the highest block is kept as runs, which grow by neighbours that
become free, sorted by the largest block that fits: a block is taken from the first run of its own size or a larger.

A freed block rests before it is used again, because a program that read its base a moment ago may still be about to
read its slots.
"""

from __future__ import annotations

from collections import deque

from agent.core.abi import FIRST_FREE_SLOT
from agent.errors import CapacityError

REST_S = 1.0
"""How long a freed segment rests, in seconds: many times what a preempted program needs."""


def block_size(slots: int) -> int:
    """Find the smallest block that holds this many slots: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = 1 << (slots - 1).bit_length()
    three_quarters = power - power // 4
    return three_quarters if slots <= three_quarters else power


class SegmentAllocator:
    """Blocks of slots ``[base, base + size)``, whose sizes are those of ``block_size``.

    ``capacity`` is the number of slots of the array; the first two are the shared empty segments. Above the top
    everything is free.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = FIRST_FREE_SLOT
        self._top = FIRST_FREE_SLOT
        self._sizes: dict[int, int] = {}  # of the runs below the top, by base
        self._bases: dict[int, int] = {}  # by end
        self._ranks: list[set[int]] = [set() for _ in range(_rank(capacity) + 1)]  # bases, by what fits
        self._resting: deque[tuple[float, int, int]] = deque()

    def allocate(self, size: int) -> int:
        """Take a block and return its base: where it leaves least, or at the top. Raises: CapacityError."""
        if self._sizes and (runs := next(filter(None, self._ranks[_rank(size) :]), None)):
            base = runs.pop()
            self._add_run(base + size, self._remove_run(base))
        elif self._top + size <= self.capacity:
            base = self._top
            self._top += size
        else:
            raise CapacityError("segments", size, self.capacity)
        self.used += size
        return base

    def reserve(self, base: int, size: int) -> bool:
        """Take this very block, or nothing; returns False where it is not above all others, or out of range.

        Blocks that were found are taken in ascending order, before any is allocated.
        """
        if base < self._top or base + size > self.capacity:
            return False
        self._add_run(self._top, base)
        self._top = base + size
        self.used += size
        return True

    def rest(self, base: int, size: int, now: float) -> None:
        """Give a block back, to be used again no sooner than ``REST_S`` after ``now`` (monotonic seconds)."""
        self._resting.append((now, base, size))

    def wake(self, now: float) -> bool:
        """Make blocks that have rested long enough available; returns whether any was."""
        woken = False
        while self._resting and now - self._resting[0][0] >= REST_S:
            _, base, size = self._resting.popleft()
            self._release(base, size)
            woken = True
        return woken

    @property
    def next_wake(self) -> float | None:
        """When the first resting block becomes available (monotonic seconds); None = nothing rests."""
        return self._resting[0][0] + REST_S if self._resting else None

    def _release(self, base: int, size: int) -> None:
        self.used -= size
        end = base + size
        if base in self._bases:
            base = self._bases[base]
            self._remove_run(base)
        if end in self._sizes:
            end = self._remove_run(end)
        if end == self._top:
            self._top = base
        else:
            self._add_run(base, end)

    def _add_run(self, base: int, end: int) -> None:
        if base < end:
            self._sizes[base] = size = end - base
            self._bases[end] = base
            self._ranks[_rank(size)].add(base)

    def _remove_run(self, base: int) -> int:
        """Take a run out; returns its end."""
        size = self._sizes.pop(base)
        self._ranks[_rank(size)].discard(base)
        del self._bases[base + size]
        return base + size


def _rank(size: int) -> int:
    """Give the number, from 0, of the largest block size that fits a run."""
    order = size.bit_length() - 1
    return 2 * order + (2 * size >> order) - 2
