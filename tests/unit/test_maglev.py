"""Maglev tables: who gets how much, what a change moves, and that all nodes agree."""

from __future__ import annotations

import random
from collections import Counter as Tally

import pytest

from agent.core.abi import MAGLEV_BACKENDS, MAGLEV_BUILD, MAGLEV_SIZE, MAGLEV_WALK, pack_maglev_build
from agent.core.maglev import build_table, walks
from tests.builders import pods, slots


def chosen(backends: tuple[bytes, ...]) -> list[bytes]:
    """Build a table; returns the backend of each entry."""
    return [backends[place] for place in build_table(walks(backends))]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 100])
def test_every_backend_has_the_same_share_within_one_per_cent(count):
    shares = Tally(chosen(pods(count)))

    assert len(shares) == count
    for share in shares.values():
        assert share == pytest.approx(MAGLEV_SIZE / count, rel=0.01, abs=1)


def test_as_many_backends_as_a_table_takes_all_get_their_share():
    shares = Tally(chosen(pods(MAGLEV_BACKENDS)))

    assert set(shares.values()) <= {MAGLEV_SIZE // MAGLEV_BACKENDS, MAGLEV_SIZE // MAGLEV_BACKENDS + 1}


@pytest.mark.parametrize("count", [2, 10, 100])
def test_a_removal_moves_few_besides_those_of_the_backend_that_goes(count):
    backends = pods(count)
    before = chosen(backends)
    for gone in (0, count // 2, count - 1):
        after = chosen(backends[:gone] + backends[gone + 1 :])

        moved = sum(a != b and b != backends[gone] for a, b in zip(after, before, strict=True))

        assert moved / MAGLEV_SIZE <= 0.02


def test_nodes_agree_whatever_order_their_segments_are_in():
    backends = pods(50)
    others = list(backends)
    random.Random(1).shuffle(others)

    assert chosen(tuple(others)) == chosen(backends)


def test_backends_that_share_an_address_differ_by_their_ports():
    backends = (*slots("10.1.0.1", port=80), *slots("10.1.0.1", port=81))

    assert len(set(walks(backends))) == len({walk.offset for walk in walks(backends)}) == 2


def test_walks_stay_as_they_are_or_every_client_of_a_mixed_cluster_changes_its_backend():
    """Nodes of two versions serve side by side during an upgrade."""
    backends = (*slots("10.1.0.1", "fd00::1", port=8080), *slots("10.1.0.1", port=80))

    assert walks(backends) == [(16091, 7363, 2), (56, 14045, 0), (7806, 8168, 1)]


def test_what_is_to_be_built_begins_with_nothing_claimed_and_the_first_walk():
    turns = walks(pods(3))

    turn, filled, ways, table = MAGLEV_BUILD.packer.unpack(pack_maglev_build(turns))

    assert (turn, filled) == (0, 0)
    assert set(table) == {0xFF}
    first, second, third = MAGLEV_WALK.packer.iter_unpack(ways[: 3 * MAGLEV_WALK.size])
    assert first == (turns[0].offset, turns[0].skip - MAGLEV_SIZE, turns[0].place, 1)
    assert (second[3], third[3]) == (2, 0)
    assert not any(ways[3 * MAGLEV_WALK.size :])
