"""Which object is it: the UID behind a name, which alone tells an object from a later one of the same name.

Asked as a list of one name, since that is what the agent's ClusterRole allows; it grants no `get`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from agent.core.records import Kind, ObjectKey
from agent.sources.kube_failures import ApiFailure, Cause

_COLLECTIONS = {
    Kind.SERVICE: "/api/v1/namespaces/{}/services",
    Kind.ENDPOINT_SLICE: "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices",
    Kind.NODE: "/api/v1/nodes",
    Kind.POD: "/api/v1/namespaces/{}/pods",
    Kind.NAMESPACE: "/api/v1/namespaces",
    Kind.NETWORK_POLICY: "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    Kind.CLUSTER_NETWORK_POLICY: "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
}

KUBERNETES = ObjectKey("default", "kubernetes")
"""The Service every API server makes for itself in an empty store: its UID is as good as the store's own."""


class Reader(Protocol):
    """Reads from the API server."""

    def read(self, path: str, query: Sequence[tuple[str, str]], read_timeout_s: float) -> bytes:
        """GET a whole body; raises SourceError."""


class _Metadata(msgspec.Struct):
    name: str = ""
    uid: str = ""


class _Item(msgspec.Struct):
    metadata: _Metadata


class _Items(msgspec.Struct):
    items: list[_Item] | None = None


_items = msgspec.json.Decoder(_Items)


def read_uid(client: Reader, kind: Kind, key: ObjectKey, read_timeout_s: float) -> str:
    """Ask for the UID of an object; empty where there is none of that name.

    Raises: SourceError, when the server does not say.
    """
    path = _COLLECTIONS[kind].format(key.namespace)
    body = client.read(path, (("fieldSelector", f"metadata.name={key.name}"),), read_timeout_s)
    try:
        found = _items.decode(body).items or ()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiFailure(Cause.GARBAGE, f"not a list of {kind}: {error}") from error
    return next((item.metadata.uid for item in found if item.metadata.name == key.name), "")
