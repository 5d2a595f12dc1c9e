"""Whatever happens, in whatever order: clients are never led astray, and the maps end as the objects say."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.events import Delete, Event
from agent.core.model import Model
from agent.core.records import Kind, ObjectKey
from agent.core.services import DesiredPort
from tests.property.simulation import Crash, SimulatedAgent, expected_answers, simulated_time
from tests.property.strategies import batches


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[None]:
    with simulated_time():
        yield


def play(node: SimulatedAgent, histories: list[list[Event]]) -> None:
    for events in histories:
        node.take(events)


def wants(model: Model) -> list[DesiredPort]:
    """All that is desired."""
    return [want for key in model.services for want in model.desired(key)]


def check_settled(node: SimulatedAgent) -> None:
    """The maps are as the objects say; planning again, and a restart, write nothing."""
    node.settle()
    assert node.maps.answers() == expected_answers(node.model)
    placed, writes = node.placed, node.writes
    node.replan_all()
    assert node.writes == writes, "a plan of what is already there is not empty"
    assert node.reconciler.planner.differences(node.maps.read_state()) == 0
    lacks = Tally((policy, want.port.family) for want in wants(node.model) for policy in want.lacks_local)
    assert node.reconciler.planner.no_local_endpoints == lacks
    node.restart()
    assert (node.placed, node.writes) == (placed, writes), "a restart wrote though nothing had changed"


@given(st.lists(batches, max_size=8))
def test_any_sequence_of_events_ends_in_the_maps_of_the_final_objects(histories):
    node = SimulatedAgent()
    play(node, histories)

    check_settled(node)


@given(st.lists(batches, min_size=1, max_size=6), st.data())
def test_a_restart_at_any_point_changes_nothing_of_what_is_unchanged(histories, data):
    node = SimulatedAgent()
    at = data.draw(st.integers(0, len(histories)))
    play(node, histories[:at])
    answers, placed = node.maps.answers(), node.placed

    node.restart()
    assert (node.maps.answers(), node.placed) == (answers, placed)
    play(node, histories[at:])

    check_settled(node)


@given(st.lists(batches, min_size=1, max_size=6), batches)
def test_an_agent_that_starts_over_other_objects_keeps_what_is_unchanged(histories, missed):
    node = SimulatedAgent()
    play(node, histories)
    node.settle()
    before, placed = node.maps.answers(), node.placed

    for event in missed:  # while no agent ran
        node.model.apply(event)
    node.restart()

    after = expected_answers(node.model)
    assert node.maps.answers() == after
    for frontend in before.keys() & after.keys():
        if before[frontend] == after[frontend] and before[frontend].inside.backends:
            assert node.placed[frontend] == placed[frontend]
    check_settled(node)


FAILURES = st.lists(
    st.tuples(batches, st.none() | st.tuples(st.integers(0, 12), st.booleans())), min_size=1, max_size=6
)


@given(FAILURES)
def test_a_plan_that_is_cut_short_anywhere_is_made_good(histories):
    """Cut short by a write that the kernel refuses (the agent recovers), or by the agent's death."""
    node = SimulatedAgent()
    for events, failure in histories:
        if failure is not None:
            node.maps.fail_after, dies = failure
            node.maps.error = Crash() if dies else None
        try:
            node.take(events)
        except Crash:
            node.restart()
        node.maps.fail_after = None

    # What an unreadable Service had in the maps stays, until it is known to be gone.
    node.take([Delete(kind, key) for kind, key in node.model.malformed if (kind, key) not in known(node.model)])
    check_settled(node)


def known(model: Model) -> set[tuple[Kind, ObjectKey]]:
    """Objects that could be read at least once."""
    slices = (piece.key for pieces in model.slices.values() for piece in pieces)
    return {(Kind.SERVICE, key) for key in model.services} | {(Kind.ENDPOINT_SLICE, key) for key in slices}


@given(
    st.lists(batches, min_size=1, max_size=8),
    st.sampled_from([8, 16, 32, 2048]),
    st.sampled_from([1, 2, 4, 16, 512]),
    st.sampled_from([0, 1, 2, 128]),
)
def test_maps_that_are_full_cost_only_what_does_not_fit(histories, segment_slots, frontend_limit, source_range_limit):
    node = SimulatedAgent(segment_slots, frontend_limit, source_range_limit)
    for events in histories:
        node.take(events)
        check_degraded(node)
    node.settle()

    check_degraded(node)
    placed, writes = node.placed, node.writes
    node.replan_all()
    assert (node.placed, node.writes) == (placed, writes)


def check_degraded(node: SimulatedAgent) -> None:
    """Nothing leads to a backend that is gone; what is not as desired is of a Service that says so."""
    assert len(node.maps.frontends) <= node.sizes.frontends
    planner, expected = node.reconciler.planner, expected_answers(node.model)
    degraded = {service for service, _ in planner.degraded}
    for key in node.model.services:
        for want in node.model.desired(key):
            for frontend in want.frontends:
                answer = node.maps.answers().get(frontend)
                if key not in degraded and not any(
                    frontend in other.frontends and other.service in degraded
                    for ports in planner.placements.values()
                    for other in ports
                ):
                    assert answer == expected[frontend]
    for frontend, answer in node.maps.answers().items():
        assert frontend in expected, "a frontend nobody wants"
        assert answer.inside.backends <= expected[frontend].inside.backends or degraded
        assert answer.outside.backends <= expected[frontend].outside.backends or degraded


@given(st.lists(batches, min_size=1, max_size=8))
def test_recovery_when_there_is_room_again(histories):
    """In maps that were too small, everything fits once the Services that crowd them are gone."""
    node = SimulatedAgent(segment_slots=16, frontend_limit=4)
    play(node, histories)
    for key in sorted(node.model.services)[1:]:
        del node.model.services[key]
        node.model.dirty.add(key)
    node.settle()
    node.settle()
    answers = expected_answers(node.model)
    segments = [backends for want in wants(node.model) for backends in (want.cluster, want.local) if backends]
    needed = sum(1 << len(backends.slots).bit_length() for backends in segments if backends.slots)

    if needed <= 8 and len(answers) <= 4:
        assert node.maps.answers() == answers
        assert not [reason for reason in node.reconciler.planner.degraded.values() if "full" in reason]
