"""The model is what the last of each object says, whatever was said in between and in whatever order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.core.events import Delete, Event, ListEnded, ListStarted, Upsert
from agent.core.model import Model
from agent.core.records import Kind, ServiceRecord, SliceRecord
from agent.core.services import Backends
from tests.property.strategies import NODE_NAME, batches

Objects = dict[tuple[Kind, object], ServiceRecord | SliceRecord]


def final_objects(events: list[Event]) -> Objects:
    """Play events the simple way: a dictionary, and for each list what it mentioned."""
    objects: Objects = {}
    mentioned: dict[Kind, set[object]] = {}
    for event in events:
        match event:
            case Upsert(ServiceRecord() | SliceRecord() as record):
                kind = Kind.SERVICE if isinstance(record, ServiceRecord) else Kind.ENDPOINT_SLICE
                objects[kind, record.key] = record
                mentioned.get(kind, set()).add(record.key)
            case Delete(kind, key):
                objects.pop((kind, key), None)
            case ListStarted(kind):
                mentioned[kind] = set()
            case ListEnded(kind):
                seen = mentioned.pop(kind)
                for place in [place for place in objects if place[0] is kind and place[1] not in seen]:
                    del objects[place]
            case _:
                if hasattr(event, "reason"):
                    mentioned.get(event.kind, set()).add(event.key)
    return objects


@given(st.lists(batches, max_size=10).map(lambda lists: [event for events in lists for event in events]))
def test_the_model_holds_the_latest_of_each_object(events):
    model = Model(NODE_NAME)
    for event in events:
        model.apply(event)
    objects = final_objects(events)

    assert model.services == {key: record for (kind, key), record in objects.items() if kind is Kind.SERVICE}
    held = {piece.key: piece for pieces in model.slices.values() for piece in pieces}
    assert held == {key: record for (kind, key), record in objects.items() if kind is Kind.ENDPOINT_SLICE}
    assert sum(map(len, model.slices.values())) == len(held), "a slice is held twice"
    for service, pieces in model.slices.items():
        assert pieces
        assert {piece.service for piece in pieces} == {service}


def desired(model: Model) -> dict[object, list[object]]:
    """What every Service resolves to; the order of backends means nothing."""
    return {
        key: [
            want._replace(cluster=_unordered(want.cluster), local=_unordered(want.local)) for want in model.desired(key)
        ]
        for key in model.services
    }


def _unordered(backends: Backends | None) -> Backends | None:
    return backends and Backends(tuple(sorted(backends.slots)), backends.is_silent)


@given(st.lists(batches, min_size=1, max_size=8))
def test_a_service_that_is_not_dirty_resolves_as_before(histories):
    model = Model(NODE_NAME)
    before = desired(model)
    for events in histories:
        model.dirty.clear()
        for event in events:
            model.apply(event)
        after = desired(model)
        for key in before.keys() | after.keys():
            if key not in model.dirty:
                assert before.get(key) == after.get(key)
        before = after


@given(st.lists(batches, min_size=1, max_size=8))
def test_health_checks_are_as_if_counted_anew(histories):
    model = Model(NODE_NAME)
    for events in histories:
        for event in events:
            model.apply(event)
        anew = Model(NODE_NAME)
        for record in (*model.services.values(), *(piece for pieces in model.slices.values() for piece in pieces)):
            anew.apply(Upsert(record))

        assert model.health_checks() == anew.health_checks()


@given(
    st.lists(batches, max_size=6).flatmap(lambda lists: st.tuples(st.just(lists), st.randoms(use_true_random=False)))
)
def test_events_of_different_objects_may_come_in_any_order(drawn):
    lists, random = drawn
    events = [event for events in lists for event in events if isinstance(event, Upsert)]
    last = {(type(event.record), getattr(event.record, "key", event.record)): event for event in events}
    one, other = Model(NODE_NAME), Model(NODE_NAME)
    finals = [event for event in last.values() if hasattr(event.record, "key")]
    for event in finals:
        one.apply(event)
    random.shuffle(finals)
    for event in [*finals, *finals]:
        other.apply(event)

    assert desired(one) == desired(other)
