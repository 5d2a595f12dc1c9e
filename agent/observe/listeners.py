"""Where the node listens for load balancers' probes, and the sockets that do."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable

from agent.config_values import Network
from agent.core.addresses import format_address

EVERYWHERE = "*"
"""The host that stands for every address of both families."""
_BACKLOG = 64
_IP_FREEBIND, _IPV6_FREEBIND = 15, 78  # Source: linux/in.h, linux/in6.h; socket has no names for them


def listening_hosts(chosen: tuple[Network, ...] | str, selected: Iterable[bytes]) -> tuple[str, ...]:
    """Say where to listen, as ``nodePortAddresses`` has it.

    ``selected`` are the node's addresses that NodePorts answer on. A family for which none is chosen listens
    everywhere. A link-local address means a device, which a load balancer cannot name: not there.
    """
    if not chosen:
        return (EVERYWHERE,)
    addresses = [ipaddress.ip_address(format_address(address)) for address in selected]
    hosts = {str(address) for address in addresses if not address.is_link_local}
    if not isinstance(chosen, str):
        for version, everywhere in ((4, "0.0.0.0"), (6, "::")):
            if all(network.version != version for network in chosen):
                hosts = {host for host in hosts if ipaddress.ip_address(host).version != version} | {everywhere}
    return tuple(sorted(hosts))


def open_listener(host: str, port: int) -> socket.socket:
    """Listen at an address of this node, also one that is only just coming; both families at ``EVERYWHERE``.

    Raises: OSError.
    """
    if host == EVERYWHERE:
        try:
            return _listener(socket.AF_INET6, "::", port, is_dual=True)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            return _listener(socket.AF_INET, "0.0.0.0", port)  # a node without IPv6
    return _listener(socket.AF_INET6 if ":" in host else socket.AF_INET, host, port)


def _listener(family: socket.AddressFamily, host: str, port: int, *, is_dual: bool = False) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not is_dual))
            listener.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        else:
            listener.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
