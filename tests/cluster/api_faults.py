"""What the tests' API server can be told to do wrong, and to which requests."""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass, field


class Do(enum.StrEnum):
    """The faults."""

    STATUS = "status"  # answer with `code`, `body`, `retry_after`
    NO_ANSWER = "no-answer"  # take the request, and never answer
    SILENT = "silent"  # answer 200, then nothing: no events, no bookmarks
    CUT = "cut"  # close within an event
    END = "end"  # end the response as if complete, within an event
    HALF_CLOSE = "half-close"  # close our sending half within an event, keep receiving
    STALL = "stall"  # send half an event and then nothing
    GARBAGE = "garbage"  # send `body` as a line, then go on
    DRIP = "drip"  # send everything one byte at a time


class Verb(enum.StrEnum):
    """What a request asks for; a streaming list is not a watch here."""

    LIST = "list"
    FIND = "find"  # a list of one name in one namespace
    PAGE = "page"  # a list's second or later page
    STREAM = "stream"
    WATCH = "watch"
    WRITE = "write"
    GET = "get"


@dataclass(slots=True)
class Fault:
    """One fault: what, to which requests (empty is any), how often (negative is always), after how many events."""

    do: Do
    resource: str = ""
    verb: str = ""
    times: int = 1
    after_events: int = 0
    code: int = 500
    body: str = ""
    retry_after: str = ""
    hits: int = 0


@dataclass(slots=True)
class FaultPlan:
    """The faults to come."""

    _faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, fault: Fault) -> Fault:
        """Plan a fault; returns it, so that its hits can be looked at."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget all faults; streams already broken stay so."""
        with self._lock:
            self._faults.clear()

    def take(self, resource: str, verb: Verb) -> Fault | None:
        """Return the first fault that applies to a request."""
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.resource in ("", resource) and fault.verb in ("", verb):
                    fault.times -= 1
                    fault.hits += 1
                    return fault
        return None
