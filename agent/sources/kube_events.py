"""Tell users, by Kubernetes Events on their objects, what the agent could not do for them."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from agent.core.records import Kind, ObjectKey
from agent.errors import SourceError
from agent.sources.kube_identity import Reader, read_uid

log = logging.getLogger("ebproxy.source.kube")

_REPEAT_S = 600.0  # the same complaint about the same object, again only after this
_REMEMBERED = 1024
_LOOKUP_S = 5.0
_MESSAGE_LIMIT = 1024  # Source: core/v1 Event.message, as the API validates it

_API_VERSIONS = {
    Kind.SERVICE: "v1",
    Kind.ENDPOINT_SLICE: "discovery.k8s.io/v1",
    Kind.NODE: "v1",
    Kind.POD: "v1",
    Kind.NAMESPACE: "v1",
    Kind.NETWORK_POLICY: "networking.k8s.io/v1",
    Kind.CLUSTER_NETWORK_POLICY: "policy.networking.k8s.io/v1alpha2",
}


class Poster(Reader, Protocol):
    """Sends an object to the API server, and reads others."""

    def post(self, path: str, body: dict[str, Any], read_timeout_s: float = 10.0) -> None:
        """POST; raises SourceError."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """One Warning about one object."""

    kind: Kind
    key: ObjectKey
    reason: str
    message: str


class TokenBucket:
    """Allows ``burst`` at once and ``rate_per_s`` in the long run."""

    def __init__(self, burst: int, rate_per_s: float, clock: Callable[[], float]) -> None:
        self._burst = float(burst)
        self._rate_per_s = rate_per_s
        self._clock = clock
        self._tokens = float(burst)
        self._filled_at = clock()

    def take(self) -> bool:
        """Take a token if there is one."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate_per_s)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class EventRecorder:
    """Posts Warnings on a thread of its own; never blocks its caller, and rather drops than floods."""

    def __init__(
        self,
        client: Poster,
        node_name: str,
        *,
        burst: int = 10,
        rate_per_s: float = 0.2,
        depth: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._node_name = node_name
        self._clock = clock
        self._bucket = TokenBucket(burst, rate_per_s, clock)
        self._lock = threading.Lock()
        self._said: dict[tuple[Kind, ObjectKey, str], float] = {}
        self._queue: queue.Queue[Complaint | None] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._run, name="event-recorder", daemon=True)
        self._thread.start()

    def warn(self, key: ObjectKey, reason: str, message: str, *, kind: Kind = Kind.SERVICE) -> bool:
        """Queue a Warning; False if it was said lately, or there are too many."""
        with self._lock:
            if not self._is_news((kind, key, reason)) or not self._bucket.take():
                return False
            try:
                self._queue.put_nowait(Complaint(kind, key, reason, message))
            except queue.Full:
                return False
            self._said[(kind, key, reason)] = self._clock()
            return True

    def stop(self, timeout_s: float = 2.0) -> None:
        """Post what is queued, within ``timeout_s``."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    def _is_news(self, complaint: tuple[Kind, ObjectKey, str]) -> bool:
        now = self._clock()
        if len(self._said) >= _REMEMBERED:
            self._said = {said: at for said, at in self._said.items() if now - at < _REPEAT_S}
        return now - self._said.get(complaint, float("-inf")) >= _REPEAT_S

    def _run(self) -> None:
        while (complaint := self._queue.get()) is not None:
            namespace = complaint.key.namespace or "default"
            body = event_body(complaint, self._node_name, self._uid_of(complaint))
            try:
                self._client.post(f"/api/v1/namespaces/{namespace}/events", body)
            except SourceError as error:
                log.warning("event not posted object=%s error=%r", complaint.key, str(error))

    def _uid_of(self, complaint: Complaint) -> str:
        """Look up what `kubectl describe` finds an object's Events by; without it `kubectl get events` still does."""
        try:
            return read_uid(self._client, complaint.kind, complaint.key, _LOOKUP_S)
        except SourceError as error:
            log.debug("event without uid object=%s error=%r", complaint.key, str(error))
            return ""


def event_body(complaint: Complaint, node_name: str, uid: str = "") -> dict[str, Any]:
    """Build the object to post; an empty ``uid`` is one that is not known. Source: core/v1 Event."""
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    involved = {
        "apiVersion": _API_VERSIONS[complaint.kind],
        "kind": str(complaint.kind),
        "name": complaint.key.name,
    }
    if complaint.key.namespace:
        involved["namespace"] = complaint.key.namespace
    if uid:
        involved["uid"] = uid
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{complaint.key.name}.", "namespace": complaint.key.namespace or "default"},
        "involvedObject": involved,
        "type": "Warning",
        "reason": complaint.reason,
        "message": complaint.message[:_MESSAGE_LIMIT],
        "source": {"component": "ebproxy", "host": node_name},
        "reportingComponent": "ebproxy",
        "reportingInstance": node_name,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
