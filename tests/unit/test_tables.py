"""Who gets a Maglev table, when it is built, and what becomes of those for whom there is none."""

from __future__ import annotations

import pytest

from agent.core.abi import MAGLEV_BACKENDS, FrontendFlag, unpack_header
from agent.core.frontends import Role, Which
from agent.core.plan import Plan
from agent.core.services import DesiredPort
from tests.builders import CLUSTER_IP, LOCAL_NODE_PORT, NODE_PORT, frontend, key, pods, want
from tests.unit.planned_node import API, F80, F81, WEB, A, B, C, Node

PORT = frontend("192.0.2.1", 30080)
OTHER_PORT = frontend("192.0.2.1", 30081)
MAGLEV = NODE_PORT._replace(flags=NODE_PORT.flags | FrontendFlag.MAGLEV)
LOCAL_MAGLEV = LOCAL_NODE_PORT._replace(flags=LOCAL_NODE_PORT.flags | FrontendFlag.MAGLEV)


def service(*backends: bytes, role: Role = MAGLEV, at: bytes = F80, port: bytes = PORT, **tweaks) -> DesiredPort:
    """A service port with a ClusterIP and a NodePort."""
    return want(backends, at=(at, port), roles=(CLUSTER_IP, role), **tweaks)


def reasons(node: Node) -> list[str]:
    return list(node.planner.degraded.values())


def number(node: Node, at: bytes = F80) -> int:
    return unpack_header(node.maps.segments[node.base(at)]).table


def test_a_service_with_maglev_gets_a_table_for_its_backends():
    node = Node()

    plan = node.set((WEB, [service(A, B)]))

    assert number(node) == 1
    assert plan.tables == node.maps.tables == {1: A + B}
    assert not node.plan((WEB, [service(A, B)])), "planning again must find nothing to do"


@pytest.mark.parametrize("role", [NODE_PORT, LOCAL_NODE_PORT], ids=["cluster", "local"])
def test_nobody_else_does(role):
    node = Node()

    plan = node.set((WEB, [service(A, B, role=role, local=(A,))]))

    assert (plan.tables, number(node)) == ({}, 0)


def test_the_table_is_for_the_backends_that_clients_outside_get():
    node = Node()

    node.set((WEB, [service(A, B, C, role=LOCAL_MAGLEV, local=(B,))]))

    assert node.maps.tables == {1: B}
    assert number(node) == 0, "the segment for clients inside needs none"


@pytest.mark.parametrize(
    ("backends", "built"),
    [
        pytest.param((A, B, C), {1: A + B + C}, id="one-more"),
        pytest.param((A,), {1: A}, id="one-less"),
        pytest.param((C, A), {1: A + C}, id="another-in-its-place"),
        pytest.param((*pods(7),), {1: b"".join(pods(7))}, id="a-larger-segment"),
        pytest.param((B, A), {}, id="only-the-order"),
        pytest.param((), {}, id="all-go"),
    ],
)
def test_a_table_is_built_again_when_backends_change(backends, built):
    node = Node()
    node.set((WEB, [service(A, B)]))

    plan = node.set((WEB, [service(*backends)]))

    assert plan.tables == built
    assert number(node) == 1
    assert plan.freed_tables == []


@pytest.mark.parametrize(
    "after",
    [
        pytest.param([service(A, B, role=NODE_PORT)], id="no-longer-maglev"),
        pytest.param([want([A, B])], id="no-longer-outside"),
        pytest.param([], id="removed"),
    ],
)
def test_a_table_that_nobody_wants_rests_and_then_is_anothers(after):
    node = Node(table_limit=1)
    node.set((WEB, [service(A, B)]))

    plan = node.set((WEB, after))

    assert plan.freed_tables == [1]
    node.set((API, [service(C, at=F81, port=OTHER_PORT)]))
    assert node.degraded() == [API], "a program may still be reading it"
    node.rest()
    node.set((API, [service(C, at=F81, port=OTHER_PORT)]))
    assert (number(node, F81), node.maps.tables, node.degraded()) == (1, {1: C}, [])


def test_a_table_moves_along_when_the_other_policy_takes_over_its_segment():
    node = Node()
    cluster = want([A, B], at=PORT, roles=Role(MAGLEV.flags, Which.CLUSTER, Which.CLUSTER))
    local = want([], local=[A], at=PORT, roles=Role(LOCAL_MAGLEV.flags, Which.LOCAL, Which.LOCAL))
    node.set((WEB, [cluster]))

    plan = node.set((WEB, [local]))

    assert (plan.tables, plan.freed_tables, number(node, PORT)) == ({1: A}, [], 1)


@pytest.mark.parametrize("limit", [0, 1])
def test_without_a_table_left_backends_are_chosen_at_random_and_it_says_so(limit):
    node = Node(table_limit=limit)
    settings = [
        (name, [service(A, B, at=at, port=port)]) for name, at, port in ((WEB, F80, PORT), (API, F81, OTHER_PORT))
    ]

    node.set(*settings)

    assert node.degraded() == [API, WEB][: 2 - limit]
    assert node.backends(PORT) == node.backends(OTHER_PORT) == "10.1.0.2:8080 10.1.0.3:8080"
    (reason,) = set(reasons(node))
    assert reason == (
        f"map maglev_tables is full: 1 more entries do not fit in {limit} (mapSizes.maglevTables): "
        "backends are chosen at random"
    )


def test_more_backends_than_a_table_is_built_for_are_chosen_at_random():
    node = Node(segment_slots=8192)
    node.set((WEB, [service(*pods(MAGLEV_BACKENDS))]))
    assert (number(node), node.degraded()) == (1, [])

    plan = node.set((WEB, [service(*pods(MAGLEV_BACKENDS + 1))]))

    assert (number(node), plan.freed_tables) == (0, [1])
    assert reasons(node) == [
        "1025 are more than the 1024 that a Maglev table is built for: backends are chosen at random"
    ]
    node.set((WEB, [service(*pods(3))]))
    assert (number(node), node.degraded()) == (2, [])


def test_a_segment_that_does_not_fit_has_a_table_for_what_does():
    node = Node(segment_slots=8)
    node.set((WEB, [service(A, B)]))

    node.set((WEB, [service(*pods(9)[1:])]))

    assert node.degraded() == [WEB]
    base = node.base()
    slots, _ = node.maps.read_state().segments[base]
    assert node.maps.tables == {1: slots}


def test_a_restart_adopts_tables_and_builds_them_again():
    """A former agent may have ended between writing backends and building their table."""
    node = Node()
    node.set((WEB, [service(A, B)]), (API, [service(C, at=F81, port=OTHER_PORT)]))
    numbers = number(node), number(node, F81)
    node.restart()

    plan = node.set((API, [service(C, at=F81, port=OTHER_PORT)]), (WEB, [service(A, B)]), leftovers=True)

    assert (number(node), number(node, F81)) == numbers == (1, 2)
    assert plan.tables == {1: A + B, 2: C}
    assert (plan.headers, plan.frontends, plan.freed_tables) == ([], {}, [])


def test_a_table_of_a_service_that_went_while_no_agent_ran_is_freed():
    node = Node()
    node.set((WEB, [service(A, B)]))
    node.restart()

    plan = node.set(leftovers=True)

    assert plan.freed_tables == [1]
    node.rest()
    assert node.planner.tables.used == 0


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_header_that_names_a_table_there_is_not_is_put_right(is_wanted):
    node = Node()
    node.set((WEB, [service(A, B)]))
    segment = node.planner.placements[key(WEB)][0].cluster
    assert segment.table
    segment.table.number = 77
    node.apply(Plan(headers=[(segment.base, segment.header)]))
    node.restart()

    node.set((WEB, [service(A, B, role=MAGLEV if is_wanted else NODE_PORT)]))

    assert number(node) == (1 if is_wanted else 0)
    assert node.planner.differences(node.maps.read_state()) == 0


def test_a_header_without_its_table_is_a_difference():
    node = Node()
    node.set((WEB, [service(A, B)]))
    assert node.planner.differences(node.maps.read_state()) == 0

    node.apply(Plan(headers=[(node.base(), node.planner.placements[key(WEB)][0].cluster.header[:16] + bytes(8))]))

    assert node.planner.differences(node.maps.read_state()) > 0
