"""What `ebproxy trace` says: the table of origins and frontends, over maps that were planned from records."""

from __future__ import annotations

import time

import pytest

from agent.cli.decision import Client, Maps
from agent.core.abi import (
    AFFINITY,
    AFFINITY_KEY,
    DEVICE,
    Frontend,
    FrontendKey,
    port_bytes,
    unpack_source_range,
)
from agent.core.addresses import AddressRange, parse_address
from agent.core.options import ServiceOptions
from agent.core.plan import Plan
from agent.core.planner import Planner
from agent.core.records import Forwarding, Protocol, Traits
from agent.core.services import resolve
from agent.errors import ConfigError
from agent.observe.names import Name
from tests.builders import READY, external, frontend, piece, service
from tests.property.fake_maps import FakeMaps

TCP = Protocol.TCP
PLAIN = ServiceOptions()
NODE, POD, STRANGER = "192.0.2.1", "10.1.0.7", "203.0.113.5"
HERE, THERE, ON_NODE = "10.1.0.1", "10.1.0.2", NODE
LOCAL = Traits(local=True)
ALL = (HERE + ":8080", THERE + ":8080")


class Table:
    """One map: a dictionary by packed key."""

    def __init__(self, entries: dict[bytes, bytes] | None = None) -> None:
        self.entries = entries or {}

    def lookup(self, key: bytes) -> bytes | None:
        return self.entries.get(key)


class Ranges(Table):
    """Source ranges, by longest prefix."""

    def lookup(self, key: bytes) -> bytes | None:
        service, client, _ = unpack_source_range(key)
        for raw, value in self.entries.items():
            ident, *it = unpack_source_range(raw)
            if ident == service and AddressRange(*it).contains(client):
                return value
        return None


class Store:
    """The maps of a node at 192.0.2.1, with one Service."""

    def __init__(self, record, *pieces, options: ServiceOptions) -> None:
        self.fake = FakeMaps()
        planner, plan = Planner(64, 16, self.fake.read_state()), Plan()
        addresses = tuple(map(parse_address, (NODE, "127.0.0.1")))
        planner.plan_service(record.key, "", resolve(record, pieces, "", addresses, options), plan)
        self.fake.apply(plan)
        device = DEVICE.packer.pack(parse_address(NODE), bytes(16), 0)
        self.maps = {
            "frontends": Table(self.fake.frontends),
            "source_ranges": Ranges(self.fake.source_ranges),
            "affinity": Table(),
            "node_addresses": Table(dict.fromkeys(addresses, b"\1")),
            "devices": Table({bytes(4): device}),
        }

    def read_segments(self, bases: set[int]) -> dict[int, tuple[bytes, bool]]:
        return {base: found for base, found in self.fake.read_state().segments.items() if base in bases}


def outcome(record, target, client, *pieces, socket_lb="off", options=PLAIN, protocol=TCP, keep=None):
    """Trace to ``(address, port)`` from an origin and address."""
    store = Store(record, *pieces, options=options)
    if keep:
        ident = Frontend.unpack(store.fake.frontends[frontend(*target)]).service
        address, port, age_s = keep
        value = AFFINITY.packer.pack(parse_address(address), port_bytes(port), 0, 0, int(time.monotonic()) - age_s)
        store.maps["affinity"].entries[AFFINITY_KEY.packer.pack(parse_address(client[1]), ident)] = value
    names = {1: Name("ns/web", "http", "TCP", "IPv4")}
    origin, address = client
    asked = Client(origin, parse_address(address) if address else None)
    return Maps(store, names, socket_lb).decide(FrontendKey(parse_address(target[0]), target[1], protocol), asked)


BOTH = piece("s", (LOCAL, [HERE]), (READY, [THERE]))
CLUSTER_IP, NODE_PORT, EXTERNAL_IP, LB = ("10.0.0.1", 80), (NODE, 30080), ("192.0.2.9", 80), ("198.51.100.1", 80)
PORTS = [("http", 80, TCP, 30080)]


def published(**tweaks):
    return service(ports=PORTS, reached=external("192.0.2.9", load_balancer=["198.51.100.1"], **tweaks))


HOST, LOOP, IN_POD, OUTSIDE = ("host", None), ("host", "127.0.0.1"), ("pod", POD), ("outside", STRANGER)
# Packet path: frontend, external policy, origin -> backends, whether they see the node's address.
TABLE = [
    (CLUSTER_IP, "Cluster", IN_POD, ALL, False),
    (CLUSTER_IP, "Cluster", HOST, ALL, False),
    (CLUSTER_IP, "Cluster", OUTSIDE, ALL, True),
    (NODE_PORT, "Cluster", IN_POD, ALL, True),
    (NODE_PORT, "Cluster", HOST, ALL, False),
    (("127.0.0.1", 30080), "Cluster", HOST, ALL, True),
    (NODE_PORT, "Cluster", LOOP, ALL, True),
    (NODE_PORT, "Cluster", OUTSIDE, ALL, True),
    (NODE_PORT, "Local", IN_POD, ALL, False),
    (NODE_PORT, "Local", HOST, ALL, False),
    (NODE_PORT, "Local", LOOP, ALL, True),
    (NODE_PORT, "Local", OUTSIDE, ALL[:1], False),
    (EXTERNAL_IP, "Cluster", IN_POD, ALL, True),
    (EXTERNAL_IP, "Cluster", HOST, ALL, False),
    (EXTERNAL_IP, "Cluster", OUTSIDE, ALL, True),
    (EXTERNAL_IP, "Local", IN_POD, ALL, False),
    (EXTERNAL_IP, "Local", HOST, ALL, False),
    (EXTERNAL_IP, "Local", OUTSIDE, ALL[:1], False),
    (LB, "Cluster", IN_POD, ALL, True),
    (LB, "Cluster", HOST, ALL, False),
    (LB, "Cluster", OUTSIDE, ALL, True),
    (LB, "Local", IN_POD, ALL, False),
    (LB, "Local", HOST, ALL, False),
    (LB, "Local", OUTSIDE, ALL[:1], False),
]


@pytest.mark.parametrize(
    ("target", "policy", "client", "backends", "is_hidden"),
    TABLE,
    ids=[f"{target[0]}-{policy}-{client[0]}-{client[1] or ''}" for target, policy, client, _, _ in TABLE],
)
def test_origins_and_frontends(target, policy, client, backends, is_hidden):
    said = outcome(published(local=policy == "Local"), target, client, BOTH)

    assert (said.verdict, said.backends, said.source_nat) == ("forward", backends, is_hidden)
    assert (said.frontend["service"], said.frontend["port"]) == ("ns/web", "http")


@pytest.mark.parametrize(
    ("target", "policy", "backends", "is_hidden"),
    [
        pytest.param(CLUSTER_IP, "Cluster", ALL, False, id="a ClusterIP"),
        pytest.param(NODE_PORT, "Cluster", ALL, True, id="a NodePort"),
        pytest.param(EXTERNAL_IP, "Local", ALL[:1], False, id="the policy Local"),
    ],
)
def test_where_nobody_says_what_addresses_pods_have(target, policy, backends, is_hidden):
    said = outcome(published(local=policy == "Local"), target, ("unknown", STRANGER), BOTH)

    assert (said.verdict, said.backends, said.source_nat) == ("forward", backends, is_hidden)


@pytest.mark.parametrize(
    ("target", "kind"),
    [(CLUSTER_IP, "ClusterIP"), (NODE_PORT, "NodePort"), (EXTERNAL_IP, "ExternalIP"), (LB, "LoadBalancer")],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_what_a_frontend_is(target, kind):
    assert outcome(published(), target, OUTSIDE, BOTH).frontend["kind"] == kind


@pytest.mark.parametrize("socket_lb", ["all", "host", "off"])
@pytest.mark.parametrize("client", [HOST, IN_POD, OUTSIDE], ids=lambda it: it[0])
def test_sockets_speak_from_their_own_address(socket_lb, client):
    said = outcome(published(), NODE_PORT, client, BOTH, socket_lb=socket_lb)
    at_socket = client[0] in {"all": ("host", "pod"), "host": ("host",), "off": ()}[socket_lb]

    assert said.source_nat is (not at_socket and client is not HOST)
    assert ("connect()" in said.reason) is at_socket


def test_sctp_is_left_to_the_packet_path():
    record = service(ports=[("sig", 80, Protocol.SCTP, 30080)], reached=external())
    ports = [("sig", 8080, Protocol.SCTP)]
    said = outcome(
        record, NODE_PORT, IN_POD, piece("s", (READY, [HERE]), ports=ports), socket_lb="all", protocol=Protocol.SCTP
    )

    assert (said.verdict, said.source_nat) == ("forward", True)


@pytest.mark.parametrize(
    ("record", "options", "target", "client", "pieces", "is_hidden"),
    [
        pytest.param(published(), PLAIN, CLUSTER_IP, ("pod", HERE), [BOTH], False, id="hairpin-is-not-all"),
        pytest.param(published(), PLAIN, CLUSTER_IP, ("pod", HERE), [piece("s", (LOCAL, [HERE]))], True, id="hairpin"),
        pytest.param(
            published(), ServiceOptions(masquerade_all=True), CLUSTER_IP, IN_POD, [BOTH], True, id="masquerade-all"
        ),
        pytest.param(published(), PLAIN, NODE_PORT, OUTSIDE, [piece("s", (LOCAL, [ON_NODE]))], False, id="on-the-node"),
        pytest.param(published(forwarding=Forwarding.DSR), PLAIN, NODE_PORT, OUTSIDE, [BOTH], False, id="dsr"),
        pytest.param(published(forwarding=Forwarding.DSR), PLAIN, NODE_PORT, IN_POD, [BOTH], True, id="dsr-for-a-pod"),
    ],
)
def test_who_is_hidden(record, options, target, client, pieces, is_hidden):
    assert outcome(record, target, client, *pieces, options=options).source_nat is is_hidden


AWAY = piece("s", (READY, [THERE]))
REFUSALS = [
    pytest.param(published(), CLUSTER_IP, IN_POD, [], "reject", id="no-endpoints"),
    pytest.param(published(), NODE_PORT, OUTSIDE, [], "reject", id="no-endpoints-of-a-node-port"),
    pytest.param(service(local=True), CLUSTER_IP, IN_POD, [AWAY], "drop", id="internal-policy"),
    pytest.param(published(local=True), NODE_PORT, OUTSIDE, [AWAY], "drop", id="external-policy"),
    pytest.param(published(local=True), NODE_PORT, IN_POD, [AWAY], "forward", id="external-policy-from-a-pod"),
    pytest.param(published(), ("10.0.0.1", 81), IN_POD, [BOTH], "reject", id="a-port-that-a-cluster-ip-lacks"),
    pytest.param(published(), ("198.51.100.1", 81), OUTSIDE, [BOTH], "pass", id="a-port-that-a-load-balancer-lacks"),
    pytest.param(published(), ("0.0.0.0", 30080), HOST, [BOTH], "pass", id="the-address-zero"),
    pytest.param(published(), (HERE, 8080), IN_POD, [BOTH], "pass", id="a-pod"),
    pytest.param(published(ranges=["203.0.113.0/24"]), LB, OUTSIDE, [BOTH], "forward", id="in-range"),
    pytest.param(published(ranges=["10.0.0.0/8"]), LB, OUTSIDE, [BOTH], "drop", id="not-in-range"),
    pytest.param(published(ranges=["203.0.113.0/24"]), LB, IN_POD, [BOTH], "drop", id="a-pod-not-in-range"),
    pytest.param(published(ranges=["192.0.2.1/32"]), LB, HOST, [BOTH], "forward", id="the-host-in-range"),
    pytest.param(published(ranges=["10.0.0.0/8"]), NODE_PORT, OUTSIDE, [BOTH], "forward", id="a-node-port-has-none"),
]


@pytest.mark.parametrize(("record", "target", "client", "pieces", "verdict"), REFUSALS)
def test_verdicts(record, target, client, pieces, verdict):
    said = outcome(record, target, client, *pieces)

    assert said.verdict == verdict
    assert (said.frontend is None) is (verdict == "pass")
    assert bool(said.backends) is (verdict == "forward")


def test_source_ranges_need_an_address():
    with pytest.raises(ConfigError):
        outcome(published(ranges=["10.0.0.0/8"]), LB, ("pod", None), BOTH)


@pytest.mark.parametrize(
    ("keep", "backends"),
    [
        pytest.param(None, ALL, id="new-client"),
        pytest.param((THERE, 8080, 0), ALL[1:], id="came-before"),
        pytest.param((THERE, 8080, 59), ALL[1:], id="came-in-time"),
        pytest.param((THERE, 8080, 70), ALL, id="too-long-ago"),
        pytest.param(("10.1.0.3", 8080, 0), ALL, id="its-backend-is-gone"),
        pytest.param((THERE, 9090, 0), ALL, id="its-backend-has-another-port"),
    ],
)
@pytest.mark.parametrize("socket_lb", ["all", "off"])
def test_affinity(keep, backends, socket_lb):
    said = outcome(service(affinity_s=60), CLUSTER_IP, IN_POD, BOTH, keep=keep, socket_lb=socket_lb)

    assert (said.verdict, said.backends) == ("forward", backends)
    assert ("had before" in said.reason) is (backends != ALL)


@pytest.mark.parametrize(
    ("pieces", "socket_lb", "words"),
    [
        pytest.param([BOTH], "all", "connect() goes to one of 2, at random", id="connect"),
        pytest.param([BOTH], "off", "its packets go to one of 2, at random", id="packets"),
        pytest.param([piece("s", (READY, [THERE]))], "all", "connect() goes to the only one", id="one, connect"),
        pytest.param([piece("s", (READY, [THERE]))], "off", "its packets go to the only one", id="one, packets"),
    ],
)
def test_of_one_backend_nobody_says_that_it_is_chosen(pieces, socket_lb, words):
    assert outcome(service(), CLUSTER_IP, IN_POD, *pieces, socket_lb=socket_lb).reason == words
