"""What netlink says of this network namespace: its addresses."""

from __future__ import annotations

from pyroute2 import IPRoute

from agent.core.addresses import parse_address


def local_addresses() -> set[bytes]:
    """Read the addresses of every device, 16 bytes each; those of loopback's whole range are only the one it has."""
    with IPRoute() as netlink:
        found = [dict(message["attrs"]) for message in netlink.get_addr()]
    return {parse_address(attrs.get("IFA_LOCAL") or attrs["IFA_ADDRESS"]) for attrs in found}
