"""Hypothesis strategies for records and events, over a universe small enough that objects meet."""

from __future__ import annotations

from hypothesis import strategies as st

from agent.core.addresses import AddressRange
from agent.core.events import AddressesChanged, Delete, Event, ListEnded, ListStarted, Malformed, Upsert
from agent.core.records import (
    SERVICE_KINDS,
    Algorithm,
    External,
    Family,
    Fault,
    Forwarding,
    Kind,
    NodeRecord,
    ObjectKey,
    Protocol,
    ServicePort,
    ServiceRecord,
    SlicePort,
    SliceRecord,
    Traits,
)
from tests.builders import addresses

NODE_NAME = "n1"
SERVICE_KEYS = [ObjectKey("ns", name) for name in ("a", "b", "c", "d")]
SLICE_KEYS = [ObjectKey("ns", name) for name in ("a-1", "a-2", "b-1", "c-1")]
CLUSTER_IPS = [addresses(f"10.0.0.{i}") for i in (1, 2, 3)]
CLUSTER_IPS_V6 = [addresses(f"fd00::{i}") for i in (1, 2)]
ZONES = ("", "x", "y")
EXTERNAL_IPS = [addresses("192.0.2.9"), addresses("2001:db8::9")]
LOAD_BALANCER_IPS = [addresses("198.51.100.1"), addresses("192.0.2.9"), addresses("2001:db8:2::1")]
SOURCE_RANGES = [AddressRange.parse(text) for text in ("10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "fd00::/8")]
NODE_ADDRESSES = [addresses(text) for text in ("192.0.2.1", "192.0.2.2", "127.0.0.1", "2001:db8::1", "::1")]
PODS = {
    Family.IPV4: [addresses(f"10.1.0.{i}") for i in range(1, 13)],
    Family.IPV6: [addresses(f"fd01::{i:x}") for i in range(1, 5)],
}
_PORT_NAMES = st.sampled_from(["", "http", "admin"])
_PROTOCOLS = st.sampled_from([Protocol.TCP, Protocol.UDP])
_CREATED = st.sampled_from(["", "2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z"])

service_keys = st.sampled_from(SERVICE_KEYS)
slice_keys = st.sampled_from(SLICE_KEYS)


# Strategies are made once: made anew at each draw they cost more than what they draw.
service_ports = st.lists(
    st.builds(ServicePort, _PORT_NAMES, _PROTOCOLS, st.sampled_from([80, 81]), st.sampled_from([0, 0, 30080, 30081])),
    max_size=3,
    unique_by=lambda port: (port.name, port.protocol),  # two may have one number, as only a manifest can say
).map(tuple)
_cluster_ips = st.tuples(
    st.sampled_from([*CLUSTER_IPS, None]), st.sampled_from([*CLUSTER_IPS_V6, None, None, None])
).map(lambda pair: tuple(filter(None, pair)))
_externals = st.builds(
    External,
    external_ips=st.lists(st.sampled_from(EXTERNAL_IPS), max_size=2, unique=True).map(tuple),
    load_balancer_ips=st.lists(st.sampled_from(LOAD_BALANCER_IPS), max_size=2, unique=True).map(tuple),
    source_ranges=st.lists(st.sampled_from(SOURCE_RANGES), max_size=3, unique=True).map(tuple),
    is_local=st.booleans(),
    health_check_node_port=st.sampled_from([0, 32000]),
    forwarding=st.sampled_from([None, None, Forwarding.DSR]),
    algorithm=st.sampled_from([None, None, Algorithm.MAGLEV]),
    lacks_ranges=st.sampled_from([False, False, True]),
)
services = st.builds(
    ServiceRecord,
    service_keys,
    _cluster_ips,
    service_ports,
    st.booleans(),
    _CREATED,
    st.sampled_from([0, 0, 10_800]),
    st.none() | _externals,
)

traits = st.just(Traits()) | st.builds(
    Traits,
    ready=st.booleans(),
    serving=st.booleans(),
    terminating=st.booleans(),
    local=st.booleans(),
    zones=st.none() | st.frozensets(st.sampled_from(ZONES[1:]), min_size=1),
    node_hint=st.sampled_from([None, True, False]),
)
_slice_ports = st.lists(
    st.builds(SlicePort, _PORT_NAMES, _PROTOCOLS, st.sampled_from([8080, 8081])),
    min_size=1,
    max_size=3,
    unique_by=lambda port: (port.name, port.protocol),
).map(tuple)
_runs = {
    family: st.lists(
        st.tuples(traits, st.lists(st.sampled_from(pods), min_size=1, max_size=8, unique=True).map(b"".join)),
        max_size=3,
    ).map(tuple)
    for family, pods in PODS.items()
}
slices = st.one_of(
    *(
        st.builds(SliceRecord, slice_keys, service_keys, st.just(family), _slice_ports, _runs[family])
        for family in (Family.IPV4, Family.IPV4, Family.IPV6)
    )
)
nodes = st.builds(NodeRecord, st.sampled_from([NODE_NAME, NODE_NAME, "n2"]), st.sampled_from(ZONES))


def _upsert(record: ServiceRecord, left_out: tuple[Fault, ...]) -> Upsert:
    return Upsert(record, left_out)


_keyed = st.tuples(st.just(Kind.SERVICE), service_keys) | st.tuples(st.just(Kind.ENDPOINT_SLICE), slice_keys)
networks = st.builds(AddressesChanged, st.frozensets(st.sampled_from(NODE_ADDRESSES)))
changes: st.SearchStrategy[Event] = st.one_of(
    st.builds(_upsert, services, st.sampled_from([(), (), (Fault("spec.externalIPs[0]", "as the test asked"),)])),
    slices.map(Upsert),
    slices.map(Upsert),
    nodes.map(Upsert),
    networks,
    _keyed.map(lambda pair: Delete(*pair)),
    _keyed.map(lambda pair: Malformed(*pair, field="spec", reason="as the test asked")),
)
"""One object appears, changes, goes or cannot be read, or the node's addresses change."""

relists: st.SearchStrategy[list[Event]] = st.one_of(
    *(
        st.lists(listed.map(Upsert) | changes, max_size=4).map(
            lambda items, kind=kind: [ListStarted(kind), *items, ListEnded(kind)]
        )
        for kind, listed in ((Kind.SERVICE, services), (Kind.ENDPOINT_SLICE, slices))
    )
)
"""A full list of a kind, which changes may interrupt."""

batches: st.SearchStrategy[list[Event]] = st.lists(changes, min_size=1, max_size=5) | relists
"""Events that the reconciler takes in at once."""


def first_lists() -> list[Event]:
    """Every kind listed, with nothing in it."""
    return [event(kind) for kind in SERVICE_KINDS for event in (ListStarted, ListEnded)]
