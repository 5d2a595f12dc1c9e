"""The planner: knows what is in the kernel, and plans one Service at a time towards what is desired.

Each service port of each family has a placement: up to two segments (``agent.core.placing``), and the frontends that
lead to them. What a former agent left is adopted by the placement that wants the same (``agent.core.adoption``).
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Container, Iterable, Mapping, Sequence

from agent.core.abi import Frontend, FrontendFlag, FrontendKind
from agent.core.adoption import Leftovers
from agent.core.frontends import Role, Which, shared_roles
from agent.core.placing import free, place
from agent.core.plan import Bases, KernelState, Placement, Plan, Segment
from agent.core.records import Family, ObjectKey
from agent.core.segments import SegmentAllocator
from agent.core.services import Backends, DesiredPort, PortName
from agent.core.source_ranges import SourceRanges
from agent.core.tables import Tables, maglev_side
from agent.errors import CapacityError

_NONE = frozenset[Which]()
_Before = tuple[tuple[bytes, ...], tuple[Role, ...], Bases, int]


class Planner:
    """Knows what is in the kernel, and plans the way from there to what is desired.

    Plans are to be applied in the order they are made. When one fails half-way, this object no longer knows what the
    kernel holds: start anew with what is read back.
    """

    def __init__(
        self,
        segment_slots: int,
        frontend_limit: int,
        state: KernelState,
        last_id: int = 0,
        source_range_limit: int = 16_384,
        table_limit: int = 16,
    ) -> None:
        """``last_id``: the highest service id that was ever given out, where that is known."""
        self.allocator = SegmentAllocator(segment_slots)
        self.frontend_limit = frontend_limit
        self.placements: dict[ObjectKey, tuple[Placement, ...]] = {}
        self.degraded: dict[tuple[ObjectKey, PortName], str] = {}
        self.to_replan: set[ObjectKey] = set()
        """Services whose turn has come because another let go of what they claim."""
        self.source_ranges = SourceRanges(source_range_limit, len(state.source_ranges))
        self._owners: dict[bytes, Placement] = {}
        self._losers: dict[bytes, set[ObjectKey]] = {}
        self.tables = Tables(table_limit)
        self._left = Leftovers(state, self.allocator, self.tables)
        self._lacking: dict[tuple[ObjectKey, PortName], tuple[str, ...]] = {}
        self._next_id = max(self._left.last_id, last_id) + 1

    def wake(self, now: float) -> bool:
        """Make what has rested long enough available; returns whether anything was."""
        woken = self.allocator.wake(now)
        return self.tables.wake(now) or woken

    @property
    def next_wake(self) -> float | None:
        """When the first of what rests becomes available (monotonic seconds); None = nothing rests."""
        due = (self.allocator.next_wake, self.tables.next_wake)
        return min((at for at in due if at is not None), default=None)

    @property
    def frontend_count(self) -> int:
        """Frontends in the kernel once every plan so far is applied."""
        return len(self._owners) + len(self._left.frontends)

    @property
    def no_local_endpoints(self) -> Mapping[tuple[str, Family], int]:
        """Count service ports whose Local policy leaves clients without endpoints though there are some elsewhere.

        By traffic policy (internal, external) and family.
        """
        return Tally((policy, port.family) for (_, port), policies in self._lacking.items() for policy in policies)

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
            placement = current.get(want.port) or self._begin(key, created, want, plan)
            self._set_created(placement, created)
            kept.append(placement)
            self._place(placement, want, plan)
        if kept:
            self.placements[key] = tuple(kept)

    @property
    def has_leftovers(self) -> bool:
        """Whether something that was found in the kernel is claimed by no Service yet."""
        return bool(self._left)

    @property
    def found(self) -> Mapping[bytes, Frontend]:
        """The frontends that were found in the kernel and no Service claims yet, by packed key."""
        return self._left.frontends

    def is_found(self, frontends: Iterable[bytes]) -> bool:
        """Whether a former agent left any of these frontends, and they are not adopted yet."""
        return any(frontend in self._left.frontends for frontend in frontends)

    def plan_leftovers(self, plan: Plan, spared: Container[int] = ()) -> None:
        """Remove what was found in the kernel and no Service claims; right only after every Service was planned.

        ``spared``: service ids whose frontends stay, to be adopted or removed later.
        """
        self.source_ranges.count -= self._left.plan_removal(plan, spared)

    def differences(self, state: KernelState) -> int:
        """Count frontends, segments and source ranges that are not in the kernel as they were planned."""
        left = self._left
        count = sum(key not in self._owners and key not in left.frontends for key in state.frontends)
        ranges = {key for key in state.source_ranges if not left.has_range(key)}
        for placement in (placement for ports in self.placements.values() for placement in ports):
            for key, value in placement.entries():
                found = state.frontends.get(key)
                count += found is None or found.pack() != value
            for segment in placement.segments:
                if segment.is_owned and placement.frontends:
                    count += state.segments.get(segment.base) != (segment.slots, segment.is_silent)
                    count += state.tables.get(segment.base, 0) != segment.table_number
            ranges ^= set(placement.range_keys())
        return count + len(ranges)

    def _set_created(self, placement: Placement, created: str) -> None:
        """Note when the Service was created; made anew it is younger, and may lose what it has to those who lost."""
        if created > placement.created:
            for frontend in placement.frontends:
                self.to_replan |= self._losers.pop(frontend, set())
        placement.created = created

    def _begin(self, key: ObjectKey, created: str, want: DesiredPort, plan: Plan) -> Placement:
        """Begin a placement, with what a former agent left for the same frontends, if it did."""
        placement = Placement(key, want.port, 0, created, affinity_timeout_s=want.affinity_timeout_s)
        if self._left.frontends:
            for frontend in self._left.adopt(placement, want, plan):
                self._owners[frontend] = placement
        if not placement.service_id:
            placement.service_id, self._next_id = self._next_id, self._next_id + 1
        return placement

    def _place(self, placement: Placement, want: DesiredPort, plan: Plan) -> None:
        if self.degraded:
            self.degraded.pop((placement.service, placement.port), None)
        before = placement.frontends, placement.roles, placement.bases, placement.affinity_timeout_s
        placement.affinity_timeout_s, placement.serving = want.affinity_timeout_s, want.serving
        if self._lacking or want.local is not None:
            self._note_lack(placement, want)
        granted = self._fitting(placement, self._claim(placement, want), plan)
        if want.source_ranges or placement.source_ranges:
            self._place_ranges(placement, want.source_ranges if _is_limited(granted) else (), plan)
        if failed := self._place_segments(placement, want, plan, is_granted=bool(granted)):
            granted = _kept(placement, granted, failed)
        self._place_tables(placement, want, plan)
        self._place_frontends(placement, want, granted, before, plan)
        self._drop_unused(placement, want, plan)

    def _note_lack(self, placement: Placement, want: DesiredPort) -> None:
        if lacks := want.lacks_local:
            self._lacking[placement.service, placement.port] = lacks
        elif self._lacking:
            self._lacking.pop((placement.service, placement.port), None)

    def _degrade(self, placement: Placement, reason: str) -> None:
        self.degraded[placement.service, placement.port] = reason

    def _place_ranges(self, placement: Placement, ranges: Sequence[tuple[bytes, int]], plan: Plan) -> None:
        try:
            self.source_ranges.place(placement, ranges, plan)
        except CapacityError as error:
            self._degrade(placement, str(error))

    def _claim(self, placement: Placement, want: DesiredPort) -> dict[bytes, Role]:
        """Find which of the frontends a placement wants are its to have."""
        granted = {}
        for frontend, role in zip(want.frontends, want.roles, strict=True):
            owner = self._owners.get(frontend)
            if owner is None or owner is placement or placement.rank < owner.rank:
                granted[frontend] = role
                continue
            self._lose(placement, frontend, role, owner)
        return granted

    def _lose(self, placement: Placement, frontend: bytes, role: Role, winner: Placement) -> None:
        """Note that another has a frontend; a reserved one does for both what it is there for."""
        self._losers.setdefault(frontend, set()).add(placement.service)
        if role.kind != FrontendKind.RESERVED:
            self._degrade(placement, f"its address and port belong to service {winner.service}")

    def _fitting(self, placement: Placement, granted: dict[bytes, Role], plan: Plan) -> dict[bytes, Role]:
        """Choose the frontends that there is room for. One that a plan removes takes room until it is carried out."""
        room = self.frontend_limit - self.frontend_count - len(plan.removed_frontends)
        if room >= len(granted):
            return granted
        fitting = {}
        for frontend, role in granted.items():
            is_there = frontend in self._owners or frontend in self._left.frontends
            if not is_there and frontend not in plan.removed_frontends:
                room -= 1
                if room < 0:
                    continue
            fitting[frontend] = role
        if missing := len(granted) - len(fitting):
            self._degrade(placement, str(CapacityError("frontends", missing, self.frontend_limit)))
        return fitting

    def _place_segments(
        self, placement: Placement, want: DesiredPort, plan: Plan, *, is_granted: bool
    ) -> frozenset[Which]:
        """Place the backends of both policies; returns those that no frontend can be led to for want of room."""
        if placement.cluster and not placement.local and want.local and not want.cluster:
            placement.cluster, placement.local = None, placement.cluster  # another policy: the same clients' segment
        elif placement.local and not placement.cluster and want.cluster and not want.local:
            placement.cluster, placement.local = placement.local, None
        failed = _NONE
        segment = placement.cluster
        if want.cluster is not None and (is_granted or (segment and segment.is_owned)):
            placement.cluster = placed = self._place_backends(placement, segment, want.cluster, plan)
            if placed is None or (want.cluster.slots and not placed.is_owned):
                failed |= {Which.CLUSTER}
        segment = placement.local
        if want.local is not None and (is_granted or (segment and segment.is_owned)):
            placement.local = placed = self._place_backends(placement, segment, want.local, plan)
            if placed is None or (want.local.slots and not placed.is_owned):
                failed |= {Which.LOCAL}
        return failed

    def _place_backends(
        self, placement: Placement, segment: Segment | None, want: Backends, plan: Plan
    ) -> Segment | None:
        placed = segment or Segment()
        try:
            place(placed, want, self.allocator, plan)
        except CapacityError as error:
            self._degrade(placement, str(error))
            return segment
        return placed

    def _place_tables(self, placement: Placement, want: DesiredPort, plan: Plan) -> None:
        side = maglev_side(want.roles)
        for which, segment in ((Which.CLUSTER, placement.cluster), (Which.LOCAL, placement.local)):
            if segment and (segment.table or which is side):
                reason = self.tables.place(segment, plan, is_wanted=which is side)
                if reason:
                    self._degrade(placement, reason)

    def _place_frontends(
        self, placement: Placement, want: DesiredPort, granted: dict[bytes, Role], before: _Before, plan: Plan
    ) -> None:
        bases, timeout_s = placement.bases, placement.affinity_timeout_s
        frontends, roles = tuple(granted), tuple(granted.values())
        after = frontends, want.roles if roles == want.roles else shared_roles(roles), bases, timeout_s
        if after == before:
            return
        placement.frontends, placement.roles, _, _ = after
        held = self._release_others(placement, granted, before, plan) if before[0] else {}
        for frontend, role in granted.items():
            value = placement.value_of(role, bases, timeout_s)
            if held and held.get(frontend) == value:
                continue
            owner = self._owners.get(frontend)
            if owner is not None and owner is not placement:
                self._dispossess(owner, frontend, placement)
            self._left.forget(frontend)
            self._owners[frontend] = placement
            plan.set_frontend(frontend, value)

    def _release_others(
        self, placement: Placement, granted: dict[bytes, Role], before: _Before, plan: Plan
    ) -> dict[bytes, bytes]:
        """Let go of the frontends that a placement had and has no more; returns what the others hold."""
        frontends, roles, bases, timeout_s = before
        held = {}
        for frontend, role in zip(frontends, roles, strict=True):
            if frontend in granted:
                held[frontend] = placement.value_of(role, bases, timeout_s)
            else:
                self._release_frontend(frontend, plan)
        return held

    def _dispossess(self, owner: Placement, frontend: bytes, winner: Placement) -> None:
        had = dict(zip(owner.frontends, owner.roles, strict=True))
        role = had.pop(frontend)
        owner.frontends, owner.roles = tuple(had), tuple(had.values())
        self._lose(owner, frontend, role, winner)
        if owner.source_ranges:
            self.to_replan.add(owner.service)  # which may not need them any more

    def _release_frontend(self, frontend: bytes, plan: Plan) -> None:
        del self._owners[frontend]
        plan.remove_frontend(frontend)
        self.to_replan |= self._losers.pop(frontend, set())

    def _drop_unused(self, placement: Placement, want: DesiredPort, plan: Plan) -> None:
        if placement.cluster and want.cluster is None:
            free(placement.cluster, plan)
            placement.cluster = None
        if placement.local and want.local is None:
            free(placement.local, plan)
            placement.local = None

    def _remove(self, placement: Placement, plan: Plan) -> None:
        self.degraded.pop((placement.service, placement.port), None)
        self._lacking.pop((placement.service, placement.port), None)
        for frontend in placement.frontends:
            self._release_frontend(frontend, plan)
        self.source_ranges.place(placement, (), plan)
        for segment in placement.segments:
            free(segment, plan)


def _is_limited(granted: Mapping[bytes, Role]) -> bool:
    return any(role.flags & FrontendFlag.SOURCE_RANGES for role in granted.values())


def _kept(placement: Placement, granted: dict[bytes, Role], failed: frozenset[Which]) -> dict[bytes, Role]:
    """Choose the frontends that do not need what failed, and those that can stay as they are."""
    had = dict(zip(placement.frontends, placement.roles, strict=True))
    there = {Which.NOTHING, *_there(placement)}
    kept = {}
    for frontend, role in granted.items():
        needed = {role.inside, role.outside}
        if not needed & failed:
            kept[frontend] = role
        elif frontend in had:
            kept[frontend] = role if needed <= there else had[frontend].limited_as(role)
    return kept


def _there(placement: Placement) -> Iterable[Which]:
    if placement.cluster:
        yield Which.CLUSTER
    if placement.local:
        yield Which.LOCAL
