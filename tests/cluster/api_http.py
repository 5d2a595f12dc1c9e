"""One connection to the tests' API server: paths, verbs, list and watch."""

from __future__ import annotations

import base64
import random
import ssl
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from tests.cluster import api_rules as rules
from tests.cluster.api_faults import Do, Fault, Verb
from tests.cluster.api_selectors import Selector, selector
from tests.cluster.api_store import ApiError, Change, Object, Resource, Store, Version, expired
from tests.cluster.api_watch import EventStream

if TYPE_CHECKING:
    from tests.cluster.apiserver import ApiServer, HttpServer

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
_LATEST = ("", "0")
_LAST_BOOKMARK_S = 2.0  # a real server sends one this long before it ends a watch


class Asked(NamedTuple):
    """A request that came."""

    verb: str
    resource: str
    query: dict[str, str]


class Target(NamedTuple):
    """What a path names; an empty name is the collection, an empty namespace all of them."""

    resource: Resource
    namespace: str
    name: str
    subresource: str = ""


def parse_path(path: str) -> Target:
    """Read ``/api/v1/...`` or ``/apis/GROUP/VERSION/...``; 404 for anything else."""
    parts = [unquote(part) for part in path.strip("/").split("/")]
    if parts[:1] == ["api"] and len(parts) >= 3:
        group, version, rest = "", parts[1], parts[2:]
    elif parts[:1] == ["apis"] and len(parts) >= 4:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        raise ApiError(404, "NotFound", "the server could not find the requested resource")
    namespace = ""
    if rest[0] == "namespaces" and len(rest) >= 3:
        namespace, rest = rest[1], rest[2:]
    name, subresource = (*rest[1:3], "", "")[:2]
    return Target(Resource(group, version, rest[0]), namespace, name, subresource)


def full(resource: Resource, version: Version) -> bytes:
    """Return an object's JSON, with its kind."""
    head = f'{{"kind":"{resource.kind}","apiVersion":"{resource.api_version}",'
    return head.encode() + version.bare[1:]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HttpServer

    def do_GET(self) -> None:
        """Answer get, list and watch."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Create an object."""
        self._answer(self._post)

    def do_PUT(self) -> None:
        """Replace an object."""
        self._answer(lambda: self._written(200, self._update()))

    def do_PATCH(self) -> None:
        """Merge into an object."""
        self._answer(lambda: self._written(200, self._merge()))

    def do_DELETE(self) -> None:
        """Delete an object."""
        self._answer(self._delete)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # its base says so
        """Say nothing."""

    @property
    def _api(self) -> ApiServer:
        return self.server.api

    @property
    def _store(self) -> Store:
        return self.server.api.store

    def _answer(self, act: Callable[[], None]) -> None:
        url = urlsplit(self.path)
        self._query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        self._raw_body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if url.path.startswith("/_test/"):
                self._control(url.path)
            elif url.path in ("/healthz", "/livez", "/readyz"):
                self._send(200, b"ok", "text/plain")
            else:
                self._authenticate()
                self._target = parse_path(url.path)
                if self._store.is_defined(self._target.resource):
                    act()
                else:
                    self._undefined()
        except ApiError as error:
            extra = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
            self._send(error.code, msgspec.json.encode(error.status()), extra=extra)
        except (ConnectionError, ssl.SSLError, ValueError):
            self.close_connection = True

    def _authenticate(self) -> None:
        tokens = self._api.options.tokens
        token = (self.headers.get("Authorization") or "").split(" ")[-1].strip()
        if tokens is not None and token not in tokens:
            raise ApiError(401, "Unauthorized", "Unauthorized")

    def _control(self, path: str) -> None:
        if path == "/_test/requests":
            self._send(200, msgspec.json.encode(list(self._api.requests)))
            return
        if path == "/_test/compact":
            self._store.compact()
        elif self.command == "DELETE":
            self._api.faults.clear()
        else:
            self._api.faults.add(msgspec.convert(self._body(), Fault))
        self._send(200, b"{}")

    def _body(self) -> Object:
        try:
            body = msgspec.json.decode(self._raw_body)
        except msgspec.DecodeError as error:
            raise ApiError(400, "BadRequest", str(error)) from error
        if not isinstance(body, dict):
            raise ApiError(400, "BadRequest", "not an object")
        return body

    def _object(self) -> tuple[Resource, tuple[str, str]]:
        self._note(Verb.WRITE)
        return self._target.resource, (self._target.namespace, self._target.name)

    def _note(self, verb: Verb) -> Fault | None:
        """Write the request down; return the fault that applies, when it concerns the stream; play it otherwise."""
        plural = self._target.resource.plural
        self._api.requests.append(Asked(str(verb), plural, dict(self._query)))
        fault = self._api.faults.take(plural, verb)
        if fault is None:
            return None
        if fault.do == Do.STATUS:
            raise _Refused(fault)
        if fault.do == Do.NO_ANSWER:
            self._api.stopping.wait()
            raise ConnectionAbortedError
        return fault

    def _get(self) -> None:
        try:
            if self._target.name:
                self._note(Verb.GET)
                version = self._store.get(self._target.resource, (self._target.namespace, self._target.name))
                self._written(200, version)
            elif self._query.get("watch") in ("true", "1"):
                self._watch()
            else:
                self._list()
        except _Refused as refused:
            fault = refused.fault
            extra = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            body = fault.body or msgspec.json.encode(ApiError(fault.code, "Injected", "injected").status()).decode()
            self._send(fault.code, body.encode(), extra=extra)

    def _post(self) -> None:
        self._note(Verb.WRITE)
        self._written(201, rules.create(self._store, self._target.resource, self._target.namespace, self._body()))

    def _update(self) -> Version:
        return rules.update(self._store, *self._object(), self._body(), self._target.subresource)

    def _merge(self) -> Version:
        return rules.merge(self._store, *self._object(), self._body(), self._target.subresource)

    def _delete(self) -> None:
        grace = self._query.get("gracePeriodSeconds")
        self._written(200, rules.delete(self._store, *self._object(), None if grace is None else int(grace)))

    def _undefined(self) -> None:
        """Answer for a kind that nothing defines, in the words of the real one, which are no Status."""
        self._api.requests.append(Asked("undefined", self._target.resource.plural, dict(self._query)))
        self._send(404, b"404 page not found\n", "text/plain; charset=utf-8")

    def _written(self, code: int, version: Version) -> None:
        self._send(code, full(self._target.resource, version))

    def _send(
        self, code: int, body: bytes, content: str = "application/json", extra: dict[str, str] | None = None
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _selector(self) -> Selector:
        wanted = selector(
            self._query.get("labelSelector", ""), self._query.get("fieldSelector", ""), self._target.resource.plural
        )
        namespace = self._target.namespace
        return lambda version: (not namespace or version.key[0] == namespace) and wanted(version)

    # List

    def _list(self) -> None:
        fault = self._note(self._list_verb())
        resource = self._target.resource
        number, start = self._position()
        number, versions = self._store.snapshot(resource, number)
        wanted = self._selector()
        rest = [version for version in versions if version.key > start and wanted(version)]
        limit = int(self._query.get("limit") or 0) or len(rest)
        page = rest[:limit]
        metadata: Object = {"resourceVersion": str(number)}
        if len(rest) > limit:
            metadata["continue"] = _token(number, page[-1].key)
            if not (self._query.get("labelSelector") or self._query.get("fieldSelector")):
                metadata["remainingItemCount"] = len(rest) - limit
        envelope = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": metadata}
        head = msgspec.json.encode(envelope)
        body = head[:-1] + b',"items":[' + b",".join(version.bare for version in page) + b"]}"
        if fault:
            self._send_broken(body, fault)
        else:
            self._send(200, body)

    def _list_verb(self) -> Verb:
        if self._query.get("continue"):
            return Verb.PAGE
        is_of_one = self._query.get("fieldSelector", "").startswith("metadata.name=")
        return Verb.FIND if is_of_one and self._target.namespace else Verb.LIST

    def _position(self) -> tuple[int | None, tuple[str, str]]:
        """Return the version to list at (None is now), and the key to go on after."""
        version = self._query.get("resourceVersion", "")
        if token := self._query.get("continue", ""):
            if version not in _LATEST:
                raise ApiError(400, "BadRequest", "specifying resource version is not allowed when using continue")
            return _read_token(token)
        if version in _LATEST:
            return None, ("", "")
        number = _number(version)
        if number > self._store.current:
            raise ApiError(504, "Timeout", f"Too large resource version: {number}", retry_after_s=1)
        return (number if self._query.get("resourceVersionMatch") == "Exact" else None), ("", "")

    def _send_broken(self, body: bytes, fault: Fault) -> None:
        """Send a list that is cut, stalls or drips; its length is announced in full."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault.do == Do.DRIP:
            for at in range(len(body)):
                self.wfile.write(body[at : at + 1])
            return
        if fault.do == Do.GARBAGE:
            self.wfile.write(fault.body.encode().ljust(len(body))[: len(body)])
            return
        self.wfile.write(body[: len(body) // 2])
        if fault.do in (Do.STALL, Do.SILENT):
            self._api.stopping.wait()
        self.close_connection = True

    # Watch

    def _watch(self) -> None:
        is_initial, number = self._watch_start()
        fault = self._note(Verb.STREAM if is_initial else Verb.WATCH)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        stream = EventStream(self.wfile, self.connection, fault, self._api.stopping)
        try:
            if not stream.is_silent():
                self._stream(stream, is_initial, number)
        except ApiError as error:
            stream.send([_line("ERROR", msgspec.json.encode(error.status()))])
        stream.end()
        self.close_connection = stream.is_broken

    def _watch_start(self) -> tuple[bool, int | None]:
        """Return whether initial events are marked, and the version to watch from (None is: what there is, first)."""
        asks = self._query.get("sendInitialEvents")
        streaming = self._api.options.streaming
        match = self._query.get("resourceVersionMatch", "")
        if streaming != "ignore":
            if asks and streaming == "refuse":
                raise ApiError(422, "Invalid", "sendInitialEvents: Forbidden: not supported by this server")
            if asks and match != "NotOlderThan":
                raise ApiError(422, "Invalid", "resourceVersionMatch: Forbidden: must be NotOlderThan")
            if match and not asks:
                raise ApiError(422, "Invalid", "resourceVersionMatch: Forbidden: for a watch")
        version = self._query.get("resourceVersion", "")
        is_initial = asks == "true" and streaming == "yes"
        return is_initial, None if is_initial or version in _LATEST else _number(version)

    def _stream(self, stream: EventStream, is_initial: bool, number: int | None) -> None:
        wanted = self._selector()
        resource = self._target.resource
        if number is None:
            number, versions = self._store.snapshot(resource)
            stream.send(_line("ADDED", full(resource, version)) for version in versions if wanted(version))
            if is_initial:
                stream.send([_bookmark(resource, number, is_end=True)])
        elif number < self._store.floor:
            raise expired(number, self._store.floor)
        self._follow(stream, wanted, number)

    def _follow(self, stream: EventStream, wanted: Selector, number: int) -> None:
        resource = self._target.resource
        bookmark_s = self._api.options.bookmark_s if self._query.get("allowWatchBookmarks") == "true" else 0
        end = time.monotonic() + float(self._query.get("timeoutSeconds") or random.randint(1800, 3600))
        bookmark_at = min(time.monotonic() + bookmark_s, end - _LAST_BOOKMARK_S) if bookmark_s else float("inf")
        while not stream.is_broken and not self._api.stopping.is_set() and time.monotonic() < end:
            wait_s = min(bookmark_at, end) - time.monotonic()
            number, changes = self._store.wait(resource, number, min(max(wait_s, 0), 1))
            stream.send(line for change in changes for line in _lines(resource, change, wanted))
            if not changes and not self._store.is_defined(resource):
                return
            if time.monotonic() >= bookmark_at:
                stream.send([_bookmark(resource, number)])
                bookmark_at = min(time.monotonic() + bookmark_s, end)


class _Refused(Exception):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(fault.do)


def _lines(resource: Resource, change: Change, wanted: Selector) -> Iterable[bytes]:
    """Return the event a change is to one selector: coming into view is ADDED, leaving it DELETED."""
    was = change.old is not None and wanted(change.old)
    if change.new is not None and wanted(change.new):
        yield _line("MODIFIED" if was else "ADDED", full(resource, change.new))
    elif was:
        last = change.last or _renumbered(change)
        yield _line("DELETED", full(resource, last))


def _renumbered(change: Change) -> Version:
    """Return what an object was, numbered by the change that took it out of view."""
    assert change.old is not None
    source = msgspec.json.decode(change.old.bare)
    source["metadata"]["resourceVersion"] = str(change.number)
    return Version(change.old.key, change.number, change.old.labels, msgspec.json.encode(source))


def _line(event: str, raw: bytes) -> bytes:
    return b'{"type":"%s","object":%s}\n' % (event.encode(), raw)


def _bookmark(resource: Resource, number: int, *, is_end: bool = False) -> bytes:
    metadata: Object = {"resourceVersion": str(number), "creationTimestamp": None}
    if is_end:
        metadata["annotations"] = {INITIAL_EVENTS_END: "true"}
    body = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}
    return _line("BOOKMARK", msgspec.json.encode(body))


def _number(version: str) -> int:
    if not version.isdecimal():
        raise ApiError(400, "BadRequest", f"invalid resource version {version!r}")
    return int(version)


def _token(number: int, key: tuple[str, str]) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode([number, *key])).decode()


def _read_token(token: str) -> tuple[int, tuple[str, str]]:
    try:
        number, namespace, name = msgspec.json.decode(base64.urlsafe_b64decode(token))
    except (ValueError, msgspec.DecodeError) as error:
        raise ApiError(400, "BadRequest", "continue key is not valid") from error
    return number, (namespace, name)
