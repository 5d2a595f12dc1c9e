"""Resolve a Service and its slices into service ports: frontends and the backends behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from agent.core.abi import pack_backends, pack_frontend_key
from agent.core.addresses import family_of
from agent.core.records import Family, Protocol, ServicePort, ServiceRecord, SliceRecord
from agent.core.topology import Run, categorize


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
    """What one service port of one family should be in the kernel. ``frontends`` are packed keys.

    ``serving``: of a UDP port, who serves it on any node, whoever may use that, as address and port; else None.
    """

    port: PortName
    frontends: tuple[bytes, ...]
    inside: Backends
    serving: frozenset[bytes] | None = None


def resolve(service: ServiceRecord, slices: Sequence[SliceRecord], zone: str) -> Iterator[DesiredPort]:
    """Resolve every port of a Service in every family it has a cluster IP of."""
    for address in service.cluster_ips:
        family = family_of(address)
        matching = [piece for piece in slices if piece.family is family]
        for port in service.ports:
            frontend = pack_frontend_key(address, port.number, port.protocol)
            runs = _runs(port, matching)
            inside = _inside(runs, zone, is_local=service.internal_local)
            serving = _serving(runs) if port.protocol is Protocol.UDP else None
            yield DesiredPort(_port_name(port.name, port.protocol, family), (frontend,), inside, serving)


def _runs(port: ServicePort, slices: Sequence[SliceRecord]) -> list[Run]:
    """Endpoints of a service port: slices name their ports alike, and give each its own number."""
    return [
        Run(traits, addresses, target.number)
        for piece in slices
        for target in piece.ports
        if target.name == port.name and target.protocol is port.protocol
        for traits, addresses in piece.runs
    ]


def _serving(runs: Sequence[Run]) -> frozenset[bytes]:
    """Gather who keeps the flows it has, terminating or not."""
    usable = [run for run in runs if run.traits.ready or run.traits.serving]
    return frozenset(slot[:18] for run in usable for slot in pack_backends(run.addresses, run.port))


def _inside(runs: Sequence[Run], zone: str, *, is_local: bool) -> Backends:
    reachable = categorize(runs, zone)
    chosen = reachable.local if is_local else reachable.cluster
    slots = pack_backends(chosen[0].addresses, chosen[0].port) if chosen else []
    for run in chosen[1:]:
        slots += pack_backends(run.addresses, run.port)
    return Backends(tuple(dict.fromkeys(slots)), is_silent=not slots and reachable.anywhere)
