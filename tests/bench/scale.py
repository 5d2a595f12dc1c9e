"""How much a run measures."""

from __future__ import annotations

from dataclasses import dataclass

from tests.bench.policy_population import PolicyPopulation

_ISOLATION = PolicyPopulation(250, 250, local=110, policies=250, peers=18)
_CLUSTER = PolicyPopulation(10_000, 500, local=110, policies=250, peers=18)


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes and repetitions. A block is ``block`` connects of one variant; a round is a block of each.

    ``flat_services``: how many services the flatness of connects is compared at, besides ``services``.
    ``flood``: packets of a block of forwarding, sent in ``flood_limit_ms`` at most. ``runs``: of a program on a packet.
    ``isolation``: what policy is made of where its cost is measured; ``cluster``: where an agent enforces it.
    ``is_full``: the sizes the goals speak of; otherwise a figure says nothing about a goal.
    """

    services: int = 10_000
    endpoints: int = 10
    flat_services: tuple[int, ...] = (10, 100_000)
    rounds: int = 160
    warm_up_rounds: int = 6
    block: int = 200
    flood: int = 40_000
    flood_limit_ms: int = 500
    runs: int = 2_000
    syncs: int = 5
    changes: int = 500
    churned: int = 20_000
    peer_changes: int = 7
    kills: int = 20
    quiet_kills: int = 5
    idle_s: float = 30.0
    tables: int = 200
    isolation: PolicyPopulation = _ISOLATION
    cluster: PolicyPopulation = _CLUSTER
    is_full: bool = True


FULL = Scale()
QUICK = Scale(
    rounds=80,
    flood=20_000,
    runs=500,
    syncs=3,
    changes=200,
    churned=10_000,
    peer_changes=3,
    kills=5,
    quiet_kills=3,
    idle_s=5.0,
)
TINY = Scale(
    services=40,
    endpoints=3,
    flat_services=(10,),
    rounds=12,
    warm_up_rounds=2,
    block=50,
    flood=2_000,
    runs=20,
    syncs=1,
    changes=20,
    churned=200,
    peer_changes=1,
    kills=1,
    quiet_kills=1,
    idle_s=0.5,
    tables=10,
    isolation=PolicyPopulation(20, 20, local=4, policies=20, peers=4),
    cluster=PolicyPopulation(60, 20, local=6, policies=10, peers=4),
    is_full=False,
)
