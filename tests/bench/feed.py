"""An API server that has its answers ready: it costs the machine little while an agent reads them.

It serves what the agent asks of a real one (streaming lists, pages, watches, Events), each event in a chunk of its own
as a real one does, and knows when it wrote what. How such a server behaves is tested in tests/cluster, not here.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

from agent.core.records import Kind
from tests.bench.errors import BenchError
from tests.bench.policy_population import PolicyPopulation
from tests.bench.population import NODE, Population, node
from tests.lab import netns

_KINDS = {
    "services": Kind.SERVICE,
    "endpointslices": Kind.ENDPOINT_SLICE,
    "nodes": Kind.NODE,
    "pods": Kind.POD,
    "namespaces": Kind.NAMESPACE,
    "networkpolicies": Kind.NETWORK_POLICY,
    "clusternetworkpolicies": Kind.CLUSTER_NETWORK_POLICY,
}
_API_VERSIONS = {
    Kind.ENDPOINT_SLICE: "discovery.k8s.io/v1",
    Kind.NETWORK_POLICY: "networking.k8s.io/v1",
    Kind.CLUSTER_NETWORK_POLICY: "policy.networking.k8s.io/v1alpha2",
}
"""Of those that are not ``v1``."""
_CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
_WATCH_LIMIT_S = 30.0


def _chunk(event: str, source: bytes) -> bytes:
    line = b'{"type":"%s","object":%s}\n' % (event.encode(), source)
    return b"%x\r\n%s\r\n" % (len(line), line)


class Feed:
    """Serves a population on loopback; ``url`` is where.

    ``first_byte_at`` is when the first byte of the first list since ``rewind`` was written, and ``last_byte_at`` when
    the kernel had taken in the last one (monotonic seconds).
    """

    def __init__(self, population: Population, place: str = "", policy: PolicyPopulation | None = None) -> None:
        """Listen, in a network namespace if one is named; without ``policy`` nothing that it is made of is served."""
        self.first_byte_at = 0.0
        self.last_byte_at = 0.0
        self._version = 1
        self._objects: dict[Kind, list[bytes]] = {
            Kind.SERVICE: [population.service(number, 1) for number in range(population.services)],
            Kind.ENDPOINT_SLICE: [population.slice(number, 1) for number in range(population.services)],
            Kind.NODE: [node(1)],
            **(policy.objects() if policy else {}),
        }
        self._lists = {kind: self._initial_events(kind) for kind in self._objects}
        self._watches: dict[Kind, socket.socket] = {}
        self._lock = threading.Lock()
        with netns.entered(place) if place else contextlib.nullcontext():
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: set[socket.socket] = set()
        threading.Thread(target=self._accept, name="feed", daemon=True).start()

    @property
    def size(self) -> int:
        """Bytes of all objects."""
        return sum(len(source) for sources in self._objects.values() for source in sources)

    @property
    def next_version(self) -> int:
        """The version the next change will have."""
        return self._version + 1

    def rewind(self) -> None:
        """Be as if nobody had asked yet."""
        self.first_byte_at = self.last_byte_at = 0.0

    def change_slice(self, number: int, source: bytes) -> float:
        """Change a slice and tell whoever watches; returns when the write began (monotonic seconds)."""
        return self._change(Kind.ENDPOINT_SLICE, number, source)

    def change_policy(self, number: int, source: bytes) -> float:
        """The same for a NetworkPolicy."""
        return self._change(Kind.NETWORK_POLICY, number, source)

    def _change(self, kind: Kind, number: int, source: bytes) -> float:
        self._version += 1
        self._objects[kind][number] = source
        chunk = _chunk("MODIFIED", source)
        watch = self._watch_of(kind)
        begun = time.monotonic()
        watch.sendall(chunk)
        return begun

    def change_slices(self, sources: dict[int, bytes]) -> float:
        """The same for many, written as fast as they are taken in."""
        self._version += len(sources)
        for number, source in sources.items():
            self._objects[Kind.ENDPOINT_SLICE][number] = source
        chunks = b"".join(_chunk("MODIFIED", source) for source in sources.values())
        watch = self._watch_of(Kind.ENDPOINT_SLICE)
        begun = time.monotonic()
        watch.sendall(chunks)
        return begun

    def settle(self) -> None:
        """Take what was changed into the lists; nothing is served meanwhile that is older."""
        self._lists[Kind.ENDPOINT_SLICE] = self._initial_events(Kind.ENDPOINT_SLICE)

    def list_body(self, kind: Kind) -> bytes:
        """A whole list as one body."""
        return self._page(kind, 0, len(self._objects[kind]))

    def stop(self) -> None:
        """Close everything."""
        self._listener.close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _initial_events(self, kind: Kind) -> bytes:
        end = (
            b'{"kind":"%s","apiVersion":"%s","metadata":{"resourceVersion":"%d","annotations":'
            b'{"k8s.io/initial-events-end":"true"}}}'
        ) % (kind.value.encode(), _version_of(kind), self._version)
        chunks = [_chunk("ADDED", source) for source in self._objects[kind]]
        return b"".join([*chunks, _chunk("BOOKMARK", end)])

    def _page(self, kind: Kind, start: int, limit: int) -> bytes:
        items = self._objects[kind]
        end = min(start + limit, len(items))
        token = b'"continue":"%d",' % end if end < len(items) else b""
        return b'{"kind":"%sList","apiVersion":"%s","metadata":{%s"resourceVersion":"%d"},"items":[%s]}' % (
            kind.value.encode(),
            _version_of(kind),
            token,
            self._version,
            b",".join(items[start:end]),
        )

    def _watch_of(self, kind: Kind) -> socket.socket:
        deadline = time.monotonic() + _WATCH_LIMIT_S
        while kind not in self._watches:
            if time.monotonic() > deadline:
                raise BenchError(f"the agent does not watch {kind}")
            time.sleep(0.002)
        return self._watches[kind]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            for method, target in _requests(connection):
                self._answer(connection, method, target)
        except OSError:
            pass  # the agent was killed, or we are stopping
        finally:
            self._connections.discard(connection)
            connection.close()

    def _answer(self, connection: socket.socket, method: str, target: str) -> None:
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        kind = _KINDS.get(parts.path.rsplit("/", 1)[-1])
        if method != "GET" or kind not in self._objects:
            _reply(connection, b"{}", "201 Created" if method == "POST" else "404 Not Found")
        elif query.get("watch") == "true":
            self._watch(connection, kind, with_list=query.get("sendInitialEvents") == "true")
        else:
            self.first_byte_at = self.first_byte_at or time.monotonic()
            limit = int(query.get("limit", 0)) or len(self._objects[kind])
            _reply(connection, self._page(kind, int(query.get("continue", 0)), limit))
            self.last_byte_at = time.monotonic()

    def _watch(self, connection: socket.socket, kind: Kind, *, with_list: bool) -> None:
        connection.sendall(_CHUNKED)
        if with_list:
            with self._lock:
                self.first_byte_at = self.first_byte_at or time.monotonic()
            connection.sendall(self._lists[kind])
            self.last_byte_at = time.monotonic()
        self._watches[kind] = connection
        try:
            while connection.recv(4096):
                pass
        finally:
            if self._watches.get(kind) is connection:
                del self._watches[kind]


def _version_of(kind: Kind) -> bytes:
    return _API_VERSIONS.get(kind, "v1").encode()


def _requests(connection: socket.socket) -> Iterator[tuple[str, str]]:
    """Read requests one after the other; a body, if any, is skipped."""
    waiting = b""
    while True:
        while b"\r\n\r\n" not in waiting:
            more = connection.recv(65536)
            if not more:
                return
            waiting += more
        head, _, waiting = waiting.partition(b"\r\n\r\n")
        first, *headers = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in headers)}
        length = int(fields.get("content-length", 0))
        while len(waiting) < length:
            waiting += connection.recv(65536)
        waiting = waiting[length:]
        method, target, _ = first.split(" ")
        yield method, target


def _reply(connection: socket.socket, body: bytes, status: str = "200 OK") -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)


def kubeconfig(url: str) -> str:
    """Write how to reach the feed."""
    return f"""apiVersion: v1
kind: Config
clusters: [{{name: bench, cluster: {{server: "{url}"}}}}]
contexts: [{{name: bench, context: {{cluster: bench, user: {NODE}}}}}]
users: [{{name: {NODE}, user: {{token: bench}}}}]
current-context: bench
"""
