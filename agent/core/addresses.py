"""The one address type: 16 bytes in network order, IPv4 as ``::ffff:a.b.c.d``."""

from __future__ import annotations

import ipaddress

from agent.core.records import Family

IPV4_PREFIX = bytes(10) + b"\xff\xff"


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
