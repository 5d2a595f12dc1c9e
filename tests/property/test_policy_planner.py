"""Whatever happens in whatever order, the maps judge as the text of the API says, and no write in between differs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.abi import POLICY_ENTRY, SUBJECT, SubjectFlag
from agent.core.events import Delete, Upsert
from agent.core.policy_planner import Numbers, PolicySizes, PolicyState
from agent.core.policy_records import NamespaceRecord, PolicyRecord
from agent.core.records import Kind, ObjectKey
from tests.policy_builders import PolicyNode
from tests.policy_reference import End, PolicyMaps, Reference
from tests.property.policy_strategies import ADDRESSES, QUESTIONS, SAMPLED, events, populations

Change = Upsert | Delete
histories = st.builds(lambda first, then: [*first, *then], populations | st.just([]), st.lists(events, max_size=15))
FEW = [(6, 0), (6, 80), (6, 1024), (6, 8080), (17, 80), (132, 80), (1, 0)]
Objects = dict[tuple[Kind, ObjectKey], PolicyRecord]


def after(objects: Objects, change: Change) -> Objects:
    """The objects there are after a change."""
    objects = dict(objects)
    if isinstance(change, Upsert):
        objects[change.record.kind, change.record.key] = change.record
    else:
        objects.pop((change.kind, change.key), None)
    return objects


def of(changes: Sequence[Change]) -> Objects:
    objects: Objects = {}
    for change in changes:
        objects = after(objects, change)
    return objects


def answers(maps: PolicyMaps, ports: Sequence[tuple[int, int]] = SAMPLED) -> Iterator[bool]:
    for subject, peer, direction in QUESTIONS:
        for protocol, port in ports:
            yield maps.verdict(subject, peer, direction, protocol, port)


def promised(reference: Reference, ports: Sequence[tuple[int, int]] = SAMPLED) -> list[bool]:
    ends = {address: reference.end(address) for address in ADDRESSES}
    return [
        not is_enforced(ends[subject]) or reference.verdict(ends[subject], ends[peer], direction, protocol, port)
        for subject, peer, direction in QUESTIONS
        for protocol, port in ports
    ]


def is_enforced(end: End) -> bool:
    return end.pod is not None and end.pod.is_local


def check(node: PolicyNode, objects: Objects) -> None:
    found, expected = list(answers(node.maps)), promised(Reference(objects.values()))
    questions = [(*question, *port) for question in QUESTIONS for port in SAMPLED]

    wrong = [question for question, is_, should in zip(questions, found, expected, strict=True) if is_ != should]
    assert wrong == []
    assert node.planner.differences(node.maps.state) == 0


@given(histories, st.lists(st.booleans(), min_size=60, max_size=60))
def test_any_order_of_events_ends_in_the_verdicts_of_the_reference(changes, settles):
    node = PolicyNode()

    for change, settle in zip(changes, settles, strict=False):
        node.model.apply(change)
        if settle:
            node.settle()
    node.settle()

    check(node, of(changes))


@given(histories, st.randoms(use_true_random=False))
def test_duplicates_and_another_order_change_nothing(changes, random):
    objects = of(changes)
    twice = [*objects.values(), *objects.values()]
    random.shuffle(twice)
    node, other = PolicyNode(*objects.values()), PolicyNode()

    for record in twice:
        other.apply(record)

    check(other, objects)
    assert list(answers(other.maps)) == list(answers(node.maps))


Moment = tuple[bool, bool, bool, bool]


def moments(node: PolicyNode, objects: Objects, changes: Sequence[Change]) -> Iterator[Moment]:
    """Change them, and answer after every write: as it was before the change, between, is now, and is to be."""
    for change in changes:
        before, reference = list(answers(node.maps, FEW)), Reference(objects.values())
        objects = after(objects, change)
        follows = promised(Reference(objects.values()), FEW)
        meanwhile = half_moved(reference, Reference(objects.values())) if moves_many(change) else before
        node.model.apply(change)
        for plan in node.plans():
            for _ in node.maps.writes(plan):
                yield from zip(before, meanwhile, answers(node.maps, FEW), follows, strict=True)


@settings(max_examples=settings.default.max_examples // 4)
@given(histories, st.lists(events, min_size=1, max_size=4))
def test_every_write_leaves_the_old_verdict_or_the_new_one(past, changes):
    objects = of(past)
    node = PolicyNode(*objects.values())

    for was, between, now, will in moments(node, objects, changes):
        assert now in {was, between, will}

    check(node, functools.reduce(after, changes, objects))


def moves_many(change: Change) -> bool:
    """Whether both ends of a pair may come to be called otherwise at once; one does before the other then."""
    return isinstance(change, Delete) or isinstance(change.record, NamespaceRecord) or change.record.kind is Kind.POD


def half_moved(old: Reference, new: Reference) -> list[bool]:
    """What holds between ends of which the peer is what it is now and the subject still what it was."""
    return [
        not is_enforced(old.end(subject)) or new.verdict(old.end(subject), new.end(peer), direction, protocol, port)
        for subject, peer, direction in QUESTIONS
        for protocol, port in FEW
    ]


@given(histories, events)
def test_what_changes_nothing_writes_nothing(changes, last):
    node = PolicyNode()
    node.apply(*changes, last)
    numbers = node.planner.numbers_version

    assert node.apply(last) == []
    assert node.planner.numbers_version == numbers


@given(histories, st.lists(events, max_size=3))
def test_a_restart_writes_nothing_and_keeps_every_number(changes, missed):
    node = PolicyNode()
    for change in changes:
        node.apply(change)
    numbers = node.planner.numbers

    assert node.restart() == []
    assert node.planner.numbers == numbers

    for change in missed:
        node.model.apply(change)
    node.restart()
    check(node, of([*changes, *missed]))


@given(histories, st.integers(0, 400), st.booleans())
def test_what_was_cut_short_is_completed(changes, count, keeps_numbers):
    node = PolicyNode()
    for change in changes[:-4]:
        node.apply(change)
    for change in changes[-4:]:
        node.model.apply(change)
    plan = node.planner.plan()
    for _, _ in zip(range(count), node.maps.writes(plan), strict=False):
        pass

    node.restart(None if keeps_numbers else Numbers())

    check(node, of(changes))


rooms = st.one_of(
    st.builds(PolicySizes, identities=st.integers(0, 5)),
    st.builds(PolicySizes, blocks=st.integers(0, 6)),
    st.builds(PolicySizes, policy=st.integers(0, 60)),
    st.builds(PolicySizes, subjects=st.integers(0, 5)),
    st.builds(PolicySizes, st.integers(0, 5), st.integers(0, 6), st.integers(0, 60), st.integers(0, 5)),
)
"""Mostly one map is small: where all are, every pod fails, and nothing else can be seen."""


@given(histories, rooms, st.booleans())
def test_what_does_not_fit_fails_as_it_was_set_and_the_rest_is_right(changes, sizes, fails_open):
    node = PolicyNode(sizes=sizes, fails_open=fails_open)
    for change in changes:
        node.model.apply(change)
        for plan in node.plans():
            for _ in node.maps.writes(plan):
                assert_within(node.maps.state, sizes)
    fits = PolicyNode()
    fits.apply(*changes)
    failing = failing_subjects(node.maps.state)
    unplaced = fits.maps.state.subjects.keys() - node.maps.state.subjects.keys()

    owners = {node.model.pods_by_address[it] for it in failing | unplaced}
    assert owners <= node.planner.degraded.keys()
    assert node.planner.lacks_subjects == any(SUBJECT.packer.unpack(fits.maps.state.subjects[it])[1] for it in unplaced)
    assert node.planner.degraded or len(fits.maps.state.policy) <= sizes.policy
    for subject, peer, direction in QUESTIONS:
        for protocol, port in SAMPLED:
            expected = fits.maps.verdict(subject, peer, direction, protocol, port)
            found = node.maps.verdict(subject, peer, direction, protocol, port)
            assert subject in unplaced or found == expected or (subject in failing and found is fails_open)


@settings(max_examples=settings.default.max_examples // 4)
@given(histories, st.lists(events, min_size=1, max_size=4), rooms)
def test_no_write_lets_pass_what_may_not_for_want_of_room(past, changes, sizes):
    objects = of(past)
    node = PolicyNode(*objects.values(), sizes=replace(sizes, subjects=len(ADDRESSES)))

    for was, between, now, will in moments(node, objects, changes):
        assert not now or was or between or will


@given(histories, rooms)
def test_with_room_again_everything_is_right(changes, sizes):
    node = PolicyNode(sizes=sizes)
    node.apply(*changes)
    everything = [Delete(kind, key) for kind, key in of(changes)]

    node.apply(*everything)
    assert node.planner.degraded == {}
    node.apply(*changes)
    node.sizes = PolicySizes()
    node.restart()

    check(node, of(changes))


def assert_within(state: PolicyState, sizes: PolicySizes) -> None:
    for name in ("policy", "blocks", "identities", "subjects"):
        assert len(getattr(state, name)) <= getattr(sizes, name)


def failing_subjects(state: PolicyState) -> set[bytes]:
    """Subjects that the programs are told to fail."""
    flags = {address: SUBJECT.packer.unpack(value)[1] for address, value in state.subjects.items()}
    return {address for address, it in flags.items() if it & (SubjectFlag.FAIL_OPEN | SubjectFlag.FAIL_CLOSED)}


@given(histories)
def test_every_verdict_names_a_rule_there_is(changes):
    node = PolicyNode()
    node.apply(*changes)
    objects = of(changes)

    for value in node.maps.state.policy.values():
        rule, _ = POLICY_ENTRY.packer.unpack(value)
        name = node.planner.rule_name(rule)
        assert rule == 0 or any(name.policy == key for _, key in objects)


def test_the_check_of_promises_can_fail():
    node = PolicyNode()
    state = copy.deepcopy(node.maps.state)
    state.identities[ADDRESSES[0]] = b"\1\0\0\0"
    node.maps = PolicyMaps(state)

    with pytest.raises(AssertionError):
        check(node, {})
    assert node.planner.differences(PolicyState()) == 0
