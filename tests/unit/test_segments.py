"""The allocator of segments."""

from __future__ import annotations

import pytest

from agent.core.abi import FIRST_FREE_SLOT, MapSizes
from agent.core.segments import REST_S, SegmentAllocator, block_size
from agent.errors import CapacityError

POWERS = {1 << order for order in range(12)}
SIZES = sorted(POWERS | {3 * power for power in POWERS})


def drain(allocator: SegmentAllocator, size: int = 1) -> list[int]:
    """Allocate until nothing is left; returns the bases, sorted."""
    bases = []
    try:
        while True:
            bases.append(allocator.allocate(size))
    except CapacityError:
        return sorted(bases)


def give_back(allocator: SegmentAllocator, *blocks: tuple[int, int]) -> None:
    for base, size in blocks:
        allocator.rest(base, size, now=0.0)
    allocator.wake(REST_S)


def test_block_sizes_are_powers_of_two_and_three_quarters_of_one():
    for slots in range(1, 2049):
        assert block_size(slots) == next(size for size in SIZES if size >= slots)


@pytest.mark.parametrize("capacity", [2, 3, 4, 7, 8, 9, 64, 100, 1000])
def test_every_slot_but_the_shared_ones_can_be_had(capacity):
    allocator = SegmentAllocator(capacity)

    assert drain(allocator) == list(range(FIRST_FREE_SLOT, capacity))
    assert allocator.used == capacity


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 48])
def test_blocks_lie_side_by_side(size):
    assert drain(SegmentAllocator(64), size) == list(range(FIRST_FREE_SLOT, 64 - size + 1, size))


def test_ten_thousand_services_of_ten_endpoints_fit_by_default():
    allocator = SegmentAllocator(MapSizes().segments)

    for _ in range(10_000):
        allocator.allocate(block_size(1 + 10))


def test_what_is_full_says_so():
    allocator = SegmentAllocator(16)

    with pytest.raises(CapacityError) as raised:
        allocator.allocate(16)

    assert (raised.value.map_name, raised.value.needed, raised.value.capacity) == ("segments", 16, 16)
    assert allocator.used == FIRST_FREE_SLOT


def test_a_block_larger_than_the_array_is_refused():
    with pytest.raises(CapacityError):
        SegmentAllocator(16).allocate(1 << 40)


def test_a_freed_block_rests_before_it_is_used_again():
    allocator = SegmentAllocator(14)
    base = allocator.allocate(12)
    allocator.rest(base, 12, now=100.0)

    assert allocator.next_wake == 100.0 + REST_S
    assert not allocator.wake(100.0 + REST_S - 0.001)
    with pytest.raises(CapacityError):
        allocator.allocate(12)
    assert allocator.wake(100.0 + REST_S)
    assert allocator.next_wake is None
    assert allocator.allocate(12) == base


def test_blocks_wake_in_the_order_they_were_freed():
    allocator = SegmentAllocator(16)
    first, second = allocator.allocate(2), allocator.allocate(2)
    allocator.rest(first, 2, now=1.0)
    allocator.rest(second, 2, now=1.5)

    assert allocator.wake(1.0 + REST_S)
    assert allocator.next_wake == 1.5 + REST_S
    assert allocator.wake(1.5 + REST_S)
    assert not allocator.wake(99.0)


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(range(62), id="from-below"),
        pytest.param(range(61, -1, -1), id="from-above"),
        pytest.param([*range(0, 62, 2), *range(1, 62, 2)], id="every-other-one-first"),
    ],
)
def test_neighbours_that_are_free_become_one_run_again(order):
    allocator = SegmentAllocator(64)
    bases = drain(allocator)
    give_back(allocator, *((bases[index], 1) for index in order))

    assert allocator.used == FIRST_FREE_SLOT
    assert drain(allocator, 48) == [FIRST_FREE_SLOT]


def test_a_block_is_taken_where_it_leaves_least():
    """Behind a hole of 16 is one of 12, which another 12 fits as it is."""
    allocator = SegmentAllocator(64)
    large, _, small, _ = (allocator.allocate(size) for size in (16, 1, 12, 1))
    give_back(allocator, (large, 16), (small, 12))

    assert allocator.allocate(12) == small
    assert allocator.allocate(16) == large


@pytest.mark.parametrize("hole", range(1, 62))
def test_a_hole_has_room_for_what_fits_it_and_for_no_more(hole):
    allocator = SegmentAllocator(64)
    allocator.reserve(FIRST_FREE_SLOT + hole, 62 - hole)

    with pytest.raises(CapacityError):
        allocator.allocate(next(size for size in SIZES if size > hole))
    assert allocator.allocate(max(size for size in SIZES if size <= hole)) == FIRST_FREE_SLOT


RESERVATIONS = [
    pytest.param([(8, 8)], True, id="a-block"),
    pytest.param([(9, 1)], True, id="a-slot"),
    pytest.param([(14, 12), (26, 12)], True, id="side-by-side"),
    pytest.param([(2, 12), (20, 12)], True, id="with-a-gap"),
    pytest.param([(52, 12)], True, id="to-the-end"),
    pytest.param([(8, 4), (8, 4)], False, id="twice"),
    pytest.param([(8, 4), (10, 2)], False, id="inside-another"),
    pytest.param([(10, 2), (8, 8)], False, id="around-another"),
    pytest.param([(8, 4), (11, 4)], False, id="overlaps-by-one"),
    pytest.param([(20, 4), (8, 4)], False, id="below-another"),
    pytest.param([(64, 1)], False, id="out-of-range"),
    pytest.param([(62, 4)], False, id="reaches-over-the-end"),
    pytest.param([(0, 1)], False, id="shared-reject"),
    pytest.param([(1, 1)], False, id="shared-drop"),
    pytest.param([(2, 1 << 40)], False, id="larger-than-the-array"),
]


@pytest.mark.parametrize(("blocks", "expected"), RESERVATIONS)
def test_reserve_takes_the_very_block_or_nothing(blocks, expected):
    allocator = SegmentAllocator(64)
    *before, last = blocks
    for block in before:
        assert allocator.reserve(*block)
    used = allocator.used

    assert allocator.reserve(*last) is expected
    assert allocator.used == used + (last[1] if expected else 0)
    taken = {base + i for base, size in (blocks if expected else before) for i in range(size)}
    assert drain(allocator) == [slot for slot in range(FIRST_FREE_SLOT, 64) if slot not in taken]
