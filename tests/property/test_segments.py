"""Whatever is allocated, reserved and freed: blocks never overlap, and nothing is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.core.abi import FIRST_FREE_SLOT
from agent.core.segments import REST_S, SegmentAllocator
from agent.errors import CapacityError

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("reserve"), st.integers(0, 5), st.integers(0, 130)),
        st.tuples(st.just("free"), st.integers(0, 50), st.just(0)),
        st.tuples(st.just("wait"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(st.integers(2, 128), STEPS)
def test_blocks_never_overlap_and_nothing_is_lost(capacity, steps):
    allocator, now = SegmentAllocator(capacity), 0.0
    held: dict[int, int] = {}
    resting: dict[int, int] = {}

    def slots() -> list[int]:
        return [base + i for blocks in (held, resting) for base, order in blocks.items() for i in range(1 << order)]

    for step, number, base in steps:
        if step == "allocate":
            try:
                base = allocator.allocate(number)  # noqa: PLW2901
            except CapacityError:
                assert not _fits(capacity, set(slots()), number), "there was a free block"
                continue
            assert base not in slots()
            held[base] = number
        elif step == "reserve":
            wanted = set(range(base, base + (1 << number)))
            is_free = base % (1 << number) == 0 and base >= FIRST_FREE_SLOT and base + (1 << number) <= capacity
            is_free = is_free and not wanted & set(slots())
            assert allocator.reserve(base, number) is is_free
            if is_free:
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
        assert all(base % (1 << order) == 0 for base, order in held.items())
        assert allocator.used == FIRST_FREE_SLOT + len(taken)


def _fits(capacity: int, taken: set[int], order: int) -> bool:
    size = 1 << order
    return any(
        base >= FIRST_FREE_SLOT and not taken & set(range(base, base + size))
        for base in range(0, capacity - size + 1, size)
    )
