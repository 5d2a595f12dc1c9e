"""Convert parts of policies and pods as they are on the wire into parts of records, as `convert` does of Services."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from socket import AF_INET, AF_INET6, inet_pton
from sys import intern

from agent.core.addresses import IPV4_PREFIX
from agent.core.policy_records import (
    EVERYTHING,
    Action,
    IpBlock,
    NamedPort,
    Operator,
    Peer,
    PortRange,
    Prefix,
    Requirement,
    Rule,
    Selector,
    TierRule,
)
from agent.core.records import Family, Protocol
from agent.sources.convert import PROTOCOLS, fault, pack
from agent.sources.wire_policy import (
    ContainerPort,
    EgressRule,
    IngressRule,
    LabelSelector,
    NamespacedPods,
    PodSpec,
    PodStatus,
    PolicyPeer,
    PolicyPort,
    TierEgressRule,
    TierIngressRule,
    TierPeer,
    TierProtocols,
    TierSubject,
    WireBlock,
    WirePort,
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
    if spec.host_network or status.phase in _OVER:
        return ()
    if not status.pod_ips:
        return (_address(status.pod_ip, "status.podIP"),) if status.pod_ip else ()
    texts = [it.ip for it in status.pod_ips if it.ip]
    addresses = tuple([_address(text, "status.podIPs") for text in texts])
    if len(texts) > 1 and len({":" in text for text in texts}) < len(texts):
        raise fault("status.podIPs", "two addresses of one family")
    return addresses


def _address(text: str, field: str) -> bytes:
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
    found = [_peer(peer, f"{field}[{index}]") for index, peer in enumerate(said)]
    return tuple(dict.fromkeys(peer for peer in found if peer is not None))


def _peer(said: PolicyPeer, field: str) -> Peer | None:
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
    return tuple(dict.fromkeys(_port(port, f"{field}[{index}]") for index, port in enumerate(said)))


def _port(said: PolicyPort, field: str) -> PortRange:
    """Convert a port. Source: ValidateNetworkPolicyPort."""
    protocol, port = PROTOCOLS[said.protocol], said.port
    if isinstance(port, int):
        last = port if said.end_port is None else said.end_port
        if last < port:
            raise fault(f"{field}.endPort", f"{last} is less than port, {port}")
        return PortRange(protocol, port, last)
    if said.end_port is not None:
        raise fault(f"{field}.endPort", "port is not a number" if port else "there is no port")
    return PortRange(protocol) if port is None else PortRange(protocol, name=_port_name(port, f"{field}.port"))


def _port_name(name: str, field: str) -> str:
    if not _PORT_NAME.fullmatch(name):
        raise fault(field, f"{name!r} is neither a port nor a port's name")
    return intern(name)


# ClusterNetworkPolicy


class _Unknown(Exception):
    """A part of a rule says nothing we know: its definition is newer than we are, or what it says is experimental."""


def tier_subject(said: TierSubject, field: str) -> tuple[Selector, Selector | None]:
    """Convert whom a policy is about: namespaces, and which of their pods."""
    found = _tier_selectors(said, field)
    if found is None:
        raise fault(field, "neither namespaces nor pods")
    return found


def tier_rules(said: Sequence[TierIngressRule | TierEgressRule], field: str, peers: str) -> tuple[TierRule, ...]:
    """Convert the rules of one direction; ``peers`` is ``from`` or ``to``."""
    found = []
    for index, rule in enumerate(said):
        place = f"{field}[{index}]"
        if not rule.peers:
            raise fault(f"{place}.{peers}", "empty")
        try:
            body = Rule(_tier_peers(rule.peers, f"{place}.{peers}"), _tier_ports(rule.protocols, f"{place}.protocols"))
            found.append(TierRule(rule.action, body, rule.name or ""))
        except _Unknown:
            found.append(_closed(rule.action, rule.name or ""))
    return tuple(found)


def _closed(action: Action, name: str) -> TierRule:
    """Make what a rule comes to that is not understood. Source: ClusterNetworkPolicyIngressPeer, "fail closed"."""
    if action is Action.ACCEPT:
        return TierRule(action, Rule(peers=()), name)
    return TierRule(Action.DENY, Rule(), name)


def _tier_peers(said: Sequence[TierSubject], field: str) -> tuple[Peer, ...]:
    """Convert peers. Raises: _Unknown."""
    return tuple(dict.fromkeys(peer for index, it in enumerate(said) for peer in _tier_peer(it, f"{field}[{index}]")))


def _tier_peer(said: TierSubject, field: str) -> Iterator[Peer]:
    networks = said.networks if isinstance(said, TierPeer) else None
    selected = _tier_selectors(said, field)
    if networks and selected:
        raise fault(field, "more than one of namespaces, pods and networks")
    if not networks and not selected:
        raise _Unknown
    if selected:
        yield Peer(*selected)
    for index, text in enumerate(networks or ()):
        yield Peer(block=block(prefix(text, f"{field}.networks[{index}]")))


def _tier_selectors(said: TierSubject, field: str) -> tuple[Selector, Selector | None] | None:
    """Convert which pods are selected; None where it is not by selectors."""
    namespaces, pods = said.namespaces, said.pods
    if namespaces is not None and pods is not None:
        raise fault(field, "more than one of namespaces and pods")
    if namespaces is not None:
        return selector(namespaces, f"{field}.namespaces"), None
    return _namespaced(pods, f"{field}.pods") if pods is not None else None


def _namespaced(said: NamespacedPods, field: str) -> tuple[Selector, Selector]:
    namespaces = selector(said.namespace_selector, f"{field}.namespaceSelector")
    return namespaces, selector(said.pod_selector, f"{field}.podSelector")


def _tier_ports(said: Sequence[TierProtocols] | None, field: str) -> tuple[PortRange, ...] | None:
    """Convert protocols; None for whatever protocol it is. Raises: _Unknown."""
    if not said:
        return None
    return tuple(
        dict.fromkeys(port for index, it in enumerate(said) for port in _tier_protocol(it, f"{field}[{index}]"))
    )


def _tier_protocol(said: TierProtocols, field: str) -> Iterator[PortRange]:
    """Convert one entry; a named port is that of any protocol."""
    given = [(name, getattr(said, name)) for name in ("tcp", "udp", "sctp") if getattr(said, name) is not None]
    name = said.destination_named_port
    if len(given) + bool(name) > 1:
        raise fault(field, "more than one of tcp, udp, sctp and destinationNamedPort")
    if not given and not name:
        raise _Unknown
    if name:
        _port_name(name, f"{field}.destinationNamedPort")
        yield from (PortRange(protocol, name=intern(name)) for protocol in Protocol)
    for protocol, body in given:
        port = body.destination_port
        place = f"{field}.{protocol}.destinationPort"
        yield PortRange(Protocol[protocol.upper()], *(_numbers(port, place) if port is not None else ()))


def _numbers(said: WirePort, field: str) -> tuple[int, int]:
    """Convert a port or a range of them. Raises: _Unknown."""
    if said.number is not None and said.range is not None:
        raise fault(field, "number and range")
    if said.number is not None:
        return said.number, said.number
    if said.range is None:
        raise _Unknown
    if said.range.end < said.range.start:
        raise fault(f"{field}.range.end", f"{said.range.end} is less than start, {said.range.start}")
    return said.range.start, said.range.end


def labels(said: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """Sort labels by key."""
    return tuple(sorted(said.items())) if said else ()
