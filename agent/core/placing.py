"""Take one segment from the backends it has to those it should have.

A segment that keeps its size is edited in place: a new backend goes into the hole a removed one leaves, or behind the
last; a hole that stays is filled with the last backend before the header's count is lowered. One that outgrows its
block, or needs much less, is written anew elsewhere, and the frontends are turned to it.
"""

from __future__ import annotations

from agent.core.abi import BASE_DROP, BASE_REJECT
from agent.core.plan import Plan, Segment, split_slots
from agent.core.segments import SegmentAllocator, block_size
from agent.core.services import Backends
from agent.core.tables import release_table
from agent.errors import CapacityError


def place(segment: Segment, want: Backends, allocator: SegmentAllocator, plan: Plan) -> None:
    """Plan the way. Raises: CapacityError, when it has what fits, or is as it was where nothing does."""
    needed = 1 + len(want.slots)
    if not want.slots and not segment.is_owned:
        segment.base = BASE_DROP if want.is_silent else BASE_REJECT
        segment.is_silent = want.is_silent
    elif not segment.is_owned or needed > segment.size:
        _grow(segment, want, allocator, plan)
    elif want.slots and _is_roomy(segment, needed):
        _shrink(segment, want, allocator, plan)
    else:
        _edit(segment, want, plan)


def free(segment: Segment | None, plan: Plan) -> None:
    """Give a segment's slots, and its table, back once the plan is carried out."""
    if segment and segment.is_owned:
        plan.freed.append((segment.base, segment.size))
        release_table(segment, plan)


def _is_roomy(segment: Segment, needed: int) -> bool:
    """Tell whether a block that is smaller by four slots or more has room for what is needed, and some to spare.

    Without the spare a Service whose endpoints come and go would move each time.
    """
    return block_size(needed + 1 + needed // 16) <= segment.size - 4


def _move(segment: Segment, want: Backends, allocator: SegmentAllocator, plan: Plan) -> None:
    """Write the backends into a new block of the right size. Raises: CapacityError, with nothing changed."""
    size = block_size(1 + len(want.slots))
    base = allocator.allocate(size)
    if segment.is_owned:
        plan.freed.append((segment.base, segment.size))
    segment.base, segment.size = base, size
    segment.slots = b"".join(want.slots)
    segment.is_silent = want.is_silent
    plan.backends.append((base + 1, segment.slots))
    plan.headers.append((base, segment.header))


def _shrink(segment: Segment, want: Backends, allocator: SegmentAllocator, plan: Plan) -> None:
    """Move to a smaller block; where there is no room for that, stay."""
    try:
        _move(segment, want, allocator, plan)
    except CapacityError:
        _edit(segment, want, plan)


def _grow(segment: Segment, want: Backends, allocator: SegmentAllocator, plan: Plan) -> None:
    """Move to a larger block; where there is none, drop what is gone, take in what fits, raise CapacityError."""
    try:
        _move(segment, want, allocator, plan)
    except CapacityError:
        if segment.is_owned:
            had = set(split_slots(segment.slots))
            by_age = sorted(want.slots, key=lambda slot: slot not in had)
            fitting = tuple(by_age[: segment.size - 1])
            _edit(segment, Backends(fitting, is_silent=False), plan)
        raise


def _edit(segment: Segment, want: Backends, plan: Plan) -> None:
    """Change a segment in place, writing only the slots that differ."""
    had, count = split_slots(segment.slots), len(want.slots)
    slots = had[:count] + [b""] * (count - len(had))
    wanted, staying, holes = set(want.slots), set[bytes](), list[int]()
    for index, slot in enumerate(slots):
        if slot in wanted and slot not in staying:  # a removal that was cut short leaves a backend twice
            staying.add(slot)
        else:
            holes.append(index)
    for index, slot in zip(holes, [slot for slot in want.slots if slot not in staying], strict=True):
        slots[index] = slot
        plan.backends.append((segment.base + 1 + index, slot))
    is_header_stale = count != len(had) or (not count and want.is_silent != segment.is_silent)
    segment.slots = b"".join(slots)
    segment.is_silent = want.is_silent
    if is_header_stale:
        plan.headers.append((segment.base, segment.header))
