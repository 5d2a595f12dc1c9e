"""The planner: knows what is in the kernel, and plans one Service at a time towards what is desired.

A segment that keeps its size is edited in place: a new backend goes into the hole a removed one leaves, or behind the
last; a hole that stays is filled with the last backend before the header's count is lowered. One that outgrows its
block is written anew elsewhere, and the frontends are turned to it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

from agent.core.abi import BASE_DROP, BASE_REJECT, FIRST_FREE_SLOT, SLOT, Frontend, pack_header
from agent.core.plan import KernelState, Placement, Plan, split_slots
from agent.core.records import ObjectKey
from agent.core.segments import SegmentAllocator, order_for
from agent.core.services import Backends, DesiredPort, PortName
from agent.errors import CapacityError


class Planner:
    """Knows what is in the kernel, and plans the way from there to what is desired.

    Plans are to be applied in the order they are made. When one fails half-way, this object no longer knows what the
    kernel holds: start anew with what is read back.
    """

    def __init__(self, segment_slots: int, frontend_limit: int, state: KernelState, last_id: int = 0) -> None:
        """``last_id``: the highest service id that was ever given out, where that is known."""
        self.allocator = SegmentAllocator(segment_slots)
        self.frontend_limit = frontend_limit
        self.placements: dict[ObjectKey, tuple[Placement, ...]] = {}
        self.degraded: dict[tuple[ObjectKey, PortName], str] = {}
        self.to_replan: set[ObjectKey] = set()
        """Services whose turn has come because another let go of what they claim."""
        self._owners: dict[bytes, Placement] = {}
        self._losers: dict[bytes, set[ObjectKey]] = {}
        self._found = dict(state.frontends)
        self._found_segments: dict[int, tuple[int, bytes, bool]] = {}
        self._adopted_ids: set[int] = set()
        self._next_id = 1 + max((frontend.service for frontend in state.frontends.values()), default=0)
        self._next_id = max(self._next_id, last_id + 1)
        for base, (slots, is_silent) in sorted(state.segments.items()):
            order = order_for(1 + len(slots) // SLOT.size)
            if base >= FIRST_FREE_SLOT and self.allocator.reserve(base, order):
                self._found_segments[base] = (order, slots, is_silent)

    @property
    def frontend_count(self) -> int:
        """Frontends in the kernel once every plan so far is applied."""
        return len(self._owners) + len(self._found)

    def plan_service(self, key: ObjectKey, created: str, desired: Iterable[DesiredPort], plan: Plan) -> None:
        """Add to a plan what makes one Service as desired.

        A port that does not fit keeps what it has in the kernel and says why in ``degraded``.
        """
        current = {placement.port: placement for placement in self.placements.pop(key, ())}
        kept: list[Placement] = []
        wanted = sorted(desired, key=lambda want: want.port)  # by rank, as two ports of one number are a conflict too
        if current:
            for port in current.keys() - {port.port for port in wanted}:
                self._remove(current[port], plan)
        for want in wanted:
            placement = current.get(want.port) or self._adopt(key, created, want, plan)
            self._set_created(placement, created)
            placement.serving = want.serving
            kept.append(placement)
            self._place(placement, want, plan)
        if kept:
            self.placements[key] = tuple(kept)

    @property
    def has_leftovers(self) -> bool:
        """Whether something that was found in the kernel is claimed by no Service yet."""
        return bool(self._found or self._found_segments)

    @property
    def found(self) -> Mapping[bytes, Frontend]:
        """The frontends that were found in the kernel and no Service claims yet, by packed key."""
        return self._found

    def is_found(self, frontends: Iterable[bytes]) -> bool:
        """Whether a former agent left any of these frontends, and they are not adopted yet."""
        return any(frontend in self._found for frontend in frontends)

    def plan_leftovers(self, plan: Plan, spared: Container[int] = ()) -> None:
        """Remove what was found in the kernel and no Service claims; right only after every Service was planned.

        ``spared``: service ids whose frontends stay, to be adopted or removed later.
        """
        gone = [key for key, found in self._found.items() if found.service not in spared]
        for key in gone:
            plan.remove_frontend(key)
            del self._found[key]
        kept_bases = {found.inside for found in self._found.values()}
        for base in self._found_segments.keys() - kept_bases:
            plan.freed.append((base, self._found_segments.pop(base)[0]))
        if not self._found:
            self._adopted_ids.clear()

    def differences(self, state: KernelState) -> int:
        """Count frontends and segments that are not in the kernel as they were planned."""
        planned = {frontend: owner.value for frontend, owner in self._owners.items()}
        count = sum(planned.get(key) != found.pack() for key, found in state.frontends.items())
        count += len(planned.keys() - state.frontends.keys())
        for placements in self.placements.values():
            for placement in placements:
                if placement.owns_segment and placement.frontends:
                    count += state.segments.get(placement.base) != (placement.slots, placement.is_silent)
        return count

    def _set_created(self, placement: Placement, created: str) -> None:
        """Note when the Service was created; made anew it is younger, and may lose what it has to those who lost."""
        if created > placement.created:
            for frontend in placement.frontends:
                self.to_replan |= self._losers.pop(frontend, set())
        placement.created = created

    def _adopt(self, key: ObjectKey, created: str, want: DesiredPort, plan: Plan) -> Placement:
        """Begin a placement with what a former agent left for the same frontends, if it did."""
        placement = Placement(key, want.port, 0, created)
        candidates = want.frontends if self._found else ()
        taken = [frontend for frontend in candidates if self._begin_at(placement, self._found.get(frontend))]
        if not placement.service_id:
            placement.service_id, self._next_id = self._next_id, self._next_id + 1
        for frontend in taken:
            self._take_found(frontend, placement, plan)
        return placement

    def _begin_at(self, placement: Placement, found: Frontend | None) -> bool:
        """Make a placement what a found frontend says; returns False where that is another's, or makes no sense."""
        if found is None or not found.service:
            return False
        if placement.service_id:
            return (found.service, found.inside) == (placement.service_id, placement.base)
        if found.service in self._adopted_ids:
            return False
        if found.inside < FIRST_FREE_SLOT:
            placement.is_silent = found.inside == BASE_DROP
        elif segment := self._found_segments.pop(found.inside, None):
            placement.order, placement.slots, placement.is_silent = segment
        else:
            return False
        placement.base, placement.service_id = found.inside, found.service
        self._adopted_ids.add(found.service)
        return True

    def _take_found(self, frontend: bytes, placement: Placement, plan: Plan) -> None:
        """Make a frontend that was found a placement's own."""
        found = self._found.pop(frontend)
        self._owners[frontend] = placement
        placement.frontends += (frontend,)
        if found.pack() != placement.value:
            plan.set_frontend(frontend, placement.value)

    def _place(self, placement: Placement, want: DesiredPort, plan: Plan) -> None:
        if self.degraded:
            self.degraded.pop((placement.service, placement.port), None)
        before = placement.base
        granted = self._fitting(placement, self._claim(placement, want.frontends), plan)
        try:
            if granted or placement.owns_segment:
                self._place_backends(placement, want.inside, plan)
        except CapacityError as error:
            self._degrade(placement, str(error))
            if not placement.owns_segment:
                granted = tuple(frontend for frontend in granted if frontend in placement.frontends)
        self._place_frontends(placement, granted, before, plan)

    def _degrade(self, placement: Placement, reason: str) -> None:
        self.degraded[placement.service, placement.port] = reason

    def _claim(self, placement: Placement, frontends: Sequence[bytes]) -> tuple[bytes, ...]:
        """Find which of the frontends a placement wants are its to have."""
        granted = []
        for frontend in frontends:
            owner = self._owners.get(frontend)
            if owner is None or owner is placement or placement.rank < owner.rank:
                granted.append(frontend)
                continue
            self._losers.setdefault(frontend, set()).add(placement.service)
            self._degrade(placement, f"its address and port belong to service {owner.service}")
        return tuple(granted)

    def _fitting(self, placement: Placement, granted: tuple[bytes, ...], plan: Plan) -> tuple[bytes, ...]:
        """Choose the frontends that there is room for. One that a plan removes takes room until it is carried out."""
        room = self.frontend_limit - self.frontend_count - len(plan.removed_frontends)
        if room >= len(granted):
            return granted
        fitting = []
        for frontend in granted:
            if frontend not in self._owners and frontend not in self._found and frontend not in plan.removed_frontends:
                room -= 1
                if room < 0:
                    continue
            fitting.append(frontend)
        if missing := len(granted) - len(fitting):
            self._degrade(placement, str(CapacityError("frontends", missing, self.frontend_limit)))
        return tuple(fitting)

    def _place_frontends(self, placement: Placement, granted: tuple[bytes, ...], before: int, plan: Plan) -> None:
        if granted == placement.frontends and placement.base == before:
            return
        for frontend in placement.frontends:
            if frontend not in granted:
                self._release_frontend(frontend, plan)
        placement.frontends = granted
        value = placement.value
        for frontend in granted:
            owner = self._owners.get(frontend)
            if owner is placement and placement.base == before:
                continue
            if owner is not None and owner is not placement:
                self._dispossess(owner, frontend, placement)
            if self._found:
                self._found.pop(frontend, None)
            self._owners[frontend] = placement
            plan.set_frontend(frontend, value)

    def _dispossess(self, owner: Placement, frontend: bytes, winner: Placement) -> None:
        owner.frontends = tuple(key for key in owner.frontends if key != frontend)
        self._losers.setdefault(frontend, set()).add(owner.service)
        self._degrade(owner, f"its address and port belong to service {winner.service}")

    def _release_frontend(self, frontend: bytes, plan: Plan) -> None:
        del self._owners[frontend]
        plan.remove_frontend(frontend)
        self.to_replan |= self._losers.pop(frontend, set())

    def _remove(self, placement: Placement, plan: Plan) -> None:
        self.degraded.pop((placement.service, placement.port), None)
        for frontend in placement.frontends:
            self._release_frontend(frontend, plan)
        self._free_segment(placement, plan)

    def _free_segment(self, placement: Placement, plan: Plan) -> None:
        if placement.owns_segment:
            plan.freed.append((placement.base, placement.order))

    def _place_backends(self, placement: Placement, want: Backends, plan: Plan) -> None:
        needed = 1 + len(want.slots)
        if not want.slots and not placement.owns_segment:
            placement.base = BASE_DROP if want.is_silent else BASE_REJECT
            placement.is_silent = want.is_silent
        elif not placement.owns_segment or needed > 1 << placement.order:
            self._grow(placement, want, plan)
        elif want.slots and needed <= 1 << placement.order >> 2:
            self._shrink(placement, want, plan)
        else:
            self._edit(placement, want, plan)

    def _move(self, placement: Placement, want: Backends, plan: Plan) -> None:
        """Write the backends into a new segment of the right size. Raises: CapacityError, with nothing changed."""
        order = order_for(1 + len(want.slots))
        base = self.allocator.allocate(order)
        self._free_segment(placement, plan)
        placement.base, placement.order = base, order
        placement.slots = b"".join(want.slots)
        placement.is_silent = want.is_silent
        plan.backends.append((base + 1, placement.slots))
        plan.headers.append((base, pack_header(len(want.slots), drop=want.is_silent)))

    def _shrink(self, placement: Placement, want: Backends, plan: Plan) -> None:
        """Move to a smaller segment; where there is no room for that, stay."""
        try:
            self._move(placement, want, plan)
        except CapacityError:
            self._edit(placement, want, plan)

    def _grow(self, placement: Placement, want: Backends, plan: Plan) -> None:
        """Move to a larger segment; where there is none, drop what is gone, take in what fits, raise CapacityError."""
        try:
            self._move(placement, want, plan)
        except CapacityError:
            if placement.owns_segment:
                had = set(split_slots(placement.slots))
                by_age = sorted(want.slots, key=lambda slot: slot not in had)
                fitting = tuple(by_age[: (1 << placement.order) - 1])
                self._edit(placement, Backends(fitting, is_silent=False), plan)
            raise

    def _edit(self, placement: Placement, want: Backends, plan: Plan) -> None:
        """Change a segment in place, writing only the slots that differ."""
        had, count = split_slots(placement.slots), len(want.slots)
        slots = had[:count] + [b""] * (count - len(had))
        wanted, staying, holes = set(want.slots), set[bytes](), list[int]()
        for index, slot in enumerate(slots):
            if slot in wanted and slot not in staying:  # a removal that was cut short leaves a backend twice
                staying.add(slot)
            else:
                holes.append(index)
        for index, slot in zip(holes, [slot for slot in want.slots if slot not in staying], strict=True):
            slots[index] = slot
            plan.backends.append((placement.base + 1 + index, slot))
        if count != len(had) or (not count and want.is_silent != placement.is_silent):
            plan.headers.append((placement.base, pack_header(count, drop=want.is_silent)))
        placement.slots = b"".join(slots)
        placement.is_silent = want.is_silent
