"""healthCheckNodePort: tell load balancers, port by port, whether this node has ready endpoints of a Service.

One thread serves every port: a cluster may have hundreds, and every load balancer probes each of them all the time.
Source: core/v1 ServiceSpec.healthCheckNodePort; kube-proxy's answers to it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from agent.core.records import HealthCheck, ObjectKey
from agent.observe.listeners import EVERYWHERE, open_listener

log = logging.getLogger("ebproxy.health")

_REQUEST_LIMIT = 8_192
_PATIENCE_S = 5.0  # for a request to be complete; probes are one packet
_MOST_CONNECTIONS = 512
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_ENDS_OF_HEAD = (b"\r\n\r\n", b"\n\n")
_REASONS = {200: "OK", 400: "Bad Request", 503: "Service Unavailable"}

OnFailure = Callable[[ObjectKey, str], None]
"""Told of a Service whose port cannot be listened on, and why, when that begins."""


class _Place(NamedTuple):
    """Where one Service is answered for."""

    port: int
    host: str
    service: ObjectKey


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    service: ObjectKey
    deadline: float
    request: bytearray = field(default_factory=bytearray)
    is_answered: bool = False


@dataclass(frozen=True, slots=True)
class _Desired:
    checks: Mapping[ObjectKey, HealthCheck]
    hosts: tuple[str, ...]


class HealthCheckServers:
    """Serves what ``update`` last said; its thread begins with the first port.

    A port that cannot be had is tried again with each change, and every ``retry_s``. ``is_healthy`` and ``on_failure``
    are called on the thread that serves, and must not block.
    """

    def __init__(self, is_healthy: Callable[[], bool], on_failure: OnFailure, retry_s: float) -> None:
        self._is_healthy = is_healthy
        self._on_failure = on_failure
        self._retry_s = retry_s
        self._retry_at = 0.0
        self._desired = _Desired({}, ())
        self._is_changed = False
        self._is_stopping = False
        self._listeners: dict[_Place, socket.socket] = {}
        self._failed: dict[_Place, str] = {}
        self._failures = 0
        self._connections: dict[socket.socket, _Connection] = {}  # in the order of their deadlines
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="health-checks", daemon=True)

    @property
    def serving(self) -> int:
        """How many sockets listen."""
        return len(self._listeners)

    @property
    def failed(self) -> int:
        """How many sockets do not, and should."""
        return len(self._failed)

    @property
    def failures(self) -> int:
        """How often a port could not be listened on."""
        return self._failures

    def update(self, checks: Mapping[ObjectKey, HealthCheck], hosts: tuple[str, ...] = (EVERYWHERE,)) -> None:
        """Serve these Services, at these addresses of the node, and no others; returns at once."""
        desired = _Desired(dict(checks), hosts)
        if desired == self._desired:
            return
        self._desired = desired
        self._is_changed = True
        if self._thread.ident is None:
            if not checks:
                return
            self._selector.register(self._wake, selectors.EVENT_READ, lambda: os.eventfd_read(self._wake))
            self._thread.start()
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Close every port and connection."""
        self._is_stopping = True
        if self._thread.ident is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        for opened in (*self._listeners.values(), *self._connections):
            opened.close()
        self._selector.close()
        os.close(self._wake)

    def _run(self) -> None:
        while not self._is_stopping:
            now = time.monotonic()
            if self._is_changed or (self._failed and now >= self._retry_at):
                self._is_changed = False
                self._follow(self._desired, now)
            for key, _ in self._selector.select(self._patience_s(now)):
                key.data()
            self._close_late(time.monotonic())

    def _patience_s(self, now: float) -> float | None:
        """Seconds until something is due though nothing arrives; None = nothing will be."""
        due = [connection.deadline for connection in list(self._connections.values())[:1]]
        if self._failed:
            due.append(self._retry_at)
        return max(0.0, min(due) - now) if due else None

    def _follow(self, desired: _Desired, now: float) -> None:
        """Close what is not wanted any more, then open: a port may have gone to another Service."""
        wanted = {_Place(check.port, host, key) for key, check in desired.checks.items() for host in desired.hosts}
        for place in self._listeners.keys() - wanted:
            self._close(self._listeners.pop(place))
        failed: dict[_Place, str] = {}
        for place in sorted(wanted - self._listeners.keys()):
            try:
                self._listeners[place] = self._listen(place)
            except OSError as error:
                failed[place] = os.strerror(error.errno) if error.errno else str(error)
        self._retry_at = now + self._retry_s
        self._note(failed)

    def _note(self, failed: dict[_Place, str]) -> None:
        self._failures += len(failed)
        before, self._failed = self._failed, failed
        for place, reason in failed.items():
            if before.get(place) == reason:
                continue
            where = f"port {place.port}" if place.host == EVERYWHERE else f"{place.host} port {place.port}"
            log.error("health check of %s cannot be served on %s: %s; trying again", place.service, where, reason)
            self._on_failure(place.service, f"cannot serve the health check on {where}: {reason}")
        for place in before.keys() - failed.keys():
            if place in self._listeners:
                log.info("health check of %s is served on port %d now", place.service, place.port)

    def _listen(self, place: _Place) -> socket.socket:
        """Open a port. Raises: OSError."""
        listener = open_listener(place.host, place.port)
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener, place.service))
        return listener

    def _accept(self, listener: socket.socket, service: ObjectKey) -> None:
        try:
            accepted, _ = listener.accept()
        except OSError as error:  # a client that has gone already, or no descriptor to give
            if error.errno in _NO_DESCRIPTORS:
                self._close_oldest()
            return
        accepted.setblocking(False)
        if len(self._connections) >= _MOST_CONNECTIONS:
            self._close_oldest()
        connection = _Connection(accepted, service, time.monotonic() + _PATIENCE_S)
        self._connections[accepted] = connection
        self._selector.register(accepted, selectors.EVENT_READ, lambda: self._read(connection))

    def _read(self, connection: _Connection) -> None:
        try:
            arrived = connection.socket.recv(_REQUEST_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            arrived = b""
        connection.request += b"" if connection.is_answered else arrived
        if not arrived or len(connection.request) > _REQUEST_LIMIT:
            self._drop(connection.socket)
        elif not connection.is_answered and any(end in connection.request for end in _ENDS_OF_HEAD):
            self._answer(connection)

    def _answer(self, connection: _Connection) -> None:
        """Answer, and wait for the client to close: closing over unread bytes would reset what it has not read yet."""
        connection.is_answered = True
        check = self._desired.checks.get(connection.service)
        try:
            if check:
                reply = answer(bytes(connection.request), connection.service, check, is_healthy=self._is_healthy())
                connection.socket.send(reply)
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(connection.socket)

    def _close_late(self, now: float) -> None:
        while self._connections and next(iter(self._connections.values())).deadline <= now:
            self._close_oldest()

    def _close_oldest(self) -> None:
        if self._connections:
            self._drop(next(iter(self._connections)))

    def _drop(self, accepted: socket.socket) -> None:
        # One that is dropped to make room may have had a turn in the same round.
        if self._connections.pop(accepted, None):
            self._close(accepted)

    def _close(self, opened: socket.socket) -> None:
        self._selector.unregister(opened)
        opened.close()


def answer(request: bytes, service: ObjectKey, check: HealthCheck, *, is_healthy: bool) -> bytes:
    """Answer a request, whatever its path: 200 where this node has a ready endpoint and the proxy is healthy."""
    method, _, version = (*request.partition(b"\n")[0].split(), b"", b"", b"")[:3]
    if not version.startswith(b"HTTP/1."):
        return _response(400, b"", {})
    body = {
        "service": {"namespace": service.namespace, "name": service.name},
        "localEndpoints": check.local_endpoints,
        "serviceProxyHealthy": is_healthy,
    }
    encoded = json.dumps(body).encode()
    headers = {
        "Content-Type": "application/json",
        "X-Content-Type-Options": "nosniff",
        "X-Load-Balancing-Endpoint-Weight": str(check.local_endpoints),
        "Content-Length": str(len(encoded)),
    }
    return _response(
        200 if check.local_endpoints and is_healthy else 503, b"" if method == b"HEAD" else encoded, headers
    )


def _response(code: int, body: bytes, headers: Mapping[str, str]) -> bytes:
    lines = (f"HTTP/1.1 {code} {_REASONS[code]}", *(f"{name}: {value}" for name, value in headers.items()))
    return "\r\n".join((*lines, "Connection: close", "", "")).encode() + body
