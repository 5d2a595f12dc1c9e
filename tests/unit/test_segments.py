"""The buddy allocator of segments."""

from __future__ import annotations

import pytest

from agent.core.abi import FIRST_FREE_SLOT
from agent.core.segments import REST_S, SegmentAllocator, order_for
from agent.errors import CapacityError


def drain(allocator: SegmentAllocator, order: int = 0) -> list[int]:
    """Allocate until nothing is left; returns the bases, sorted."""
    bases = []
    try:
        while True:
            bases.append(allocator.allocate(order))
    except CapacityError:
        return sorted(bases)


@pytest.mark.parametrize(
    ("slots", "order"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (1001, 10), (1024, 10), (1025, 11)]
)
def test_the_smallest_block_that_holds_so_many_slots(slots, order):
    assert order_for(slots) == order


@pytest.mark.parametrize("capacity", [2, 3, 4, 7, 8, 9, 64, 100, 1000])
def test_every_slot_but_the_shared_ones_can_be_had(capacity):
    allocator = SegmentAllocator(capacity)

    assert drain(allocator) == list(range(FIRST_FREE_SLOT, capacity))
    assert allocator.used == capacity


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_blocks_are_aligned_and_do_not_overlap(order):
    bases = drain(SegmentAllocator(64), order)

    assert all(base % (1 << order) == 0 for base in bases)
    assert len({base + i for base in bases for i in range(1 << order)}) == len(bases) << order
    assert len(bases) == (64 - max(FIRST_FREE_SLOT, 1 << order)) >> order


def test_what_is_full_says_so():
    allocator = SegmentAllocator(16)

    with pytest.raises(CapacityError) as raised:
        allocator.allocate(4)

    assert (raised.value.map_name, raised.value.needed, raised.value.capacity) == ("segments", 16, 16)
    assert allocator.used == FIRST_FREE_SLOT


def test_an_order_larger_than_the_array_is_refused():
    with pytest.raises(CapacityError):
        SegmentAllocator(16).allocate(40)


def test_a_freed_block_rests_before_it_is_used_again():
    allocator = SegmentAllocator(16)
    base = allocator.allocate(3)
    allocator.rest(base, 3, now=100.0)

    assert allocator.next_wake == 100.0 + REST_S
    assert not allocator.wake(100.0 + REST_S - 0.001)
    with pytest.raises(CapacityError):
        allocator.allocate(3)
    assert allocator.wake(100.0 + REST_S)
    assert allocator.next_wake is None
    assert allocator.allocate(3) == base


def test_blocks_wake_in_the_order_they_were_freed():
    allocator = SegmentAllocator(16)
    first, second = allocator.allocate(1), allocator.allocate(1)
    allocator.rest(first, 1, now=1.0)
    allocator.rest(second, 1, now=1.5)

    assert allocator.wake(1.0 + REST_S)
    assert allocator.next_wake == 1.5 + REST_S
    assert allocator.wake(1.5 + REST_S)
    assert not allocator.wake(99.0)


def test_buddies_that_are_free_become_one_block_again():
    allocator = SegmentAllocator(64)
    bases = drain(allocator)
    for base in bases:
        allocator.rest(base, 0, now=0.0)
    allocator.wake(REST_S)

    assert allocator.used == FIRST_FREE_SLOT
    assert drain(allocator, 5) == [32]
    assert drain(allocator, 4) == [16]


RESERVATIONS = [
    pytest.param([(8, 3)], True, id="whole-block"),
    pytest.param([(9, 0)], True, id="in-the-middle"),
    pytest.param([(10, 1), (8, 1), (12, 2)], True, id="neighbours"),
    pytest.param([(8, 2), (8, 2)], False, id="twice"),
    pytest.param([(8, 2), (10, 1)], False, id="inside-another"),
    pytest.param([(10, 1), (8, 3)], False, id="around-another"),
    pytest.param([(9, 1)], False, id="misaligned"),
    pytest.param([(12, 3)], False, id="misaligned-by-half"),
    pytest.param([(64, 0)], False, id="out-of-range"),
    pytest.param([(62, 2)], False, id="reaches-over-the-end"),
    pytest.param([(0, 0)], False, id="shared-reject"),
    pytest.param([(1, 0)], False, id="shared-drop"),
    pytest.param([(0, 40)], False, id="larger-than-the-array"),
]


@pytest.mark.parametrize(("blocks", "expected"), RESERVATIONS)
def test_reserve_takes_the_very_block_or_nothing(blocks, expected):
    allocator = SegmentAllocator(64)
    *before, last = blocks
    for block in before:
        assert allocator.reserve(*block)
    used = allocator.used

    assert allocator.reserve(*last) is expected
    assert allocator.used == used + (1 << last[1] if expected else 0)
    taken = {base + i for base, order in (blocks if expected else before) for i in range(1 << order)}
    assert drain(allocator) == [slot for slot in range(FIRST_FREE_SLOT, 64) if slot not in taken]
