"""A source under test, and what its events add up to."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.core.events import AnyRecord, Delete, Event, ListEnded, ListStarted, Malformed, Upsert
from agent.core.records import Kind
from agent.sources.decode import Decoder
from agent.sources.kube import KubeSource, resources
from agent.sources.kube_client import HttpTimeouts, KubeClient, KubeTarget
from agent.sources.kube_watch import WatchTuning
from tests.cluster.api_driver import ApiDriver, are_cluster_policies_defined, until
from tests.cluster.api_servers import AnyApiServer, write_kubeconfig

NODE = "node-1"
QUICK = WatchTuning(
    read_s=2.0,
    initial_read_s=1.0,
    list_read_s=2.0,
    backoff_first_s=0.01,
    backoff_last_s=0.2,
    absent_first_s=0.02,
    absent_last_s=0.2,
    stable_s=0.3,
)

Held = dict[tuple[Kind, str], AnyRecord]


def key_of(record: AnyRecord) -> str:
    return str(getattr(record, "key", None) or record.name)  # type: ignore[union-attr]


class Followed:
    """Keeps records as the model does, and everything else for tests to look at."""

    def __init__(self) -> None:
        self.held: Held = {}
        self.events: list[Event] = []
        self.errors: Counter[str] = Counter()
        self.messages: list[str] = []
        self.arrived = threading.Event()
        self._unmentioned: dict[Kind, set[str]] = {}
        self._lock = threading.Lock()

    def emit(self, event: Event) -> None:
        with self._lock:
            self.events.append(event)
            self._apply(event)
        self.arrived.set()

    def on_error(self, cause: str, message: str) -> None:
        self.messages.append(message)
        self.errors[cause] += 1

    def names(self, kind: Kind) -> set[str]:
        with self._lock:
            return {name.rpartition("/")[2] for held, name in self.held if held == kind}

    def count(self, event: type[Event], kind: Kind) -> int:
        with self._lock:
            return sum(type(found) is event and found.kind == kind for found in self.events)  # type: ignore[union-attr]

    def _apply(self, event: Event) -> None:
        match event:
            case ListStarted(kind):
                self._unmentioned[kind] = {name for held, name in self.held if held == kind}
            case ListEnded(kind):
                for name in self._unmentioned.pop(kind):
                    del self.held[kind, name]
            case Upsert(record):
                self.held[record.kind, key_of(record)] = record
                self._unmentioned.get(record.kind, set()).discard(key_of(record))
            case Delete(kind, key):
                self.held.pop((kind, str(key)), None)
                self._unmentioned.get(kind, set()).discard(str(key))
            case Malformed(kind, key):
                self._unmentioned.get(kind, set()).discard(str(key))


def expected(api: ApiDriver, *, policy: bool = False) -> Held:
    """Return the records of what the server holds now, read by a plain list."""
    followed = Followed()
    decoder = Decoder(NODE, policy=policy)
    for resource in resources(NODE, policy=policy):
        if resource.is_optional and not are_cluster_policies_defined(api):
            continue
        for event in decoder.decode_list(resource.kind, api.raw(resource.path, **dict(resource.selector))).events:
            followed.emit(event)
    return followed.held


def assert_converges(followed: Followed, api: ApiDriver, deadline_s: float = 20.0, *, policy: bool = False) -> None:
    """Wait until what was followed is what the server holds, and not a record more."""

    def differing() -> str:
        wanted, found = expected(api, policy=policy), dict(followed.held)
        return "" if wanted == found else f"{ {key for key, _ in wanted.items() ^ found.items()} }"

    until(lambda: not differing(), deadline_s, f"convergence (errors {dict(followed.errors)}; {differing()})")


@contextmanager
def following(
    server: AnyApiServer, directory: Path, tuning: WatchTuning = QUICK, token: str = "", *, policy: bool = False
) -> Iterator[tuple[KubeSource, Followed]]:
    """Run a source against a server; at the end its threads must be gone."""
    followed = Followed()
    kubeconfig = write_kubeconfig(directory / "kubeconfig", server, token)
    client = KubeClient(KubeTarget(kubeconfig), HttpTimeouts(connect_s=1.0))
    source = KubeSource(client, NODE, followed.emit, followed.on_error, tuning, policy=policy)
    source.start()
    try:
        yield source, followed
    finally:
        source.stop()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("watch-")]
