"""Plans: what is written, in which order, and what is left alone. Every plan is applied under the invariant's eye."""

from __future__ import annotations

import pytest

from agent.core.abi import BASE_DROP, BASE_REJECT, FIRST_FREE_SLOT, FRONTEND, Frontend, pack_header
from agent.core.plan import KernelState
from tests.builders import frontend, key, pods, slots, want
from tests.property.fake_maps import REFUSED, Answer, FakeMaps
from tests.unit.planned_node import API, F80, F81, NEW, OLD, WEB, A, B, C, D, E, Node, shown, written

# before, after, (backends, headers, frontends, removed) written, whether the segment stays
EDITS = [
    pytest.param([A, B], [A, B], (0, 0, 0, 0), True, id="nothing-changed"),
    pytest.param([A, B], [B, A], (0, 0, 0, 0), True, id="only-the-order"),
    pytest.param([A, B, C, D], [A, B, C, D, E], (1, 1, 0, 0), True, id="one-more-where-there-is-room"),
    pytest.param([A, B, C], [A, B, C, D], (4, 1, 1, 0), False, id="one-more-than-fits"),
    pytest.param([A, B, C], [A, B], (0, 1, 0, 0), True, id="the-last-goes"),
    pytest.param([A, B, C], [B, C], (1, 1, 0, 0), True, id="the-first-goes-the-last-fills-its-hole"),
    pytest.param([A, B, C], [A, D, C], (1, 0, 0, 0), True, id="one-takes-the-place-of-another"),
    pytest.param([A, B, C], [D], (1, 1, 0, 0), True, id="three-to-another-one"),
    pytest.param([A, B, C], [C, D], (2, 1, 0, 0), True, id="holes-are-filled-by-new-and-by-last"),
    pytest.param([A, B, C], [], (0, 1, 0, 0), True, id="all-go"),
    pytest.param([], [A], (1, 1, 1, 0), False, id="the-first-comes"),
    pytest.param([], [], (0, 0, 0, 0), True, id="stays-empty"),
    pytest.param(pods(7), pods(6), (0, 1, 0, 0), True, id="seven-to-six"),
    pytest.param(pods(7), pods(1), (1, 1, 1, 0), False, id="seven-to-one-moves-to-a-smaller-segment"),
    pytest.param(pods(15), pods(11), (0, 1, 0, 0), True, id="four-less-but-none-to-spare-in-a-smaller-one"),
    pytest.param(pods(15), pods(10), (10, 1, 1, 0), False, id="five-less-moves-to-a-smaller-segment"),
    pytest.param(pods(7), pods(7, start=20), (7, 0, 0, 0), True, id="all-replaced"),
]


@pytest.mark.parametrize(("before", "after", "writes", "stays"), EDITS)
def test_only_what_differs_is_written(before, after, writes, stays):
    node = Node()
    node.set((WEB, [want(before)]))
    base, ident = node.base(), node.ident()

    plan = node.set((WEB, [want(after)]))

    assert node.backends() == (shown(*after) or "REFUSED")
    assert written(plan) == writes
    assert (node.base() == base) is stays
    assert node.ident() == ident
    assert not node.plan((WEB, [want(after)])), "planning again must find nothing to do"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(want([A]), want([]), id="forward-reject"),
        pytest.param(want([A]), want([], silent=True), id="forward-drop"),
        pytest.param(want([]), want([], silent=True), id="reject-drop"),
        pytest.param(want([], silent=True), want([]), id="drop-reject"),
        pytest.param(want([], silent=True), want([A]), id="drop-forward"),
        pytest.param(want([]), want([A]), id="reject-forward"),
    ],
)
@pytest.mark.parametrize("had_backends", [False, True], ids=["never-had-any", "had-backends-once"])
def test_empty_says_why(before, after, had_backends):
    node = Node()
    if had_backends:
        node.set((WEB, [want([A, B])]))
    node.set((WEB, [before]))
    node.set((WEB, [after]))

    assert node.backends() == (shown(*after.cluster.slots) or ("SILENT" if after.cluster.is_silent else "REFUSED"))
    assert not node.plan((WEB, [after]))


def test_services_without_backends_share_their_segments():
    node = Node()
    node.set((WEB, [want([])]), (API, [want([], silent=True, at=F81)]))

    assert (node.base(F80), node.base(F81)) == (BASE_REJECT, BASE_DROP)
    assert node.planner.allocator.used == FIRST_FREE_SLOT


def test_a_service_that_goes_leaves_nothing():
    node = Node()
    node.set((WEB, [want([A]), want([B], at=F81, name="admin")]))
    plan = node.set((WEB, []))

    assert node.maps.frontends == {}
    assert len(plan.freed) == 2
    node.rest()
    assert node.planner.allocator.used == FIRST_FREE_SLOT
    assert node.planner.placements == {}
    assert not node.plan((WEB, []))


def test_one_port_of_a_service_goes():
    node = Node()
    node.set((WEB, [want([A]), want([B], at=F81, name="admin")]))
    plan = node.set((WEB, [want([A])]))

    assert written(plan) == (0, 0, 0, 1)
    assert (node.backends(F80), node.backends(F81)) == (shown(A), "PASS")


def test_a_port_changes_its_number():
    node = Node()
    node.set((WEB, [want([A], at=F80)]))
    ident, base = node.ident(), node.base()
    plan = node.set((WEB, [want([A], at=F81)]))

    assert written(plan) == (0, 0, 1, 1)
    assert (node.backends(F80), node.backends(F81)) == ("PASS", shown(A))
    assert (node.ident(F81), node.base(F81)) == (ident, base)


def test_a_port_changes_its_name():
    node = Node()
    node.set((WEB, [want([A], name="http")]))
    plan = node.set((WEB, [want([A], name="web")]))

    assert written(plan)[3] == 0, "its frontend is never away"
    assert node.backends() == shown(A)


@pytest.mark.parametrize("names", [("x", "y"), ("y", "x")], ids=["in-order", "against-order"])
def test_two_ports_change_places(names):
    first, second = names
    node = Node()
    node.set((WEB, [want([A], name=first, at=F80), want([B], name=second, at=F81)]))
    node.set((WEB, [want([A], name=first, at=F81), want([B], name=second, at=F80)]))
    while node.planner.to_replan:
        node.planner.to_replan.clear()
        node.set((WEB, [want([A], name=first, at=F81), want([B], name=second, at=F80)]))

    assert (node.backends(F81), node.backends(F80)) == (shown(A), shown(B))
    assert node.degraded() == []


def test_a_freed_segment_is_not_written_before_it_has_rested():
    node = Node(segment_slots=16)
    node.set((WEB, [want(pods(7))]))
    old = node.base()
    node.set((WEB, []))
    node.set((API, [want(pods(7))]))

    assert node.degraded() == [API]
    node.rest()
    node.set((API, [want(pods(7))]))
    assert (node.base(), node.degraded()) == (old, [])


def test_ids_are_not_used_again():
    node = Node()
    node.set((WEB, [want([A])]))
    first = node.ident()
    node.set((WEB, []))
    node.set((WEB, [want([A])]))

    assert node.ident() > first


# Conflicts: two Services claim one frontend.

CLAIM_A, CLAIM_B = [want([A])], [want([B])]


@pytest.mark.parametrize(
    ("claims", "winner"),
    [
        pytest.param([(WEB, CLAIM_A, OLD), (API, CLAIM_B, NEW)], A, id="older-first"),
        pytest.param([(API, CLAIM_B, NEW), (WEB, CLAIM_A, OLD)], A, id="older-last"),
        pytest.param([(WEB, CLAIM_A, OLD), (API, CLAIM_B, OLD)], B, id="same-age-by-name"),
        pytest.param([(API, CLAIM_B, OLD), (WEB, CLAIM_A, OLD)], B, id="same-age-by-name-other-way-round"),
    ],
)
def test_the_older_service_wins(claims, winner):
    node = Node()
    for claim in claims:
        node.set(claim)

    assert node.backends() == shown(winner)
    assert node.degraded() == [WEB if winner == B else API]
    assert not node.plan(*claims)


def test_in_one_plan_the_older_service_wins_whatever_the_order():
    for claims in ([(WEB, CLAIM_A, OLD), (API, CLAIM_B, NEW)], [(API, CLAIM_B, NEW), (WEB, CLAIM_A, OLD)]):
        node = Node()
        node.set(*claims)

        assert node.backends() == shown(A)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param((WEB, []), id="goes"),
        pytest.param((WEB, [want([A], at=F81)], OLD), id="lets-go"),
        pytest.param((WEB, CLAIM_A, "2022-01-01T00:00:00Z"), id="is-created-anew"),
    ],
)
def test_the_loser_takes_over_when_the_winner(change):
    node = Node()
    node.set((WEB, CLAIM_A, OLD), (API, CLAIM_B, NEW))
    node.set(change)
    assert node.planner.to_replan == {key(API)}
    node.set((API, CLAIM_B, NEW))

    assert node.backends() == shown(B)
    assert API not in node.degraded()


def test_a_winner_that_goes_and_its_loser_that_changes_in_one_plan():
    for order in (1, -1):
        node = Node()
        node.set((WEB, CLAIM_A, OLD), (API, CLAIM_B, NEW))
        node.set(*[(WEB, []), (API, [want([C])], NEW)][::order])
        if order == -1:
            assert node.planner.to_replan == {key(API)}, "it was planned too early"
            node.set((API, [want([C])], NEW))

        assert node.backends() == shown(C)
        assert node.degraded() == []


def test_a_loser_follows_its_backends_while_it_waits():
    node = Node()
    node.set((API, CLAIM_B, NEW))
    node.set((WEB, CLAIM_A, OLD))
    node.set((API, [want([C, D])], NEW))
    assert node.backends() == shown(A)

    node.set((WEB, []))
    node.set((API, [want([C, D])], NEW))

    assert node.backends() == shown(C, D)


def test_a_loser_that_goes_takes_nothing_with_it():
    node = Node()
    node.set((API, CLAIM_B, NEW), (WEB, CLAIM_A, OLD))
    node.set((API, []))

    assert node.backends() == shown(A)
    assert node.degraded() == []


# Capacity.


def test_a_service_that_does_not_fit_is_degraded_and_the_others_stay():
    node = Node(segment_slots=16)
    node.set((WEB, [want([A])]))
    plan = node.set((API, [want(pods(12), at=F81)]))

    assert not plan
    assert node.degraded() == [API]
    assert "segments" in node.planner.degraded[key(API), want([A]).port]
    assert (node.backends(F80), node.backends(F81)) == (shown(A), "PASS")


def test_a_service_that_outgrows_the_map_keeps_what_lives_and_takes_in_what_fits():
    node = Node(segment_slots=8)
    node.set((WEB, [want([A, B, C])]))
    node.set((WEB, [want([B, C, D, *pods(4, start=50)])]))

    held = node.maps.answer(F80).backends
    assert node.degraded() == [WEB]
    assert {B, C} <= held
    assert A not in held, "a backend that is gone must not be reached"
    assert len(held) == 3


def test_a_degraded_service_recovers_when_there_is_room():
    node = Node(segment_slots=16)
    node.set((WEB, [want(pods(3))]), (API, [want(pods(7), at=F81)]))
    node.set((WEB, [want(pods(7))]))
    assert node.degraded() == [WEB]

    node.set((API, []))
    node.rest()
    node.set((WEB, [want(pods(7))]))

    assert node.degraded() == []
    assert node.backends() == shown(*pods(7))


def test_shrinking_without_room_to_move_stays():
    node = Node(segment_slots=12)
    node.set((WEB, [want(pods(7))]), (API, [want([D], at=F81)]))
    base = node.base()
    node.set((WEB, [want([C])]))

    assert (node.base(), node.backends(), node.degraded()) == (base, shown(C), [])


def test_frontends_that_do_not_fit():
    node = Node(frontend_limit=1)
    node.set((WEB, [want([A])]))
    plan = node.set((API, [want([B], at=F81)]))

    assert not plan
    assert node.degraded() == [API]
    assert "frontends" in node.planner.degraded[key(API), want([B]).port]
    assert node.backends() == shown(A)


def test_backends_change_while_a_new_frontend_does_not_fit():
    node = Node(frontend_limit=1)
    node.set((WEB, [want([A, B], at=[F80])]))
    node.set((WEB, [want([B, C], at=[F80, F81])]))

    assert node.degraded() == [WEB]
    assert node.backends() == shown(B, C)
    assert node.backends(F81) == "PASS"


def test_a_frontend_that_goes_makes_room_for_the_next_plan():
    """Frontends are written before others are removed, so both are in the map for a moment."""
    for order in (1, -1):
        node = Node(frontend_limit=1)
        node.set((WEB, [want([A])]))
        node.set(*[(WEB, []), (API, [want([B], at=F81)])][::order])
        assert node.degraded() == [API]
        node.set((API, [want([B], at=F81)]))

        assert (node.backends(F80), node.backends(F81), node.degraded()) == ("PASS", shown(B), [])


def test_a_port_changes_its_number_in_a_full_map():
    node = Node(frontend_limit=1)
    node.set((WEB, [want([A], at=F80)]))
    for _ in range(2):
        node.set((WEB, [want([A], at=F81)]))

    assert (node.backends(F80), node.backends(F81), node.degraded()) == ("PASS", shown(A), [])


# Restart: a new planner adopts what is in the maps.

WEB_PORTS = [want([A, B, C]), want([], at=F81, name="admin")]


def busy_node() -> Node:
    node = Node()
    node.set((API, [want(pods(5, start=30), at=frontend("10.0.0.2"))]), (WEB, WEB_PORTS))
    node.set((API, [want(pods(3, start=31), at=frontend("10.0.0.2"))]))
    return node


def test_a_restart_writes_nothing_when_nothing_changed():
    node = busy_node()
    state = node.maps.read_state()
    node.restart()
    plan = node.set((WEB, WEB_PORTS), (API, [want(pods(3, start=31), at=frontend("10.0.0.2"))]), leftovers=True)

    assert not plan
    assert node.maps.read_state() == state
    assert node.planner.differences(state) == 0
    assert node.planner.frontend_count == 3


def test_a_restart_writes_only_the_difference():
    node = busy_node()
    bases = [node.base(F80), node.base(F81), node.base(frontend("10.0.0.2"))]
    node.restart()
    plan = node.set(
        (WEB, [want([A, C]), want([], at=F81, name="admin")]),
        (API, [want(pods(3, start=31), at=frontend("10.0.0.2"))]),
        leftovers=True,
    )

    assert written(plan) == (1, 1, 0, 0)
    assert [node.base(F80), node.base(F81), node.base(frontend("10.0.0.2"))] == bases


def test_a_port_of_several_frontends_is_adopted_whole():
    node = Node()
    node.set((WEB, [want([A], at=[F80, F81])]))
    node.restart()

    assert not node.plan((WEB, [want([A], at=[F80, F81])]), leftovers=True)


def test_a_restart_keeps_ids_and_gives_new_ones_behind_them():
    node = busy_node()
    idents = {at: node.ident(at) for at in node.maps.frontends}
    node.restart()
    node.set((API, [want(pods(3, start=31), at=frontend("10.0.0.2"))]))
    node.set((WEB, WEB_PORTS))
    node.set(("new", [want([D], at=frontend("10.0.0.3"))]))

    assert {at: node.ident(at) for at in idents} == idents
    assert node.ident(frontend("10.0.0.3")) > max(idents.values())


def test_what_no_service_claims_is_removed_after_a_restart():
    node = busy_node()
    node.restart()
    plan = node.set((WEB, WEB_PORTS), leftovers=True)

    assert written(plan) == (0, 0, 0, 1)
    assert len(plan.freed) == 1
    assert node.backends(frontend("10.0.0.2")) == "PASS"
    assert node.planner.frontend_count == 2


def test_leftovers_count_until_they_are_removed():
    node = Node(frontend_limit=1)
    node.set((WEB, [want([A])]))
    node.restart()
    node.set((API, [want([B], at=F81)]), leftovers=True)
    assert node.degraded() == [API]
    node.set((API, [want([B], at=F81)]))

    assert (node.backends(F80), node.backends(F81), node.degraded()) == ("PASS", shown(B), [])


def test_an_adopted_segment_is_not_given_away():
    node = busy_node()
    node.restart()
    node.set(*[(f"s{i}", [want([D], at=frontend(f"10.0.1.{i}"))]) for i in range(5)])

    assert (node.backends(F80), node.backends(frontend("10.0.0.2"))) == (shown(A, B, C), shown(*pods(3, start=31)))


def header(count: int) -> bytes:
    return pack_header(count, drop=False)


# What the maps may hold that no agent wrote: each must heal in one plan.
CORRUPTED = [
    pytest.param({F80: Frontend(7, 60, 60)}, {60: header(200)}, id="count-reaches-over-the-end"),
    pytest.param({F80: Frontend(7, 9999, 9999)}, {}, id="base-out-of-range"),
    pytest.param({F80: Frontend(7, 9, 9)}, {9: header(2), 10: A, 11: B}, id="base-misaligned"),
    pytest.param({F80: Frontend(0, 8, 8)}, {8: header(1), 9: A}, id="no-id"),
    pytest.param({F80: Frontend(7, 8, 16)}, {8: header(1), 9: A}, id="outside-elsewhere"),
    pytest.param({F80: Frontend(7, 8, 8, 10)}, {8: header(1), 9: A}, id="affinity-nobody-asked-for"),
    pytest.param({F80: Frontend(7, 8, 8)}, {8: header(3), 9: A, 10: A, 11: B}, id="a-backend-twice"),
    pytest.param({F80: Frontend(7, 8, 8)}, {8: header(3), 9: C, 10: B, 11: C}, id="a-removal-cut-short"),
    pytest.param({F80: Frontend(7, 8, 8)}, {8: header(2), 9: A}, id="a-zeroed-slot"),
    pytest.param({F80: Frontend(7, 1, 1)}, {}, id="silent"),
    pytest.param(
        {F80: Frontend(7, 8, 8), F81: Frontend(7, 8, 8)}, {8: header(1), 9: A}, id="two-ports-share-id-and-segment"
    ),
    pytest.param(
        {F80: Frontend(7, 8, 8), F81: Frontend(8, 10, 10)},
        {8: header(3), 9: A, 10: header(1), 11: B},
        id="segments-overlap",
    ),
]


@pytest.mark.parametrize(("frontends", "segments"), CORRUPTED)
@pytest.mark.parametrize("wanted", [[A, B], [B, C, D], []], ids=["two", "three", "none"])
def test_corrupted_maps_heal(frontends, segments, wanted):
    node = Node()
    node.maps.frontends = {at: value.pack() for at, value in frontends.items()}
    for index, slot in segments.items():
        node.maps.segments[index] = slot
    node.restart()

    plan = node.plan((WEB, [want(wanted), want([D], at=F81, name="admin")]), leftovers=True)
    node.maps.apply(plan)

    assert (node.backends(F80), node.backends(F81)) == (shown(*wanted) or "REFUSED", shown(D))
    assert len({node.ident(F80), node.ident(F81), 0}) == 3
    assert node.planner.differences(node.maps.read_state()) == 0


# Drift.


@pytest.mark.parametrize(
    "meddle",
    [
        pytest.param(lambda maps: maps.frontends.pop(F80), id="frontend-removed"),
        pytest.param(lambda maps: maps.frontends.update({F80: Frontend(99, 0, 0).pack()}), id="frontend-changed"),
        pytest.param(lambda maps: maps.frontends.update({frontend(port=9): bytes(FRONTEND.size)}), id="frontend-added"),
        pytest.param(lambda maps: maps.segments.__setitem__(_base(maps) + 1, D), id="backend-changed"),
        pytest.param(lambda maps: maps.segments.__setitem__(_base(maps), header(1)), id="header-changed"),
    ],
)
def test_drift_is_counted_and_heals(meddle):
    node = busy_node()
    assert node.planner.differences(node.maps.read_state()) == 0
    meddle(node.maps)
    assert node.planner.differences(node.maps.read_state()) > 0

    node.restart()
    node.maps.apply(
        node.plan((WEB, WEB_PORTS), (API, [want(pods(3, start=31), at=frontend("10.0.0.2"))]), leftovers=True)
    )

    assert {at: node.maps.answer(at) for at in node.maps.frontends} == {
        F80: Answer(frozenset([A, B, C])),
        F81: REFUSED,
        frontend("10.0.0.2"): Answer(frozenset(pods(3, start=31))),
    }
    assert node.planner.differences(node.maps.read_state()) == 0


def _base(maps: FakeMaps) -> int:
    return Frontend.unpack(maps.frontends[F80]).inside


def test_an_empty_state_is_not_drift():
    assert Node().planner.differences(KernelState({}, {})) == 0


def test_backends_of_both_families_are_told_apart():
    node = Node()
    v6 = frontend("fd00::1")
    node.set((WEB, [want([A]), want(slots("fd01::1"), at=v6)]))

    assert (node.backends(F80), node.backends(v6)) == (shown(A), "[fd01::1]:8080")
