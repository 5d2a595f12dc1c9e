"""Allocate segments: runs of slots in one array, in blocks of a power of two (a buddy allocator).

A freed block rests before it is used again, because a program that read its base a moment ago may still be about to
read its slots.
"""

from __future__ import annotations

from collections import deque

from agent.core.abi import FIRST_FREE_SLOT
from agent.errors import CapacityError

REST_S = 1.0
"""How long a freed segment rests, in seconds: many times what a preempted program needs."""


def order_for(slots: int) -> int:
    """Find the smallest order whose block, ``1 << order``, holds this many slots."""
    return (slots - 1).bit_length()


class SegmentAllocator:
    """Blocks of slots ``[base, base + 2**order)``, each aligned to its size.

    ``capacity`` is the number of slots of the array; the first two are the shared empty segments.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = FIRST_FREE_SLOT
        self._free: list[set[int]] = [set() for _ in range(capacity.bit_length())]
        self._resting: deque[tuple[float, int, int]] = deque()
        base = FIRST_FREE_SLOT
        while base < capacity:
            order = min((base & -base).bit_length(), (capacity - base).bit_length()) - 1
            self._free[order].add(base)
            base += 1 << order

    def allocate(self, order: int) -> int:
        """Take a block and return its base. Raises: CapacityError."""
        for larger in range(order, len(self._free)):
            if self._free[larger]:
                base = self._free[larger].pop()
                self._split(base, larger, order)
                self.used += 1 << order
                return base
        raise CapacityError("segments", 1 << order, self.capacity)

    def reserve(self, base: int, order: int) -> bool:
        """Take this very block, or nothing; returns False where it is taken in part, misaligned or out of range."""
        if base >> order << order != base:
            return False
        for larger in range(order, len(self._free)):
            start = base >> larger << larger
            if start in self._free[larger]:
                self._free[larger].remove(start)
                self._split_around(start, larger, base, order)
                self.used += 1 << order
                return True
        return False

    def rest(self, base: int, order: int, now: float) -> None:
        """Give a block back, to be used again no sooner than ``REST_S`` after ``now`` (monotonic seconds)."""
        self._resting.append((now, base, order))

    def wake(self, now: float) -> bool:
        """Make blocks that have rested long enough available; returns whether any was."""
        woken = False
        while self._resting and now - self._resting[0][0] >= REST_S:
            _, base, order = self._resting.popleft()
            self._release(base, order)
            woken = True
        return woken

    @property
    def next_wake(self) -> float | None:
        """When the first resting block becomes available (monotonic seconds); None = nothing rests."""
        return self._resting[0][0] + REST_S if self._resting else None

    def _split(self, base: int, order: int, wanted: int) -> None:
        while order > wanted:
            order -= 1
            self._free[order].add(base + (1 << order))

    def _split_around(self, start: int, order: int, base: int, wanted: int) -> None:
        while order > wanted:
            order -= 1
            middle = start + (1 << order)
            if base >= middle:
                self._free[order].add(start)
                start = middle
            else:
                self._free[order].add(middle)

    def _release(self, base: int, order: int) -> None:
        self.used -= 1 << order
        while order + 1 < len(self._free) and base ^ (1 << order) in self._free[order]:
            self._free[order].remove(base ^ (1 << order))
            base &= ~(1 << order)
            order += 1
        self._free[order].add(base)
