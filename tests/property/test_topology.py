"""Choosing endpoints by runs agrees with choosing them one by one."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from agent.core.records import Family, Traits
from agent.core.topology import Run, categorize
from tests.property.strategies import PODS, ZONES, traits

runs = st.lists(
    st.builds(
        Run,
        traits,
        st.lists(st.sampled_from(PODS[Family.IPV4][:5]), min_size=1, max_size=4, unique=True).map(b"".join),
        st.sampled_from([80, 81]),
    ),
    max_size=5,
)


class Endpoint(NamedTuple):
    traits: Traits
    address: bytes
    port: int


def endpoints_of(chosen: list[Run]) -> list[Endpoint]:
    return [
        Endpoint(run.traits, run.addresses[i : i + 16], run.port)
        for run in chosen
        for i in range(0, len(run.addresses), 16)
    ]


def places(endpoints: list[Endpoint]) -> set[tuple[bytes, int]]:
    return {(endpoint.address, endpoint.port) for endpoint in endpoints}


def one_by_one(endpoints: list[Endpoint], zone: str) -> tuple[list[Endpoint], list[Endpoint], bool]:
    """The rules as the reference tells them, over single endpoints."""
    staying = places([e for e in endpoints if not e.traits.terminating])
    endpoints = [e for e in endpoints if not e.traits.terminating or (e.address, e.port) not in staying]
    ready = [e for e in endpoints if e.traits.ready]
    fallback = [e for e in endpoints if e.traits.serving and e.traits.terminating]
    cluster = ready
    on_node = [e for e in ready if e.traits.node_hint]
    in_zone = [e for e in ready if zone and zone in (e.traits.zones or ())]
    if on_node and all(e.traits.node_hint is not None for e in ready):
        cluster = on_node
    elif in_zone and all(e.traits.zones is not None for e in ready):
        cluster = in_zone
    local = [e for e in ready if e.traits.local] or [e for e in fallback if e.traits.local]
    return cluster or fallback, local, bool(ready or fallback)


@given(runs, st.sampled_from(ZONES))
def test_runs_are_chosen_as_their_endpoints_would_be(runs, zone):
    reachable = categorize(runs, zone)
    cluster, local, anywhere = one_by_one(endpoints_of(runs), zone)

    assert places(endpoints_of(reachable.cluster)) == places(cluster)
    assert places(endpoints_of(reachable.local)) == places(local)
    assert reachable.anywhere is anywhere


@given(runs, st.sampled_from(ZONES), st.randoms(use_true_random=False))
def test_the_order_of_slices_does_not_matter(runs, zone, random):
    shuffled = list(runs)
    random.shuffle(shuffled)
    one, other = categorize(runs, zone), categorize(shuffled, zone)

    assert places(endpoints_of(one.cluster)) == places(endpoints_of(other.cluster))
    assert places(endpoints_of(one.local)) == places(endpoints_of(other.local))
