"""What one change writes, what lasts over a restart, and what becomes of policy that does not fit."""

from __future__ import annotations

import msgspec
import pytest

from agent.core.abi import FIRST_IDENTITY, PEER_WORLD, SUBJECT, Direction, SubjectFlag
from agent.core.addresses import parse_address
from agent.core.events import Delete, ListStarted, Upsert
from agent.core.policy_model import PolicyModel
from agent.core.policy_planner import Numbers, PolicyPlanner, PolicySizes, PolicyState
from agent.core.policy_records import Operator, Peer
from agent.core.records import Kind, ObjectKey
from tests.builders import key
from tests.policy_builders import (
    PolicyNode,
    cidr,
    cluster_policy,
    deny,
    namespace,
    need,
    network_policy,
    pod,
    pods,
    rule,
    selector,
    tcp,
)

TCP = 6
DB, WEB, JOB = map(parse_address, ("10.1.0.1", "10.1.0.2", "10.1.0.3"))
PODS = (
    namespace("x"),
    pod("x/db", "10.1.0.1", app="db"),
    pod("x/web", "10.1.0.2", app="web"),
    pod("x/job", "10.1.0.3", app="job", local=False),
)
WEB_TO_DB = network_policy("x/db", selector(app="db"), ingress=[rule(pods(app="web"), ports=[tcp(80)])])


def subject(node: PolicyNode, address: bytes) -> tuple[int, SubjectFlag, int]:
    identity, flags, since, _ = SUBJECT.packer.unpack(node.maps.state.subjects[address])
    return identity, SubjectFlag(flags), since


def place(node: PolicyNode, address: bytes) -> int:
    return SUBJECT.packer.unpack(node.maps.state.subjects[address])[3]


def test_nothing_is_planned_before_everything_is_listed():
    model = PolicyModel("n1")
    model.apply(ListStarted(Kind.POD))
    model.apply(Upsert(PODS[1]))

    assert not PolicyPlanner(model, PolicySizes(), PolicyState(identities={DB: b"\x10\0\0\0"}), Numbers()).plan()


def test_only_what_a_selector_looks_at_makes_an_identity():
    node = PolicyNode(
        *PODS,
        WEB_TO_DB,
        pod("x/web-2", "10.1.0.4", app="web", **{"pod-template-hash": "5d4"}),
        pod("y/web", "10.1.0.5", app="web"),
    )
    identity_of = node.planner.identity_of
    name = node.planner.identity_name(identity_of(WEB))

    assert identity_of(parse_address("10.1.0.4")) == identity_of(WEB)
    assert identity_of(parse_address("10.1.0.5")) != identity_of(WEB)
    assert (name.namespace, name.labels, name.namespace_labels) == ("x", (("app", "web"),), ())
    assert identity_of(parse_address("192.0.2.1")) == PEER_WORLD
    assert min(int.from_bytes(it, "little") for it in node.maps.state.identities.values()) >= FIRST_IDENTITY


def test_without_a_policy_pods_are_subjects_whom_nothing_is_asked_about():
    node = PolicyNode(*PODS)

    assert set(node.maps.state.subjects) == {DB, WEB}
    assert subject(node, DB)[1] == SubjectFlag(0)
    assert node.maps.state.policy == {}
    assert node.planner.identity_count == 1


def test_a_pod_that_is_relabelled_writes_what_is_its_own():
    others = [pod(f"x/web-{i}", f"10.1.1.{i}", app="web") for i in range(1, 40)]
    node = PolicyNode(*PODS, *others, WEB_TO_DB)

    (plan,) = node.apply(pod("x/web-7", "10.1.1.7", app="job"))

    assert (plan.policy, plan.removed_policy) == ([], [])
    assert (list(plan.identities), list(plan.subjects)) == ([others[6].addresses[0]], [others[6].addresses[0]])
    assert plan.bumps_generation


def test_a_pod_of_a_new_identity_adds_a_column():
    node = PolicyNode(*PODS, network_policy("x/p", ingress=[rule(pods(need("app", Operator.EXISTS)))]))
    before = dict(node.maps.state.policy)

    (plan,) = node.apply(pod("x/new", "10.1.0.9", app="new", local=False))

    assert len(plan.policy) == 2  # one of each subject
    assert plan.removed_policy == []
    assert before.items() <= node.maps.state.policy.items()


def test_the_last_pod_of_an_identity_takes_its_entries_along():
    node = PolicyNode(*PODS, WEB_TO_DB, network_policy("x/p", ingress=[rule(pods(need("app", Operator.EXISTS)))]))
    before = dict(node.maps.state.policy)
    new = pod("x/new", "10.1.0.9", app="new")

    node.apply(new)
    number = node.planner.identity_of(new.addresses[0])
    node.delete(new)

    assert node.maps.state.policy == before
    assert node.planner.identity_name(number) is None
    node.apply(pod("x/newer", "10.1.0.9", app="newer"))
    assert node.planner.identity_of(new.addresses[0]) == number + 1


def test_a_pod_that_ends_loses_its_policy_at_once():
    node = PolicyNode(*PODS, WEB_TO_DB)

    (plan,) = node.apply(pod("x/db", app="db"))

    assert plan.removed_subjects == [DB]
    assert plan.removed_identities == [DB]
    assert node.maps.state.policy == {}


def test_a_pod_that_is_terminating_keeps_its_policy():
    node = PolicyNode(*PODS, WEB_TO_DB)

    assert node.apply(pod("x/db", "10.1.0.1", app="db", terminating=True)) == []
    assert not node.may_send(JOB, DB, TCP, 80)


def test_an_address_that_is_used_again_has_the_policy_of_who_uses_it():
    node = PolicyNode(*PODS, WEB_TO_DB)

    node.apply(pod("x/web", "10.1.0.2", app="web", terminating=True), pod("x/late", "10.1.0.2", app="job"))

    assert not node.may_send(WEB, DB, TCP, 80)


def test_a_policy_that_tells_pods_apart_anew_never_touches_those_it_is_not_about():
    tiered = (*PODS, pod("x/cache", "10.1.0.4", app="web", tier="cache"))
    cache = parse_address("10.1.0.4")
    node = PolicyNode(*tiered, network_policy("x/any", selector(app="db"), ingress=[rule()]))
    untiered = network_policy("x/untiered", selector(need("tier", Operator.DOES_NOT_EXIST)), ingress=[])

    node.model.apply(Upsert(untiered))
    steps = 0
    for plan in node.plans():
        steps += 1
        for _ in node.maps.writes(plan):
            assert node.may_send(DB, cache, TCP, 80)
    assert steps == 2
    assert not node.may_send(DB, WEB, TCP, 80)

    plans = node.delete(untiered)
    assert len(plans) == 2
    assert node.planner.identity_of(cache) == node.planner.identity_of(WEB)


RACKED = [
    pytest.param(lambda _: "1", True, set(), id="one value"),
    pytest.param(lambda i: "1" if i < 5 else "2", False, {5, 6, 7}, id="two values, of which most keep the number"),
    pytest.param(lambda i: "1" if i < 2 else "2", True, {2, 3, 4, 5, 6, 7}, id="a local pod weighs more than any"),
    pytest.param(str, True, {1, 2, 3, 4, 5, 6, 7}, id="a value for each"),
]


@pytest.mark.parametrize(("rack", "first_is_local", "renamed"), RACKED)
def test_a_label_that_every_pod_has_renames_as_few_addresses_as_can_be(rack, first_is_local, renamed):
    webs = [
        pod(f"x/web-{i}", f"10.1.1.{i}", local=first_is_local and i == 0, app="web", rack=rack(i)) for i in range(8)
    ]
    node = PolicyNode(*PODS[:2], PODS[3], *webs, WEB_TO_DB)
    by_rack = network_policy("x/rack", selector(app="job"), ingress=[rule(pods(need("rack", Operator.EXISTS)))])
    before = dict(node.maps.state.identities)

    plans = node.apply(by_rack)
    assert {address for plan in plans for address in plan.identities} == {webs[i].addresses[0] for i in renamed}
    numbers = node.planner.numbers
    assert node.restart() == []
    assert node.planner.numbers == numbers

    node.delete(by_rack)
    assert node.maps.state.identities == before


def test_who_is_relabelled_meanwhile_takes_no_number_along():
    node = PolicyNode(*PODS, WEB_TO_DB)
    by_tier = network_policy("x/tier", selector(app="job"), ingress=[rule(pods(tier="1"))])

    node.apply(by_tier, pod("x/web", "10.1.0.2", app="job", tier="1"))

    assert not node.may_send(WEB, DB, TCP, 80)
    assert node.planner.differences(node.maps.state) == 0


def test_a_policy_about_pods_elsewhere_writes_nothing():
    node = PolicyNode(*PODS, WEB_TO_DB)

    assert node.apply(network_policy("x/job", selector(app="job"), ingress=[rule(pods(app="web"))])) == []


GENERATION = {
    "a policy": ([network_policy("x/p", ingress=[])], True),
    "a label": ([pod("x/web", "10.1.0.2", app="db")], True),
    "a pod that goes": ([pod("x/job", app="job", local=False)], True),
    "nothing": ([PODS[1]], False),
}


@pytest.mark.parametrize(("changes", "expected"), GENERATION.values(), ids=GENERATION)
def test_verdicts_are_taken_again_when_they_may_differ(changes, expected):
    node = PolicyNode(*PODS, WEB_TO_DB)

    assert any(plan.bumps_generation for plan in node.apply(*changes)) is expected


def test_numbers_outlive_a_restart_by_way_of_a_file():
    node = PolicyNode(*PODS, WEB_TO_DB, cluster_policy("c", ingress=[deny(cidr("192.0.2.0/24"))]))
    numbers = msgspec.json.decode(msgspec.json.encode(node.planner.numbers), type=Numbers)

    assert numbers == node.planner.numbers
    assert node.restart(numbers) == []
    assert node.planner.numbers == numbers


def test_numbers_that_nobody_remembers_are_not_given_out_again():
    node = PolicyNode(*PODS, WEB_TO_DB)
    before = {node.planner.identity_of(address) for address in (DB, WEB, JOB)}

    node.restart(Numbers())

    assert before.isdisjoint(node.planner.identity_of(address) for address in (DB, WEB, JOB))
    assert node.planner.differences(node.maps.state) == 0


def test_connections_may_be_older_than_the_first_agent_with_policy():
    node = PolicyNode(*PODS)
    assert subject(node, DB)[2] == 7

    node.apply(pod("x/new", "10.1.0.9"))
    assert subject(node, parse_address("10.1.0.9"))[2] == 0

    node.restart()
    node.apply(pod("x/newer", "10.1.0.8"))
    assert subject(node, DB)[2] == 7
    assert subject(node, parse_address("10.1.0.9"))[2] == 0
    assert subject(node, parse_address("10.1.0.8"))[2] == 0

    node.apply(pod("x/db", app="db"), pod("x/heir", "10.1.0.1", app="db"))
    assert subject(node, DB)[2] == 0


@pytest.mark.parametrize("fails_open", [False, True], ids=["closed", "open"])
def test_policy_that_does_not_fit_fails_until_there_is_room(fails_open):
    wide = network_policy("x/wide", selector(app="web"), ingress=[rule(ports=[tcp(p) for p in range(1, 40, 2)])])
    node = PolicyNode(*PODS, WEB_TO_DB, wide, sizes=PolicySizes(policy=10), fails_open=fails_open)

    assert set(node.planner.degraded) == {key("x/web")}
    assert "policy" in node.planner.degraded[key("x/web")]
    assert node.may_send(DB, WEB, TCP, 2) is fails_open
    assert not node.may_send(JOB, DB, TCP, 80)
    assert len(node.maps.state.policy) <= 10

    node.delete(wide)
    assert node.planner.degraded == {}
    assert node.may_send(DB, WEB, TCP, 2)


def test_addresses_that_do_not_fit_are_told_and_placed_when_there_is_room():
    node = PolicyNode(*PODS, WEB_TO_DB, sizes=PolicySizes(identities=2, subjects=1))

    assert node.planner.degraded == {
        key("x/job"): "map identities is full: 1 more entries do not fit in 2 (mapSizes.identities)",
        key("x/web"): "map subjects is full: 1 more entries do not fit in 1 (mapSizes.subjects)",
    }
    node.apply(pod("x/db", app="db"))
    assert node.planner.degraded == {}
    assert set(node.maps.state.identities) == {WEB, JOB}
    assert set(node.maps.state.subjects) == {WEB}


def test_a_pods_addresses_find_room_together_and_those_of_isolated_pods_first():
    plain, web = pod("x/a", "10.1.1.1", "fd00::1"), pod("x/b", "10.1.1.2", "fd00::2", app="web")
    denied = network_policy("x/p", selector(app="web"), ingress=[])

    node = PolicyNode(plain, web, denied, sizes=PolicySizes(subjects=3))
    assert set(node.maps.state.subjects) == set(web.addresses)
    assert set(node.planner.degraded) == {plain.key}
    assert not node.planner.lacks_subjects, "no policy is about it"

    node.apply(network_policy("x/all", ingress=[]))
    assert node.planner.lacks_subjects


@pytest.mark.parametrize("fails_open", [False, True], ids=["closed", "open"])
def test_who_would_take_a_peer_without_room_for_the_world_fails_until_there_is_room(fails_open):
    """Else an Admin tier's denial would be evaded by whoever comes when the map is full."""
    guard = cluster_policy(
        "guard", pods=selector(app="db"), ingress=[deny(Peer(namespaces=selector(), pods=selector(app="job")))]
    )
    about_web = network_policy("x/p", selector(app="web"), ingress=[rule(pods(app="db"))])
    node = PolicyNode(*PODS[:3], guard, about_web, sizes=PolicySizes(identities=2), fails_open=fails_open)
    assert node.planner.degraded == {}

    node.apply(PODS[3])
    full = "map identities is full: 1 more entries do not fit in 2 (mapSizes.identities)"
    assert node.planner.degraded == {key("x/job"): full, key("x/db"): full}
    assert node.may_send(JOB, DB, TCP, 80) is node.may_send(WEB, DB, TCP, 80) is fails_open
    assert [node.may_send(it, WEB, TCP, 80) for it in (DB, JOB)] == [True, False], "to it a job is as the world"

    node.delete(PODS[2])
    assert node.planner.degraded == {}
    assert not node.may_send(JOB, DB, TCP, 80)


def test_a_peer_without_room_is_taken_for_the_block_it_is_in():
    wide, beside = cidr("10.1.0.0/16"), cidr("192.0.2.0/24")
    node = PolicyNode(
        pod("x/db", "10.1.0.1", app="db"),
        network_policy("x/block", selector(app="db"), ingress=[rule(wide, pods(app="job"))]),
        sizes=PolicySizes(identities=1),
    )
    node.apply(pod("x/job", "10.1.0.3", app="job"))
    assert set(node.planner.degraded) == {key("x/job")}, "the block allows it, too"
    assert node.may_send(JOB, DB, TCP, 80)

    node.apply(network_policy("x/block", selector(app="db"), ingress=[rule(beside, pods(app="job"))]))
    assert set(node.planner.degraded) == {key("x/job"), key("x/db")}
    assert not node.may_send(JOB, DB, TCP, 80)


def test_an_exception_without_room_is_never_judged_as_what_it_is_cut_from():
    """Not between two writes either: whom it concerns fails before anything of the policy is written."""
    outside = parse_address("192.0.2.9")
    node = PolicyNode(*PODS, network_policy("x/p", egress=[]), sizes=PolicySizes(blocks=1))

    node.model.apply(Upsert(network_policy("x/p", egress=[rule(cidr("192.0.2.0/24", "192.0.2.9/32"))])))
    for plan in node.plans():
        for _ in node.maps.writes(plan):
            assert not node.may_send(DB, outside, TCP, 80)
    assert key("x/db") in node.planner.degraded


def test_a_subject_that_did_not_fit_has_the_room_of_one_that_is_gone():
    """Though nothing else happens: what is removed is free only behind the plan that removes it."""
    one, two, three = (pod(f"x/{number}", f"10.1.1.{number}") for number in (1, 2, 3))
    node = PolicyNode(one, two, three, sizes=PolicySizes(subjects=2))
    assert set(node.planner.degraded) == {three.key}

    node.delete(one)

    assert node.planner.degraded == {}
    assert set(node.maps.state.subjects) == {two.addresses[0], three.addresses[0]}


@pytest.mark.parametrize("fails_open", [False, True], ids=["closed", "open"])
def test_whom_a_policy_about_a_block_that_does_not_fit_concerns_fails_until_there_is_room(fails_open):
    """Else what is excepted would be judged as the block it is excepted from."""
    wide = network_policy("x/wide", selector(app="db"), egress=[rule(cidr("192.0.2.0/24"))])
    hole = network_policy("x/hole", selector(app="web"), egress=[rule(cidr("192.0.2.0/24", "192.0.2.9/32"))])
    beside, within = parse_address("192.0.2.1"), parse_address("192.0.2.9")
    node = PolicyNode(*PODS, wide, sizes=PolicySizes(blocks=1), fails_open=fails_open)
    assert node.planner.degraded == {}

    node.apply(hole)
    assert set(node.planner.degraded) == {ObjectKey("IPBlock", "192.0.2.9/32"), key("x/web")}
    assert set(node.planner.degraded.values()) == {
        "map blocks is full: 1 more entries do not fit in 1 (mapSizes.blocks)"
    }
    assert [node.may_send(WEB, it, TCP, 80) for it in (beside, within)] == [fails_open] * 2
    assert [node.may_send(DB, it, TCP, 80) for it in (beside, within)] == [True] * 2, "which it has no part in"

    node.apply(network_policy("x/hole", selector(app="web"), egress=[rule(cidr("192.0.2.0/24"))]))
    assert node.planner.degraded == {}
    assert node.may_send(WEB, beside, TCP, 80)


def test_a_verdict_names_its_rule_and_a_subject_who_isolates_it():
    node = PolicyNode(*PODS, WEB_TO_DB, network_policy("x/all", ingress=[]))
    identity = subject(node, DB)[0]
    allowed, number = node.maps.rule(identity, node.planner.identity_of(WEB), Direction.INGRESS, TCP, 80)

    name = node.planner.rule_name(number)
    assert (allowed, name.kind, name.policy, name.direction, name.index) == (
        True,
        "NetworkPolicy",
        key("x/db"),
        Direction.INGRESS,
        0,
    )
    assert node.planner.isolating(identity, Direction.INGRESS) == (key("x/all"), key("x/db"))
    assert node.planner.isolating(identity, Direction.EGRESS) == ()


def test_a_rule_keeps_its_number_while_it_exists():
    node = PolicyNode(*PODS, WEB_TO_DB)
    (before,) = node.planner.numbers.rules

    node.apply(network_policy("x/db", selector(app="db"), ingress=[rule(pods(app="web")), rule(pods(app="job"))]))
    assert set(node.planner.numbers.rules) == {before, before + 1}

    node.apply(WEB_TO_DB)
    assert set(node.planner.numbers.rules) == {before}


def test_whoever_is_told_the_same_shares_it():
    many = [pod(f"x/p{i}", f"10.1.1.{i}", app=f"a{i}") for i in range(1, 30)]
    node = PolicyNode(*PODS, *many, network_policy("x/p", ingress=[rule(Peer(pods=selector(app="web")))]))

    columns = [
        columns for (_, direction), columns in node.planner._table.rows.items() if direction is Direction.INGRESS
    ]
    assert len(columns) == 31
    assert len({id(it) for it in columns}) == 1


def test_who_has_an_address_next_is_not_where_the_one_before_was():
    node = PolicyNode(*PODS, WEB_TO_DB)
    node.maps.apply(node.planner.place({DB: 11}))
    before = subject(node, DB)
    assert place(node, DB) == 11

    node.apply(pod("x/other", "10.1.0.1", app="db"), Delete(Kind.POD, key("x/db")))

    assert subject(node, DB)[:2] == before[:2]
    assert place(node, DB) == 0


def test_what_is_planned_anew_keeps_places():
    node = PolicyNode(*PODS, WEB_TO_DB)
    node.maps.apply(node.planner.place({DB: 11}))
    node.delete(WEB_TO_DB)
    assert place(node, DB) == 11

    node.restart()
    assert place(node, DB) == 11
    assert not node.planner.place({DB: 11})


def test_differences_counts_what_is_not_as_planned():
    node = PolicyNode(*PODS, WEB_TO_DB)
    state = node.maps.state
    assert node.planner.differences(state) == 0

    state.policy.popitem()
    state.identities[parse_address("10.9.9.9")] = b"\x10\0\0\0"
    state.subjects[DB] = bytes(SUBJECT.size)

    assert node.planner.differences(state) == 3


@pytest.mark.parametrize("identities", [100, 4], ids=["room", "identities full"])
def test_an_address_does_not_change_hands_without_the_generation_moving(identities):
    """Else connections of the pod that had it go on into the one that has it now."""
    others = (pod(f"x/{name}", f"10.1.0.{number}", app=name) for number, name in enumerate("abcd", 1))
    isolated = network_policy("x/b", selector(app="b"), ingress=[])
    node = PolicyNode(namespace("x"), *others, isolated, sizes=PolicySizes(identities=identities))
    one, other = pod("x/a2", "10.1.0.9", app="a"), pod("x/b2", "10.1.0.9", app="b")
    node.apply(one)

    assert any(plan.bumps_generation for plan in node.delete(one) + node.apply(other))
