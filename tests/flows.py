"""Builders of tracked flows, as the packet path writes them."""

from __future__ import annotations

from agent.core.abi import FLOW, TUPLE, FlowFlag, port_bytes
from agent.core.addresses import parse_address

SERVICE = 7
Entry = tuple[bytes, bytes]


def end(text: str) -> bytes:
    """An address and a port as 18 bytes: ``a.b.c.d:port`` or ``[v6]:port``."""
    address, _, port = text.rpartition(":")
    return parse_address(address.strip("[]")) + port_bytes(int(port))


def entry(
    protocol: int,
    source: str,
    destination: str,
    new_source: str,
    new_destination: str,
    *,
    seen: int = 0,
    flags: int = 0,
    service: int = SERVICE,
) -> Entry:
    """One entry: key and value."""
    asked, becomes = [end(source), end(destination)], [end(new_source), end(new_destination)]
    key = TUPLE.packer.pack(asked[0][:16], asked[1][:16], asked[0][16:], asked[1][16:], protocol, bytes(3))
    ends = (becomes[0][:16], becomes[1][:16], becomes[0][16:], becomes[1][16:])
    return key, FLOW.packer.pack(*ends, service, seen, 0, flags)


def pair(
    protocol: int,
    client: str = "10.9.0.1:4000",
    frontend: str = "10.96.0.10:53",
    backend: str = "10.1.0.1:53",
    masquerade: str = "",
    *,
    seen: int = 0,
    flags: int = 0,
    service: int = SERVICE,
) -> tuple[Entry, Entry]:
    """A flow: the way there and the way back; the flags are those of the way there."""
    source = masquerade or client
    flags |= FlowFlag.MASQUERADED if masquerade else 0
    there = entry(protocol, client, frontend, source, backend, seen=seen, flags=flags, service=service)
    back = entry(protocol, backend, source, frontend, client, seen=seen, flags=mirrored(flags), service=service)
    return there, back


def mirrored(flags: int) -> int:
    """Say the same of a flow from the way back."""
    ends = FlowFlag.FIN | FlowFlag.PEER_FIN
    turned = FlowFlag.PEER_FIN if flags & FlowFlag.FIN else 0
    turned |= FlowFlag.FIN if flags & FlowFlag.PEER_FIN else 0
    return (flags & ~ends) | turned | FlowFlag.REPLY
