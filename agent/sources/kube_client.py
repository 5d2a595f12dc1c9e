"""Talk HTTP to the API server: where it is, who we are, and what its failures mean.

The `kubernetes` package contributes configuration, credentials and the urllib3 pool. Its models and its Watch are
not used: responses stay raw, for `kube_stream` to frame and `decode` to type.
"""

from __future__ import annotations

import email.utils
import http.client
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import urllib3
import yaml
from kubernetes.client import ApiClient, ApiException, Configuration
from kubernetes.config import ConfigException, load_kube_config
from kubernetes.config.incluster_config import InClusterConfigLoader
from kubernetes.utils.keepalive import tcp_keepalive_socket_options

from agent.errors import ConfigError
from agent.sources.kube_chunks import ChunkedBody
from agent.sources.kube_failures import ApiFailure, Cause
from agent.sources.kube_sockets import OpenSockets, tracked_pools

log = logging.getLogger("ebproxy.source.kube")

SERVICE_ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_BODY_LIMIT = 64 * 1024  # of an error's body; a Status is far smaller, a proxy's HTML page need not be
_UNCONFIGURED = (ConfigException, OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True)
class KubeTarget:
    """Which API server, and with whose credentials.

    Without ``kubeconfig`` the pod's service account is used. ``api_server`` replaces the address either of them
    gives, since the ClusterIP of the Service `kubernetes` answers only once this very agent has programmed it.
    """

    kubeconfig: Path | None = None
    api_server: str | None = None
    service_account_dir: Path = SERVICE_ACCOUNT_DIR


@dataclass(frozen=True, slots=True)
class HttpTimeouts:
    """How long to wait for the network, and how often to read credentials again; all in seconds."""

    connect_s: float = 5.0
    reload_s: float = 60.0
    keepalive_idle_s: int = 15
    keepalive_interval_s: int = 10
    keepalive_count: int = 3

    def socket_options(self) -> list[tuple[int, int, int]]:
        """Find a dead peer in about 45 s, though nothing is being sent."""
        options = tcp_keepalive_socket_options(self.keepalive_idle_s, self.keepalive_interval_s, self.keepalive_count)
        return cast("list[tuple[int, int, int]]", options)


DEFAULT_TIMEOUTS = HttpTimeouts()


class KubeClient:
    """Requests to one API server; safe to share between threads.

    Credentials are read again before the first request after ``reload_s``, and at once after `reload`: rotated token
    files and client certificates, edited kubeconfigs and exec plugins all come in that way. If they cannot be read,
    the ones in use stay.
    """

    def __init__(
        self,
        target: KubeTarget,
        timeouts: HttpTimeouts = DEFAULT_TIMEOUTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target = target
        self._timeouts = timeouts
        self._clock = clock
        self._sockets = OpenSockets()
        self._lock = threading.Lock()
        self._api = self._build()
        self._loaded_at = clock()

    @property
    def host(self) -> str:
        """The URL of the API server."""
        return str(self._api.configuration.host)

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
        response = self._send("POST", path, (), body, read_timeout_s)
        if not 200 <= response.status < 300:
            raise _refusal(response)
        with KubeResponse(response) as created:
            created.read_all()

    def reload(self) -> None:
        """Read the credentials again at the next request."""
        with self._lock:
            self._loaded_at = float("-inf")

    def set_read_timeout(self, read_timeout_s: float) -> None:
        """Change the read timeout of the request this thread is reading."""
        self._sockets.set_timeout_of_thread(read_timeout_s)

    def close(self) -> None:
        """End every request in flight, in whichever thread it blocks, and refuse new ones."""
        self._sockets.close()
        with self._lock:
            self._api.close()

    def _send(
        self, method: str, path: str, query: Sequence[tuple[str, str]], body: Any, read_timeout_s: float
    ) -> urllib3.HTTPResponse:
        api = self._current()
        with translated_failures():
            verb, url, headers, payload, _ = api.param_serialize(
                method,
                path,
                query_params=list(query),
                header_params={"Accept": "application/json", "Content-Type": "application/json"},
                body=body,
                auth_settings=["BearerToken"],
            )
            timeouts = (self._timeouts.connect_s, read_timeout_s)
            answer = api.call_api(verb, url, headers, body=payload, _request_timeout=timeouts)
        return cast("urllib3.HTTPResponse", answer.response)

    def _current(self) -> ApiClient:
        with self._lock:
            if self._clock() - self._loaded_at >= self._timeouts.reload_s:
                self._loaded_at = self._clock()
                self._replace()
            return self._api

    def _replace(self) -> None:
        try:
            fresh = self._build()
        except ConfigError as error:
            log.warning("credentials not readable, keeping those in use error=%r", str(error))
            return
        self._api.close()
        self._api = fresh

    def _build(self) -> ApiClient:
        configuration = load_configuration(self._target)
        configuration.retries = False  # urllib3's own would sleep on Retry-After, deaf to close()
        configuration.socket_options = self._timeouts.socket_options()
        configuration.connection_pool_maxsize = 4
        try:
            api = ApiClient(configuration)
        except _UNCONFIGURED as error:
            raise ConfigError([f"credentials of {configuration.host}: {error}"]) from error
        api.user_agent = "ebproxy"
        api.rest_client.pool_manager.pool_classes_by_scheme = tracked_pools(self._sockets)
        return api


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


def load_configuration(target: KubeTarget) -> Configuration:
    """Read kubeconfig or service account, and put the explicit address over theirs.

    Raises:
        ConfigError: there is neither, or it cannot be used.
    """
    configuration = Configuration()
    origin = f"kubeconfig {target.kubeconfig}" if target.kubeconfig else "in-cluster configuration"
    try:
        if target.kubeconfig:
            load_kube_config(str(target.kubeconfig), client_configuration=configuration, persist_config=False)
        else:
            _load_service_account(target, configuration)
    except _UNCONFIGURED as error:
        raise ConfigError([f"{origin}: {error}"]) from error
    if target.api_server:
        configuration.host = target.api_server.rstrip("/")
    # The hook would put the address of the file back; credentials come in through KubeClient's own reload instead.
    configuration.refresh_api_key_hook = None
    return configuration


def _load_service_account(target: KubeTarget, configuration: Configuration) -> None:
    environment = dict(os.environ)
    if target.api_server:
        environment.setdefault("KUBERNETES_SERVICE_HOST", "replaced")
        environment.setdefault("KUBERNETES_SERVICE_PORT", "443")
    directory = target.service_account_dir
    InClusterConfigLoader(
        token_filename=str(directory / "token"),
        cert_filename=str(directory / "ca.crt"),
        try_refresh_token=False,
        environ=environment,
    ).load_and_set(configuration)


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
    except (urllib3.exceptions.SSLError, ApiException) as error:
        raise ApiFailure(Cause.CONNECT, str(error).strip()) from error
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
