"""The objects of the tests' API server: every version, in the order in which they came to be.

One counter numbers all changes of all resources, as etcd's revision does. A resource's history is a list of changes; a
watch is a position in it, and an older state is the newest one with the later changes undone.
"""

from __future__ import annotations

import bisect
import datetime as dt
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

Object = dict[str, Any]
Key = tuple[str, str]

KINDS = {
    "services": "Service",
    "endpointslices": "EndpointSlice",
    "nodes": "Node",
    "namespaces": "Namespace",
    "pods": "Pod",
    "networkpolicies": "NetworkPolicy",
    "clusternetworkpolicies": "ClusterNetworkPolicy",
    "customresourcedefinitions": "CustomResourceDefinition",
    "configmaps": "ConfigMap",
    "events": "Event",
}


DEFINITIONS_GROUP = "apiextensions.k8s.io"
BUILT_IN = frozenset({
    "",
    "apps",
    "batch",
    "coordination.k8s.io",
    "discovery.k8s.io",
    "networking.k8s.io",
    "rbac.authorization.k8s.io",
    DEFINITIONS_GROUP,
})  # fmt: skip
"""The groups that are there without a CustomResourceDefinition."""


class ApiError(Exception):
    """An answer that is a Status."""

    def __init__(self, code: int, reason: str, message: str, retry_after_s: int = 0) -> None:
        self.code = code
        self.reason = reason
        self.retry_after_s = retry_after_s
        super().__init__(message)

    def status(self) -> Object:
        """Return the body."""
        body: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "code": self.code,
        }
        if self.retry_after_s:
            body["details"] = {"retryAfterSeconds": self.retry_after_s}
        return body


def expired(version: int, floor: int) -> ApiError:
    """Return the answer to a version that is no longer kept."""
    return ApiError(410, "Expired", f"too old resource version: {version} ({floor})")


class Resource(NamedTuple):
    """A collection: group (empty for core), version, plural."""

    group: str
    version: str
    plural: str

    @property
    def api_version(self) -> str:
        """As objects name it."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def kind(self) -> str:
        """The kind of its objects."""
        return KINDS.get(self.plural, self.plural.capitalize())


DEFINITIONS = Resource(DEFINITIONS_GROUP, "v1", "customresourcedefinitions")


@dataclass(frozen=True, slots=True)
class Version:
    """An object as it was at one version; ``bare`` is its JSON without apiVersion and kind, as lists carry it.

    ``fields``: what field selectors may ask of it besides its name and namespace.
    """

    key: Key
    number: int
    labels: Mapping[str, str]
    bare: bytes
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """What happened at one version: no ``old`` is a creation, no ``new`` a deletion (``last`` is then what was)."""

    number: int
    old: Version | None
    new: Version | None
    last: Version | None = None


@dataclass(slots=True)
class Collection:
    """One resource's present and past."""

    present: dict[Key, Version] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)


class Store:
    """All collections under one lock."""

    def __init__(self, first_version: int = 1000) -> None:
        self.changed = threading.Condition()  # reentrant
        self.current = first_version
        self.floor = first_version
        self._collections: dict[Resource, Collection] = {}

    def create(self, resource: Resource, namespace: str, source: Object) -> Version:
        """Add an object; 409 if it is there."""
        metadata = dict(source.get("metadata") or {})
        if not metadata.get("name"):
            metadata["name"] = metadata.get("generateName", "unnamed-") + uuid.uuid4().hex[:5]
        if namespace:
            metadata["namespace"] = namespace
        metadata["uid"] = str(uuid.uuid4())
        metadata["creationTimestamp"] = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        key = (metadata.get("namespace", ""), metadata["name"])
        with self.changed:
            if key in self._of(resource).present:
                raise ApiError(409, "AlreadyExists", f'{resource.plural} "{key[1]}" already exists')
            return self._write(resource, None, source, metadata)

    def update(self, resource: Resource, key: Key, source: Object) -> Version:
        """Replace an object; 409 if ``source`` is of another version; nothing happens if nothing changes."""
        metadata = dict(source.get("metadata") or {})
        with self.changed:
            old = self.get(resource, key)
            wanted = metadata.get("resourceVersion")
            if wanted and wanted != str(old.number):
                raise ApiError(409, "Conflict", f'"{key[1]}": the object has been modified')
            kept = msgspec.json.decode(old.bare)["metadata"]
            metadata |= {name: kept[name] for name in ("name", "uid", "creationTimestamp", "resourceVersion")}
            if key[0]:
                metadata["namespace"] = key[0]
            if _bare(source, metadata) == old.bare:
                return old
            return self._write(resource, old, source, metadata)

    def merge(self, resource: Resource, key: Key, patch: Object) -> Version:
        """Apply a JSON merge patch. Source: RFC 7386."""
        with self.changed:
            present = msgspec.json.decode(self.get(resource, key).bare)
            merged = _merged(present, patch)
            if "resourceVersion" not in (patch.get("metadata") or {}):
                merged["metadata"].pop("resourceVersion", None)
            return self.update(resource, key, merged)

    def delete(self, resource: Resource, key: Key) -> Version:
        """Remove an object; return it as it was, numbered by its deletion."""
        with self.changed:
            old = self.get(resource, key)
            self.current += 1
            source = msgspec.json.decode(old.bare)
            source["metadata"]["resourceVersion"] = str(self.current)
            last = Version(key, self.current, old.labels, _bare(source, source["metadata"]), old.fields)
            collection = self._of(resource)
            del collection.present[key]
            collection.changes.append(Change(self.current, old, None, last))
            self.changed.notify_all()
            return last

    def get(self, resource: Resource, key: Key) -> Version:
        """Return an object; 404 if it is not there."""
        with self.changed:
            version = self._of(resource).present.get(key)
        if version is None:
            raise ApiError(404, "NotFound", f'{resource.plural} "{key[1]}" not found')
        return version

    def snapshot(self, resource: Resource, number: int | None = None) -> tuple[int, list[Version]]:
        """Return all objects, sorted, as they were at ``number`` or are now, and that number; 410 if forgotten."""
        with self.changed:
            state = dict(self._of(resource).present)
            if number is not None:
                if number < self.floor:
                    raise expired(number, self.floor)
                for change in reversed(self._after(resource, number)):
                    _undo(state, change)
            return number or self.current, [state[key] for key in sorted(state)]

    def wait(self, resource: Resource, after: int, timeout_s: float) -> tuple[int, list[Change]]:
        """Return the changes after a version and the present version, waiting for one; 410 if forgotten."""
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while True:
                if after < self.floor:
                    raise expired(after, self.floor)
                changes = self._after(resource, after)
                rest_s = deadline - time.monotonic()
                if changes or rest_s <= 0:
                    return max(self.current, after), changes
                self.changed.wait(rest_s)

    def is_defined(self, resource: Resource) -> bool:
        """Tell whether there are objects of such a kind: it is built in, or a CustomResourceDefinition has it."""
        if resource.group in BUILT_IN:
            return True
        with self.changed:
            name = ("", f"{resource.plural}.{resource.group}")
            definition = self._of(DEFINITIONS).present.get(name)
        if definition is None:
            return False
        spec = msgspec.json.decode(definition.bare)["spec"]
        return any(it["name"] == resource.version and it.get("served") for it in spec["versions"])

    def undefine(self, key: Key) -> Version:
        """Remove a CustomResourceDefinition, and before it the objects that it defines."""
        with self.changed:
            spec = msgspec.json.decode(self.get(DEFINITIONS, key).bare)["spec"]
            for version in spec["versions"]:
                resource = Resource(spec["group"], version["name"], spec["names"]["plural"])
                for found in list(self._of(resource).present):
                    self.delete(resource, found)
            return self.delete(DEFINITIONS, key)

    def compact(self) -> None:
        """Forget the past; who watches from it is told so."""
        with self.changed:
            self.current += 1
            self.floor = self.current
            for collection in self._collections.values():
                collection.changes.clear()
            self.changed.notify_all()

    def _of(self, resource: Resource) -> Collection:
        return self._collections.setdefault(resource, Collection())

    def _after(self, resource: Resource, number: int) -> list[Change]:
        changes = self._of(resource).changes
        return changes[bisect.bisect_right(changes, number, key=lambda change: change.number) :]

    def _write(self, resource: Resource, old: Version | None, source: Object, metadata: Object) -> Version:
        self.current += 1
        metadata["resourceVersion"] = str(self.current)
        key = (metadata.get("namespace", ""), metadata["name"])
        new = Version(
            key, self.current, metadata.get("labels") or {}, _bare(source, metadata), _fields(resource, source)
        )
        collection = self._of(resource)
        collection.present[key] = new
        collection.changes.append(Change(self.current, old, new))
        self.changed.notify_all()
        return new


def _bare(source: Object, metadata: Object) -> bytes:
    rest = {name: value for name, value in source.items() if name not in ("apiVersion", "kind", "metadata")}
    return msgspec.json.encode({"metadata": dict(sorted(metadata.items())), **rest})


def _fields(resource: Resource, source: Object) -> Mapping[str, str]:
    """Return what field selectors see. Source: the API server's ToSelectableFields of pods, and its events'."""
    if resource.plural == "pods":
        spec, status = source.get("spec") or {}, source.get("status") or {}
        return {"spec.nodeName": spec.get("nodeName") or "", "status.phase": status.get("phase") or ""}
    if resource.plural == "events":
        return {f"involvedObject.{name}": str(value) for name, value in source.get("involvedObject", {}).items()}
    return {}


def _merged(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merged(merged.get(name), value)
    return merged


def _undo(state: dict[Key, Version], change: Change) -> None:
    if change.old is not None:
        state[change.old.key] = change.old
    elif change.new is not None:
        state.pop(change.new.key, None)
