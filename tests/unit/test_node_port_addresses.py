"""Where NodePorts answer: addresses that come and go, and which of them are the node's primary ones."""

from __future__ import annotations

import pytest

from agent.core.addresses import AddressRange, format_address, parse_address
from agent.core.events import AddressesChanged, Upsert
from agent.core.model import Model
from agent.core.options import ServiceOptions
from agent.core.records import NodeRecord

LOCAL = ("127.0.0.1", "192.0.2.1", "192.0.2.2", "198.51.100.1", "::1", "2001:db8::1", "2001:db8::2")
ROUTES = ("192.0.2.1", "2001:db8::1")
NODE = "node-1"


def addresses(*texts: str) -> frozenset[bytes]:
    return frozenset(map(parse_address, texts))


def options(*ranges: str, primary: bool = False, bind: str = "", localhost: bool = True) -> ServiceOptions:
    return ServiceOptions(
        node_port_ranges=tuple(map(AddressRange.parse, ranges)),
        is_node_port_primary=primary,
        has_localhost_node_ports=localhost,
        bind_address=parse_address(bind) if bind else None,
    )


def chosen(model: Model) -> set[str]:
    return set(map(format_address, model.node_port_addresses))


@pytest.mark.parametrize(
    ("given", "named", "expected"),
    [
        pytest.param(options(), (), set(LOCAL) - {"::1"}, id="unset: all, and no loopback of IPv6"),
        pytest.param(options(localhost=False), (), set(LOCAL) - {"::1", "127.0.0.1"}, id="unset, no localhost"),
        pytest.param(options("127.0.0.0/8", "::1/128"), (), {"127.0.0.1"}, id="localhost alone"),
        pytest.param(options("127.0.0.0/8", "::1/128", localhost=False), (), set(), id="localhost, and yet not"),
        pytest.param(options("192.0.2.0/24", "::/0"), (), {"192.0.2.1", "192.0.2.2", *LOCAL[5:]}, id="ranges"),
        pytest.param(options("192.0.2.2/32"), (), {"192.0.2.2", *LOCAL[5:]}, id="a family without a range: all"),
        pytest.param(options(primary=True), (), set(ROUTES), id="primary by routes"),
        pytest.param(
            options(primary=True),
            ("198.51.100.1", "192.0.2.2", "2001:db8::2"),
            {"198.51.100.1", "2001:db8::2"},
            id="primary by the Node: the first of each family",
        ),
        pytest.param(options(primary=True), ("192.0.2.2",), {"192.0.2.2", "2001:db8::1"}, id="primary of one family"),
        pytest.param(
            options(primary=True), ("203.0.113.9", "192.0.2.2"), {"192.0.2.2", "2001:db8::1"}, id="named, not local"
        ),
        pytest.param(
            options(primary=True, bind="192.0.2.2"), ("198.51.100.1",), {"192.0.2.2", "2001:db8::1"}, id="bind address"
        ),
        pytest.param(options(primary=True, bind="203.0.113.9"), (), set(ROUTES), id="bind address that is not local"),
    ],
)
def test_addresses(given, named, expected):
    events = [
        AddressesChanged(addresses(*LOCAL), addresses(*ROUTES)),
        Upsert(NodeRecord(NODE, addresses=named)),
    ]
    for order in (events, events[::-1]):
        model = Model(NODE, given)
        for event in order:
            model.apply(event)

        assert chosen(model) == expected


def test_addresses_come_and_go():
    model = Model(NODE, options())
    for local in (("192.0.2.1",), ("192.0.2.1", "192.0.2.2"), ()):
        model.apply(AddressesChanged(addresses(*local)))

        assert chosen(model) == set(local)
