"""The objects of a bench: Services and their slices, as records and as the JSON an API server would send."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from agent.core.addresses import parse_address
from agent.core.events import Event, ListEnded, ListStarted, Upsert
from agent.core.records import (
    SERVICE_KINDS,
    External,
    Family,
    ObjectKey,
    Protocol,
    ServicePort,
    ServiceRecord,
    SlicePort,
    SliceRecord,
    Traits,
)

SERVICE_PORT = 80
POD_PORT = 8080
NODE = "bench-node"
NODE_PORT = 30_080
"""Of the UDP port of the Service in the middle, where that has one."""
POD_RANGE = "10.128.0.0/9"
_FIRST_SERVICE = int(ipaddress.IPv4Address("10.96.0.10"))
_FIRST_ENDPOINT = int(ipaddress.IPv4Address("10.128.0.10"))
_FIRST_BALANCER = int(ipaddress.IPv4Address("198.18.0.10"))
_FIRST_NODE_PORT = 30_100
_FIRST_HEALTH_CHECK = 32_500
_PORTS = (ServicePort("http", Protocol.TCP, SERVICE_PORT), ServicePort("dns", Protocol.UDP, SERVICE_PORT))
_SLICE_PORTS = (SlicePort("http", Protocol.TCP, POD_PORT), SlicePort("dns", Protocol.UDP, POD_PORT))


@dataclass(frozen=True, slots=True)
class Population:
    """``services`` Services of ``endpoints`` endpoints each, numbered from 0; the middle one has a UDP port too.

    ``pool``: how many addresses the endpoints share; 0 = each has its own. ``node_port``: of that UDP port; 0 = none.
    ``external_every``: in the lists of an API server, each so-manieth has a NodePort and a load balancer's address, and
    of ten of these one has externalTrafficPolicy Local; 0 = none.
    """

    services: int
    endpoints: int
    pool: int = 0
    node_port: int = 0
    external_every: int = 0

    @property
    def middle(self) -> int:
        """The number of the Service in the middle."""
        return self.services // 2

    def cluster_ip(self, number: int) -> str:
        """The cluster IP of a Service; those of consecutive Services are consecutive."""
        return str(ipaddress.IPv4Address(_FIRST_SERVICE + number))

    def endpoint(self, number: int, index: int) -> str:
        """The address of a Service's endpoint."""
        place = number * self.endpoints + index
        return str(ipaddress.IPv4Address(_FIRST_ENDPOINT + (place % self.pool if self.pool else place)))

    def addresses(self, number: int) -> list[str]:
        """The addresses of all of a Service's endpoints."""
        return [self.endpoint(number, index) for index in range(self.endpoints)]

    def name(self, number: int) -> str:
        """The name of a Service."""
        return f"service-{number:06}"

    def namespace(self, number: int) -> str:
        """The namespace of a Service."""
        return f"team-{number % 100:02}"

    @property
    def _ports(self) -> tuple[ServicePort, ...]:
        http, dns = _PORTS
        return http, msgspec.structs.replace(dns, node_port=self.node_port)

    def events(self) -> Iterator[Event]:
        """Full lists of every kind, as a source would hand them to the model."""
        for kind in SERVICE_KINDS:
            yield ListStarted(kind)
        for number in range(self.services):
            key = ObjectKey(self.namespace(number), self.name(number))
            vip = parse_address(self.cluster_ip(number))
            ports = 1 + (number == self.middle)
            external = External() if self.node_port and number == self.middle else None
            yield Upsert(ServiceRecord(key, (vip,), self._ports[:ports], external=external))
            packed = b"".join(map(parse_address, self.addresses(number)))
            yield Upsert(
                SliceRecord(
                    ObjectKey(key.namespace, f"{key.name}-0"),
                    key,
                    Family.IPV4,
                    _SLICE_PORTS[:ports],
                    ((Traits(), packed),),
                )
            )
        for kind in SERVICE_KINDS:
            yield ListEnded(kind)

    def service(self, number: int, version: int) -> bytes:
        """A Service as JSON, with the fields a real one carries."""
        return dump(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {
                    **self._metadata(self.name(number), number, version),
                    "labels": {"app": self.name(number), "team": self.namespace(number)},
                    "managedFields": [
                        managed("kubectl-client-side-apply", {"f:spec": {"f:ports": {}, "f:selector": {}}})
                    ],
                },
                "spec": {
                    **self._external_spec(number),
                    "clusterIP": self.cluster_ip(number),
                    "clusterIPs": [self.cluster_ip(number)],
                    "internalTrafficPolicy": "Cluster",
                    "ipFamilies": ["IPv4"],
                    "ipFamilyPolicy": "SingleStack",
                    "ports": [self._port(number)],
                    "selector": {"app": self.name(number)},
                    "sessionAffinity": "None",
                },
                "status": {"loadBalancer": self._ingress(number)},
            }
        )

    def is_external(self, number: int) -> bool:
        """Whether a Service is reached from outside."""
        return bool(self.external_every) and number % self.external_every == 0

    def frontends(self, node_addresses: int) -> int:
        """How many entries an agent writes for the lists, where NodePorts answer on so many addresses."""
        # A port and, once, its address; a load balancer's address, a NodePort on each address and, once, the port.
        return 2 * self.services + (2 + node_addresses) * sum(map(self.is_external, range(self.services)))

    def _external_spec(self, number: int) -> dict[str, Any]:
        if not self.is_external(number):
            return {"type": "ClusterIP"}
        place = number // self.external_every
        spec = {"type": "LoadBalancer", "externalTrafficPolicy": "Cluster"}
        if place % 10:
            return spec
        return spec | {"externalTrafficPolicy": "Local", "healthCheckNodePort": _FIRST_HEALTH_CHECK + place // 10}

    def _port(self, number: int) -> dict[str, Any]:
        port = {"name": "http", "port": SERVICE_PORT, "protocol": "TCP", "targetPort": POD_PORT}
        node_port = {"nodePort": _FIRST_NODE_PORT + number // self.external_every} if self.is_external(number) else {}
        return port | node_port

    def _ingress(self, number: int) -> dict[str, Any]:
        if not self.is_external(number):
            return {}
        address = str(ipaddress.IPv4Address(_FIRST_BALANCER + number))
        return {"ingress": [{"ip": address, "ipMode": "VIP"}]}

    def slice(self, number: int, version: int, addresses: list[str] | None = None) -> bytes:
        """The EndpointSlice of a Service as JSON; with other ``addresses``, if given."""
        endpoints = [
            {
                "addresses": [address],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": NODE if self.is_external(number) and not index else f"node-{index:04}",
                "targetRef": {
                    "kind": "Pod",
                    "name": f"{self.name(number)}-7d9c8b6f5-{index:05}",
                    "namespace": self.namespace(number),
                    "uid": f"9b2d6a10-4c1e-4b7a-8f61-{number:06}{index:06}",
                },
                "zone": f"zone-{index % 3}",
            }
            for index, address in enumerate(addresses or self.addresses(number))
        ]
        return dump(
            {
                "addressType": "IPv4",
                "apiVersion": "discovery.k8s.io/v1",
                "endpoints": endpoints,
                "kind": "EndpointSlice",
                "metadata": self._slice_metadata(number, version),
                "ports": [{"name": "http", "port": POD_PORT, "protocol": "TCP"}],
            }
        )

    def _slice_metadata(self, number: int, version: int) -> dict[str, Any]:
        return {
            **self._metadata(f"{self.name(number)}-x7k2p", number, version),
            "generateName": f"{self.name(number)}-",
            "generation": 1,
            "labels": {
                "app": self.name(number),
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": self.name(number),
            },
            "managedFields": [
                managed("kube-controller-manager", {"f:addressType": {}, "f:endpoints": {}, "f:ports": {}})
            ],
            "ownerReferences": [
                {
                    "apiVersion": "v1",
                    "blockOwnerDeletion": True,
                    "controller": True,
                    "kind": "Service",
                    "name": self.name(number),
                    "uid": uid(number),
                }
            ],
        }

    def _metadata(self, name: str, number: int, version: int) -> dict[str, Any]:
        return {
            "creationTimestamp": "2025-06-01T12:00:00Z",
            "name": name,
            "namespace": self.namespace(number),
            "resourceVersion": str(version),
            "uid": uid(number),
        }


def node(version: int) -> bytes:
    """This node as JSON."""
    return dump(
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": NODE, "resourceVersion": str(version), "labels": {}},
            "spec": {"podCIDR": "10.128.0.0/24"},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.10"}]},
        }
    )


def managed(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """An entry of managedFields: who has set which fields."""
    return {
        "apiVersion": "v1",
        "fieldsType": "FieldsV1",
        "fieldsV1": fields,
        "manager": name,
        "operation": "Update",
        "time": "2025-06-01T12:00:00Z",
    }


def uid(number: int) -> str:
    """A UID."""
    return f"3f1c8a52-0d7b-4e5f-9a34-{number:012}"


def dump(source: dict[str, Any]) -> bytes:
    """Write an object as an API server does."""
    return json.dumps(source, separators=(",", ":")).encode()
