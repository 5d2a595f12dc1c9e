"""An API server for tests: real HTTP, real list and watch, and faults on demand.

In a thread: ``ApiServer().start()``. As a process: ``python -m tests.cluster.apiserver --port 0 --portfile F``.
It takes any resource of any group, validates nothing and defaults nothing. What it promises is what
`test_api_contract.py` asks of it and of a real kube-apiserver alike.

Beside the API: POST /_test/faults (a Fault's fields), DELETE /_test/faults, POST /_test/compact, GET /_test/requests.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import ssl
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import yaml

from tests.cluster.api_faults import FaultPlan
from tests.cluster.api_http import Asked, Handler
from tests.cluster.api_store import KINDS, Resource, Store


@dataclass(slots=True)
class Options:
    """How the server behaves when nothing is wrong.

    ``streaming``: "yes"; "refuse" as servers before 1.27 do; "ignore" as if the parameter were not there.
    ``tokens``: the bearer tokens that are accepted; None is everybody.
    """

    bookmark_s: float = 60.0
    streaming: str = "yes"
    tokens: set[str] | None = None
    tls: ssl.SSLContext | None = None


class HttpServer(ThreadingHTTPServer):
    """A thread per connection; all connections end with the server."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, api: ApiServer) -> None:
        self.api = api
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)
        if api.options.tls:
            self.socket = api.options.tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""

    def cut_all(self) -> None:
        """Close every connection under its handler."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


@dataclass
class ApiServer:
    """The server: its store, its faults, and what it was asked."""

    options: Options = field(default_factory=Options)
    store: Store = field(default_factory=Store)
    faults: FaultPlan = field(default_factory=FaultPlan)
    requests: deque[Asked] = field(default_factory=lambda: deque(maxlen=10_000))
    stopping: threading.Event = field(default_factory=threading.Event)
    port: int = 0
    _http: HttpServer | None = None
    _thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it listens; the port stays the same from the first start on."""
        return f"{'https' if self.options.tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> ApiServer:
        """Listen."""
        self.stopping.clear()
        self._http = HttpServer(self.port, self)
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Refuse connections and cut those there are; the objects stay."""
        if not self._http or not self._thread:
            return
        self.stopping.set()
        with self.store.changed:
            self.store.changed.notify_all()
        self._http.shutdown()
        self._http.server_close()
        self._http.cut_all()
        self._thread.join()
        self._http = self._thread = None

    def asked(self, verb: str, resource: str) -> list[dict[str, str]]:
        """Return the queries of the requests of one sort, oldest first."""
        return [asked.query for asked in self.requests if (asked.verb, asked.resource) == (verb, resource)]


def _documents(path: Path) -> Iterable[Any]:
    """Read a file's documents; JSON is YAML, but large lists are read fifty times faster as what they are."""
    if path.suffix == ".json":
        return [msgspec.json.decode(path.read_bytes())]
    return yaml.load_all(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def load(store: Store, paths: Sequence[Path]) -> None:
    """Create every object of some YAML or JSON files."""
    for path in paths:
        for document in _documents(path):
            for source in document.get("items", [document]) if document else []:
                group, _, version = source["apiVersion"].rpartition("/")
                plural = next(plural for plural, kind in KINDS.items() if kind == source["kind"])
                store.create(Resource(group, version, plural), source["metadata"].get("namespace", ""), source)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="An API server for tests, on loopback.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--portfile", type=Path, help="the port is written here once it listens")
    parser.add_argument("--load", type=Path, action="append", default=[], help="a file of objects; may be repeated")
    parser.add_argument("--bookmark-s", type=float, default=60.0)
    parser.add_argument("--streaming", choices=("yes", "refuse", "ignore"), default="yes")
    arguments = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    server = ApiServer(Options(bookmark_s=arguments.bookmark_s, streaming=arguments.streaming), port=arguments.port)
    load(server.store, arguments.load)
    server.start()
    if arguments.portfile:
        unfinished = arguments.portfile.with_suffix(".part")
        unfinished.write_text(f"{server.port}\n")
        unfinished.rename(arguments.portfile)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    server.stop()


if __name__ == "__main__":
    main()
