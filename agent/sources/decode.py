"""Decode objects, from JSON or from builtin values, into records.

Pure: no clock, no I/O; the caches only make equal parts of records the same object. An object that cannot be used
becomes a Malformed event that names its field; of one that can, what cannot be read is left out, and named.

A list is read in two passes: find the items, then decode each. That costs a tenth more than one typed pass, but one
bad item does not cost the others, and one decoded item is held at a time instead of all of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from sys import intern
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from agent.core.records import (
    Delete,
    Family,
    Kind,
    Malformed,
    NodeRecord,
    ObjectKey,
    ServiceRecord,
    SliceRecord,
    Traits,
    Upsert,
)
from agent.errors import SourceError
from agent.sources import convert
from agent.sources.wire import (
    SERVICE_NAME_LABEL,
    Conditions,
    Endpoint,
    Hints,
    Identity,
    ListEnvelope,
    NodeSpec,
    WatchEvent,
    WireNode,
    WireObject,
    WireService,
    WireSlice,
)

ObjectEvent = Upsert | Delete | Malformed
"""What one object comes to. Delete: it exists, but says nothing to us, perhaps no longer."""

UNNAMED = ObjectKey("", "?")
"""The key of an object whose name cannot be read."""

_EXISTENCE = ("ADDED", "MODIFIED")
DELETING_TAINT = "ToBeDeletedByClusterAutoscaler"

_CACHE_SIZE = 1024
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_FAULT = re.compile(r"(?P<reason>.*?)(?: - at (?:`key` in )?`\$\.?(?P<field>[^`]*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")
_FAMILIES = {"IPv4": Family.IPV4, "IPv6": Family.IPV6}
_NO_CONDITIONS = Conditions()
_NO_HINTS = Hints()


class Decoded(NamedTuple):
    """One object's event, and the resource version it had (empty: none)."""

    event: ObjectEvent
    resource_version: str


class Listing(NamedTuple):
    """One page of a list; an empty continue token means that it is the last."""

    events: list[ObjectEvent]
    resource_version: str
    continue_token: str


class Decoder:
    """Decode objects as the node of this name sees them."""

    def __init__(self, node_name: str) -> None:
        self._node_name = node_name
        self._readers: dict[Kind, _Reader[Any]] = {
            Kind.SERVICE: _Reader(Kind.SERVICE, WireService, self._service),
            Kind.ENDPOINT_SLICE: _Reader(Kind.ENDPOINT_SLICE, WireSlice, self._slice),
            Kind.NODE: _Reader(Kind.NODE, WireNode, self._node),
        }
        self._service_ports = lru_cache(_CACHE_SIZE)(convert.service_ports)
        self._slice_ports = lru_cache(_CACHE_SIZE)(convert.slice_ports)
        self._traits = lru_cache(_CACHE_SIZE)(self._make_traits)
        self._shared_traits = lru_cache(_CACHE_SIZE)(Traits)

    def decode(self, kind: Kind, raw: bytes | msgspec.Raw) -> Decoded:
        """Decode one object from JSON."""
        return self._readers[kind].from_json(raw)

    def decode_change(self, kind: Kind, line: bytes) -> Decoded | None:
        """Decode a watch event and its object at once; None unless it says that a readable object exists.

        Half the work of reading the event first and its object then, which is left for the events that are neither.
        """
        return self._readers[kind].from_event(line)

    def decode_object(self, kind: Kind, value: object) -> ObjectEvent:
        """Decode one object from the builtin values that a YAML or JSON parser makes."""
        return self._readers[kind].from_value(value)

    def decode_list(self, kind: Kind, body: bytes) -> Listing:
        """Decode one page of a list; a malformed item costs only itself.

        Raises: SourceError, when the body is no list at all.
        """
        try:
            page = msgspec.json.decode(body, type=ListEnvelope)
        except _UNREADABLE as error:
            raise SourceError(f"not a list of {kind}: {error}") from error
        read = self._readers[kind].from_json
        events = [read(item).event for item in page.items or ()]
        return Listing(events, page.metadata.resource_version or "", page.metadata.continue_token or "")

    def _service(self, key: ObjectKey, service: WireService) -> Upsert:
        spec, metadata = service.spec, service.metadata
        is_ours = metadata.labels is None or metadata.labels.proxy_name is None
        cluster_ips = convert.cluster_ips(spec) if is_ours and spec.type != "ExternalName" else ()
        ports = self._service_ports(spec.ports or ())
        external, left_out = (
            convert.external(spec, service.status, metadata.annotations, ports) if cluster_ips else (None, ())
        )
        record = ServiceRecord(
            key,
            cluster_ips,
            ports,
            spec.internal_traffic_policy == "Local",
            metadata.creation_timestamp or "",
            convert.affinity_timeout_s(spec),
            external,
        )
        return Upsert(record, left_out)

    def _slice(self, key: ObjectKey, endpoint_slice: WireSlice) -> Upsert | None:
        labels, annotations = endpoint_slice.metadata.labels, endpoint_slice.metadata.annotations
        family = _FAMILIES.get(endpoint_slice.address_type)
        if labels is None or not labels.service or labels.headless is not None or family is None:
            return None
        record = SliceRecord(
            key,
            ObjectKey(key.namespace, intern(labels.service)),
            family,
            self._slice_ports(endpoint_slice.ports or ()),
            self._runs(family, endpoint_slice.endpoints or ()),
            convert.unix_time(annotations.changed_at) if annotations else None,
        )
        return Upsert(record)

    def _node(self, key: ObjectKey, node: WireNode) -> Upsert:
        labels, spec = node.metadata.labels, node.spec or NodeSpec()
        is_tainted = any(taint.key == DELETING_TAINT for taint in spec.taints or ())
        record = NodeRecord(
            key.name,
            (labels.zone if labels else None) or "",
            convert.node_addresses((node.status.addresses if node.status else None) or ()),
            convert.pod_cidrs(spec),
            is_tainted or node.metadata.deletion_timestamp is not None,
        )
        return Upsert(record)

    def _runs(self, family: Family, endpoints: Sequence[Endpoint]) -> tuple[tuple[Traits, bytes], ...]:
        """Group the first addresses of endpoints by traits.

        Grouping by what the wire says comes first, since it is the loop over all endpoints of the cluster; what the
        wire says in two ways (``null`` for the default) is merged after it.
        """
        node_name = self._node_name
        said: defaultdict[tuple[Conditions | None, Hints | None, bool], list[str]] = defaultdict(list)
        words: tuple[Conditions | None, Hints | None, bool] = (None, None, False)
        conditions, hints, is_local = words
        texts = said[words]
        for endpoint in endpoints:
            if (
                endpoint.conditions != conditions
                or endpoint.hints != hints
                or (endpoint.node_name == node_name) is not is_local
            ):
                # Neighbours mostly say the same: to compare them is cheaper than to hash each.
                words = endpoint.conditions, endpoint.hints, endpoint.node_name == node_name
                conditions, hints, is_local = words
                texts = said[words]
            if endpoint.addresses:
                texts.append(endpoint.addresses[0])
        runs: dict[Traits, bytes] = {}
        try:
            for words, texts in said.items():
                if not texts:
                    continue
                traits = self._traits(*words)
                runs[traits] = runs.get(traits, b"") + convert.pack(family, texts)
        except (OSError, ValueError):
            convert.blame_endpoint(family, endpoints)
        return tuple(runs.items())

    def _make_traits(self, conditions: Conditions | None, hints: Hints | None, is_local: bool) -> Traits:
        """Convert what an endpoint says; equal traits are the same object, in whatever words they were said."""
        conditions, hints = conditions or _NO_CONDITIONS, hints or _NO_HINTS
        return self._shared_traits(
            conditions.ready is not False,
            conditions.serving is not False,
            conditions.terminating is True,
            is_local,
            frozenset([intern(zone.name) for zone in hints.for_zones]) if hints.for_zones else None,
            any(node.name == self._node_name for node in hints.for_nodes) if hints.for_nodes else None,
        )


_W = TypeVar("_W", bound=WireObject)


class _Reader(Generic[_W]):
    """Reads the objects of one kind; ``read`` returns None for an object that counts as deleted."""

    def __init__(self, kind: Kind, shape: type[_W], read: Callable[[ObjectKey, _W], Upsert | None]) -> None:
        self._kind = kind
        self._shape = shape
        self._read = read
        self._json = msgspec.json.Decoder(shape)
        self._event_json: msgspec.json.Decoder[Any] = msgspec.json.Decoder(WatchEvent[shape])  # type: ignore[valid-type]

    def from_json(self, raw: bytes | msgspec.Raw) -> Decoded:
        try:
            decoded = self._json.decode(raw)
            return Decoded(self._event(decoded), decoded.metadata.resource_version or "")
        except _UNREADABLE as error:
            key, version, owner = _identify(self._kind, lambda: msgspec.json.decode(raw, type=Identity))
            return Decoded(Malformed(self._kind, key, *_explain(error), owner), version)

    def from_event(self, line: bytes) -> Decoded | None:
        try:
            event = self._event_json.decode(line)
            if event.type not in _EXISTENCE:
                return None
            return Decoded(self._event(event.object), event.object.metadata.resource_version or "")
        except _UNREADABLE:
            return None

    def from_value(self, value: object) -> ObjectEvent:
        try:
            return self._event(msgspec.convert(value, self._shape))
        except _UNREADABLE as error:
            key, _, owner = _identify(self._kind, lambda: msgspec.convert(value, Identity))
            return Malformed(self._kind, key, *_explain(error), owner)

    def _event(self, decoded: _W) -> ObjectEvent:
        if not decoded.metadata.name:
            raise convert.fault("metadata.name", "empty")
        key = _key(self._kind, decoded.metadata.namespace, decoded.metadata.name)
        return self._read(key, decoded) or Delete(self._kind, key)


def _key(kind: Kind, namespace: str | None, name: str) -> ObjectKey:
    """Make a key; an object of a namespaced kind that names no namespace is in ``default``.

    The name is interned because a Service and its slices say the same one.
    """
    return ObjectKey("" if kind is Kind.NODE else intern(namespace or "default"), intern(name))


def _identify(kind: Kind, read: Callable[[], Identity]) -> tuple[ObjectKey, str, ObjectKey | None]:
    """Find out which object this is, its resource version, and the Service of a slice, whatever else is wrong."""
    try:
        metadata = read().metadata
    except _UNREADABLE:
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


def _explain(error: Exception) -> tuple[str, str]:
    """Split an error into field and reason; the field is empty where the whole object is at fault."""
    fault = _FAULT.fullmatch(str(error))
    if fault is None or not isinstance(error, msgspec.ValidationError):
        return "", str(error)
    field, missing = fault["field"] or "", _MISSING.fullmatch(fault["reason"])
    return (f"{field}.{missing['name']}".lstrip("."), "missing") if missing else (field, fault["reason"])
