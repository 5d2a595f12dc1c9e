"""Read objects of one kind, from JSON or from builtin values; what cannot be read is told with the field at fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from sys import intern
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from agent.core.events import AnyRecord, Delete, Malformed, Upsert
from agent.core.records import Fault, Kind, ObjectKey
from agent.sources import convert
from agent.sources.wire import SERVICE_NAME_LABEL, Identity, WatchEvent, WireObject

ObjectEvent = Upsert | Delete | Malformed
"""What one object comes to. Delete: it exists, but says nothing to us, perhaps no longer."""

UNNAMED = ObjectKey("", "?")
"""The key of an object whose name cannot be read."""

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What is raised for an object that cannot be read."""

_EXISTENCE = ("ADDED", "MODIFIED")
_FAULT = re.compile(r"(?P<reason>.*?)(?: - at (?:`key` in )?`\$\.?(?P<field>[^`]*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`")
UNKNOWN_FIELD = "unknown field"
"""The reason of a fault that is a field's being there at all."""
_CLUSTER_SCOPED = frozenset({Kind.NODE, Kind.NAMESPACE, Kind.CLUSTER_NETWORK_POLICY})
_TRANSIENT = frozenset({Kind.POD})


class Decoded(NamedTuple):
    """One object's event, and the resource version it had (empty: none)."""

    event: ObjectEvent
    resource_version: str


_W = TypeVar("_W", bound=WireObject)

PartialRead = Callable[[ObjectKey, object], tuple[AnyRecord, list[Fault]]]
"""Reads what can be read of an object, from builtin values, and says what cannot. Raises: one of UNREADABLE."""


class Reader(Generic[_W]):
    """Reads the objects of one kind; ``read`` returns None for an object that counts as deleted.

    ``read_partly`` is for what cannot be read as a whole, where a part of it is better than nothing; with
    ``leaves_out`` it is also better than what the object said before.
    """

    def __init__(
        self,
        kind: Kind,
        shape: type[_W],
        read: Callable[[ObjectKey, _W], Upsert | None],
        read_partly: PartialRead | None = None,
        *,
        leaves_out: bool = False,
    ) -> None:
        self._kind = kind
        self._leaves_out = leaves_out
        self._read_partly = read_partly
        self._shape = shape
        self._read = read
        self._json = msgspec.json.Decoder(shape)
        self._event_json: msgspec.json.Decoder[Any] = msgspec.json.Decoder(WatchEvent[shape])  # type: ignore[valid-type]

    def from_json(self, raw: bytes | msgspec.Raw) -> Decoded:
        """Read one object from JSON."""
        try:
            decoded = self._json.decode(raw)
            return Decoded(self._event(decoded), decoded.metadata.resource_version or "")
        except UNREADABLE as error:
            key, version, owner = _identify(self._kind, lambda: msgspec.json.decode(raw, type=Identity))
            return Decoded(self._malformed(key, error, owner, lambda: msgspec.json.decode(raw)), version)

    def from_event(self, line: bytes) -> Decoded | None:
        """Read a watch event and its object at once; None unless it says that a readable object exists."""
        try:
            event = self._event_json.decode(line)
            if event.type not in _EXISTENCE:
                return None
            return Decoded(self._event(event.object), event.object.metadata.resource_version or "")
        except UNREADABLE:
            return None

    def from_value(self, value: object) -> ObjectEvent:
        """Read one object from builtin values."""
        try:
            return self._event(msgspec.convert(value, self._shape))
        except UNREADABLE as error:
            key, _, owner = _identify(self._kind, lambda: msgspec.convert(value, Identity))
            return self._malformed(key, error, owner, lambda: value)

    def _malformed(
        self, key: ObjectKey, error: Exception, owner: ObjectKey | None, value: Callable[[], object]
    ) -> Upsert | Malformed:
        if self._read_partly is None or key == UNNAMED:
            return Malformed(self._kind, key, *explain(error), owner)
        try:
            record, faults = self._read_partly(key, value())
        except UNREADABLE:
            return Malformed(self._kind, key, *explain(error), owner)
        faults = faults or [explain(error)]
        if self._leaves_out:
            return Upsert(record, tuple(faults))
        fields, reasons = zip(*faults, strict=True)
        return Malformed(self._kind, key, ", ".join(fields), "; ".join(reasons), owner, record)

    def _event(self, decoded: _W) -> ObjectEvent:
        if not decoded.metadata.name:
            raise convert.fault("metadata.name", "empty")
        key = _key(self._kind, decoded.metadata.namespace, decoded.metadata.name)
        return self._read(key, decoded) or Delete(self._kind, key)


def _key(kind: Kind, namespace: str | None, name: str) -> ObjectKey:
    """Make a key; an object of a namespaced kind that names no namespace is in ``default``.

    The name is interned because a Service and its slices say the same one. A pod's is its own, and pods come and go:
    CPython 3.12 keeps what is interned for ever.
    """
    namespace = "" if kind in _CLUSTER_SCOPED else intern(namespace or "default")
    return ObjectKey(namespace, name if kind in _TRANSIENT else intern(name))


def _identify(kind: Kind, read: Callable[[], Identity]) -> tuple[ObjectKey, str, ObjectKey | None]:
    """Find out which object this is, its resource version, and the Service of a slice, whatever else is wrong."""
    try:
        metadata = read().metadata
    except UNREADABLE:
        return UNNAMED, "", None
    namespace, name, version = (
        value if isinstance(value, str) else ""
        for value in (metadata.namespace, metadata.name, metadata.resource_version)
    )
    if not name:
        return UNNAMED, version, None
    key = _key(kind, namespace, name)
    labels = metadata.labels if kind is Kind.ENDPOINT_SLICE and isinstance(metadata.labels, dict) else {}
    owner = labels.get(SERVICE_NAME_LABEL)
    return key, version, ObjectKey(key.namespace, owner) if owner and isinstance(owner, str) else None


def explain(error: Exception) -> Fault:
    """Split an error into field and reason; the field is empty where the whole object is at fault."""
    found = _FAULT.fullmatch(str(error))
    if found is None or not isinstance(error, msgspec.ValidationError):
        return Fault("", str(error))
    field = found["field"] or ""
    for pattern, reason in ((_MISSING, "missing"), (_UNKNOWN, UNKNOWN_FIELD)):
        if named := pattern.fullmatch(found["reason"]):
            return Fault(f"{field}.{named['name']}".lstrip("."), reason)
    return Fault(field, found["reason"])
