"""Convert parts of objects as they are on the wire into parts of records.

Pure functions. A fault is raised as msgspec's own error, worded and placed as msgspec does it, so that the decoder
has one kind of error to explain, whether a type was wrong or a value.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from socket import AF_INET, AF_INET6, inet_pton
from sys import intern
from typing import NoReturn, TypeVar

import msgspec

from agent.core.addresses import IPV4_PREFIX, AddressRange, format_address
from agent.core.records import Algorithm, External, Family, Fault, Forwarding, Protocol, ServicePort, SlicePort
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
_AN_ADDRESS = "an IPv4 or IPv6 address"
_LEADING_ZEROS = re.compile(r"(?<![0-9])0+(?=[0-9])")
PROTOCOLS: dict[str | None, Protocol] = {None: Protocol.TCP, "": Protocol.TCP}
PROTOCOLS.update((protocol.name, protocol) for protocol in Protocol)

_E = TypeVar("_E", Forwarding, Algorithm)
_T = TypeVar("_T")


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
) -> tuple[External | None, tuple[Fault, ...]]:
    """Convert how a Service is reached from outside, None where it is not; and name what of it cannot be read.

    Addresses count wherever they are written, whatever the type; the external traffic policy only where there is one.
    An address or source range that cannot be read costs only itself.
    Source: kube-proxy's ServicePort and pkg/api/v1/service ExternalPolicyLocal, NeedsHealthCheck.
    """
    ingress_ips = dict(_ingress_ips(status)) if status else {}
    has_policy = spec.type in ("NodePort", "LoadBalancer") or bool(spec.external_ips)
    if not (has_policy or ingress_ips or any(port.node_port for port in ports)):
        return None, ()
    is_local = has_policy and spec.external_traffic_policy == "Local"
    addresses, no_addresses = _each(_address, _indexed(spec.external_ips), "spec.externalIPs[{}]")
    ingresses, no_ingresses = _each(_address, ingress_ips, "status.loadBalancer.ingress[{}].ip")
    given = _indexed(spec.load_balancer_source_ranges)
    ranges, no_ranges = _each(_source_range, given, "spec.loadBalancerSourceRanges[{}]", "an address range")
    found = External(
        addresses,
        ingresses,
        ranges,
        is_local,
        spec.health_check_node_port or 0 if is_local and spec.type == "LoadBalancer" else 0,
        _choice(Forwarding, annotations.forwarding) if annotations else None,
        _choice(Algorithm, annotations.algorithm) if annotations else None,
        lacks_ranges=bool(no_ranges),
    )
    return found, (*no_addresses, *no_ingresses, *no_ranges)


def _ingress_ips(status: ServiceStatus) -> Iterator[tuple[int, str]]:
    """Choose the addresses that packets reach the node with; of a load balancer that is a proxy they do not."""
    ingresses = (status.load_balancer and status.load_balancer.ingress) or ()
    for index, ingress in enumerate(ingresses):
        if ingress.ip and ingress.ip_mode in (None, "", "VIP"):
            yield index, ingress.ip


def _indexed(texts: Sequence[str] | None) -> dict[int, str]:
    return dict(enumerate(texts)) if texts else {}


def _each(
    read: Callable[[str], _T], texts: Mapping[int, str], field: str, what: str = _AN_ADDRESS
) -> tuple[tuple[_T, ...], list[Fault]]:
    """Read texts, the same only once, and name those that cannot be read by their index."""
    found: dict[_T, None] = {}
    faults: list[Fault] = []
    for index, text in texts.items():
        try:
            found[read(text)] = None
        except (OSError, ValueError):
            faults.append(Fault(field.format(index), f"{text!r} is not {what}"))
    return tuple(found), faults


def _source_range(text: str) -> AddressRange:
    return AddressRange.parse(_decimal(text.strip()))


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

    Zones are refused by inet_pton; an IPv4-mapped IPv6 address is, lest it pass for an IPv4 one.
    Raises: OSError or ValueError, which do not say which address is at fault.
    """
    if family is Family.IPV4:
        try:
            return IPV4_PREFIX + IPV4_PREFIX.join([inet_pton(AF_INET, text) for text in texts])
        except OSError:  # as good as none has leading zeros: to look for them first would cost the others
            texts = [_decimal(text) for text in texts]
            return IPV4_PREFIX + IPV4_PREFIX.join([inet_pton(AF_INET, text) for text in texts])
    addresses = [inet_pton(AF_INET6, text) for text in texts]
    packed = b"".join(addresses)
    if IPV4_PREFIX in packed and any(address.startswith(IPV4_PREFIX) for address in addresses):
        raise ValueError("IPv4-mapped")
    return packed


def _decimal(text: str) -> str:
    """Take the leading zeros out of an IPv4 address or range: they stand in old objects, and mean no octal number.

    Source: kube-proxy, by k8s.io/utils/net ParseIPSloppy and ParseCIDRSloppy.
    """
    return text if ":" in text else _LEADING_ZEROS.sub("", text)


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
    """Choose the IP addresses: internal ones first, each kind in the order given. What is none is passed over.

    Source: kube-proxy, by k8s.io/component-helpers/node/util GetNodeHostIPs.
    """

    def of_type(wanted: str) -> Iterator[str]:
        for address in addresses:
            if address.type == wanted:
                with suppress(msgspec.ValidationError):
                    yield format_address(_parse(address.address, "status.addresses"))

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
        return _address(text)
    except (OSError, ValueError):
        raise fault(field.format(index), f"{text!r} is not {_AN_ADDRESS}") from None


def _address(text: str) -> bytes:
    return pack(Family.IPV6 if ":" in text else Family.IPV4, (text,))


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
