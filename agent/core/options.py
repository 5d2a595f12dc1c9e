"""How this node answers for Services and enforces policy: what the configuration says, and objects do not."""

from __future__ import annotations

import enum
from collections.abc import Container, Iterable
from dataclasses import dataclass

from agent.core.addresses import IPV4_PREFIX, AddressRange, family_of
from agent.core.records import Algorithm, Family, Forwarding

_IPV6_LOOPBACK = bytes(15) + b"\x01"
_LOCALHOST = AddressRange.parse("127.0.0.0/8")


class NetworkPolicyMode(enum.StrEnum):
    """Whether policy is enforced, and what a new pod may do before its policy is known: anything, or nothing."""

    OFF = "off"
    STANDARD = "standard"
    STRICT = "strict"


class PolicyOverflow(enum.StrEnum):
    """What becomes of a pod whose policy does not fit: nothing passes, or everything."""

    CLOSED = "closed"
    OPEN = "open"


class PolicyAnswer(enum.StrEnum):
    """What a pod gets for a connection it may not make: silence, or a refusal."""

    DROP = "drop"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """What holds for every Service.

    ``allowed_external_ips`` of () = any; else a family without a range has none. ``forwarding`` and ``algorithm``: for
    Services that do not say.
    """

    node_port_ranges: tuple[AddressRange, ...] = ()
    """Where NodePorts answer, of the node's own addresses; a family without a range: on all of them."""
    is_node_port_primary: bool = False
    """NodePorts answer on the node's primary addresses alone."""
    has_localhost_node_ports: bool = True
    """NodePorts answer on loopback over IPv4, where it is among the ranges."""
    bind_address: bytes | None = None
    """What is to be taken for the node's primary address of its family."""
    masquerade_all: bool = False
    allowed_external_ips: tuple[AddressRange, ...] = ()
    forwarding: Forwarding = Forwarding.SNAT
    algorithm: Algorithm = Algorithm.RANDOM

    def is_external_ip_allowed(self, address: bytes) -> bool:
        """Whether a Service may have this address among its externalIPs."""
        ranges = self.allowed_external_ips
        return not ranges or any(allowed.contains(address) for allowed in ranges)

    def node_port_addresses(self, local: Iterable[bytes], primary: Iterable[bytes]) -> tuple[bytes, ...]:
        """Choose the addresses that NodePorts answer on, sorted; never on the loopback of IPv6.

        Source: kube-proxy's nodePortAddresses; route_localnet has no counterpart in IPv6.
        """
        wanted = primary if self.is_node_port_primary else filter(self._is_node_port_address, local)
        found = sorted(set(wanted) - {_IPV6_LOOPBACK})
        return tuple(it for it in found if self.has_localhost_node_ports or not _LOCALHOST.contains(it))

    def primary_addresses(
        self, local: Container[bytes], named: Iterable[bytes], sources: Iterable[bytes]
    ) -> frozenset[bytes]:
        """Choose the node's address of each family: as configured, as its Node object names it, else by its routes.

        Only what is in ``local``: a cloud may name an address that is not the node's to answer on.
        """
        chosen: dict[Family, bytes] = {}
        for address in (self.bind_address, *named, *sorted(sources)):
            if address is not None and address in local:
                chosen.setdefault(family_of(address), address)
        return frozenset(chosen.values())

    def _is_node_port_address(self, address: bytes) -> bool:
        is_ipv4 = address.startswith(IPV4_PREFIX)
        ranges = [it for it in self.node_port_ranges if it.address.startswith(IPV4_PREFIX) is is_ipv4]
        return not ranges or any(it.contains(address) for it in ranges)
