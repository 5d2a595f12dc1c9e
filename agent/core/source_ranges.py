"""Source ranges of load balancers: written before the frontends that look at them, removed after."""

from __future__ import annotations

from collections.abc import Sequence

from agent.core.abi import pack_source_range
from agent.core.plan import Placement, Plan
from agent.errors import CapacityError


class SourceRanges:
    """The entries of one map. ``count``: how many it holds once every plan so far is applied."""

    def __init__(self, limit: int, count: int) -> None:
        self.limit = limit
        self.count = count

    def place(self, placement: Placement, wanted: Sequence[tuple[bytes, int]], plan: Plan) -> None:
        """Plan the way to the wanted ranges.

        Those there is no room for are left out, so that too few clients get through, never too many.
        Raises: CapacityError, when the others are placed.
        """
        had, kept = set(placement.source_ranges), []
        # One that a plan removes takes room until it is carried out.
        room = self.limit - self.count - len(plan.removed_source_ranges)
        missing = 0
        for it in wanted:
            if it in had:
                kept.append(it)
            elif room > 0:
                room -= 1
                self.count += 1
                kept.append(it)
                plan.allow(pack_source_range(placement.service_id, *it))
            else:
                missing += 1
        for it in had.difference(wanted):
            self.count -= 1
            plan.disallow(pack_source_range(placement.service_id, *it))
        placement.source_ranges = tuple(kept)
        if missing:
            raise CapacityError("source_ranges", missing, self.limit)
