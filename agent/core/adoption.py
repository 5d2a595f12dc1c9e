"""What a former agent left in the maps, until a Service claims it or none can."""

from __future__ import annotations

from collections.abc import Container

from agent.core.abi import BASE_DROP, FIRST_FREE_SLOT, SLOT, unpack_source_range
from agent.core.frontends import Role, Which
from agent.core.placing import free
from agent.core.plan import KernelState, Placement, Plan, Segment
from agent.core.segments import SegmentAllocator, block_size
from agent.core.services import DesiredPort
from agent.core.tables import Tables


class Leftovers:
    """Frontends, segments and source ranges that were found. Their slots are taken, so that nobody gets them."""

    def __init__(self, state: KernelState, allocator: SegmentAllocator, tables: Tables) -> None:
        self.frontends = dict(state.frontends)
        self.last_id = max((frontend.service for frontend in state.frontends.values()), default=0)
        self._segments: dict[int, Segment] = {}
        self._ranges: dict[int, set[bytes]] = {}
        self._adopted_ids: set[int] = set()
        for base, (slots, is_silent) in sorted(state.segments.items()):
            size = block_size(1 + len(slots) // SLOT.size)
            if allocator.reserve(base, size):
                number = state.tables.get(base)
                table = tables.adopt(number) if number else None
                self._segments[base] = Segment(base, size, slots, is_silent, table)
        for key in state.source_ranges:
            service, _, _ = unpack_source_range(key)
            self._ranges.setdefault(service, set()).add(key)
            self.last_id = max(self.last_id, service)

    def __bool__(self) -> bool:
        return bool(self.frontends or self._segments or self._ranges)

    def forget(self, frontend: bytes) -> None:
        """Note that a frontend is overwritten."""
        if self.frontends:
            self.frontends.pop(frontend, None)

    def adopt(self, placement: Placement, want: DesiredPort, plan: Plan) -> list[bytes]:
        """Make a placement of what is left for the same frontends; returns those that are its own now."""
        wanted = zip(want.frontends, want.roles, strict=True)
        taken = [(frontend, role) for frontend, role in wanted if self._begin_at(placement, frontend, role)]
        placement.frontends = tuple(frontend for frontend, _ in taken)
        placement.roles = tuple(role for _, role in taken)
        for frontend, value in placement.entries():
            if self.frontends.pop(frontend).pack() != value:
                plan.set_frontend(frontend, value)
        if placement.service_id:
            ranges = self._ranges.pop(placement.service_id, ())
            placement.source_ranges = tuple(unpack_source_range(key)[1:] for key in ranges)
        return list(placement.frontends)

    def has_range(self, key: bytes) -> bool:
        """Whether a source range is among what is left."""
        return any(key in keys for keys in self._ranges.values())

    def _begin_at(self, placement: Placement, frontend: bytes, role: Role) -> bool:
        """Make a placement what a found frontend says; returns False where that is another's, or makes no sense."""
        found = self.frontends.get(frontend)
        if found is None or not found.service:
            return False
        if not placement.service_id:
            # A reserved frontend says whose an address was, not which port.
            if role.inside is Which.NOTHING or found.service in self._adopted_ids:
                return False
        elif found.service != placement.service_id:
            return False
        sides = ((role.inside, found.inside), (role.outside, found.outside))
        fitting = [self._take_segment(placement, which, base) for which, base in sides]
        if any(fitting):
            placement.service_id = found.service
            self._adopted_ids.add(found.service)
        return all(fitting)

    def _take_segment(self, placement: Placement, which: Which, base: int) -> bool:
        """Make the segment at a base a placement's; returns False where that is another's or no segment."""
        if which is Which.NOTHING:
            return True
        segment = placement.cluster if which is Which.CLUSTER else placement.local
        if segment is not None:
            return segment.base == base
        if base < FIRST_FREE_SLOT:
            segment = Segment(base, is_silent=base == BASE_DROP)
        else:
            segment = self._segments.pop(base, None)
        if which is Which.CLUSTER:
            placement.cluster = segment
        else:
            placement.local = segment
        return segment is not None

    def plan_removal(self, plan: Plan, spared: Container[int]) -> int:
        """Remove what no Service claimed, but for ``spared`` service ids; returns how many source ranges that were."""
        for key in [key for key, found in self.frontends.items() if found.service not in spared]:
            plan.remove_frontend(key)
            del self.frontends[key]
        staying = self.frontends.values()
        kept_bases = {base for found in staying for base in (found.inside, found.outside)}
        for base in self._segments.keys() - kept_bases:
            free(self._segments.pop(base), plan)
        kept_ids = {found.service for found in staying}
        gone = [key for ident in self._ranges.keys() - kept_ids for key in self._ranges.pop(ident)]
        for key in gone:
            plan.disallow(key)
        if not self.frontends:
            self._adopted_ids.clear()
        return len(gone)
