"""Structs are packed byte for byte as the programs read them."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import reduce
from operator import or_

import pytest

from agent.core.abi import (
    FRONTEND,
    FRONTEND_KEY,
    FRONTEND_KIND_MASK,
    MAGLEV_BUILD,
    MAGLEV_TABLE,
    MAGLEV_WALK,
    ORIGIN,
    PEER_KEY,
    PEER_ORIGIN,
    SLOT,
    Counter,
    Frontend,
    FrontendFlag,
    FrontendKey,
    MapSizes,
    layout_id,
    map_specs,
    pack_backends,
    pack_header,
    unpack_backend,
    unpack_header,
)
from agent.core.addresses import parse_address
from agent.core.records import Protocol
from tests.builders import addresses

V4 = "00000000000000000000ffff"
U32_1 = "01000000" if sys.byteorder == "little" else "00000001"
U32_2 = "02000000" if sys.byteorder == "little" else "00000002"
U32_3 = "03000000" if sys.byteorder == "little" else "00000003"
EVERY_FLAG = FRONTEND_KIND_MASK | reduce(or_, FrontendFlag)
U16_1 = "0100" if sys.byteorder == "little" else "0001"


@pytest.mark.parametrize(
    ("text", "port", "protocol", "packed"),
    [
        pytest.param("10.0.0.1", 80, Protocol.TCP, V4 + "0a000001" + "0050" + "06" + "00", id="tcp-ipv4"),
        pytest.param("10.0.0.1", 0x1234, Protocol.UDP, V4 + "0a000001" + "1234" + "11" + "00", id="udp-port-order"),
        pytest.param("fd00::1", 65535, Protocol.SCTP, "fd" + "00" * 14 + "01" + "ffff" + "84" + "00", id="sctp-ipv6"),
    ],
)
def test_a_frontend_key_is_twenty_bytes_in_network_order(text, port, protocol, packed):
    key = FrontendKey(parse_address(text), port, protocol)

    assert key.pack().hex() == packed
    assert FrontendKey.unpack(bytes.fromhex(packed)) == key


@pytest.mark.parametrize(
    ("frontend", "word"),
    [
        pytest.param(Frontend(1, 2, 3), 0, id="nothing"),
        pytest.param(Frontend(1, 2, 3, 0, EVERY_FLAG), 0xFF, id="flags"),
        pytest.param(Frontend(1, 2, 3, 1), 0x1000, id="a-second"),
        pytest.param(Frontend(1, 2, 3, 86_400, EVERY_FLAG), 0x1518_00FF, id="flags-and-the-longest-timeout"),
    ],
)
def test_a_frontend_is_four_words_in_host_order(frontend, word):
    assert frontend.pack().hex() == U32_1 + U32_2 + U32_3 + word.to_bytes(4, sys.byteorder).hex()
    assert Frontend.unpack(frontend.pack()) == frontend


def test_backends_are_one_slot_each():
    first, second = pack_backends(addresses("10.0.0.1", "fd00::2"), 8080)

    assert first.hex() == V4 + "0a000001" + "1f90" + "0000" + "00000000"
    assert second.hex() == "fd" + "00" * 14 + "02" + "1f90" + "0000" + "00000000"
    assert unpack_backend(second) == (parse_address("fd00::2"), 8080)


@pytest.mark.parametrize(
    ("count", "drop", "table", "packed"),
    [
        pytest.param(0, False, 0, "00" * 18 + "0000" + "00000000", id="reject"),
        pytest.param(0, True, 0, "00" * 18 + U16_1 + "00000000", id="drop"),
        pytest.param(3, False, 0, "00" * 18 + "0000" + U32_3, id="three-backends"),
        pytest.param(3, False, 1, "00" * 16 + U16_1 + "0000" + U32_3, id="table"),
    ],
)
def test_a_header_holds_count_flag_and_table(count, drop, table, packed):
    assert pack_header(count, drop=drop, table=table).hex() == packed
    assert unpack_header(bytes.fromhex(packed)) == (count, drop, table)


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        pytest.param(FRONTEND_KEY, 20, id="frontend_key"),
        pytest.param(FRONTEND, 16, id="frontend"),
        pytest.param(SLOT, 24, id="slot"),
        pytest.param(ORIGIN, 32, id="origin"),
        pytest.param(PEER_KEY, 32, id="peer_key"),
        pytest.param(PEER_ORIGIN, 20, id="peer_origin"),
        pytest.param(MAGLEV_TABLE, 32_768, id="maglev_table"),
        pytest.param(MAGLEV_WALK, 24, id="maglev_walk"),
        pytest.param(MAGLEV_BUILD, 57_352, id="maglev_build"),
    ],
)
def test_a_layout_has_no_holes(layout, size):
    ends = [field.offset + field.size for field in layout.fields]

    assert [field.offset for field in layout.fields] == [0, *ends[:-1]]
    assert ends[-1] == layout.size == size


def test_counters_have_one_entry_for_each_name():
    (counters,) = (spec for spec in map_specs(MapSizes()) if spec.name == "counters")

    assert counters.max_entries == max(Counter) + 1


SPECS = map_specs(MapSizes())


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(map_specs(MapSizes(frontends=1)), id="frontends"),
        pytest.param(map_specs(MapSizes(segments=1)), id="segments"),
        pytest.param(map_specs(MapSizes(socket_origins=1)), id="socket_origins"),
        pytest.param(map_specs(MapSizes(peer_origins=1)), id="peer_origins"),
        pytest.param(map_specs(MapSizes(maglev_tables=1)), id="maglev_tables"),
        pytest.param((replace(SPECS[0], value=SLOT), *SPECS[1:]), id="value-layout"),
        pytest.param((replace(SPECS[0], key=SLOT), *SPECS[1:]), id="key-layout"),
        pytest.param((replace(SPECS[0], kind=SPECS[1].kind), *SPECS[1:]), id="kind"),
        pytest.param(SPECS[:-1], id="one-map-less"),
    ],
)
def test_any_change_of_layout_or_size_changes_its_name(changed):
    assert layout_id(changed) != layout_id(SPECS)


def test_a_layout_without_maglev_tables_has_a_map_for_them_all_the_same():
    (tables,) = (spec for spec in map_specs(MapSizes(maglev_tables=0)) if spec.name == "maglev_tables")

    assert tables.max_entries == 1


def test_a_layout_keeps_its_name_and_bpffs_can_hold_it():
    assert layout_id(SPECS) == layout_id(map_specs(MapSizes()))
    assert len(layout_id(SPECS)) == 12
    assert "." not in layout_id(SPECS)
