"""Resolve a Service and its slices into service ports: frontends, and the backends that their clients get."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from agent.core.abi import FrontendKind, pack_backends
from agent.core.addresses import family_of
from agent.core.frontends import Role, Which, cluster_ip_frontends, face_of
from agent.core.options import ServiceOptions
from agent.core.records import ADDRESS_SIZE, Family, Protocol, ServicePort, ServiceRecord, SliceRecord
from agent.core.topology import Reachable, Run, categorize, serving

_END_SIZE = ADDRESS_SIZE + 2
_DEFAULTS = ServiceOptions()


class PortName(NamedTuple):
    """A service port within its Service; each family has its own endpoints and is resolved by itself."""

    name: str
    protocol: Protocol
    family: Family

    def __str__(self) -> str:
        name = self.name or "-"
        return f"{name}/{self.protocol.name}/IPv{self.family.value}"


_port_name = lru_cache(1024)(PortName)  # a cluster has few: the same one for thousands of Services


class Backends(NamedTuple):
    """The backends a client gets, as ``struct slot`` each, without duplicates.

    ``is_silent``: where there are none, whether the client hears nothing (endpoints exist, none of them for it).
    """

    slots: tuple[bytes, ...]
    is_silent: bool


class DesiredPort(NamedTuple):
    """What one service port of one family should be in the kernel.

    ``frontends`` are packed keys, ``roles`` what each of them is. ``cluster`` and ``local`` are the segments that a
    role names, None where none does. ``source_ranges``: address and prefix bits of 128. ``serving``: of UDP, every
    serving endpoint of any node, as address and port (18 bytes); None = not UDP.
    """

    port: PortName
    frontends: tuple[bytes, ...]
    roles: tuple[Role, ...]
    cluster: Backends | None
    local: Backends | None
    affinity_timeout_s: int = 0
    source_ranges: tuple[tuple[bytes, int], ...] = ()
    serving: frozenset[bytes] | None = None

    @property
    def lacks_local(self) -> tuple[str, ...]:
        """Name the traffic policies (internal, external) whose clients hear nothing: all endpoints are elsewhere."""
        if self.local is None or not self.local.is_silent:
            return ()
        kinds = {role.kind for role in self.roles if role.outside is Which.LOCAL}
        internal = ("internal",) if FrontendKind.CLUSTER_IP in kinds else ()
        return (*internal, "external") if kinds - {FrontendKind.CLUSTER_IP} else internal


def resolve(
    service: ServiceRecord,
    slices: Sequence[SliceRecord],
    zone: str,
    node_port_addresses: Sequence[bytes] = (),
    options: ServiceOptions = _DEFAULTS,
) -> Iterator[DesiredPort]:
    """Resolve every port of a Service in every family it has a cluster IP of."""
    ports, external = service.ports, service.external
    first = ports[0] if len(ports) == 1 else min(ports, key=lambda port: (port.name, port.protocol), default=None)
    for address in service.cluster_ips:
        family = family_of(address)
        matching = [piece for piece in slices if piece.family is family]
        face = face_of(service, external, address, node_port_addresses, options) if external else None
        for port in ports:
            if face is None:  # as most are: without what the others need
                frontends, roles = cluster_ip_frontends(
                    address,
                    port,
                    is_local=service.internal_local,
                    is_masqueraded=options.masquerade_all,
                    is_first=port is first,
                )
            else:
                frontends, roles = face.frontends_of(port, is_first=port is first)
            runs = _runs(port, matching)
            reachable = categorize(runs, zone)
            used = _used(roles)
            yield DesiredPort(
                _port_name(port.name, port.protocol, family),
                frontends,
                roles,
                _backends(reachable.cluster, reachable) if Which.CLUSTER in used else None,
                _backends(reachable.local, reachable) if Which.LOCAL in used else None,
                service.affinity_timeout_s,
                face.source_ranges if face else (),
                _serving(runs) if port.protocol is Protocol.UDP else None,
            )


def _runs(port: ServicePort, slices: Sequence[SliceRecord]) -> list[Run]:
    """Endpoints of a service port: slices name their ports alike, and give each its own number."""
    return [
        Run(traits, addresses, target.number)
        for piece in slices
        for target in piece.ports
        if target.name == port.name and target.protocol is port.protocol
        for traits, addresses in piece.runs
    ]


@lru_cache(256)
def _used(roles: tuple[Role, ...]) -> frozenset[Which]:
    """Find the segments that a frontend uses."""
    return frozenset(which for role in roles for which in (role.inside, role.outside))


def _backends(chosen: Sequence[Run], reachable: Reachable) -> Backends:
    if len(chosen) == 1:
        slots = pack_backends(chosen[0].addresses, chosen[0].port)
    else:
        slots = [slot for run in chosen for slot in pack_backends(run.addresses, run.port)]
    return Backends(tuple(dict.fromkeys(slots)), is_silent=not slots and reachable.anywhere)


def _serving(runs: Sequence[Run]) -> frozenset[bytes]:
    return frozenset(slot[:_END_SIZE] for run in serving(runs) for slot in pack_backends(run.addresses, run.port))
