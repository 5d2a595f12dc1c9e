"""Ordinary Kubernetes objects, and directories of YAML that agents watch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Object = dict[str, Any]
NAMESPACE = "shop"


class Port(NamedTuple):
    """A port of a Service and of its slices: what clients use, and what pods listen on; ``node_port`` 0 = none."""

    name: str
    number: int
    target: int
    protocol: str = "TCP"
    node_port: int = 0


WEB = (Port("http", 80, 8080), Port("http-udp", 80, 8080, "UDP"))


class Endpoint(NamedTuple):
    """An endpoint of a slice: its address, node, and conditions."""

    address: str
    node: str = ""
    ready: bool = True
    serving: bool = True
    terminating: bool = False


def _meta(name: str, **fields: Any) -> Object:
    return {"name": name, "namespace": NAMESPACE, **fields}


def service(
    name: str,
    ips: Sequence[str],
    ports: Iterable[Port] = WEB,
    *,
    ingress: Sequence[str] = (),
    annotations: dict[str, str] | None = None,
    **spec: Any,
) -> Object:
    """Build a ClusterIP Service; ``spec`` adds or replaces fields of its spec.

    ``ingress``: the addresses a load balancer has given it.
    """
    families = ["IPv6" if ":" in ip else "IPv4" for ip in ips]
    given = [{"ip": address, "ipMode": "VIP"} for address in ingress]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _meta(name, **({"annotations": annotations} if annotations else {})),
        "spec": {
            "type": "ClusterIP",
            "clusterIP": ips[0],
            "clusterIPs": list(ips),
            "ipFamilies": families,
            "ipFamilyPolicy": "RequireDualStack" if len(ips) > 1 else "SingleStack",
            "selector": {"app": name},
            "ports": [_service_port(port) for port in ports],
            **spec,
        },
        **({"status": {"loadBalancer": {"ingress": given}}} if given else {}),
    }


def _service_port(port: Port) -> Object:
    written = {"name": port.name, "port": port.number, "targetPort": port.target, "protocol": port.protocol}
    return written | ({"nodePort": port.node_port} if port.node_port else {})


def endpoint_slice(
    owner: str, endpoints: Sequence[Endpoint], ports: Iterable[Port] = WEB, *, name: str = "", ipv6: bool = False
) -> Object:
    """Build an EndpointSlice of one family."""
    family = "IPv6" if ipv6 else "IPv4"
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": _meta(name or f"{owner}-{family.lower()}", labels={"kubernetes.io/service-name": owner}),
        "addressType": family,
        "endpoints": [
            {
                "addresses": [e.address],
                "conditions": {"ready": e.ready, "serving": e.serving, "terminating": e.terminating},
                **({"nodeName": e.node} if e.node else {}),
            }
            for e in endpoints
        ],
        "ports": [{"name": p.name, "port": p.target, "protocol": p.protocol} for p in ports],
    }


def node(name: str, addresses: Sequence[str], pod_cidrs: Sequence[str], zone: str = "") -> Object:
    """Build a Node."""
    labels = {"kubernetes.io/hostname": name} | ({"topology.kubernetes.io/zone": zone} if zone else {})
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {"podCIDR": pod_cidrs[0], "podCIDRs": list(pod_cidrs)},
        "status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]},
    }


def pod(
    name: str,
    node_name: str,
    ips: Sequence[str],
    app: str,
    *,
    namespace: str = NAMESPACE,
    ports: Sequence[tuple[str, int, str]] = (),
    phase: str = "Running",
    **labels: str,
) -> Object:
    """Build a running Pod; ``ports``: name, number and protocol of those that have a name."""
    named = [{"name": port, "containerPort": number, "protocol": protocol} for port, number, protocol in ports]
    container = {"name": "server", "image": "example.invalid/server", **({"ports": named} if named else {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": app, **labels}},
        "spec": {"nodeName": node_name, "containers": [container]},
        "status": {"phase": phase, "podIP": ips[0], "podIPs": [{"ip": ip} for ip in ips]},
    }


def namespace(name: str = NAMESPACE, **labels: str) -> Object:
    """Build a Namespace."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def network_policy(name: str, app: str = "", *, namespace: str = NAMESPACE, **spec: Any) -> Object:
    """Build a NetworkPolicy about the pods of an app, or of the whole namespace; ``spec`` is the rest of its spec."""
    subject = {"matchLabels": {"app": app}} if app else {}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"podSelector": subject, **spec},
    }


class Manifests:
    """A directory of YAML files; each is replaced whole."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, *objects: Object) -> None:
        """Write a file of several documents, by a rename as editors do."""
        self.write_text(name, yaml.safe_dump_all(objects, sort_keys=False))

    def write_text(self, name: str, text: str) -> None:
        """Write a file as it is."""
        hidden = self.directory / f".{name}.new"
        hidden.write_text(text, encoding="utf-8")
        hidden.replace(self.directory / f"{name}.yaml")

    def remove(self, name: str) -> None:
        """Delete a file."""
        (self.directory / f"{name}.yaml").unlink()
