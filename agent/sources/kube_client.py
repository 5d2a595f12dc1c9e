"""Talk HTTP to the API server: where it is, who we are, and what its failures mean.

The `kubernetes` package contributes configuration and credentials, in a child (`kube_credentials`); the transport is
urllib3, as that package's own. Responses stay raw, for `kube_stream` to frame and `decode` to type.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import logging
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import urllib3

from agent.errors import ConfigError
from agent.sources.kube_chunks import ChunkedBody
from agent.sources.kube_credentials import Credentials, Request
from agent.sources.kube_failures import ApiFailure, Cause
from agent.sources.kube_inquiry import Inquiry, is_outdated
from agent.sources.kube_limits import RequestLimit
from agent.sources.kube_pools import open_pools
from agent.sources.kube_sockets import OpenSockets

log = logging.getLogger("ebproxy.source.kube")

SERVICE_ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_BODY_LIMIT = 64 * 1024  # of an error's body; a Status is far smaller, a proxy's HTML page need not be


@dataclass(frozen=True, slots=True)
class KubeTarget:
    """Which API server, and with whose credentials.

    Without ``kubeconfig`` the pod's service account is used. ``api_server`` replaces the address either of them
    gives, since the ClusterIP of the Service `kubernetes` answers only once this very agent has programmed it.
    """

    kubeconfig: Path | None = None
    api_server: str | None = None
    service_account_dir: Path = SERVICE_ACCOUNT_DIR

    def request(self) -> Request:
        """Say it to the credentials child, which runs in another directory."""
        return Request(
            kubeconfig=_absolute(str(self.kubeconfig)) if self.kubeconfig else None,
            api_server=self.api_server,
            service_account_dir=_absolute(str(self.service_account_dir)),
            agent_pid=os.getpid(),
        )


def _absolute(paths: str) -> str:
    """Make absolute one path, or several with a colon between them as in KUBECONFIG."""
    return os.pathsep.join(str(Path(path).expanduser().absolute()) for path in paths.split(os.pathsep) if path)


@dataclass(frozen=True, slots=True)
class HttpTimeouts:
    """How long to wait for the network, and how often to look for new credentials; all in seconds."""

    connect_s: float = 5.0
    reload_s: float = 60.0
    keepalive_idle_s: int = 15
    keepalive_interval_s: int = 10
    keepalive_count: int = 3

    def socket_options(self) -> list[tuple[int, int, int]]:
        """Find a dead peer in about 45 s, though nothing is being sent."""
        return [
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, self.keepalive_idle_s),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, self.keepalive_interval_s),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, self.keepalive_count),
        ]


DEFAULT_TIMEOUTS = HttpTimeouts()


class Access:
    """Credentials in use, and the connections that were made with them. Compared by identity."""

    def __init__(self, credentials: Credentials, pools: urllib3.PoolManager) -> None:
        self.credentials = credentials
        self.pools = pools


class KubeClient:
    """Requests to one API server; safe to share between threads.

    ``limit``: how often it may ask; None = as often as there is something to ask.

    Reading credentials begins with the client, and is waited for in `connect` or with the first use. Before the first
    request after ``reload_s`` they are read again if a file they came from has changed, or a plugin's expire; after
    `reload`, always. If they cannot be read, the ones in use stay.
    """

    def __init__(
        self,
        target: KubeTarget,
        timeouts: HttpTimeouts = DEFAULT_TIMEOUTS,
        clock: Callable[[], float] = time.monotonic,
        limit: RequestLimit | None = None,
    ) -> None:
        self._request = target.request()
        self._limit = limit
        self._closing = threading.Event()
        self._timeouts = timeouts
        self._clock = clock
        self._sockets = OpenSockets()
        self._access: Access | None = None
        self._last_used = threading.local()
        self._refused: Access | None = None
        self._reading = threading.Lock()
        self._lock = threading.Lock()  # over the next two
        self._is_closed = False
        self._inquiry: Inquiry | None = Inquiry(self._request)
        self._checked_at = clock()

    @property
    def host(self) -> str:
        """The URL of the API server."""
        return self.connect().credentials.host

    def connect(self) -> Access:
        """Wait for the first credentials.

        Raises:
            ConfigError: there are none, or they cannot be used.
        """
        if self._access is None:
            with self._reading:
                if self._access is None:
                    self._access = self._read()
        return self._access

    def open(self, path: str, query: Sequence[tuple[str, str]], read_timeout_s: float) -> KubeResponse:
        """Start a GET and return its body unread.

        Raises:
            ApiFailure: no answer, or one that is not 200.
        """
        response = self._send("GET", path, query, None, read_timeout_s)
        if response.status != 200:
            raise _refusal(response)
        return KubeResponse(response)

    def read(self, path: str, query: Sequence[tuple[str, str]], read_timeout_s: float) -> bytes:
        """GET a whole body."""
        with self.open(path, query, read_timeout_s) as response:
            return response.read_all()

    def post(self, path: str, body: dict[str, Any], read_timeout_s: float = 10.0) -> None:
        """POST an object; the answer is not looked at beyond its status."""
        response = self._send("POST", path, (), json.dumps(body), read_timeout_s)
        if not 200 <= response.status < 300:
            raise _refusal(response)
        with KubeResponse(response) as created:
            created.read_all()

    def reload(self) -> None:
        """Read the credentials again at the next request, unless those this thread used last are replaced already."""
        used = getattr(self._last_used, "access", self._access)
        if used is self._access:
            self._refused = used

    def set_read_timeout(self, read_timeout_s: float) -> None:
        """Change the read timeout of the request this thread is reading."""
        self._sockets.set_timeout_of_thread(read_timeout_s)

    def close(self) -> None:
        """End every request in flight, in whichever thread it blocks, and refuse new ones."""
        self._closing.set()
        self._sockets.close()
        with self._lock:
            self._is_closed = True
            if self._inquiry:
                self._inquiry.cancel()
        if self._access:
            self._access.pools.clear()

    def _send(
        self, method: str, path: str, query: Sequence[tuple[str, str]], body: str | None, read_timeout_s: float
    ) -> urllib3.HTTPResponse:
        # The pages of a list count as the one request that kube-proxy would have made.
        if self._limit and all(name != "continue" for name, _ in query):
            self._limit.wait(self._closing)
        access = self._last_used.access = self._current()
        headers = {"Accept": "application/json", "User-Agent": "ebproxy"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if access.credentials.authorization:
            headers["Authorization"] = access.credentials.authorization
        url = access.credentials.host + path
        if query:
            url += "?" + urllib.parse.urlencode(query, quote_via=urllib.parse.quote)
        timeout = urllib3.Timeout(connect=self._timeouts.connect_s, read=read_timeout_s)
        with translated_failures():
            answer = access.pools.request(
                method, url, headers=headers, body=body, timeout=timeout, preload_content=False
            )
        return cast("urllib3.HTTPResponse", answer)

    def _current(self) -> Access:
        """Return what to use, read again where that is due.

        One thread reads. Others wait only when what is in use was refused: a plugin may take its time.
        """
        access = self.connect()
        if self._is_due(access) and self._reading.acquire(blocking=access is self._refused):
            try:
                access = self._access = self._renewed(self.connect())
            finally:
                self._reading.release()
        return access

    def _is_due(self, access: Access) -> bool:
        return access is self._refused or self._clock() - self._checked_at >= self._timeouts.reload_s

    def _renewed(self, access: Access) -> Access:
        """Return new access, or the same where nothing new is to be had."""
        if not self._is_due(access):
            return access  # another thread has seen to it
        try:
            if access is not self._refused and not is_outdated(access.credentials):
                return access
            fresh = self._read()
        except ConfigError as error:
            if not self._is_closed:
                log.warning("credentials not readable, keeping those in use error=%r", str(error))
            return access
        finally:
            self._checked_at = self._clock()
            self._refused = None
        access.pools.clear()
        return fresh

    def _read(self) -> Access:
        """Read credentials, or take those that are being read since the client is there. Raises: ConfigError."""
        with self._lock:
            if self._is_closed:
                raise ConfigError([f"{self._request.origin}: not read, the client is closed"])
            self._inquiry = inquiry = self._inquiry or Inquiry(self._request)
        try:
            credentials = inquiry.answer()
        finally:
            with self._lock:
                self._inquiry = None
        return Access(credentials, open_pools(credentials, self._timeouts.socket_options(), self._sockets))


class KubeResponse:
    """A response's body, read as it arrives; closing it frees the connection."""

    def __init__(self, response: urllib3.HTTPResponse) -> None:
        self._response = response
        is_plain = response.chunked and not response.headers.get("Content-Encoding")
        self._chunks = ChunkedBody() if is_plain else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._response.closed:
            self._response.close()
        self._response.release_conn()

    def read_some(self, size: int = 256 * 1024) -> bytes:
        """Return what has arrived, up to ``size`` bytes, waiting for the first; empty at the end.

        ``read1`` and not ``stream``, which would wait for a full ``size``. Not to be mixed with ``read_all``.
        """
        with translated_failures():
            return self._read_chunks(self._chunks, size) if self._chunks else self._response.read1(size)

    def _read_chunks(self, chunks: ChunkedBody, size: int) -> bytes:
        """Read past http.client, straight from the connection's buffer."""
        connection = cast("http.client.HTTPResponse", self._response._fp).fp  # noqa: SLF001
        while not chunks.is_complete:
            arrived = connection.read1(size)
            if not arrived:
                raise http.client.IncompleteRead(b"")
            content = chunks.feed(arrived)
            if content:
                return content
        return b""

    def read_all(self) -> bytes:
        """Return the rest of the body."""
        with translated_failures():
            return self._response.read()


@contextmanager
def translated_failures() -> Iterator[None]:
    """Turn the transport's many exceptions into ApiFailure.

    ValueError and AttributeError are what http.client raises in a thread whose socket another thread has closed.
    """
    try:
        yield
    except urllib3.exceptions.ConnectTimeoutError as error:
        raise ApiFailure(Cause.CONNECT, str(error)) from error
    except (urllib3.exceptions.ReadTimeoutError, TimeoutError) as error:
        raise ApiFailure(Cause.TIMEOUT, str(error)) from error
    except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ProxyError) as error:
        raise ApiFailure(Cause.CONNECT, str(error)) from error
    except urllib3.exceptions.SSLError as error:
        raise ApiFailure(Cause.CONNECT, f"{type(error).__name__}: {error}") from error
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError, AttributeError) as error:
        raise ApiFailure(Cause.CUT, f"{type(error).__name__}: {error}") from error


def _refusal(response: urllib3.HTTPResponse) -> ApiFailure:
    """Read why the server refused, and free the connection."""
    try:
        with translated_failures():
            body = response.read(_BODY_LIMIT)
    except ApiFailure:
        body = b""
    response.close()
    response.release_conn()
    return ApiFailure.of_status(response.status, body, retry_after_s(response.headers.get("Retry-After")))


def retry_after_s(value: str | None) -> float:
    """Parse Retry-After: seconds, or a date; 0 where absent or unreadable.

    Source: RFC 9110, 10.2.3.
    """
    if not value:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
