"""What an API server does by itself to what it is given: to pods, namespaces, and the objects of definitions.

Only requests come by here; what a test puts into the store is stored as it is.
Source: kube-apiserver's strategies of pods (status is a resource of its own; deletion is graceful) and of namespaces.
"""

from __future__ import annotations

import datetime as dt

import msgspec

from tests.cluster.api_store import DEFINITIONS, Key, Object, Resource, Store, Version

_PODS = "pods"
_NAME_LABEL = "kubernetes.io/metadata.name"
_DEFAULT_GRACE_S = 30
_ENDED = ("Succeeded", "Failed")


def create(store: Store, resource: Resource, namespace: str, source: Object) -> Version:
    """Create an object."""
    if resource.plural == _PODS:
        source = source | {"status": {"phase": "Pending"}}
    elif resource.plural == "namespaces":
        metadata = source.get("metadata") or {}
        labels = (metadata.get("labels") or {}) | {_NAME_LABEL: metadata.get("name", "")}
        source = source | {"metadata": metadata | {"labels": labels}}
    return store.create(resource, namespace, source)


def update(store: Store, resource: Resource, key: Key, source: Object, subresource: str) -> Version:
    """Replace an object but for its status, or its status alone."""
    if subresource == "status" or resource.plural == _PODS:
        with store.changed:
            present = msgspec.json.decode(store.get(resource, key).bare)
            version = (source.get("metadata") or {}).get("resourceVersion")
            if subresource == "status":
                metadata = present["metadata"] | ({"resourceVersion": version} if version else {})
                source = present | {"metadata": metadata, "status": source.get("status") or {}}
            else:
                source = source | {"status": present.get("status") or {}}
            return store.update(resource, key, source)
    return store.update(resource, key, source)


def merge(store: Store, resource: Resource, key: Key, patch: Object, subresource: str) -> Version:
    """Apply a merge patch to an object but for its status, or to its status alone."""
    if subresource == "status":
        patch = {name: value for name, value in patch.items() if name == "status"}
    elif resource.plural == _PODS:
        patch = {name: value for name, value in patch.items() if name != "status"}
    return store.merge(resource, key, patch)


def delete(store: Store, resource: Resource, key: Key, grace_s: int | None) -> Version:
    """Delete an object; a pod that runs on a node is only marked, until somebody deletes it without grace."""
    if resource == DEFINITIONS:
        return store.undefine(key)
    if resource.plural == _PODS and grace_s != 0:
        with store.changed:
            present = msgspec.json.decode(store.get(resource, key).bare)
            if present.get("spec", {}).get("nodeName") and present["status"].get("phase") not in _ENDED:
                wait_s = _DEFAULT_GRACE_S if grace_s is None else grace_s
                due = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=wait_s)
                mark = {"deletionTimestamp": f"{due:%Y-%m-%dT%H:%M:%SZ}", "deletionGracePeriodSeconds": wait_s}
                return store.merge(resource, key, {"metadata": mark})
    return store.delete(resource, key)
