"""Whose an address is, what changes reach, and what lists say by what they leave out."""

from __future__ import annotations

import msgspec
import pytest

from agent.core.addresses import parse_address
from agent.core.events import Delete, ListEnded, ListStarted, Malformed, Upsert
from agent.core.policy_model import PolicyModel
from agent.core.policy_records import NetworkPolicyRecord
from agent.core.records import POLICY_KINDS, Fault, Kind, ObjectKey
from tests.builders import key, service
from tests.policy_builders import namespace, network_policy, pod, rule

ADDRESS = "10.1.0.1"
CLAIMS = {
    "the younger": ([pod("x/old", ADDRESS, created="1"), pod("x/new", ADDRESS, created="2")], "new"),
    "the one that stays": (
        [pod("x/old", ADDRESS, created="1"), pod("x/new", ADDRESS, created="2", terminating=True)],
        "old",
    ),
    "one that is about to go, if no other": ([pod("x/old", ADDRESS, terminating=True)], "old"),
    "by name, where nothing else tells": ([pod("x/a", ADDRESS), pod("x/b", ADDRESS)], "b"),
}


@pytest.mark.parametrize(("pods", "owner"), CLAIMS.values(), ids=CLAIMS)
def test_an_address_has_one_owner(pods, owner):
    for order in (pods, pods[::-1]):
        model = PolicyModel("n1")
        for record in order:
            model.apply(Upsert(record))

        assert model.owner(parse_address(ADDRESS)).key.name == owner


def test_an_address_goes_back_when_its_owner_lets_go():
    model = PolicyModel("n1")
    for record in (pod("x/old", ADDRESS, created="1"), pod("x/new", ADDRESS, created="2")):
        model.apply(Upsert(record))

    model.apply(Delete(Kind.POD, key("x/new")))
    assert model.owner(parse_address(ADDRESS)).key.name == "old"
    model.apply(Upsert(pod("x/old", created="1")))

    assert model.owner(parse_address(ADDRESS)) is None
    assert model.pods_by_address == {}


def test_a_namespace_reaches_its_pods_alone():
    model = PolicyModel("n1")
    for record in (pod("x/a", ADDRESS), pod("y/b", "10.1.0.2"), namespace("x")):
        model.apply(Upsert(record))
    model.take_dirty()

    model.apply(Upsert(namespace("x", env="prod")))

    assert model.take_dirty() == ({parse_address(ADDRESS)}, set())


def test_the_same_again_is_no_change():
    model = PolicyModel("n1")
    said = [pod("x/a", ADDRESS), namespace("x", env="dev"), network_policy("x/p", ingress=[])]
    for record in said:
        model.apply(Upsert(record))
    model.take_dirty()

    for record in said:
        model.apply(Upsert(record))

    assert model.take_dirty() == (set(), set())


def test_what_a_full_list_leaves_out_is_gone():
    model = PolicyModel("n1")
    for record in (pod("x/a", ADDRESS), pod("x/b", "10.1.0.2"), network_policy("x/p", ingress=[])):
        model.apply(Upsert(record))
    assert not model.is_synced

    for kind in POLICY_KINDS:
        model.apply(ListStarted(kind))
    model.apply(Upsert(pod("x/a", ADDRESS)))
    for kind in POLICY_KINDS:
        model.apply(ListEnded(kind))

    assert model.is_synced
    assert list(model.pods_by_address.values()) == [key("x/a")]
    assert model.policies == {}


def test_what_an_incomplete_list_leaves_out_stays():
    model = PolicyModel("n1")
    model.apply(Upsert(network_policy("x/p", ingress=[])))

    model.apply(ListStarted(Kind.NETWORK_POLICY))
    model.apply(ListEnded(Kind.NETWORK_POLICY, is_complete=False))

    assert list(model.policies) == [(Kind.NETWORK_POLICY, key("x/p"))]
    assert model.incomplete == {Kind.NETWORK_POLICY}


def test_what_a_malformed_object_said_before_stays():
    model = PolicyModel("n1")
    record = network_policy("x/p", ingress=[])
    model.apply(Upsert(record))
    model.apply(ListStarted(record.kind))
    model.apply(Malformed(record.kind, record.key, "spec", "nonsense"))
    model.apply(ListEnded(record.kind))

    assert model.policies == {(record.kind, record.key): record}
    assert (record.kind, record.key) in model.malformed

    model.apply(Delete(record.kind, record.key))
    assert (model.policies, model.malformed) == ({}, {})


WHOLE = network_policy("x/p", ingress=[rule()])
PART, LESS = (
    msgspec.structs.replace(network_policy("x/p", ingress=it), is_partial=True) for it in ([rule(ports=())], [])
)


def unread(partial: NetworkPolicyRecord | None) -> Malformed:
    return Malformed(WHOLE.kind, WHOLE.key, "spec.ingress[0]", "nonsense", partial=partial)


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        pytest.param([unread(PART)], PART, id="one that never was read"),
        pytest.param([unread(None)], None, id="of which nothing can be read"),
        pytest.param([Upsert(WHOLE), unread(PART)], WHOLE, id="one that was read whole"),
        pytest.param([unread(PART), unread(LESS)], LESS, id="one that says something else"),
        pytest.param([unread(PART), unread(None)], PART, id="and then of which nothing can be"),
        pytest.param([unread(PART), Upsert(WHOLE), unread(LESS)], WHOLE, id="one that was mended meanwhile"),
        pytest.param([Upsert(WHOLE), Delete(WHOLE.kind, WHOLE.key), unread(PART)], PART, id="one that is made anew"),
    ],
)
def test_what_can_be_read_holds_where_nothing_that_was_said_before_is_known(events, wanted):
    model = PolicyModel("n1")
    for event in events:
        model.apply(event)

    assert model.policies.get((WHOLE.kind, WHOLE.key)) == wanted
    assert list(model.malformed) == [(WHOLE.kind, WHOLE.key)]


@pytest.mark.parametrize(
    ("listed", "is_complete", "wanted"),
    [
        pytest.param([unread(PART)], True, WHOLE, id="unreadable"),
        pytest.param([unread(None)], True, WHOLE, id="wholly unreadable"),
        pytest.param([Upsert(PART)], True, PART, id="another by now"),
        pytest.param([], True, None, id="gone"),
        pytest.param([], False, WHOLE, id="not mentioned by a list that is not complete"),
    ],
)
def test_what_a_former_agent_knew_holds_until_a_list_says_otherwise(listed, is_complete, wanted):
    model = PolicyModel("n1", [WHOLE])

    for event in (ListStarted(WHOLE.kind), *listed, ListEnded(WHOLE.kind, is_complete)):
        model.apply(event)

    assert model.policies.get((WHOLE.kind, WHOLE.key)) == wanted


@pytest.mark.parametrize(
    ("fields", "record", "expected"),
    [
        pytest.param(
            ["spec.containers[0].ports[0].containerPort"],
            pod("x/a", "10.1.0.2", app="db"),
            pod("x/a", "10.1.0.2", app="db"),
            id="a port: the rest is what it says now",
        ),
        pytest.param(
            ["status.podIPs[1].ip"],
            pod("x/a", "10.1.0.1", app="web"),
            pod("x/a", "10.1.0.1", "fd00::1", app="web"),
            id="an address: the one of before of that family",
        ),
        pytest.param(
            ["metadata.labels.tier"], pod("x/a", app="db"), pod("x/a", app="db", tier="1"), id="a label: as it was"
        ),
        pytest.param(["metadata.labels"], pod("x/a"), pod("x/a", app="web", tier="1"), id="labels: as they were"),
    ],
)
def test_what_cannot_be_read_of_a_pod_stays_or_is_left_out_and_is_told(fields, record, expected):
    before = pod("x/a", "10.1.0.1", "fd00::1", app="web", tier="1")
    left_out = tuple(Fault(field, "is bad") for field in fields)
    new, known = PolicyModel("n1"), PolicyModel("n1")
    known.apply(Upsert(before))

    for model, wanted in ((new, record), (known, expected)):
        model.apply(Upsert(record, left_out))
        assert model.pod(key("x/a")) == wanted
        assert model.left_out[Kind.POD, key("x/a")] == left_out
        model.apply(Upsert(before))
        assert not model.left_out
        model.apply(Upsert(record, left_out))
        model.apply(Delete(Kind.POD, key("x/a")))
        assert not model.left_out


def test_pods_that_say_the_same_share_it():
    model = PolicyModel("n1")
    for name in ("a", "b"):
        model.apply(Upsert(pod(f"x/{name}", app="web", ports=[("http", 80)])))

    one, other = model.pod(key("x/a")), model.pod(key("x/b"))
    assert one.labels is other.labels
    assert one.ports is other.ports


def test_other_kinds_are_left_alone():
    model = PolicyModel("n1")

    model.apply(Upsert(service()))
    model.apply(Delete(Kind.SERVICE, ObjectKey("ns", "web")))
    model.apply(ListStarted(Kind.SERVICE))
    model.apply(ListEnded(Kind.SERVICE))

    assert model.take_dirty() == (set(), set())
