"""The maps in memory that the property tests use do what the kernel's do."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.core.abi import FRONTEND
from agent.core.plan import Plan
from agent.errors import DataplaneError
from agent.kernel.maps import MapStore
from tests.bpf.conftest import SIZES
from tests.property.fake_maps import FakeMaps
from tests.property.simulation import SimulatedAgent, simulated_time
from tests.property.strategies import batches


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    with simulated_time():
        yield


def empty(store: MapStore) -> None:
    for name in ("frontends", "source_ranges"):
        for key in [key for key, _ in store.maps[name].items()]:
            store.maps[name].delete(key)
    store.maps["segments"].update_batch(
        b"".join(i.to_bytes(4, sys.byteorder) for i in range(2, SIZES.segments)),
        bytes(24 * (SIZES.segments - 2)),
        SIZES.segments - 2,
    )
    store.writes.clear()


def same(fake: FakeMaps, store: MapStore) -> None:
    assert dict(store.maps["frontends"].items()) == fake.frontends
    assert dict(store.maps["source_ranges"].items()) == fake.source_ranges
    assert [value for _, value in store.maps["segments"].items()] == fake.segments
    assert store.read_state() == fake.read_state()
    assert store.writes == fake.writes


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(batches, max_size=6))
def test_the_same_plans_end_in_the_same_maps(store, histories):
    empty(store)
    node = SimulatedAgent(SIZES.segments, SIZES.frontends - 1)
    plans: list[Plan] = []
    apply = node.maps.apply
    node.maps.apply = lambda plan: (plans.append(plan), apply(plan))  # type: ignore[method-assign,assignment]
    for events in histories:
        node.take(events)
        for plan in plans:
            store.apply(plan)
        plans.clear()
        same(node.maps, store)


def test_both_refuse_one_frontend_too_many(store):
    capacity = store.maps["frontends"].info.max_entries
    for maps in (store, FakeMaps(SIZES.segments, capacity)):
        maps.apply(Plan(frontends={i.to_bytes(20, "big"): bytes(FRONTEND.size) for i in range(capacity)}))
        with pytest.raises(DataplaneError):
            maps.apply(Plan(frontends={b"x" * 20: bytes(FRONTEND.size)}))
        maps.apply(Plan(frontends={bytes(20): b"\1" * FRONTEND.size}))


def test_both_refuse_a_slot_over_the_end(store):
    for maps in (store, FakeMaps(SIZES.segments, SIZES.frontends)):
        with pytest.raises(DataplaneError):
            maps.apply(Plan(backends=[(SIZES.segments, bytes(24))]))
