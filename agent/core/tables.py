"""Which segments have a Maglev table: those that clients outside are led to by frontends with MAGLEV."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from agent.core.abi import MAGLEV_BACKENDS, FrontendFlag
from agent.core.frontends import Role, Which
from agent.core.plan import Plan, Segment, Table
from agent.core.segments import REST_S
from agent.errors import CapacityError

_MAGLEV = int(FrontendFlag.MAGLEV)
_INSTEAD = "backends are chosen at random"


def maglev_side(roles: Iterable[Role]) -> Which | None:
    """Find which segment wants a table; None = neither does."""
    for role in roles:
        if role.flags & _MAGLEV:
            return role.outside
    return None


class Tables:
    """The tables of a layout, numbered from 1 to ``capacity``. One that is given back rests, as segments do."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = set(range(1, capacity + 1))
        self._resting: deque[tuple[float, int]] = deque()

    @property
    def used(self) -> int:
        """How many are taken, or rest."""
        return self.capacity - len(self._free)

    def place(self, segment: Segment, plan: Plan, *, is_wanted: bool) -> str:
        """Give a segment a table for the backends it has, or take it back. Returns why it has none; empty = it may.

        Right after the segment itself was placed.
        """
        reason = self._obstacle(segment) if is_wanted and segment.is_owned else ""
        is_given = is_wanted and segment.is_owned and not reason
        if is_given != bool(segment.table_number) or (segment.table and not segment.table_number):
            release_table(segment, plan)
            if is_given:
                segment.table = Table(self._allocate())
            if segment.is_owned:
                plan.headers.append((segment.base, segment.header))
        if segment.table and segment.slots and segment.table.slots != segment.slots:
            segment.table.slots = segment.slots
            plan.tables[segment.table.number] = segment.slots
        return reason

    def _obstacle(self, segment: Segment) -> str:
        if segment.count > MAGLEV_BACKENDS:
            return f"{segment.count} are more than the {MAGLEV_BACKENDS} that a Maglev table is built for: {_INSTEAD}"
        if not segment.table_number and not self._free:
            return f"{CapacityError('maglev_tables', 1, self.capacity)}: {_INSTEAD}"
        return ""

    def _allocate(self) -> int:
        number = min(self._free)
        self._free.remove(number)
        return number

    def adopt(self, number: int) -> Table:
        """Take over the table that a header was found to name; one that is another's, or none, is number 0."""
        if number not in self._free:
            return Table(0)
        self._free.remove(number)
        return Table(number)

    def rest(self, number: int, now: float) -> None:
        """Give a number back, to be used again no sooner than ``REST_S`` after ``now`` (monotonic seconds)."""
        self._resting.append((now, number))

    def wake(self, now: float) -> bool:
        """Make numbers that have rested long enough available; returns whether any was."""
        woken = False
        while self._resting and now - self._resting[0][0] >= REST_S:
            self._free.add(self._resting.popleft()[1])
            woken = True
        return woken

    @property
    def next_wake(self) -> float | None:
        """When the first resting number becomes available (monotonic seconds); None = nothing rests."""
        return self._resting[0][0] + REST_S if self._resting else None


def release_table(segment: Segment, plan: Plan) -> None:
    """Give a segment's table back once the plan is carried out."""
    if segment.table and segment.table.number:
        plan.freed_tables.append(segment.table.number)
    segment.table = None
