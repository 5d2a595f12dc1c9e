"""Frame and read a watch: bytes in, whole lines out; each line one event, its object left to the decoder.

Source: https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

from __future__ import annotations

import msgspec

from agent.core.records import ObjectKey
from agent.sources.kube_failures import ApiFailure, Cause

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
LINE_LIMIT = 8 * 1024 * 1024  # etcd takes objects of 1.5 MiB; a line beyond this is not one


class WatchEvent(msgspec.Struct):
    """One event, its object still unread. Source: meta/v1 WatchEvent."""

    type: str
    object: msgspec.Raw


class _Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    annotations: dict[str, str] | None = None


class ObjectHead(msgspec.Struct):
    """Who an object is, and at which version."""

    metadata: _Metadata

    @property
    def key(self) -> ObjectKey:
        """Namespace and name."""
        return ObjectKey(self.metadata.namespace, self.metadata.name)

    @property
    def version(self) -> str:
        """The resourceVersion."""
        return self.metadata.resource_version

    @property
    def is_initial_end(self) -> bool:
        """Whether a bookmark marks the end of a streaming list."""
        return (self.metadata.annotations or {}).get(INITIAL_EVENTS_END) == "true"


class LineFramer:
    """Cut a stream of chunks into lines; what follows the last newline waits for more."""

    def __init__(self, limit_bytes: int = LINE_LIMIT) -> None:
        self._limit_bytes = limit_bytes
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines that ``chunk`` completes, empty ones left out.

        Raises: ApiFailure, when a line is longer than the limit.
        """
        if b"\n" not in chunk:
            self._keep(chunk)
            return []
        lines = chunk.split(b"\n")
        lines[0] = bytes(self._rest) + lines[0]
        self._rest.clear()
        self._keep(lines.pop())
        return [line for line in lines if line.strip()]

    @property
    def is_between_lines(self) -> bool:
        """Whether nothing of an unfinished line waits."""
        return not self._rest.strip()

    def _keep(self, part: bytes) -> None:
        self._rest += part
        if len(self._rest) > self._limit_bytes:
            raise ApiFailure(Cause.OVERSIZE, f"a line of more than {self._limit_bytes} bytes")


def is_older(version: str, than: str) -> bool:
    """Whether one resourceVersion certainly precedes another.

    Source: KEP-5504; versions are decimal numbers, and comparable. Others are not compared.
    """
    if not (version.isdecimal() and than.isdecimal()):
        return False
    return int(version) < int(than)


_event = msgspec.json.Decoder(WatchEvent)
_head = msgspec.json.Decoder(ObjectHead)


def read_event(line: bytes) -> WatchEvent:
    """Read a line of a watch.

    Raises: ApiFailure, when it is no event.
    """
    try:
        return _event.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiFailure(Cause.GARBAGE, f"not a watch event: {error}: {line[:80]!r}") from error


def read_head(raw: bytes | msgspec.Raw) -> ObjectHead:
    """Read only the metadata of an object.

    Raises: ApiFailure, when it has none that can be read.
    """
    try:
        return _head.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiFailure(Cause.GARBAGE, f"not an object: {error}") from error
