"""Maglev tables after any sequence of events: each segment that wants one has its own, for the backends it has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.abi import FIRST_FREE_SLOT, Frontend, FrontendFlag
from tests.property.simulation import SimulatedAgent, simulated_time
from tests.property.strategies import batches


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[None]:
    with simulated_time():
        yield


def check_tables(node: SimulatedAgent) -> None:
    """Check what headers name: as many tables as are wanted, or as there are."""
    maps = node.maps
    found = [Frontend.unpack(value) for value in maps.frontends.values()]
    wanting = {frontend.outside for frontend in found if frontend.flags & FrontendFlag.MAGLEV}
    owned = {base for frontend in found for base in (frontend.inside, frontend.outside) if base >= FIRST_FREE_SLOT}
    named = {base: maps.table_of(base) for base in owned if maps.table_of(base)}
    assert named.keys() <= wanting
    assert len(set(named.values())) == len(named), "two segments name one table"
    assert len(named) == min(len(wanting & owned), node.sizes.maglev_tables)
    assert node.reconciler.planner.tables.used == len(named)
    state = maps.read_state()
    for base, number in named.items():
        slots, _ = state.segments[base]
        assert maps.tables.get(number, b"") == slots or not slots


@given(st.lists(batches, max_size=8), st.sampled_from([0, 1, 16]), st.booleans())
def test_any_sequence_of_events_ends_in_tables_for_those_who_want_them(histories, tables, is_restarted):
    node = SimulatedAgent(tables=tables)
    for events in histories:
        node.take(events)
        if is_restarted:
            node.restart()
    node.settle()

    check_tables(node)


@given(st.lists(batches, min_size=1, max_size=6), st.integers(0, 30))
def test_a_plan_that_fails_half_way_is_made_up_for(histories, writes):
    node = SimulatedAgent(tables=2)
    for events in histories:
        node.maps.fail_after = writes
        node.take(events)
    node.maps.fail_after = None
    node.settle()

    check_tables(node)
