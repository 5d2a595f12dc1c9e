"""One watch: which objects it follows, with what patience, how it is doing, and what its failures amount to."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Protocol

from agent.core.records import Kind
from agent.sources.kube_failures import ApiFailure, Backoff, Cause

log = logging.getLogger("ebproxy.source.kube")

Query = tuple[tuple[str, str], ...]


class OnError(Protocol):
    """Counts a failure by its cause."""

    def __call__(self, cause: str, message: str, /) -> None:
        """Count one failure; called from several threads, ``cause`` is one of Cause."""


@dataclass(frozen=True, slots=True)
class WatchTuning:
    """Delays in seconds, and the size of a page.

    ``read_s``: a real server (1.36) with nothing to say sends a bookmark every one to two minutes, so twice that in
    silence means that nobody is there; a peer that is gone altogether is found sooner, by TCP keepalive.
    ``initial_read_s``: the same during a streaming list, where silence means a server that does not know of it.
    """

    watch_min_s: int = 300
    watch_max_s: int = 600
    read_s: float = 240.0
    initial_read_s: float = 20.0
    list_read_s: float = 60.0
    backoff_first_s: float = 0.1
    backoff_last_s: float = 30.0
    absent_first_s: float = 2.0
    absent_last_s: float = 60.0
    stable_s: float = 5.0
    page_size: int = 500


DEFAULT_TUNING = WatchTuning()


@dataclass(frozen=True, slots=True)
class Resource:
    """Where the objects of one kind are, and which of them are wanted; an optional kind need not be defined."""

    kind: Kind
    path: str
    selector: Query = ()
    is_optional: bool = False

    @property
    def plural(self) -> str:
        """The resource as RBAC names it."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(slots=True)
class WatchStatus:
    """How one watch is doing; ``last_contact`` is Unix time, 0 before the first byte.

    ``is_absent``: the server does not know the kind, so there is nothing to watch.
    """

    kind: Kind
    is_synced: bool = False
    is_absent: bool = False
    last_contact: float = 0.0
    resource_version: str = ""
    failures: int = 0
    error: str = ""


class WatchFailures:
    """Counts the failures of one watch in its ``status``, logs each kind of them once, and spaces the attempts."""

    def __init__(self, resource: Resource, status: WatchStatus, on_error: OnError, tuning: WatchTuning) -> None:
        self._resource = resource
        self._status = status
        self._on_error = on_error
        self._stable_s = tuning.stable_s
        self._backoff = Backoff(tuning.backoff_first_s, tuning.backoff_last_s)
        self._live_since = float("inf")
        self._logged: Cause | None = None

    def begin(self) -> None:
        """Note that a session begins; nothing came of it yet."""
        self._live_since = float("inf")

    def live(self) -> float:
        """Note that the server has answered; returns when, in monotonic seconds."""
        self._live_since = time.monotonic()
        self._status.error = ""
        return self._live_since

    def settle(self) -> None:
        """Forget past failures once a session has lasted: only then is the server well again."""
        if self._status.failures and time.monotonic() - self._live_since >= self._stable_s:
            log.info("restored kind=%s failures=%d", self._resource.kind, self._status.failures)
            self._status.failures = 0
            self._logged = None
            self._backoff.reset()

    def add(self, failure: ApiFailure) -> None:
        """Take the failure that ended a session."""
        self.settle()
        self._status.failures += 1
        self.count(failure)

    def next_s(self, failure: ApiFailure) -> float:
        """Return how long to wait after a failure."""
        return self._backoff.next_s(failure.retry_after_s)

    def count(self, failure: ApiFailure) -> None:
        """Count a failure; log only the first of its cause until the server is well again."""
        message = f"{self._resource.kind}: {failure}"
        self._status.error = str(failure)
        self._on_error(str(failure.cause), message)
        level = logging.DEBUG if failure.cause == self._logged else logging.WARNING
        self._logged = failure.cause
        log.log(level, "failed kind=%s cause=%s error=%r", self._resource.kind, failure.cause, str(failure))
        if failure.cause == Cause.FORBIDDEN:
            log.log(
                level,
                "forbidden resource=%s verbs=list,watch remedy=%r",
                self._resource.plural,
                "grant the agent's service account list and watch on it, as the ClusterRoles in manifests/ do",
            )
