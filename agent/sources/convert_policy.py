"""Convert parts of policies and pods as they are on the wire into parts of records, as `convert` does of Services."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from socket import AF_INET, AF_INET6, inet_pton
from sys import intern

from agent.core.addresses import IPV4_PREFIX
from agent.core.policy_records import (
    EVERYTHING,
    IpBlock,
    NamedPort,
    Operator,
    Peer,
    PortRange,
    Prefix,
    Requirement,
    Rule,
    Selector,
)
from agent.core.records import Family
from agent.sources.convert import PROTOCOLS, fault, pack
from agent.sources.wire_policy import (
    ContainerPort,
    EgressRule,
    IngressRule,
    LabelSelector,
    PodSpec,
    PodStatus,
    PolicyPeer,
    PolicyPort,
    WireBlock,
    WireRequirement,
)

_BITS = 128
_V4_BITS = 96
_IPV4 = Prefix(IPV4_PREFIX + bytes(4), _V4_BITS)
_PREFIX_LENGTH = re.compile(r"0|[1-9][0-9]{0,2}")
# Source: k8s.io/apimachinery validation.IsValidPortName.
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])(?!.*--)[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_OVER = ("Succeeded", "Failed")


def pod_addresses(spec: PodSpec, status: PodStatus) -> tuple[bytes, ...]:
    """Parse a pod's own addresses; none of one that has ended, or that uses its node's network.

    Source: PodStatus.podIPs: at most one of each family; podIP is the first of them.
    """
    if spec.host_network or is_over(status):
        return ()
    if not status.pod_ips:
        return (pod_address(status.pod_ip, "status.podIP"),) if status.pod_ip else ()
    texts = [it.ip for it in status.pod_ips if it.ip]
    addresses = tuple([pod_address(text, "status.podIPs") for text in texts])
    if len(texts) > 1 and len({":" in text for text in texts}) < len(texts):
        raise fault("status.podIPs", "two addresses of one family")
    return addresses


def is_over(status: PodStatus) -> bool:
    """Tell whether a pod has ended."""
    return status.phase in _OVER


def pod_address(text: str, field: str) -> bytes:
    """Parse an address; at once, and not by `pack`, because every change of every pod comes by."""
    try:
        if ":" not in text:
            return IPV4_PREFIX + inet_pton(AF_INET, text)
        address = inet_pton(AF_INET6, text)
    except (OSError, ValueError):
        raise fault(field, f"{text!r} is not an IPv4 or IPv6 address") from None
    if address.startswith(IPV4_PREFIX):
        raise fault(field, f"{text!r} is IPv4 in the form of IPv6")
    return address


def named_ports(spec: PodSpec) -> Iterator[NamedPort]:
    """Find the ports that have names, in the order in which a name is looked up; those of sidecars come last.

    Source: k8s.io/kubernetes/pkg/api/v1/pod FindPort.
    """
    for container in spec.containers or ():
        if container.ports:
            yield from _named(container.ports)
    for init in spec.init_containers or ():
        if init.ports and init.restart_policy == "Always":
            yield from _named(init.ports)


def _named(ports: Iterable[ContainerPort]) -> Iterator[NamedPort]:
    return (NamedPort(port.name, PROTOCOLS[port.protocol], port.container_port) for port in ports if port.name)


def selector(said: LabelSelector | None, field: str) -> Selector:
    """Convert a selector; one that is absent or empty selects everything. Equal ones are equal, however written."""
    if said is None or not (said.match_labels or said.match_expressions):
        return EVERYTHING
    found = [_one_value(key, value) for key, value in (said.match_labels or {}).items()]
    found += [
        _requirement(it, f"{field}.matchExpressions[{index}]") for index, it in enumerate(said.match_expressions or ())
    ]
    return Selector(tuple(sorted(set(found), key=lambda it: (it.key, it.operator, sorted(it.values)))))


def _one_value(key: str, value: str) -> Requirement:
    return Requirement(intern(key), Operator.IN, frozenset((intern(value),)))


def _requirement(said: WireRequirement, field: str) -> Requirement:
    """Convert one requirement. Source: meta/v1 ValidateLabelSelectorRequirement."""
    values = frozenset(map(intern, said.values or ()))
    if said.operator in (Operator.IN, Operator.NOT_IN):
        if not values:
            raise fault(f"{field}.values", f"empty, and the operator is {said.operator}")
    elif values:
        raise fault(f"{field}.values", f"not empty, and the operator is {said.operator}")
    return Requirement(intern(said.key), said.operator, values)


def rules(said: Sequence[IngressRule | EgressRule], field: str, peers: str) -> tuple[Rule, ...]:
    """Convert the rules of one direction of a NetworkPolicy; ``peers`` is ``from`` or ``to``."""
    return tuple(
        [
            Rule(
                _peers(rule.peers, f"{field}[{index}].{peers}") if rule.peers else None,
                _ports(rule.ports, f"{field}[{index}].ports") if rule.ports else None,
            )
            for index, rule in enumerate(said)
        ]
    )


def _peers(said: Sequence[PolicyPeer], field: str) -> tuple[Peer, ...]:
    """Convert peers; one that says nothing we know matches nobody."""
    found = [policy_peer(it, f"{field}[{index}]") for index, it in enumerate(said)]
    return tuple(dict.fromkeys(peer for peer in found if peer is not None))


def policy_peer(said: PolicyPeer, field: str) -> Peer | None:
    """Convert one peer; None where it says nothing we know."""
    namespaces, pods = said.namespace_selector, said.pod_selector
    if said.ip_block is not None:
        if namespaces is not None or pods is not None:
            raise fault(field, "has an ipBlock and a selector")
        return Peer(block=_block(said.ip_block, f"{field}.ipBlock"))
    if namespaces is None and pods is None:
        return None
    return Peer(
        selector(namespaces, f"{field}.namespaceSelector") if namespaces is not None else None,
        selector(pods, f"{field}.podSelector") if pods is not None else None,
    )


def _block(said: WireBlock, field: str) -> IpBlock:
    """Convert a block. Source: ValidateIPBlock: an exception is within the block, and less than it."""
    whole = prefix(said.cidr, f"{field}.cidr")
    excepts = []
    for index, text in enumerate(said.excepts or ()):
        found = prefix(text, f"{field}.except[{index}]")
        is_within = found.bits > whole.bits and _cut(found.address, whole.bits) == whole.address
        if not is_within or (":" in text) != (":" in said.cidr):
            raise fault(f"{field}.except[{index}]", f"{text!r} is not within {said.cidr!r}, or all of it")
        excepts.append(found)
    return block(whole, excepts)


def block(whole: Prefix, excepts: Iterable[Prefix] = ()) -> IpBlock:
    """Make a block of one family: IPv4 is held among the addresses of IPv6, and is none of them."""
    holds_ipv4 = whole.bits < _IPV4.bits and _cut(_IPV4.address, whole.bits) == whole.address
    return IpBlock(whole, tuple(dict.fromkeys((*excepts, _IPV4) if holds_ipv4 else excepts)))


def prefix(text: str, field: str) -> Prefix:
    """Parse a CIDR of either family, whose host bits need not be zero."""
    address, slash, length = text.partition("/")
    family = Family.IPV6 if ":" in address else Family.IPV4
    base = _V4_BITS if family is Family.IPV4 else 0
    try:
        packed = pack(family, (address,))
    except (OSError, ValueError):
        raise _no_prefix(text, field) from None
    if not slash or not _PREFIX_LENGTH.fullmatch(length) or base + int(length) > _BITS:
        raise _no_prefix(text, field)
    return Prefix(_cut(packed, base + int(length)), base + int(length))


def _no_prefix(text: str, field: str) -> Exception:
    return fault(field, f"{text!r} is not an address range")


def _cut(address: bytes, bits: int) -> bytes:
    """Make the bits after the first ``bits`` zero."""
    shift = _BITS - bits
    return (int.from_bytes(address, "big") >> shift << shift).to_bytes(len(address), "big")


def _ports(said: Sequence[PolicyPort], field: str) -> tuple[PortRange, ...]:
    return tuple(dict.fromkeys(policy_port(it, f"{field}[{index}]") for index, it in enumerate(said)))


def policy_port(said: PolicyPort, field: str) -> PortRange:
    """Convert a port. Source: ValidateNetworkPolicyPort."""
    protocol, port = PROTOCOLS[said.protocol], said.port
    if isinstance(port, int):
        last = port if said.end_port is None else said.end_port
        if last < port:
            raise fault(f"{field}.endPort", f"{last} is less than port, {port}")
        return PortRange(protocol, port, last)
    if said.end_port is not None:
        raise fault(f"{field}.endPort", "port is not a number" if port else "there is no port")
    return PortRange(protocol) if port is None else PortRange(protocol, name=port_name(port, f"{field}.port"))


def port_name(name: str, field: str) -> str:
    """Check the name of a port."""
    if not _PORT_NAME.fullmatch(name):
        raise fault(field, f"{name!r} is neither a port nor a port's name")
    return intern(name)


def labels(said: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """Sort labels by key."""
    return tuple(sorted(said.items())) if said else ()
