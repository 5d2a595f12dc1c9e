"""The model keeps the latest of every object, and knows which Services changed."""

from __future__ import annotations

from typing import Any

import pytest

from agent.core.abi import FrontendKind
from agent.core.addresses import format_address
from agent.core.events import AddressesChanged, Delete, Event, ListEnded, ListStarted, Malformed, Upsert
from agent.core.model import Model
from agent.core.records import (
    SERVICE_KINDS,
    Family,
    Fault,
    HealthCheck,
    Kind,
    NodeRecord,
    ObjectKey,
    Protocol,
    ServiceRecord,
    Traits,
)
from tests.builders import READY, addresses, endpoint_text, external, key, piece, service

WEB, API = key("web"), key("api")
NODE = ObjectKey("", "n1")


def model_of(*events: Event) -> Model:
    model = Model("n1")
    for event in events:
        model.apply(event)
    return model


def then(model: Model, *events: Event) -> set[str]:
    """Apply events and return the names of the Services they made dirty."""
    model.dirty.clear()
    for event in events:
        model.apply(event)
    return {key.name for key in model.dirty}


def backends(model: Model, of: ObjectKey = WEB) -> list[str]:
    return sorted(endpoint_text(slot) for want in model.desired(of) for slot in (want.cluster or want.local).slots)


def listed(kind: Kind, *events: Event) -> tuple[Event, ...]:
    return (ListStarted(kind), *events, ListEnded(kind))


ONE = Upsert(piece("s1", (READY, ["10.1.0.1"])))
TWO = Upsert(piece("s1", (READY, ["10.1.0.1", "10.1.0.2"])))
BESIDE = Upsert(piece("s2", (READY, ["10.1.0.3"])))
MOVED = Upsert(piece("s1", (READY, ["10.1.0.1"]), of="api"))
SERVICE, OTHER = Upsert(service()), Upsert(service("api", "10.0.0.2"))

CHANGES = [
    pytest.param([], [SERVICE], {"web"}, id="service-appears"),
    pytest.param([SERVICE], [SERVICE], set(), id="service-said-again"),
    pytest.param([SERVICE], [Upsert(service(local=True))], {"web"}, id="service-changes"),
    pytest.param([SERVICE, OTHER], [Delete(Kind.SERVICE, WEB)], {"web"}, id="service-goes"),
    pytest.param([], [Delete(Kind.SERVICE, WEB)], set(), id="unknown-service-goes"),
    pytest.param([SERVICE, OTHER], [ONE], {"web"}, id="slice-appears"),
    pytest.param([SERVICE, ONE], [ONE], set(), id="slice-said-again"),
    pytest.param([SERVICE, ONE], [TWO], {"web"}, id="slice-changes"),
    pytest.param([SERVICE, ONE], [Delete(Kind.ENDPOINT_SLICE, key("s1"))], {"web"}, id="slice-goes"),
    pytest.param([SERVICE], [Delete(Kind.ENDPOINT_SLICE, key("s1"))], set(), id="unknown-slice-goes"),
    pytest.param([SERVICE, OTHER, ONE], [MOVED], {"web", "api"}, id="slice-moves-by-its-label"),
    pytest.param([SERVICE, OTHER], [Upsert(NodeRecord("n1", zone="a"))], {"web", "api"}, id="zone-becomes-known"),
    pytest.param(
        [SERVICE, Upsert(NodeRecord("n1", zone="a"))], [Upsert(NodeRecord("n1", zone="b"))], {"web"}, id="zone-changes"
    ),
    pytest.param(
        [SERVICE, Upsert(NodeRecord("n1", zone="a"))],
        [Upsert(NodeRecord("n1", zone="a", addresses=("192.0.2.9",)))],
        set(),
        id="node-changes-but-not-its-zone",
    ),
    pytest.param([SERVICE], [Upsert(NodeRecord("n2", zone="a"))], set(), id="another-node"),
    pytest.param([SERVICE], [Malformed(Kind.SERVICE, WEB, "spec", "bad")], set(), id="malformed"),
]


@pytest.mark.parametrize(("before", "change", "dirty"), CHANGES)
def test_a_change_makes_its_services_dirty_and_no_others(before, change, dirty):
    assert then(model_of(*before), *change) == dirty


@pytest.mark.parametrize(
    ("events", "web", "api"),
    [
        pytest.param([SERVICE, ONE, BESIDE], ["10.1.0.1:8080", "10.1.0.3:8080"], [], id="two-slices"),
        pytest.param([ONE, BESIDE, SERVICE], ["10.1.0.1:8080", "10.1.0.3:8080"], [], id="slices-before-their-service"),
        pytest.param([SERVICE, BESIDE, ONE, TWO], ["10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:8080"], [], id="latest"),
        pytest.param([SERVICE, OTHER, ONE, MOVED], [], ["10.1.0.1:8080"], id="moved"),
        pytest.param([SERVICE, OTHER, ONE, MOVED, ONE], ["10.1.0.1:8080"], [], id="moved-and-back"),
        pytest.param([SERVICE, ONE, Delete(Kind.SERVICE, WEB), SERVICE], ["10.1.0.1:8080"], [], id="service-recreated"),
        pytest.param(
            [SERVICE, OTHER, ONE, MOVED, Delete(Kind.ENDPOINT_SLICE, key("s1"))], [], [], id="moved-and-deleted"
        ),
        pytest.param(
            [SERVICE, Upsert(piece("other/s1", (READY, ["10.1.0.9"]), of="other/web"))], [], [], id="another-namespace"
        ),
        pytest.param(
            [SERVICE, ONE, Upsert(piece("other/s1", (READY, ["10.1.0.9"]), of="other/web"))],
            ["10.1.0.1:8080"],
            [],
            id="slices-of-one-name-in-two-namespaces",
        ),
    ],
)
def test_backends_come_from_the_slices_of_now(events, web, api):
    model = model_of(*events)

    assert (backends(model), backends(model, API)) == (web, api)


@pytest.mark.parametrize(
    ("first", "relist", "dirty", "left"),
    [
        pytest.param([SERVICE, OTHER], [SERVICE, OTHER], set(), {"web", "api"}, id="nothing-changed"),
        pytest.param([SERVICE, OTHER], [OTHER], {"web"}, {"api"}, id="one-went-meanwhile"),
        pytest.param([SERVICE], [SERVICE, OTHER], {"api"}, {"web", "api"}, id="one-came-meanwhile"),
        pytest.param([SERVICE, OTHER], [], {"web", "api"}, set(), id="all-went"),
        pytest.param(
            [SERVICE, OTHER],
            [OTHER, Malformed(Kind.SERVICE, WEB, "spec.ports", "not a list")],
            set(),
            {"web", "api"},
            id="malformed-is-mentioned",
        ),
        pytest.param(
            [SERVICE, OTHER],
            [OTHER, SERVICE, Delete(Kind.SERVICE, WEB)],
            {"web"},
            {"api"},
            id="deleted-during-the-list",
        ),
        pytest.param(
            [SERVICE],
            [Delete(Kind.SERVICE, WEB), SERVICE],
            {"web"},
            {"web"},
            id="deleted-and-recreated-during-the-list",
        ),
        pytest.param(
            [SERVICE, OTHER],
            [SERVICE, ListStarted(Kind.SERVICE), OTHER],
            {"web"},
            {"api"},
            id="a-list-begun-again-counts-from-there",
        ),
    ],
)
def test_a_relist_is_a_difference(first, relist, dirty, left):
    model = model_of(*listed(Kind.SERVICE, *first))

    assert then(model, *listed(Kind.SERVICE, *relist)) == dirty
    assert {key.name for key in model.services} == left


def test_until_a_relist_has_ended_what_it_has_not_mentioned_stays():
    model = model_of(*listed(Kind.SERVICE, SERVICE, OTHER))

    assert then(model, ListStarted(Kind.SERVICE), OTHER) == set()
    assert WEB in model.services
    assert then(model, ListEnded(Kind.SERVICE)) == {"web"}


def test_a_relist_of_slices_drops_those_it_does_not_mention():
    model = model_of(SERVICE, *listed(Kind.ENDPOINT_SLICE, ONE, BESIDE))

    assert then(model, *listed(Kind.ENDPOINT_SLICE, BESIDE)) == {"web"}
    assert backends(model) == ["10.1.0.3:8080"]


def test_a_relist_of_one_kind_leaves_the_others():
    model = model_of(*listed(Kind.SERVICE, SERVICE), *listed(Kind.ENDPOINT_SLICE, ONE))

    assert then(model, *listed(Kind.NODE)) == set()
    assert backends(model) == ["10.1.0.1:8080"]


def test_the_model_is_synced_when_every_kind_was_listed():
    model = Model("n1")
    for kind in SERVICE_KINDS:
        assert not model.is_synced
        model.apply(ListEnded(kind))  # an end without a beginning says nothing
        assert not model.is_synced
        for event in listed(kind):
            model.apply(event)

    assert model.is_synced


def test_a_list_that_is_not_complete_deletes_nothing():
    model = model_of(*listed(Kind.SERVICE, Upsert(service())), ListStarted(Kind.SERVICE))

    then(model, ListEnded(Kind.SERVICE, is_complete=False))

    assert WEB in model.services
    assert model.incomplete == {Kind.SERVICE}
    assert then(model, ListStarted(Kind.SERVICE), ListEnded(Kind.SERVICE)) == {"web"}
    assert model.incomplete == set()


BOTH, V4, V6 = set(Family), {Family.IPV4}, {Family.IPV6}
UNREAD = Malformed(Kind.SERVICE, WEB, "spec", "x")
UNREAD_SLICE = Malformed(Kind.ENDPOINT_SLICE, key("s9"), "ports", "x", WEB)
DUAL = Upsert(service("web", "10.0.0.1", "fd00::1"))
ONE_V6 = Upsert(piece("s6", (READY, ["fd00:1::1"]), family=Family.IPV6))


@pytest.mark.parametrize(
    ("events", "unread"),
    [
        pytest.param([UNREAD], {WEB: BOTH}, id="never-readable"),
        pytest.param([UNREAD, UNREAD_SLICE, ONE], {WEB: BOTH}, id="never-readable-and-one-slice-of-it-is"),
        pytest.param([SERVICE, UNREAD], {}, id="was-readable"),
        pytest.param([UNREAD_SLICE], {WEB: BOTH}, id="a-slice-of-a-service-that-is-not-known"),
        pytest.param([SERVICE, UNREAD_SLICE], {WEB: V4}, id="its-only-slice"),
        pytest.param([SERVICE, ONE, UNREAD_SLICE], {}, id="one-slice-of-two"),
        pytest.param([SERVICE, OTHER, MOVED, UNREAD_SLICE], {WEB: V4}, id="another-service-has-a-slice"),
        pytest.param([DUAL, ONE, UNREAD_SLICE], {WEB: V6}, id="no-slice-of-one-family"),
        pytest.param([DUAL, ONE, ONE_V6, UNREAD_SLICE], {}, id="a-slice-of-each-family"),
        pytest.param([SERVICE, ONE, Malformed(Kind.ENDPOINT_SLICE, key("s1"), "ports", "x", WEB)], {}, id="slice-was"),
        pytest.param([Malformed(Kind.ENDPOINT_SLICE, key("s9"), "ports", "x")], {}, id="a-slice-of-nobody-knows-whom"),
        pytest.param([UNREAD, Delete(Kind.SERVICE, WEB)], {}, id="deleted"),
    ],
)
def test_what_was_never_readable(events, unread):
    assert model_of(*events).unread() == unread


def test_an_unreadable_slice_that_goes_makes_its_service_dirty():
    slice_key = ObjectKey("ns", "web-1")
    model = model_of(Malformed(Kind.ENDPOINT_SLICE, slice_key, "ports", "x", WEB))

    assert then(model, Delete(Kind.ENDPOINT_SLICE, slice_key)) == {"web"}


def test_a_malformed_version_leaves_what_the_object_said_before():
    model = model_of(SERVICE, ONE, Malformed(Kind.ENDPOINT_SLICE, key("s1"), "endpoints[0].addresses", "no address"))

    assert backends(model) == ["10.1.0.1:8080"]
    assert list(model.malformed) == [(Kind.ENDPOINT_SLICE, key("s1"))]


def test_an_object_of_which_not_all_could_be_read():
    faults = Fault("spec.externalIPs[0]", "'x' is no address"), Fault("spec.externalIPs[1]", "'y' is no address")
    model = model_of(Upsert(service(), faults))

    assert model.services[WEB] == service()
    assert model.unread() == {}
    assert list(model.malformed.values()) == [
        Malformed(
            Kind.SERVICE,
            WEB,
            "spec.externalIPs[0], spec.externalIPs[1]",
            "'x' is no address; 'y' is no address",
        )
    ]
    assert then(model, SERVICE) == set()
    assert not model.malformed


@pytest.mark.parametrize(
    "cure",
    [
        pytest.param([SERVICE], id="a-good-version"),
        pytest.param([Delete(Kind.SERVICE, WEB)], id="deletion"),
        pytest.param(listed(Kind.SERVICE), id="a-list-without-it"),
    ],
)
def test_a_fault_is_forgotten_with(cure):
    model = model_of(Malformed(Kind.SERVICE, WEB, "spec", "bad"))

    for event in cure:
        model.apply(event)

    assert not model.malformed


@pytest.mark.parametrize(
    ("events", "exists"),
    [
        pytest.param([], None, id="not-known-yet"),
        pytest.param([Upsert(NodeRecord("n1"))], True, id="said"),
        pytest.param(listed(Kind.NODE), False, id="not-in-the-list"),
        pytest.param(listed(Kind.NODE, Upsert(NodeRecord("n2"))), False, id="only-another-in-the-list"),
        pytest.param(listed(Kind.NODE, Malformed(Kind.NODE, NODE, "metadata.labels", "bad")), None, id="malformed"),
        pytest.param([*listed(Kind.NODE, Upsert(NodeRecord("n1"))), Delete(Kind.NODE, NODE)], False, id="deleted"),
        pytest.param(
            [*listed(Kind.NODE, Upsert(NodeRecord("n1"))), *listed(Kind.NODE)], False, id="gone-at-the-next-list"
        ),
        pytest.param(
            [Upsert(NodeRecord("n1")), Delete(Kind.NODE, ObjectKey("", "n2"))], True, id="another-node-deleted"
        ),
        pytest.param([Upsert(NodeRecord("n1")), Delete(Kind.NODE, NODE), Upsert(NodeRecord("n1"))], True, id="back"),
    ],
)
def test_whether_this_node_exists(events, exists):
    assert model_of(*events).node_exists is exists


def test_the_zone_of_this_node_chooses_among_hints():
    near, far = Traits(zones=frozenset("a")), Traits(zones=frozenset("b"))
    model = model_of(SERVICE, Upsert(piece("s1", (near, ["10.1.0.1"]), (far, ["10.1.0.2"]))))
    assert backends(model) == ["10.1.0.1:8080", "10.1.0.2:8080"]

    model.apply(Upsert(NodeRecord("n1", zone="b")))

    assert backends(model) == ["10.1.0.2:8080"]


# The node's addresses, and who has to do with them.

PUBLISHED = Upsert(service("api", "10.0.0.2", ports=[("http", 80, Protocol.TCP, 30080)], reached=external()))
EXPOSED = Upsert(service("lb", "10.0.0.3", reached=external("192.0.2.9", load_balancer=["198.51.100.1"])))
HOME, AWAY, LOOPBACK = (addresses(text) for text in ("192.0.2.1", "198.51.100.7", "127.0.0.1"))


def at(*local: bytes) -> AddressesChanged:
    return AddressesChanged(frozenset(local))


def node_ports(model: Model, of: ObjectKey = API) -> set[str]:
    """The addresses that a Service's NodePorts answer on."""
    return {
        format_address(frontend[:16])
        for want in model.desired(of)
        for frontend, role in zip(want.frontends, want.roles, strict=True)
        if role.kind == FrontendKind.NODE_PORT
    }


@pytest.mark.parametrize(
    ("before", "change", "dirty", "answers_on"),
    [
        pytest.param([], [at(HOME)], {"api"}, {"192.0.2.1"}, id="become-known"),
        pytest.param([at(HOME)], [at(HOME)], set(), {"192.0.2.1"}, id="said-again"),
        pytest.param([at(HOME)], [at(HOME, AWAY)], {"api"}, {"192.0.2.1", "198.51.100.7"}, id="one-comes"),
        pytest.param([at(HOME, AWAY)], [at(HOME)], {"api"}, {"192.0.2.1"}, id="one-goes"),
        pytest.param([at(HOME)], [at(HOME, LOOPBACK)], {"api"}, {"192.0.2.1", "127.0.0.1"}, id="loopback"),
        pytest.param([at(HOME)], [at()], {"api"}, set(), id="all-go"),
        pytest.param([at(HOME)], [at(HOME, addresses("::1"))], set(), {"192.0.2.1"}, id="no-loopback-of-ipv6"),
    ],
)
def test_services_with_node_ports_follow_the_nodes_addresses(before, change, dirty, answers_on):
    model = model_of(SERVICE, PUBLISHED, EXPOSED, *before)

    assert then(model, *change) == dirty
    assert node_ports(model) == answers_on


def test_a_service_that_gives_up_its_node_port_is_left_alone():
    model = model_of(PUBLISHED, Upsert(service("api", "10.0.0.2")))
    assert then(model, at(HOME)) == set()

    model = model_of(PUBLISHED, Delete(Kind.SERVICE, API))
    assert then(model, at(HOME)) == set()


def test_addresses_that_are_awaited():
    model = Model("n1", awaits_addresses=True)
    for kind in SERVICE_KINDS:
        for event in listed(kind):
            model.apply(event)
    assert not model.is_synced

    model.apply(at())
    assert model.is_synced


LB = ObjectKey("ns", "lb")
HERE, GOING = Traits(local=True), Traits(ready=False, terminating=True, local=True)
CHECKED = Upsert(
    service("lb", reached=external(load_balancer=["198.51.100.1"], local=True, health_check_node_port=32000))
)


def slices_of(name: str, *runs: tuple[Traits, list[str]], **tweaks: Any) -> Upsert:
    return Upsert(piece(name, *runs, of="lb", **tweaks))


@pytest.mark.parametrize(
    ("slices", "count"),
    [
        pytest.param([], 0, id="none"),
        pytest.param([slices_of("s", (HERE, ["10.1.0.1", "10.1.0.2"]))], 2, id="here"),
        pytest.param([slices_of("s", (HERE, ["10.1.0.1"]), (READY, ["10.1.0.2"]))], 1, id="here-and-elsewhere"),
        pytest.param([slices_of("s", (GOING, ["10.1.0.1"]))], 0, id="terminating"),
        pytest.param(
            [slices_of("s", (Traits(local=True, terminating=True), ["10.1.0.1"]))], 1, id="published-though-terminating"
        ),
        pytest.param(
            [slices_of("s", (HERE, ["10.1.0.1"])), slices_of("t", (HERE, ["10.1.0.1"]))], 1, id="one-address-twice"
        ),
        pytest.param(
            [
                slices_of("s", (HERE, ["10.1.0.1", "10.1.0.2"])),
                slices_of("t", (HERE, ["fd01::1"]), family=Family.IPV6),
            ],
            2,
            id="the-family-with-more",
        ),
    ],
)
def test_a_health_check_counts_ready_endpoints_here(slices, count):
    assert model_of(CHECKED, *slices).health_checks() == {LB: HealthCheck(32000, count)}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(Delete(Kind.SERVICE, LB), id="goes"),
        pytest.param(Upsert(service("lb")), id="asks-no-longer"),
        pytest.param(Upsert(ServiceRecord(LB, (), (), external=CHECKED.record.external)), id="loses-its-cluster-ip"),
    ],
)
def test_a_health_check_goes_with_its_service(change):
    model = model_of(CHECKED)
    assert LB in model.health_checks()

    model.apply(change)
    assert model.health_checks() == {}


def test_health_checks_follow_their_slices():
    model = model_of(CHECKED)
    assert model.health_checks()[LB].local_endpoints == 0

    model.apply(slices_of("s", (HERE, ["10.1.0.1"])))
    assert model.health_checks()[LB].local_endpoints == 1
    model.apply(Delete(Kind.ENDPOINT_SLICE, key("s")))
    assert model.health_checks()[LB].local_endpoints == 0
