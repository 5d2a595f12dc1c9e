"""Follow one kind of objects: list them, watch them, and begin again where it broke.

```
            ┌── no version ──→ identity, list (one stream, else pages) ──┐
 session ───┤                                                            ├──→ watch ──→ ends or fails ──→ back off ─→ …
            └── version known ──→ probe, if it failed before ────────────┘
```
A kind that may be undefined, for want of its CustomResourceDefinition, is then listed with nothing in it, and is looked
for again and again, with growing pauses.

A failed watch resumes from the last version seen. Only a server that no longer serves that version costs a list, or one
that is another than was listed, whose versions are not ours. What a list said so far is never taken for the whole:
``ListEnded`` comes only when the server says so.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator

from agent.core.events import Delete, Event, ListEnded, ListStarted
from agent.core.records import Kind
from agent.errors import SourceError
from agent.sources.decode import Decoder
from agent.sources.kube_client import KubeClient, KubeResponse
from agent.sources.kube_failures import ApiFailure, Backoff, Cause
from agent.sources.kube_identity import KUBERNETES, read_uid
from agent.sources.kube_stream import LineFramer, ObjectHead, is_older, read_event, read_head
from agent.sources.kube_watch import OnError, Query, Resource, WatchFailures, WatchStatus, WatchTuning

log = logging.getLogger("ebproxy.source.kube")

_START_OVER = (Cause.GONE, Cause.INVALID, Cause.INTERNAL)
_NOT_FOUND = 404
_UNREADABLE = (Cause.GARBAGE, Cause.OVERSIZE)
_UNREADABLE_LIMIT = 3
_SHORT_WATCH_S = 1.0


class Reflector:
    """Hands every change of one kind to ``emit``, from the thread that calls `run`."""

    def __init__(
        self,
        resource: Resource,
        client: KubeClient,
        decoder: Decoder,
        emit: Callable[[Event], None],
        on_error: OnError,
        tuning: WatchTuning,
        stopping: threading.Event,
    ) -> None:
        self.status = WatchStatus(resource.kind)
        self._resource = resource
        self._client = client
        self._decoder = decoder
        self._emit = emit
        self._tuning = tuning
        self._stopping = stopping
        self._failures = WatchFailures(resource, self.status, on_error, tuning)
        self._absent_backoff = Backoff(tuning.absent_first_s, tuning.absent_last_s)
        self._version = ""
        self._identity = ""
        self._is_listing = False
        self._is_doubtful = False
        self._has_streaming_list = True
        self._next_list_in_pages = False

    def run(self) -> None:
        """Follow until ``stopping`` is set."""
        while not self._stopping.is_set():
            self._failures.begin()
            try:
                self._session()
                continue
            except ApiFailure as error:
                failure = error
            except SourceError as error:  # the decoder's
                failure = ApiFailure(Cause.GARBAGE, str(error))
            except Exception as error:  # a dead thread would freeze this kind unnoticed
                log.exception("defect kind=%s", self._resource.kind)
                failure = ApiFailure(Cause.INTERNAL, f"{type(error).__name__}: {error}")
            if not self._stopping.is_set():
                self._stopping.wait(self._absent_s(failure) or self._recover(failure))

    def _session(self) -> None:
        if self.status.is_absent:
            self._read_page("")  # whether it is defined by now: one cheap request
        if self._version and self._is_doubtful:
            self._probe()
        if self._version:
            self._watch()
            return
        self._identity = self._read_identity()  # before the list: of two servers, we must not take the later one's
        if self._has_streaming_list and not self._next_list_in_pages:
            self._list_streaming()
        else:
            self._list_in_pages()

    # Lists

    def _list_streaming(self) -> None:
        """List and watch in one response; a bookmark divides them.

        Source: KEP-3157.
        """
        query = (
            *self._watch_query(),
            ("sendInitialEvents", "true"),
            ("resourceVersionMatch", "NotOlderThan"),
        )
        try:
            response = self._client.open(self._resource.path, query, self._tuning.initial_read_s)
        except ApiFailure as failure:
            if failure.cause != Cause.INVALID:
                raise
            log.info("no streaming list kind=%s error=%r", self._resource.kind, str(failure))
            self._has_streaming_list = False
            return
        self._start_list()
        self._consume(response)

    def _list_in_pages(self) -> None:
        token = ""
        version = ""
        self._is_listing = False
        while not version or token:
            listed = self._decoder.decode_list(self._resource.kind, self._read_page(token))
            if not self._is_listing:
                self._start_list()
            for event in listed.events:
                self._emit(event)
            version, token = listed.resource_version, listed.continue_token
        self._end_list(version)

    def _read_page(self, token: str) -> bytes:
        query = (*self._resource.selector, ("limit", str(self._tuning.page_size)))
        if token:
            query = (*query, ("continue", token))
        body = self._client.read(self._resource.path, query, self._tuning.list_read_s)
        self.status.last_contact = time.time()
        return body

    def _start_list(self) -> None:
        self._is_listing = True
        self._emit(ListStarted(self._resource.kind))

    def _end_list(self, version: str) -> None:
        self._emit(ListEnded(self._resource.kind))
        self._is_listing = False
        self._next_list_in_pages = False
        self._is_doubtful = False
        self._remember(version)
        self.status.is_synced = True
        self.status.is_absent = False
        self._absent_backoff.reset()
        self._client.set_read_timeout(self._tuning.read_s)
        log.info("listed kind=%s version=%s", self._resource.kind, version)

    # Watches

    def _watch_query(self) -> Query:
        timeout_s = random.randint(self._tuning.watch_min_s, self._tuning.watch_max_s)  # noqa: S311  # spreads load
        return (
            *self._resource.selector,
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", str(timeout_s)),
        )

    def _watch(self) -> None:
        query = (*self._watch_query(), ("resourceVersion", self._version))
        self._consume(self._client.open(self._resource.path, query, self._tuning.read_s))

    def _probe(self) -> None:
        """Ask whether the server still has the history we saw, before resuming in it.

        A server that was made anew has another, whichever of the two has come further. One restored from a backup may
        be behind us: watched from a version it has not reached, it would say nothing of all it does until then.
        """
        doubt = self._other_identity() or self._older_version()
        if doubt:
            self._failures.count(ApiFailure(Cause.REWOUND, doubt))
            self._version = ""
        self._is_doubtful = False

    def _other_identity(self) -> str:
        found = self._read_identity()
        if found == self._identity:
            return ""
        return f"another server: Service {KUBERNETES} has the UID {found or 'none'}, it had {self._identity or 'none'}"

    def _read_identity(self) -> str:
        """Return what tells one server's store from another's; empty before a new server has made it."""
        try:
            return read_uid(self._client, Kind.SERVICE, KUBERNETES, self._tuning.list_read_s)
        except ApiFailure as failure:
            if failure.cause == Cause.FORBIDDEN:  # what follows Services says it, and the remedy
                return ""
            if failure.code == _NOT_FOUND:  # of Services, which are always defined: nothing is said of our kind
                raise ApiFailure(failure.cause, str(failure)) from failure
            raise

    def _older_version(self) -> str:
        query = (*self._resource.selector, ("limit", "1"))
        page = self._client.read(self._resource.path, query, self._tuning.list_read_s)
        current = self._decoder.decode_list(self._resource.kind, page).resource_version
        if is_older(current, than=self._version):
            return f"the server is at {current}, behind {self._version}"
        return ""

    def _consume(self, response: KubeResponse) -> None:
        """Take events until the server ends the watch."""
        opened_at = self._failures.live()
        with response:
            for line in self._lines(response):
                self._take(line)
        if self._is_listing:
            self._next_list_in_pages = True
            raise ApiFailure(Cause.CUT, "the stream ended before the end of the list")
        if time.monotonic() - opened_at < _SHORT_WATCH_S:
            raise ApiFailure(Cause.CUT, "the watch ended as soon as it began")

    def _lines(self, response: KubeResponse) -> Iterator[bytes]:
        framer = LineFramer()
        while chunk := response.read_some():
            self.status.last_contact = time.time()
            self._failures.settle()
            yield from framer.feed(chunk)
        if not framer.is_between_lines:
            raise ApiFailure(Cause.CUT, "the stream ended within an event")

    def _take(self, line: bytes) -> None:
        change = self._decoder.decode_change(self._resource.kind, line)
        if change:
            self._emit(change.event)
            self._remember(change.resource_version)
            return
        event = read_event(line)
        match event.type:
            case "ADDED" | "MODIFIED":
                decoded, version = self._decoder.decode(self._resource.kind, event.object)
                self._emit(decoded)
                self._remember(version)
            case "DELETED":
                head = read_head(event.object)
                self._emit(Delete(self._resource.kind, head.key))
                self._remember(head.version)
            case "BOOKMARK":
                self._take_bookmark(read_head(event.object))
            case "ERROR":
                raise ApiFailure.of_status(0, event.object)
            case unknown:
                raise ApiFailure(Cause.GARBAGE, f"an event of the unknown type {unknown!r}")

    def _take_bookmark(self, head: ObjectHead) -> None:
        if not self._is_listing:
            self._remember(head.version)
        elif head.is_initial_end:
            self._end_list(head.version)
        else:
            self._next_list_in_pages = True
            raise ApiFailure(Cause.INVALID, "an unmarked bookmark: the server knows no streaming list")

    def _remember(self, version: str) -> None:
        """Note how far we have come; during a list that is nowhere yet."""
        if self._is_listing or not version:
            return
        if is_older(version, than=self._version):
            raise ApiFailure(Cause.REWOUND, f"the server sent {version} after {self._version}")
        self._version = self.status.resource_version = version

    # Kinds that are not defined

    def _absent_s(self, failure: ApiFailure) -> float:
        """Take a kind for undefined, if that is what a failure says; return how long to leave it at that, 0 if not.

        A server that has had the kind is believed only if it is still the one that was listed: a policy must not end
        because something in between knows nothing of it.
        """
        if not self._resource.is_optional or failure.code != _NOT_FOUND:
            return 0.0
        if not self.status.is_absent:
            if self.status.is_synced and not self._is_same_server():
                return 0.0
            self._empty()
        self.status.error = ""
        self.status.last_contact = time.time()
        return self._absent_backoff.next_s()

    def _is_same_server(self) -> bool:
        try:
            return not self._other_identity()
        except ApiFailure:
            return False

    def _empty(self) -> None:
        """Say that there is nothing of this kind."""
        log.log(
            logging.WARNING if self.status.is_synced else logging.INFO,
            "not defined kind=%s path=%s",
            self._resource.kind,
            self._resource.path,
        )
        self._start_list()
        self._emit(ListEnded(self._resource.kind))
        self._is_listing = False
        self._version = self.status.resource_version = ""
        self.status.is_synced = self.status.is_absent = True

    def _recover(self, failure: ApiFailure) -> float:
        """Decide what to keep after a failure; return how long to wait."""
        if failure.cause == Cause.UNAUTHORIZED:
            self._client.reload()
        self._failures.add(failure)
        if failure.cause in _START_OVER or (failure.cause in _UNREADABLE and self.status.failures >= _UNREADABLE_LIMIT):
            self._version = ""
        if self._is_listing and failure.cause == Cause.TIMEOUT:  # perhaps a server that knows only plain watches
            self._next_list_in_pages = True
        self._is_listing = False
        self._is_doubtful = True
        return self._failures.next_s(failure)
