"""Maglev at the packet path: clients outside get one backend on whichever node they enter, and most keep it."""

from __future__ import annotations

import random
import sys
from array import array
from collections import Counter as Tally
from collections.abc import Callable

import pytest
from scapy.layers.l2 import Ether

from agent.core.abi import (
    MAGLEV_SIZE,
    MAGLEV_TABLE,
    Frontend,
    FrontendFlag,
    FrontendKey,
    FrontendKind,
    pack_backends,
    pack_header,
)
from agent.core.addresses import parse_address
from agent.core.maglev import build_table, walks
from agent.core.records import Protocol
from tests.bpf import packet_path as at
from tests.bpf.packet_path import PacketPath, to
from tests.bpf.packets import End, packet
from tests.bpf.talk import TARGET

FRONTENDS = (End("198.51.100.10", 80), End("2001:db8:51::10", 80))
BACKENDS = tuple(
    tuple(End(pattern.format(10 + number), TARGET) for number in range(10))
    for pattern in ("10.180.1.{}", "fd00:10:180:1::{}")
)
CLIENTS = [(family, port) for family in (0, 1) for port in range(5000, 5100)]
EXTERNAL = FrontendKind.LOAD_BALANCER
Chosen = dict[tuple[int, int], str]


def of_backends(backends: tuple[End, ...]) -> array[int]:
    """Build the table that the agent would."""
    return build_table(walks([pack_backends(parse_address(end.address), end.port)[0] for end in backends]))


def hash_by(path: PacketPath, frontend: End, count: int, table: array[int], number: int) -> None:
    """Give the segment for clients outside a table."""
    key = FrontendKey(parse_address(frontend.address), frontend.port, Protocol.TCP).pack()
    base = Frontend.unpack(path.store.maps["frontends"].lookup(key) or b"").outside
    path.store.write_table(number, table.tobytes().ljust(MAGLEV_TABLE.size, b"\0"))
    header = pack_header(count, drop=False, table=number)
    path.store.maps["segments"].update(base.to_bytes(4, sys.byteorder), header)


def choose(
    path: PacketPath,
    arrange: Callable[[tuple[End, ...]], tuple[End, ...]] = lambda backends: backends,
    tables: Callable[[tuple[End, ...]], array[int]] = of_backends,
    device: str = "eth0",
    **service: int,
) -> Chosen:
    """Let clients ask a node that knows these backends in this order; returns whom each of them got."""
    path.clear()
    for number, (frontend, backends) in enumerate(zip(FRONTENDS, BACKENDS, strict=True), start=1):
        arranged = arrange(backends)
        flags = {"flags": FrontendFlag.MAGLEV, **service}
        path.serve("tcp", frontend, inside=to(*backends), outside=to(*arranged), kind=EXTERNAL, **flags)
        hash_by(path, frontend, len(arranged), tables(arranged), number)
    sources = at.OUTSIDE if device == "eth0" else at.POD_ONE
    return {
        (family, port): str(
            Ether(path.ingress(device, packet("tcp", End(sources[family], port), FRONTENDS[family])).packet)[1].dst
        )
        for family, port in CLIENTS
    }


def shuffled(backends: tuple[End, ...]) -> tuple[End, ...]:
    """Another node's order."""
    return tuple(random.Random(7).sample(backends, len(backends)))


def test_clients_get_the_same_backend_on_nodes_that_have_them_in_another_order(path):
    here = choose(path)

    assert choose(path, shuffled) == here
    assert set(here.values()) == {end.address for family in BACKENDS for end in family}


def test_a_backend_that_goes_moves_few_besides_its_own_clients(path):
    before = choose(path)

    after = choose(path, lambda backends: (*backends[:3], backends[9], *backends[4:9]))

    gone = {family[3].address for family in BACKENDS}
    moved = [client for client, backend in before.items() if backend not in gone and after[client] != backend]
    assert not gone & set(after.values())
    assert len(moved) <= 0.03 * len(CLIENTS)


def test_without_a_table_a_backend_that_goes_moves_many(path):
    """What Maglev is for: the test above would not fail if clients were never moved."""
    before = choose(path, flags=0)

    after = choose(path, lambda backends: backends[1:], flags=0)

    assert sum(after[client] != backend for client, backend in before.items()) > 0.3 * len(CLIENTS)


def test_clients_inside_choose_at_random(path):
    first = lambda _: array("H", [0]) * MAGLEV_SIZE  # noqa: E731 - a table that leads to one backend

    outside, inside = choose(path, tables=first), choose(path, tables=first, device="one")

    assert set(outside.values()) == {family[0].address for family in BACKENDS}
    assert len(set(inside.values())) > 10


@pytest.mark.parametrize("entry", [10, 0xFFFF], ids=["behind-the-last", "not-built-yet"])
def test_a_table_that_leads_past_the_backends_leaves_the_choice_to_chance(path, entry):
    chosen = choose(path, tables=lambda _: array("H", [entry]) * MAGLEV_SIZE)

    shares = Tally(chosen.values())
    assert shares.keys() == {end.address for family in BACKENDS for end in family}


def test_affinity_goes_first(path):
    chosen = choose(path, affinity_s=100)

    assert len(set(chosen.values())) == 2, "one client each family, whatever its port"
