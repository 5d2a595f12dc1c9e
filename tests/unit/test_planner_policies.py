"""Plans of service ports with two segments, and of source ranges. Every plan is applied under the invariant's eye."""

from __future__ import annotations

import pytest

from agent.core.abi import FIRST_FREE_SLOT, Frontend
from agent.core.addresses import AddressRange
from agent.core.frontends import RESERVED
from agent.core.records import Family
from agent.core.services import DesiredPort
from tests.builders import (
    CLUSTER_IP,
    LIMITED,
    LOAD_BALANCER,
    LOCAL_CLUSTER_IP,
    LOCAL_NODE_PORT,
    NODE_PORT,
    frontend,
    key,
    want,
)
from tests.property.fake_maps import SILENT
from tests.unit.planned_node import API, F80, F81, NEW, OLD, WEB, A, B, C, D, E, Node, shown, written

# Two segments: one for each traffic policy.

F_NODE = frontend("192.0.2.1", 30080)
BOTH = [CLUSTER_IP, LOCAL_NODE_PORT]


def both(cluster, local, **tweaks) -> DesiredPort:
    """A ClusterIP with a NodePort whose policy is Local."""
    return want(cluster, local=local, at=[F80, F_NODE], roles=BOTH, **tweaks)


def policies(node: Node) -> tuple[str, str, str]:
    """What clients get of the ClusterIP, and of the NodePort inside and outside."""
    outside = node.maps.outside(F_NODE)
    return node.backends(F80), node.backends(F_NODE), shown(*outside.backends) if outside else "PASS"


def test_a_policy_has_a_segment_of_its_own():
    node = Node()
    node.set((WEB, [both([A, B], [B])]))

    assert policies(node) == (shown(A, B), shown(A, B), shown(B))
    assert node.base(F80) == node.base(F_NODE)
    assert not node.plan((WEB, [both([A, B], [B])]))


# before, after, (backends, headers, frontends, removed) written
POLICY_EDITS = [
    pytest.param(both([A, B, C, D], [A]), both([A, B, C, D, E], [A]), (1, 1, 0, 0), id="elsewhere-one-more"),
    pytest.param(both([A, B, C, D], [A]), both([A, B, C, D, E], [A, E]), (3, 2, 1, 0), id="here-one-more-than-fits"),
    pytest.param(both([A, B, C], [A, B, C]), both([B, C], [B, C]), (2, 2, 0, 0), id="here-one-less"),
    pytest.param(both([A], [A]), both([A], []), (0, 1, 0, 0), id="here-none-left"),
    pytest.param(both([A], []), both([A], [A]), (1, 1, 1, 0), id="here-the-first"),
    pytest.param(both([A, B], [A]), want([A, B], at=[F80, F_NODE]), (0, 0, 1, 0), id="the-policy-goes"),
    pytest.param(want([A, B], at=[F80, F_NODE]), both([A, B], [A]), (1, 1, 1, 0), id="the-policy-comes"),
    pytest.param(both([A, B], [A]), want([A, B], at=F80), (0, 0, 0, 1), id="the-node-port-goes"),
    pytest.param(
        want([A, B]), want(local=[B], roles=LOCAL_CLUSTER_IP), (1, 1, 0, 0), id="the-internal-policy-becomes-local"
    ),
    pytest.param(
        want(local=[B, C], roles=LOCAL_CLUSTER_IP),
        want([A, B]),
        (1, 0, 0, 0),
        id="the-internal-policy-becomes-cluster",
    ),
    pytest.param(
        both([A, B], [A]),
        want([A, B], local=[A], at=[F80, F_NODE], roles=[LOCAL_CLUSTER_IP, LOCAL_NODE_PORT]),
        (0, 0, 1, 0),
        id="the-internal-policy-follows-the-external-one",
    ),
]


@pytest.mark.parametrize(("before", "after", "writes"), POLICY_EDITS)
def test_only_what_differs_of_a_policy_is_written(before, after, writes):
    node = Node()
    node.set((WEB, [before]))
    ident = node.ident()

    plan = node.set((WEB, [after]))

    assert written(plan) == writes
    assert node.ident() == ident
    fresh = Node()
    fresh.set((WEB, [after]))
    assert node.maps.answers() == fresh.maps.answers()
    assert not node.plan((WEB, [after]))


def test_segments_of_policies_are_given_back():
    node = Node()
    node.set((WEB, [both([A, B], [B])]))
    plan = node.set((WEB, [want([A, B], at=F80)]))
    assert len(plan.freed) == 1
    node.set((WEB, []))
    node.rest()

    assert node.planner.allocator.used == FIRST_FREE_SLOT


def test_a_restart_adopts_both_segments():
    node = Node()
    node.set((WEB, [both([A, B, C, D], [B], affinity_s=60)]))
    before = node.maps.frontends.copy()
    node.restart()

    assert not node.plan((WEB, [both([A, B, C, D], [B], affinity_s=60)]), leftovers=True)
    assert node.maps.frontends == before
    plan = node.set((WEB, [both([A, B, C, D, E], [B], affinity_s=60)]))
    assert written(plan) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(want([A, B], at=[F80, F_NODE]), id="the-external-policy-went"),
        pytest.param(want([A, B], at=F80), id="the-node-port-went"),
        pytest.param(
            want([A, B], local=[A], at=[F80, F_NODE], roles=[LOCAL_CLUSTER_IP, LOCAL_NODE_PORT]),
            id="the-internal-policy-became-local",
        ),
        pytest.param(want(local=[A], roles=LOCAL_CLUSTER_IP), id="only-the-local-one-is-left"),
    ],
)
@pytest.mark.parametrize("before", [both([A, B], [A]), want([A, B], at=[F80, F_NODE])], ids=["two-segments", "one"])
def test_a_policy_that_changed_while_no_agent_ran(before, after):
    node = Node()
    node.set((WEB, [before]))
    ident = node.ident()
    node.restart()
    node.set((WEB, [after]), leftovers=True)

    assert node.ident() == ident
    fresh = Node()
    fresh.set((WEB, [after]))
    assert node.maps.answers() == fresh.maps.answers()
    node.rest()
    (placement,) = node.planner.placements[key(WEB)]
    slots = sum(segment.size for segment in placement.segments)
    assert node.planner.allocator.used == FIRST_FREE_SLOT + slots, "a segment is lost"


def test_a_policy_without_room_leaves_clients_where_they_were():
    node = Node(segment_slots=8)
    node.set((WEB, [want([A, B, C], at=[F80, F_NODE])]))
    node.set((WEB, [both([A, B, C], [A, B])]))

    assert node.degraded() == [WEB]
    assert policies(node) == (shown(A, B, C),) * 3


def test_a_new_frontend_of_a_policy_without_room_waits():
    node = Node(segment_slots=8)
    node.set((WEB, [want([A, B, C], at=F80)]))
    node.set((WEB, [both([A, B, C], [A, B])]))

    assert node.degraded() == [WEB]
    assert policies(node) == (shown(A, B, C), "PASS", "PASS")


def test_silence_of_one_policy():
    node = Node()
    node.set((WEB, [both([A], [], silent=True)]))

    assert (node.maps.outside(F_NODE), node.backends(F_NODE)) == (SILENT, shown(A))
    assert node.planner.no_local_endpoints == {("external", Family.IPV4): 1}
    node.set((WEB, [both([A], [A])]))
    assert node.planner.no_local_endpoints == {}


@pytest.mark.parametrize(
    ("port", "lacks"),
    [
        pytest.param(want([], silent=True, local=[], roles=LOCAL_CLUSTER_IP), {"internal"}, id="internal"),
        pytest.param(both([A], [], silent=True), {"external"}, id="external"),
        pytest.param(
            want([A], silent=True, at=[F80, F_NODE], roles=[LOCAL_CLUSTER_IP, LOCAL_NODE_PORT]),
            {"internal", "external"},
            id="both",
        ),
        pytest.param(both([], []), set(), id="none-anywhere"),
        pytest.param(want([A]), set(), id="another-policy"),
    ],
)
def test_ports_that_lack_local_endpoints_are_counted(port, lacks):
    node = Node()
    node.set((WEB, [port]), (API, [want([A], at=F81)]))
    assert node.planner.no_local_endpoints == {(policy, Family.IPV4): 1 for policy in lacks}

    node.set((WEB, []))
    assert node.planner.no_local_endpoints == {}


def test_a_reserved_frontend_that_another_has_is_no_loss():
    itself = frontend("10.0.0.1", 0, 0)
    web = want([A], at=[F80, itself], roles=[CLUSTER_IP, RESERVED])
    api = want([B], at=[F81, itself], roles=[CLUSTER_IP, RESERVED])
    node = Node()
    node.set((WEB, [web], OLD), (API, [api], NEW))
    assert node.degraded() == []

    node.set((WEB, []))
    node.set(*[(name.name, [api], NEW) for name in node.planner.to_replan])
    assert node.ident(itself) == node.ident(F81)


def test_an_id_is_not_adopted_by_what_is_reserved_alone():
    itself = frontend("10.0.0.1", 0, 0)
    node = Node()
    node.set((WEB, [want([A], at=[F80, itself], roles=[CLUSTER_IP, RESERVED])]))
    former = node.ident()
    node.restart()
    node.set((WEB, [want([B], at=[F81, itself], roles=[CLUSTER_IP, RESERVED])]), leftovers=True)

    assert node.ident(F81) > former
    assert node.ident(itself) == node.ident(F81)


def test_flags_and_affinity_are_written_as_they_change():
    node = Node()
    node.set((WEB, [want([A], affinity_s=60)]))
    assert Frontend.unpack(node.maps.frontends[F80])[3:] == (60, CLUSTER_IP.flags)

    plan = node.set((WEB, [want([A], affinity_s=90)]))
    assert written(plan) == (0, 0, 1, 0)
    plan = node.set((WEB, [want([A], affinity_s=90, roles=NODE_PORT)]))
    assert written(plan) == (0, 0, 1, 0)
    assert Frontend.unpack(node.maps.frontends[F80])[3:] == (90, NODE_PORT.flags)


# Source ranges.

TEN, TEN_ONE, SIX = "10.0.0.0/8", "10.1.0.0/16", "fd00::/8"


def limited(*ranges: str, **tweaks) -> DesiredPort:
    """A load balancer's address that answers these ranges; () = everybody."""
    return want([A], at=F80, roles=LIMITED if ranges else LOAD_BALANCER, ranges=ranges, **tweaks)


def open_to(node: Node) -> set[str] | str:
    ranges = node.maps.ranges(F80)
    return "all" if ranges is None else {str(AddressRange(it[:16], it[16])) for it in ranges}


@pytest.mark.parametrize(
    ("before", "after", "writes"),
    [
        pytest.param((), (TEN,), (1, 0), id="appear"),
        pytest.param((TEN,), (), (0, 1), id="go"),
        pytest.param((TEN, SIX), (TEN_ONE, SIX), (1, 1), id="change"),
        pytest.param((TEN, SIX), (SIX, TEN), (0, 0), id="change-places"),
    ],
)
def test_source_ranges(before, after, writes):
    node = Node()
    node.set((WEB, [limited(*before)]))
    plan = node.set((WEB, [limited(*after)]))

    assert open_to(node) == (set(after) or "all")
    assert (len(plan.source_ranges), len(plan.removed_source_ranges)) == writes
    assert len(node.maps.source_ranges) == node.planner.source_ranges.count == len(after)
    assert not node.plan((WEB, [limited(*after)]))


def test_source_ranges_go_with_their_service():
    node = Node()
    node.set((WEB, [limited(TEN)]))
    node.set((WEB, []))

    assert (node.maps.source_ranges, node.planner.source_ranges.count) == ({}, 0)


def test_source_ranges_are_adopted():
    node = Node()
    node.set((WEB, [limited(TEN, SIX)]))
    node.restart()
    assert not node.plan((WEB, [limited(SIX, TEN)]), leftovers=True)

    node.restart()
    plan = node.set((WEB, [limited(TEN)]), leftovers=True)
    assert (len(plan.source_ranges), len(plan.removed_source_ranges)) == (0, 1)
    assert open_to(node) == {TEN}


def test_source_ranges_that_nobody_claims_are_removed():
    node = Node()
    node.set((WEB, [limited(TEN)]))
    node.restart()
    node.set(leftovers=True)

    assert (node.maps.source_ranges, node.planner.source_ranges.count) == ({}, 0)


def test_source_ranges_that_do_not_fit_keep_clients_out():
    node = Node(source_range_limit=1)
    node.set((WEB, [limited(TEN, SIX)]))

    assert node.degraded() == [WEB]
    assert "source_ranges" in node.planner.degraded[key(WEB), limited().port]
    assert open_to(node) == {TEN}


def test_a_service_whose_source_ranges_do_not_fit_at_all_answers_nobody():
    node = Node(source_range_limit=1)
    node.set((API, [want([B], at=F81, roles=LIMITED, ranges=[TEN])]))
    node.set((WEB, [limited()]))
    node.set((WEB, [limited(TEN)]))
    assert open_to(node) == set()

    node.set((API, []))
    node.set((WEB, [limited(TEN)]))
    assert (open_to(node), node.degraded()) == ({TEN}, [])


def test_source_ranges_that_differ_are_drift():
    node = Node()
    node.set((WEB, [limited(TEN)]))
    node.maps.source_ranges.clear()

    assert node.planner.differences(node.maps.read_state()) == 1
    node.restart()
    node.maps.apply(node.plan((WEB, [limited(TEN)]), leftovers=True))
    assert open_to(node) == {TEN}
