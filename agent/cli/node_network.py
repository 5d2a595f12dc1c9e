"""What commands ask of this namespace's network, by pyroute2: they end before its memory matters (decision 0009)."""

from __future__ import annotations

from pyroute2 import IPRoute

from agent.core.addresses import parse_address


def local_addresses() -> frozenset[bytes]:
    """Read the addresses of every device, 16 bytes each; those of loopback's whole range are only the one it has."""
    with IPRoute() as netlink:
        found = [dict(message["attrs"]) for message in netlink.get_addr()]
    return frozenset(parse_address(attrs.get("IFA_LOCAL") or attrs["IFA_ADDRESS"]) for attrs in found)


def devices_of_kind(kind: str) -> list[str]:
    """Name the devices of a kind (``veth``)."""
    with IPRoute() as netlink:
        return [message.get_attr("IFLA_IFNAME") for message in netlink.get_links(kind=kind)]
