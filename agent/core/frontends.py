"""Which frontends a service port has, and what their clients get.

    ClusterIP                            inside and outside   the internal policy's segment
    NodePort, externalIP, load balancer  inside               the Cluster segment
                                         outside              the external policy's segment
    reserved                             nothing

Every pod and host of the cluster is inside: a client there does not depend on which node its connection enters by.
Source: kube-proxy's short-circuit of externalTrafficPolicy Local.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from agent.core.abi import FRONTEND_KIND_MASK, FrontendFlag, FrontendKind, pack_frontend_key, pack_reserved_key
from agent.core.addresses import IPV4_PREFIX, AddressRange
from agent.core.options import ServiceOptions
from agent.core.records import Algorithm, External, Forwarding, ServicePort, ServiceRecord

_IPV6_ZERO = bytes(16)
_IPV4_ZERO = IPV4_PREFIX + bytes(4)


class Which(enum.IntEnum):
    """What of a service port a client gets: nothing, or the segment of one of both traffic policies."""

    NOTHING = 0
    CLUSTER = 1
    LOCAL = 2

    __hash__ = int.__hash__  # an enum's own hashes its name, in Python, and roles are looked up for every Service


class Role(NamedTuple):
    """What a frontend is: its flags in the map, kind included, and what clients inside and outside the cluster get."""

    flags: int
    inside: Which
    outside: Which

    @property
    def kind(self) -> int:
        """A FrontendKind."""
        return self.flags & FRONTEND_KIND_MASK

    def limited_as(self, other: Role) -> Role:
        """Take over whether it is limited to source ranges."""
        limit = FrontendFlag.SOURCE_RANGES
        return self._replace(flags=int(self.flags & ~limit | other.flags & limit))


RESERVED = Role(int(FrontendKind.RESERVED), Which.NOTHING, Which.NOTHING)
Frontends = tuple[tuple[bytes, ...], tuple[Role, ...]]


class Face(NamedTuple):
    """What a Service shows clients in one family: its addresses, and what they are."""

    cluster_ip: bytes
    is_cluster_ip_local: bool
    is_masqueraded: bool
    load_balancer_ips: tuple[bytes, ...] = ()
    external_ips: tuple[bytes, ...] = ()
    node_addresses: tuple[bytes, ...] = ()
    source_ranges: tuple[tuple[bytes, int], ...] = ()
    is_limited: bool = False
    """Whether load balancers' addresses are for ``source_ranges`` alone; there may be none."""
    external_flags: int = 0

    def frontends_of(self, port: ServicePort, *, is_first: bool) -> Frontends:
        """Find the packed keys of a port's frontends, and what each of them is.

        The first port stands in for the cluster IP itself. Where one address is several things the stricter holds:
        a load balancer's may be limited to ranges.
        """
        found = dict(
            zip(
                *cluster_ip_frontends(
                    self.cluster_ip,
                    port,
                    is_local=self.is_cluster_ip_local,
                    is_masqueraded=self.is_masqueraded,
                    is_first=is_first,
                ),
                strict=True,
            )
        )
        self._add(found, self.load_balancer_ips, port.number, port, FrontendKind.LOAD_BALANCER)
        self._add(found, self.external_ips, port.number, port, FrontendKind.EXTERNAL_IP)
        if port.node_port and self.node_addresses:
            self._add(found, self.node_addresses, port.node_port, port, FrontendKind.NODE_PORT)
            zero = _IPV4_ZERO if self.cluster_ip.startswith(IPV4_PREFIX) else _IPV6_ZERO
            # It speaks for the port at other nodes too, whose flows this one may have to answer for.
            reserved = RESERVED._replace(flags=RESERVED.flags | self.external_flags & FrontendFlag.DSR)
            found.setdefault(pack_frontend_key(zero, port.node_port, port.protocol), reserved)
        return tuple(found), shared_roles(tuple(found.values()))

    def _add(
        self, found: dict[bytes, Role], addresses: Sequence[bytes], number: int, port: ServicePort, kind: FrontendKind
    ) -> None:
        role = _external_role(kind, self.external_flags, self.is_limited)
        for address in addresses:
            found.setdefault(pack_frontend_key(address, number, port.protocol), role)


def cluster_ip_frontends(
    cluster_ip: bytes, port: ServicePort, *, is_local: bool, is_masqueraded: bool, is_first: bool
) -> Frontends:
    """Find the frontends of a port at a cluster IP; the first port stands in for that itself."""
    key = pack_frontend_key(cluster_ip, port.number, port.protocol)
    keys = (key, pack_reserved_key(cluster_ip)) if is_first else (key,)
    return keys, _cluster_ip_roles(is_local, is_masqueraded, is_first)


def face_of(
    service: ServiceRecord,
    external: External,
    cluster_ip: bytes,
    node_port_addresses: Sequence[bytes],
    options: ServiceOptions,
) -> Face:
    """Choose what of a Service is of the family of one of its cluster IPs."""
    is_ipv4 = cluster_ip.startswith(IPV4_PREFIX)

    def of_family(addresses: Sequence[bytes]) -> tuple[bytes, ...]:
        return tuple(address for address in addresses if address.startswith(IPV4_PREFIX) is is_ipv4)

    load_balancer_ips = of_family(external.load_balancer_ips)
    source_ranges = _limits(external, is_ipv4=is_ipv4) if load_balancer_ips else None
    return Face(
        cluster_ip,
        service.internal_local,
        options.masquerade_all,
        load_balancer_ips,
        tuple(filter(options.is_external_ip_allowed, of_family(external.external_ips))),
        of_family(node_port_addresses) if any(port.node_port for port in service.ports) else (),
        source_ranges or (),
        source_ranges is not None,
        _external_flags(external, options),
    )


def _limits(external: External, *, is_ipv4: bool) -> tuple[tuple[bytes, int], ...] | None:
    """Choose the source ranges of a family; None = everybody may, because it has none or one of them is everybody.

    Without a range that could be read nobody may, where there are others: they may be meant to keep clients out.
    """
    mine = tuple(it for it in external.source_ranges if it[0].startswith(IPV4_PREFIX) is is_ipv4)
    is_open = not mine and not external.lacks_ranges
    return None if is_open or any(AddressRange(*it).is_whole_family for it in mine) else mine


def _external_flags(external: External, options: ServiceOptions) -> int:
    flags = FrontendFlag(0)
    if external.is_local:
        flags |= FrontendFlag.EXTERNAL_LOCAL
    if (external.forwarding or options.forwarding) is Forwarding.DSR:
        flags |= FrontendFlag.DSR
    if (external.algorithm or options.algorithm) is Algorithm.MAGLEV:
        flags |= FrontendFlag.MAGLEV
    return int(flags)


# Thousands of Services share these.


@lru_cache(64)
def _cluster_ip_roles(is_local: bool, is_masqueraded: bool, is_first: bool) -> tuple[Role, ...]:
    which = Which.LOCAL if is_local else Which.CLUSTER
    role = Role(FrontendKind.CLUSTER_IP | (FrontendFlag.MASQUERADE if is_masqueraded else 0), which, which)
    return (role, RESERVED) if is_first else (role,)


@lru_cache(256)
def _external_role(kind: FrontendKind, flags: int, is_limited: bool) -> Role:
    if is_limited and kind is FrontendKind.LOAD_BALANCER:
        flags |= FrontendFlag.SOURCE_RANGES
    is_local = flags & FrontendFlag.EXTERNAL_LOCAL
    return Role(int(kind | flags), Which.CLUSTER, Which.LOCAL if is_local else Which.CLUSTER)


@lru_cache(1024)
def shared_roles(roles: tuple[Role, ...]) -> tuple[Role, ...]:
    """Choose the one of equal tuples that is kept."""
    return roles
