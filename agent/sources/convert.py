"""Convert parts of objects as they are on the wire into parts of records.

Pure functions. A fault is raised as msgspec's own error, worded and placed as msgspec does it, so that the decoder
has one kind of error to explain, whether a type was wrong or a value.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable, Iterator, Sequence
from datetime import datetime
from socket import AF_INET, AF_INET6, inet_pton
from sys import intern
from typing import NoReturn, TypeVar

import msgspec

from agent.core.addresses import IPV4_PREFIX, AddressRange
from agent.core.records import Algorithm, External, Family, Forwarding, Protocol, ServicePort, SlicePort
from agent.sources.wire import (
    Endpoint,
    NodeAddress,
    NodeSpec,
    ServiceAnnotations,
    ServiceSpec,
    ServiceStatus,
    WireServicePort,
    WireSlicePort,
)

DEFAULT_AFFINITY_S = 10_800
PROTOCOLS: dict[str | None, Protocol] = {None: Protocol.TCP, "": Protocol.TCP}
PROTOCOLS.update((protocol.name, protocol) for protocol in Protocol)


_E = TypeVar("_E", Forwarding, Algorithm)


def fault(field: str, reason: str) -> msgspec.ValidationError:
    """Build the error that says what is wrong with a field."""
    return msgspec.ValidationError(f"{reason} - at `$.{field}`")


def cluster_ips(spec: ServiceSpec) -> tuple[bytes, ...]:
    """Parse the cluster IPs, at most one of each family; empty for a Service that is headless or has none yet."""
    first, texts = spec.cluster_ip, spec.cluster_ips
    if first == "None" or not (first or texts):
        return ()
    if not texts:
        return (_parse(first or "", "spec.clusterIP"),)
    if texts[0] == "None":
        return ()
    if first and first != texts[0]:
        raise fault("spec.clusterIPs[0]", f"{texts[0]!r} is not spec.clusterIP, {first!r}")
    parsed = tuple([_parse(text, "spec.clusterIPs[{}]", index) for index, text in enumerate(texts)])
    if len(parsed) > 1:
        _refuse_repeats([address.startswith(IPV4_PREFIX) for address in parsed], "spec.clusterIPs[{}]", "family")
    return parsed


def service_ports(ports: Sequence[WireServicePort]) -> tuple[ServicePort, ...]:
    """Convert the ports of a Service, whose names differ, and whose numbers differ within a protocol."""
    converted = tuple(
        ServicePort(intern(port.name or ""), PROTOCOLS[port.protocol], port.port, port.node_port or 0) for port in ports
    )
    _refuse_repeats([port.name for port in converted], "spec.ports[{}].name", "name")
    _refuse_repeats([(port.number, port.protocol) for port in converted], "spec.ports[{}].port", "port and protocol")
    return converted


def affinity_timeout_s(spec: ServiceSpec) -> int:
    """Choose how long a client keeps its backend; 0 = it does not."""
    if spec.session_affinity != "ClientIP":
        return 0
    config = spec.session_affinity_config
    timeout_s = config.client_ip.timeout_seconds if config and config.client_ip else None
    return timeout_s or DEFAULT_AFFINITY_S


def external(
    spec: ServiceSpec,
    status: ServiceStatus | None,
    annotations: ServiceAnnotations | None,
    ports: Sequence[ServicePort],
) -> External | None:
    """Convert how a Service is reached from outside; None where it is not.

    Addresses count wherever they are written, whatever the type; the external traffic policy only where there is one.
    Source: kube-proxy's ServicePort and pkg/api/v1/service ExternalPolicyLocal, NeedsHealthCheck.
    """
    load_balancer_ips = tuple(dict.fromkeys(_load_balancer_ips(status))) if status else ()
    has_policy = spec.type in ("NodePort", "LoadBalancer") or bool(spec.external_ips)
    if not (has_policy or load_balancer_ips or any(port.node_port for port in ports)):
        return None
    is_local = has_policy and spec.external_traffic_policy == "Local"
    return External(
        tuple(dict.fromkeys(_parse_each(spec.external_ips or (), "spec.externalIPs[{}]"))),
        load_balancer_ips,
        tuple(dict.fromkeys(_source_ranges(spec.load_balancer_source_ranges or ()))),
        is_local,
        spec.health_check_node_port or 0 if is_local and spec.type == "LoadBalancer" else 0,
        _choice(Forwarding, annotations.forwarding) if annotations else None,
        _choice(Algorithm, annotations.algorithm) if annotations else None,
    )


def _load_balancer_ips(status: ServiceStatus) -> Iterator[bytes]:
    """Parse the addresses that packets reach the node with; of a load balancer that is a proxy they do not."""
    ingresses = (status.load_balancer and status.load_balancer.ingress) or ()
    for index, ingress in enumerate(ingresses):
        if ingress.ip and ingress.ip_mode in (None, "", "VIP"):
            yield _parse(ingress.ip, "status.loadBalancer.ingress[{}].ip", index)


def _source_ranges(texts: Sequence[str]) -> Iterator[AddressRange]:
    for index, text in enumerate(texts):
        try:
            yield AddressRange.parse(text.strip())
        except ValueError:
            raise fault(f"spec.loadBalancerSourceRanges[{index}]", f"{text!r} is not an address range") from None


def _parse_each(texts: Sequence[str], field: str) -> Iterator[bytes]:
    return (_parse(text, field, index) for index, text in enumerate(texts))


def _choice(kind: type[_E], said: object) -> _E | None:
    """Read an annotation; what it may not say is as if it said nothing."""
    return next((member for member in kind if member.value == said), None)


def slice_ports(ports: Sequence[WireSlicePort]) -> tuple[SlicePort, ...]:
    """Convert the ports of a slice, leaving out those without a name or number: nothing can be sent to them."""
    converted = tuple(
        SlicePort(intern(port.name), PROTOCOLS[port.protocol], port.port)
        for port in ports
        if port.name is not None and port.port
    )
    _refuse_repeats([(port.name, port.protocol) for port in converted], "ports[{}].name", "name and protocol")
    return converted


def pack(family: Family, texts: Sequence[str]) -> bytes:
    """Parse addresses of one family into 16 bytes each, end to end.

    Leading zeros and zones are refused by inet_pton; an IPv4-mapped IPv6 address is, lest it pass for an IPv4 one.
    Raises: OSError or ValueError, which do not say which address is at fault.
    """
    if family is Family.IPV4:
        return IPV4_PREFIX + IPV4_PREFIX.join([inet_pton(AF_INET, text) for text in texts])
    addresses = [inet_pton(AF_INET6, text) for text in texts]
    packed = b"".join(addresses)
    if IPV4_PREFIX in packed and any(address.startswith(IPV4_PREFIX) for address in addresses):
        raise ValueError("IPv4-mapped")
    return packed


def blame_endpoint(family: Family, endpoints: Sequence[Endpoint]) -> NoReturn:
    """Find the endpoint whose address `pack` refused, and raise the fault that names it."""
    for index, endpoint in enumerate(endpoints):
        for text in (endpoint.addresses or ())[:1]:
            try:
                pack(family, (text,))
            except (OSError, ValueError):
                raise fault(f"endpoints[{index}].addresses[0]", f"{text!r} is not an IPv{family:d} address") from None
    raise AssertionError("pack refuses no list of addresses that it accepts one by one")


def unix_time(text: object) -> float | None:
    """Convert an RFC 3339 time; what is not one is ignored, because it only feeds a metric."""
    if not isinstance(text, str):
        return None
    try:
        moment = msgspec.convert(text, datetime)
    except msgspec.ValidationError:
        return None
    return moment.timestamp() if moment.tzinfo else None


def node_addresses(addresses: Sequence[NodeAddress]) -> tuple[str, ...]:
    """Choose the IP addresses: internal ones first, as kube-proxy does, each kind in the order given."""

    def of_type(wanted: str) -> Iterator[str]:
        for index, address in enumerate(addresses):
            if address.type == wanted:
                _parse(address.address, "status.addresses[{}].address", index)
                yield address.address

    return (*of_type("InternalIP"), *of_type("ExternalIP"))


def pod_cidrs(spec: NodeSpec) -> tuple[str, ...]:
    """Choose the pod ranges; ``podCIDR`` is the first of ``podCIDRs``, and counts where that is absent."""
    for index, cidr in enumerate(spec.pod_cidrs or ()):
        _check_range(cidr, f"spec.podCIDRs[{index}]")
    if spec.pod_cidrs or not spec.pod_cidr:
        return spec.pod_cidrs or ()
    _check_range(spec.pod_cidr, "spec.podCIDR")
    return (spec.pod_cidr,)


def _parse(text: str, field: str, index: int = 0) -> bytes:
    """Parse an address of either family; ``field`` has a place for the index, filled in only where it is at fault."""
    try:
        return pack(Family.IPV6 if ":" in text else Family.IPV4, (text,))
    except (OSError, ValueError):
        raise fault(field.format(index), f"{text!r} is not an IPv4 or IPv6 address") from None


def _check_range(cidr: str, field: str) -> None:
    try:
        ipaddress.ip_network(cidr, strict=False)
    except ValueError:
        raise fault(field, f"{cidr!r} is not an address range") from None


def _refuse_repeats(values: Sequence[Hashable], field: str, what: str) -> None:
    seen: set[Hashable] = set()
    for index, value in enumerate(values):
        if value in seen:
            raise fault(field.format(index), f"repeats an earlier {what}")
        seen.add(value)
