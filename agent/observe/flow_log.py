"""The flows of late: a bounded history that any number of readers follow, each at its own pace.

Nobody waits for a reader: what is overwritten before one came to it is counted, and told.
"""

from __future__ import annotations

import itertools
import logging
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from agent.observe.flows import Flow, FlowEvent, FlowNamer, flow_document

log = logging.getLogger("ebproxy.flows")
HISTORY = 4_096


class Lost(msgspec.Struct, frozen=True, gc=False):
    """So many events found no room in the ring buffer, about then."""

    time_ns: int
    count: int


class FlowFilter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which flows are wanted; what is empty leaves none out. ``pod`` is ``namespace/name``, of either end."""

    verdict: str = ""
    pod: str = ""
    namespace: str = ""
    since_ns: int = 0

    def wants(self, flow: Flow) -> bool:
        """Tell whether a flow is wanted."""
        pods = [end.pod for end in (flow.source, flow.destination) if end.pod]
        return (
            self.verdict in ("", flow.verdict)
            and (not self.pod or any(self.pod == str(pod) for pod in pods))
            and (not self.namespace or any(self.namespace == pod.namespace for pod in pods))
        )


class FlowLog:
    """Takes in what the reader of events has, and gives it to whoever asks."""

    def __init__(
        self,
        namer: FlowNamer,
        limit: int = HISTORY,
        heartbeat_s: float = 1.0,
        has_begun: Callable[[], bool] = lambda: True,
    ) -> None:
        """``heartbeat_s``: how long a reader waits before it is given a chance to leave.

        ``has_begun``: tells whether events are read yet.
        """
        self._namer = namer
        self._has_begun = has_begun
        self._heartbeat_s = heartbeat_s
        self._entries: deque[Flow | Lost] = deque(maxlen=limit)
        self._end = 0
        """How many entries there ever were."""
        self._changed = threading.Condition()
        self._is_closed = False

    def take(self, records: Sequence[bytes], lost: int) -> None:
        """Take in records of the ring buffer, and how many it had no room for."""
        entries: list[Flow | Lost] = []
        for record in records:
            try:
                entries.append(self._namer.name(FlowEvent.unpack(record)))
            except (ValueError, struct.error) as error:
                log.error("an event that no program of this layout writes: %s", error)
        if lost:
            entries.append(Lost(time.time_ns(), lost))
        with self._changed:
            self._entries.extend(entries)
            self._end += len(entries)
            self._changed.notify_all()

    def close(self) -> None:
        """Let everybody who follows go."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def read(
        self, wanted: FlowFilter, *, follow: bool = False, history: bool = True
    ) -> Iterator[dict[str, Any] | None]:
        """Give documents: ``{"flow": ...}``, and ``{"lost": n}`` for what nobody can give.

        In front of them stands ``{"has_begun": false}`` where no event is read yet.
        With ``follow`` it goes on with what comes, and gives None where nothing does for a while. Without ``history``
        it begins with what comes.
        """
        if not self._has_begun():
            yield {"has_begun": False}
        with self._changed:
            place = self._end - len(self._entries) if history else self._end
        while True:
            with self._changed:
                if follow and place == self._end and not self._is_closed:
                    self._changed.wait(self._heartbeat_s)
                entries, missed = self._from(place)
                place, is_closed = self._end, self._is_closed
            yield from _documents(entries, missed, wanted)
            if not follow or is_closed:
                return
            if not entries:
                yield None

    def _from(self, place: int) -> tuple[list[Flow | Lost], int]:
        """List the entries from a place, and count those that are no longer there."""
        first = self._end - len(self._entries)
        missed = max(0, first - place)
        return list(itertools.islice(self._entries, max(0, place - first), None)), missed


def _documents(entries: Sequence[Flow | Lost], missed: int, wanted: FlowFilter) -> Iterator[dict[str, Any]]:
    """Write entries; losses one after another are told as one."""
    lost = missed
    for entry in entries:
        if entry.time_ns < wanted.since_ns:
            continue
        if isinstance(entry, Lost):
            lost += entry.count
        elif wanted.wants(entry):
            if lost:
                yield {"lost": lost}
                lost = 0
            yield {"flow": flow_document(entry)}
    if lost:
        yield {"lost": lost}
