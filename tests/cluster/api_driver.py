"""Drive an API server, ours or a real one, as a user would: JSON over HTTP, and nothing of the agent's own code."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import urllib3

Object = dict[str, Any]
T = TypeVar("T")

SERVICES = "/api/v1/namespaces/{}/services"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"
NODES = "/api/v1/nodes"
NAMESPACES = "/api/v1/namespaces"
PODS = "/api/v1/namespaces/{}/pods"
POLICIES = "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies"
CLUSTER_POLICIES = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def until(condition: Callable[[], T], deadline_s: float = 10.0, what: str = "the condition") -> T:
    """Poll until ``condition`` returns something true, and return it; AssertionError at the deadline."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come true within {deadline_s} s; last: {value!r}"
        time.sleep(0.005)
    return value


class Refused(Exception):
    """An answer that is not 2xx."""

    def __init__(self, code: int, body: bytes, headers: Any) -> None:
        self.code = code
        self.body = body
        self.headers = headers
        super().__init__(f"HTTP {code}: {body[:300]!r}")


class ApiDriver:
    """One user of one API server."""

    def __init__(self, url: str, token: str = "", ca_file: Path | None = None) -> None:
        self._url = url
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._pool = urllib3.PoolManager(ca_certs=str(ca_file) if ca_file else None, retries=False)

    def request(self, method: str, path: str, body: Any = None, content: str = "", **query: str) -> Object:
        """Send a request and return its JSON; Refused unless 2xx."""
        headers = self._headers | ({"Content-Type": content} if content else {})
        answer = self._pool.request(
            method,
            f"{self._url}{path}?{urlencode(query)}",
            body=None if body is None else json.dumps(body),
            headers=headers,
            timeout=30.0,
        )
        if not 200 <= answer.status < 300:
            raise Refused(answer.status, answer.data, answer.headers)
        found: Object = json.loads(answer.data)
        return found

    def get(self, path: str, **query: str) -> Object:
        """GET an object or list."""
        return self.request("GET", path, **query)

    def raw(self, path: str, **query: str) -> bytes:
        """GET a body as it is."""
        answer = self._pool.request("GET", f"{self._url}{path}?{urlencode(query)}", headers=self._headers, timeout=30.0)
        if answer.status != 200:
            raise Refused(answer.status, answer.data, answer.headers)
        return answer.data

    def create(self, collection: str, source: Object) -> Object:
        """POST an object."""
        return self.request("POST", collection, source)

    def update(self, collection: str, source: Object) -> Object:
        """PUT an object; its resourceVersion, if any, must be the present one."""
        return self.request("PUT", f"{collection}/{source['metadata']['name']}", source)

    def patch(self, collection: str, name: str, patch: Object) -> Object:
        """Apply a merge patch."""
        return self.request("PATCH", f"{collection}/{name}", patch, "application/merge-patch+json")

    def set_status(self, collection: str, name: str, status: Object) -> Object:
        """Merge into an object's status."""
        path = f"{collection}/{name}/status"
        return self.request("PATCH", path, {"status": status}, "application/merge-patch+json")

    def delete(self, collection: str, name: str, **query: str) -> None:
        """DELETE an object; ``gracePeriodSeconds="0"``: a pod at once."""
        self.request("DELETE", f"{collection}/{name}", **query)

    @contextmanager
    def watch(self, path: str, deadline_s: float = 30.0, **query: str) -> Iterator[Iterator[Object]]:
        """Watch; yields the events until the server ends the stream. No event for ``deadline_s`` is an error."""
        answer = self._pool.request(
            "GET",
            f"{self._url}{path}?{urlencode({'watch': 'true', **query})}",
            headers=self._headers,
            timeout=urllib3.Timeout(connect=5, read=deadline_s),
            preload_content=False,
        )
        try:
            if answer.status != 200:
                raise Refused(answer.status, answer.read(), answer.headers)
            yield _events(answer)
        finally:
            answer.close()


def _events(answer: Any) -> Iterator[Object]:
    rest = b""
    while chunk := answer.read1(65536):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def take(events: Iterator[Object], count: int) -> list[Object]:
    """Return the next ``count`` events that are not bookmarks."""
    found: list[Object] = []
    while len(found) < count:
        event = next(events)
        if event["type"] != "BOOKMARK":
            found.append(event)
    return found


def service(name: str, port: int = 80, labels: dict[str, str] | None = None, **spec: Any) -> Object:
    """Build a Service; the API server chooses its ClusterIP, if it is one that does."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"ports": [{"name": "main", "port": port, "protocol": "TCP"}], **spec},
    }


def endpoint_slice(name: str, of: str, addresses: list[str], labels: dict[str, str] | None = None) -> Object:
    """Build an EndpointSlice of one ready endpoint an address."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": of, **(labels or {})}},
        "addressType": "IPv4",
        "ports": [{"name": "main", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
    }


def node(name: str, zone: str = "a") -> Object:
    """Build a Node."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
    }


def pod(name: str, labels: dict[str, str] | None = None, node_name: str = "", **spec: Any) -> Object:
    """Build a Pod; what it has for a status is set apart (`running`)."""
    containers = [{"name": "main", "image": "none", "ports": [{"name": "web", "containerPort": 80}]}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"containers": containers, **({"nodeName": node_name} if node_name else {}), **spec},
    }


def running(*addresses: str) -> Object:
    """Build the status of a pod that runs and has addresses."""
    ips = [{"ip": address} for address in addresses]
    return {"phase": "Running", "podIP": addresses[0], "podIPs": ips}


def network_policy(name: str, **spec: Any) -> Object:
    """Build a NetworkPolicy; of all pods, denying all ingress, unless ``spec`` says otherwise."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {"podSelector": {}, **spec},
    }


def cluster_policy(name: str, **spec: Any) -> Object:
    """Build a ClusterNetworkPolicy; of all pods, in the Admin tier, without rules, unless ``spec`` says otherwise."""
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name},
        "spec": {"tier": "Admin", "priority": 100, "subject": {"namespaces": {}}, **spec},
    }


_DEFINITION: Object = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": "clusternetworkpolicies.policy.networking.k8s.io",
        "annotations": {"api-approved.kubernetes.io": "unapproved, only for tests"},
    },
    "spec": {
        "group": "policy.networking.k8s.io",
        "scope": "Cluster",
        "names": {
            "plural": "clusternetworkpolicies",
            "singular": "clusternetworkpolicy",
            "kind": "ClusterNetworkPolicy",
            "listKind": "ClusterNetworkPolicyList",
        },
        "versions": [
            {
                "name": "v1alpha2",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                },
            }
        ],
    },
}


def define_cluster_policies(api: ApiDriver) -> None:
    """Make the kind ClusterNetworkPolicy known to a server, and wait until it is."""
    api.create(DEFINITIONS, _DEFINITION)
    until(lambda: are_cluster_policies_defined(api), 30, "the definition")


def undefine_cluster_policies(api: ApiDriver) -> None:
    """Remove the kind, with all objects of it, and wait until it is gone."""
    api.delete(DEFINITIONS, _DEFINITION["metadata"]["name"])
    until(lambda: not are_cluster_policies_defined(api), 30, "the end of the definition")


def are_cluster_policies_defined(api: ApiDriver) -> bool:
    """Tell whether the server serves ClusterNetworkPolicies."""
    try:
        api.get(CLUSTER_POLICIES)
    except Refused as refused:
        if refused.code not in (404, 429):  # 429: a real one, just told of the definition
            raise
        return False
    return True
