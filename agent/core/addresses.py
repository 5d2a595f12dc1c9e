"""The one address type: 16 bytes in network order, IPv4 as ``::ffff:a.b.c.d``."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from agent.core.records import Family

IPV4_PREFIX = bytes(10) + b"\xff\xff"
_BITS = 128
_V4_BITS = 96


class AddressRange(NamedTuple):
    """Addresses that begin alike: the first, and how many of its 128 bits they share."""

    address: bytes
    prefix_bits: int

    @classmethod
    def parse(cls, text: str) -> AddressRange:
        """Parse a network of either family, whose host bits need not be zero. Raises: ValueError."""
        network = ipaddress.ip_network(text, strict=False)
        packed = network.network_address.packed
        if isinstance(network, ipaddress.IPv4Network):
            return cls(IPV4_PREFIX + packed, network.prefixlen + _V4_BITS)
        if packed.startswith(IPV4_PREFIX):
            message = f"{text!r} is IPv4 in the form of IPv6"
            raise ValueError(message)
        return cls(packed, network.prefixlen)

    def __str__(self) -> str:
        bits = self.prefix_bits - (_V4_BITS if self.family is Family.IPV4 else 0)
        return f"{format_address(self.address)}/{bits}"

    @property
    def family(self) -> Family:
        """The family of its addresses."""
        return family_of(self.address)

    @property
    def is_whole_family(self) -> bool:
        """Whether every address of its family is in it."""
        return self.prefix_bits == (_V4_BITS if self.family is Family.IPV4 else 0)

    def contains(self, address: bytes) -> bool:
        """Tell whether an address is in it; those of the other family are not."""
        if family_of(address) is not self.family:
            return False
        shift = _BITS - self.prefix_bits
        return int.from_bytes(address, "big") >> shift == int.from_bytes(self.address, "big") >> shift


def parse_address(text: str) -> bytes:
    """Parse an IPv4 or IPv6 address in text form into its 16 bytes.

    An IPv4 address with leading zeros in an octet is refused, as Kubernetes refuses it in new objects.
    Raises: ValueError.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv4Address):
        return IPV4_PREFIX + address.packed
    if address.scope_id is not None:
        msg = f"{text!r} carries a zone"
        raise ValueError(msg)
    return address.packed


def format_address(address: bytes) -> str:
    """Write 16 bytes as text; an IPv4-mapped address is written as IPv4."""
    if address[:12] == IPV4_PREFIX:
        return str(ipaddress.IPv4Address(address[12:]))
    return str(ipaddress.IPv6Address(address))


def format_endpoint(address: bytes, port: int) -> str:
    """Write ``a.b.c.d:port`` or ``[v6]:port``."""
    text = format_address(address)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def family_of(address: bytes) -> Family:
    """Tell the family of a 16-byte address."""
    return Family.IPV4 if address.startswith(IPV4_PREFIX) else Family.IPV6
