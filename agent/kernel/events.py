"""The programs' events: a ring buffer read through mmap, a bounded number of them each second.

        consumer page (ours to write)     producer page      records, mapped twice in a row so that none is cut
        [position]                        [position]         [length|busy|discard, -] [record ...] [length ...

The kernel wakes a reader only where it had read everything. One that lags is not woken, and what finds no room is
counted by the programs: a flood costs them a failed reservation each, and the reader nothing.
Source: kernel/bpf/ringbuf.c, Documentation/bpf/ringbuf.rst.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import select
import struct
import sys
import threading
from array import array
from collections.abc import Callable, Sequence

from agent.core.abi import POLICY_COUNTERS
from agent.errors import DataplaneError
from agent.kernel import bpf

log = logging.getLogger("ebproxy.events")
Taker = Callable[[Sequence[bytes], int], None]
"""Given records, and how many were lost since it was last called; at least one of both."""
_HEADER = struct.Struct("=II")
_BUSY = 1 << 31
_DISCARD = 1 << 30
_LENGTH = _DISCARD - 1
_PAGE = mmap.PAGESIZE
_EVENTS_LOST = (POLICY_COUNTERS - 1).to_bytes(4, sys.byteorder)
PERIOD_S = 0.1
MOST_EACH_PERIOD = 100
"""So many events a period are read at most: 1,000 a second."""


class RingBuffer:
    """A ring buffer's one consumer; the map stays its owner's. Raises: OSError."""

    def __init__(self, ring: bpf.Map) -> None:
        self.fd = ring.fd
        self._mask = ring.info.max_entries - 1
        self._fence = threading.Lock()
        self._consumer = mmap.mmap(ring.fd, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        try:
            size = _PAGE + 2 * ring.info.max_entries
            self._producer = mmap.mmap(ring.fd, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=_PAGE)
        except OSError:
            self._consumer.close()
            raise
        self._consumed = memoryview(self._consumer)[:8].cast("Q")
        self._produced = memoryview(self._producer)[:8].cast("Q")

    def close(self) -> None:
        """Unmap it."""
        for view in (self._consumed, self._produced):
            view.release()
        for mapped in (self._consumer, self._producer):
            mapped.close()

    def read(self, most: int) -> list[bytes]:
        """Take out up to ``most`` records, the oldest first; what is still being written waits."""
        position, end = self._consumed[0], self._produced[0]
        self._order()  # headers are read after the position that says that they are there
        places: list[tuple[int, int]] = []
        while position < end and len(places) < most:
            offset = _PAGE + (position & self._mask)
            (word, _) = _HEADER.unpack_from(self._producer, offset)
            if word & _BUSY:
                break
            length = word & _LENGTH
            if not word & _DISCARD:
                places.append((offset + _HEADER.size, length))
            position += (length + _HEADER.size + 7) // 8 * 8
        self._order()  # records, after the headers that say that they are whole
        records = [self._producer[start : start + length] for start, length in places]
        self._order()  # and the position that gives their room away, after them
        self._consumed[0] = position
        return records

    def _order(self) -> None:
        """Let no later access of memory come before an earlier one.

        Letting go of a lock orders what is before it, taking one what is behind, and the two stay in order.
        """
        for _ in range(2):
            with self._fence:
                pass


class EventReader:
    """Reads the ring buffer on a thread of its own, once somebody can make sense of what it says."""

    def __init__(self, ring: bpf.Map, counters: bpf.Map, take: Taker, may_begin: threading.Event) -> None:
        """``counters``: the map whose last entry counts the events that found no room. Raises: DataplaneError."""
        try:
            self._ring = RingBuffer(ring)
            self._counters = counters
            self._lost = self._read_lost()
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise DataplaneError(f"reading the events map: {error}") from error
        self._take = take
        self._may_begin = may_begin
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what was not read stays for the next agent."""
        self._is_stopped.set()
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        self._ring.close()
        os.close(self._wake)

    def _run(self) -> None:
        while not self._may_begin.wait(PERIOD_S):
            if self._is_stopped.is_set():
                return
        with contextlib.closing(select.epoll()) as poll:
            poll.register(self._ring.fd, select.EPOLLIN)
            poll.register(self._wake, select.EPOLLIN)
            while not self._is_stopped.is_set():
                poll.poll()
                try:
                    self._turn()
                except Exception:
                    log.exception("telling flows; what was read is lost")
                self._is_stopped.wait(PERIOD_S)

    def _turn(self) -> None:
        """Read a share, and tell it."""
        records = self._ring.read(MOST_EACH_PERIOD)
        total = self._read_lost()
        lost, self._lost = total - self._lost, total
        if records or lost:
            self._take(records, lost)

    def _read_lost(self) -> int:
        return sum(array("Q", self._counters.lookup(_EVENTS_LOST) or b""))
