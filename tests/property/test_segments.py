"""Whatever is allocated, reserved and freed: blocks never overlap, and nothing is lost."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.abi import FIRST_FREE_SLOT
from agent.core.segments import REST_S, SegmentAllocator, block_size
from agent.errors import CapacityError

SIZES = st.integers(1, 40).map(block_size)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), SIZES, st.just(0)),
        st.tuples(st.just("reserve"), SIZES, st.integers(0, 130)),
        st.tuples(st.just("free"), st.integers(0, 50), st.just(0)),
        st.tuples(st.just("wait"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=5 * settings().max_examples)
@given(st.integers(2, 128), STEPS)
def test_blocks_never_overlap_and_nothing_is_lost(capacity, steps):
    allocator, now = SegmentAllocator(capacity), 0.0
    held: dict[int, int] = {}
    resting: dict[int, int] = {}

    def slots() -> list[int]:
        return [base + i for blocks in (held, resting) for base, size in blocks.items() for i in range(size)]

    for step, number, base in steps:
        if step == "allocate":
            try:
                base = allocator.allocate(number)  # noqa: PLW2901
            except CapacityError:
                assert number > _longest_run(capacity, set(slots())), "there was room"
                continue
            assert base not in slots()
            held[base] = number
        elif step == "reserve":
            is_above = base >= max(slots(), default=FIRST_FREE_SLOT - 1) + 1
            assert allocator.reserve(base, number) is (is_above and base + number <= capacity)
            if is_above and base + number <= capacity:
                held[base] = number
        elif step == "free" and held:
            base = sorted(held)[number % len(held)]  # noqa: PLW2901
            resting[base] = held.pop(base)
            allocator.rest(base, resting[base], now)
        elif step == "wait":
            now += REST_S
            assert allocator.wake(now) is bool(resting)
            resting.clear()
        taken = slots()
        assert len(taken) == len(set(taken)), "blocks overlap"
        assert all(FIRST_FREE_SLOT <= slot < capacity for slot in taken)
        assert allocator.used == FIRST_FREE_SLOT + len(taken)

    for base, size in held.items():
        allocator.rest(base, size, now)
    allocator.wake(now + REST_S)
    assert allocator.used == FIRST_FREE_SLOT
    rest = capacity - FIRST_FREE_SLOT
    assert not rest or allocator.allocate(rest) == FIRST_FREE_SLOT, "what is free is not one run"


def _longest_run(capacity: int, taken: set[int]) -> int:
    runs = itertools.groupby(range(FIRST_FREE_SLOT, capacity), key=lambda slot: slot in taken)
    return max((sum(1 for _ in run) for is_taken, run in runs if not is_taken), default=0)
