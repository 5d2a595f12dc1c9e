"""Which endpoints this node may use: readiness, locality, hints.

Works on runs of endpoints that share their traits, so its cost follows the number of distinct traits.
Source: KEP-1669 (terminating), KEP-2086 (internalTrafficPolicy), KEP-2433 and KEP-3015 (hints).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from agent.core.records import ADDRESS_SIZE, Traits

_PLAIN = Traits()


class Run(NamedTuple):
    """Endpoints that share traits and port: 16-byte addresses, end to end."""

    traits: Traits
    addresses: bytes
    port: int


class Reachable(NamedTuple):
    """The endpoints of a service port that a client may get.

    ``cluster`` and ``local`` are what the Cluster and Local traffic policies choose; either may be empty.
    ``anywhere`` says whether some node has a usable endpoint: an empty choice is silent if so, refused if not.
    """

    cluster: Sequence[Run]
    local: Sequence[Run]
    anywhere: bool


def categorize(runs: Sequence[Run], zone: str) -> Reachable:
    """Choose the endpoints for both traffic policies on a node in ``zone`` (empty = not known)."""
    if len(runs) == 1 and runs[0].traits == _PLAIN:  # most services of most clusters, seen from most nodes
        return Reachable(runs, (), anywhere=True)
    runs = _without_overruled(runs)
    ready = [run for run in runs if run.addresses and run.traits.ready]
    terminating = [run for run in runs if run.addresses and run.traits.serving and run.traits.terminating]
    cluster = _nearest(ready, zone) if ready else terminating
    local = [run for run in ready if run.traits.local] or [run for run in terminating if run.traits.local]
    return Reachable(cluster, local, bool(ready or terminating))


def local_ready(runs: Sequence[Run]) -> Sequence[Run]:
    """Choose the ready ones on this node, whatever the policy."""
    return [run for run in _without_overruled(runs) if run.traits.ready and run.traits.local]


def serving(runs: Sequence[Run]) -> Sequence[Run]:
    """Choose all that a flow which has begun may go on to: readiness for new ones, place and hints do not matter."""
    return [run for run in _without_overruled(runs) if run.traits.serving or run.traits.ready]


def _without_overruled(runs: Sequence[Run]) -> Sequence[Run]:
    """Leave out terminating copies of endpoints that another slice calls non-terminating: those count."""
    if not any(run.traits.terminating for run in runs):
        return runs
    staying = {(address, run.port) for run in runs if not run.traits.terminating for address in split(run)}
    if not staying:
        return runs
    return [
        run._replace(addresses=b"".join(a for a in split(run) if (a, run.port) not in staying))
        if run.traits.terminating
        else run
        for run in runs
    ]


def split(run: Run) -> list[bytes]:
    """Cut addresses that stand end to end."""
    return [run.addresses[i : i + ADDRESS_SIZE] for i in range(0, len(run.addresses), ADDRESS_SIZE)]


def _nearest(ready: Sequence[Run], zone: str) -> Sequence[Run]:
    """Apply hints: this node if all carry node hints and one names it, else its zone likewise, else everything."""
    if all(run.traits.node_hint is not None for run in ready) and (
        near := _matching(ready, lambda traits: bool(traits.node_hint))
    ):
        return near
    if (
        zone
        and all(run.traits.zones is not None for run in ready)
        and (near := _matching(ready, lambda traits: zone in (traits.zones or ())))
    ):
        return near
    return ready


def _matching(runs: Sequence[Run], wanted: Callable[[Traits], bool]) -> list[Run]:
    return [run for run in runs if wanted(run.traits)]
