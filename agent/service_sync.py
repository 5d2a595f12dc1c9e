"""Services into maps: resolve those that changed, plan, apply, and keep what a former agent left until it is claimed.

Runs on the reconciler's thread alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable

from agent.core.flows import udp_ends
from agent.core.model import Model
from agent.core.plan import Plan
from agent.core.planner import Planner
from agent.core.records import Family, ObjectKey
from agent.core.services import DesiredPort, PortName
from agent.kernel.conntrack import FlowSweep, Undecided
from agent.kernel.dataplane import Dataplane
from agent.observe.metrics import Metrics
from agent.observe.names import NameJournal

log = logging.getLogger("ebproxy.reconciler")
_PLAN_LIMIT = 1_000

DegradedListener = Callable[[ObjectKey, str], None]
"""Told of a service whose port does not fit, and why, once for each reason (a Kubernetes Event, for one)."""


class ServiceSync:
    """Brings the maps to what the model desires. Raises, of what writes: DataplaneError, OSError; then start anew."""

    def __init__(
        self,
        model: Model,
        dataplane: Dataplane,
        metrics: Metrics,
        names: NameJournal,
        flows: FlowSweep | None,
        on_degraded: DegradedListener,
    ) -> None:
        self._model = model
        self._dataplane = dataplane
        self._metrics = metrics
        self._names = names
        self._flows = flows
        self._on_degraded = on_degraded
        self.planner = self._read_back()
        self.is_first = True
        """Whether the maps are as they were found: what is synchronised next is every Service."""
        self._held: set[ObjectKey] = set()
        """Services left as a former agent left them, until every list is complete."""
        self._told: dict[tuple[ObjectKey, PortName], str] = {}

    @property
    def is_due(self) -> bool:
        """Whether there is anything to synchronise."""
        return self.is_first or bool(self._model.dirty)

    def wake(self, now: float) -> None:
        """Have what waited, and need not any longer, synchronised too."""
        if self.planner.wake(now):
            self._model.dirty.update(key for key, _ in self.planner.degraded)
        if not self._model.incomplete:
            self._model.dirty |= self._held
            self._held.clear()

    def sync(self, now: float) -> int:
        """Bring the Services that changed up to date; returns how many. What that makes room for is due next.

        A share of them is in each plan: memory follows the share, not the cluster.
        """
        dirty, self._model.dirty = sorted(self._model.dirty, key=self._age), set()
        planned: set[ObjectKey] = set()
        for start in range(0, len(dirty), _PLAN_LIMIT):
            plan = Plan()
            share = dirty[start : start + _PLAN_LIMIT]
            planned.update(share)
            self._plan(share, planned, plan)
            self._apply(plan, now)
        self._sync_leftovers(now)
        self._names.record(placement for key in planned for placement in self.planner.placements.get(key, ()))
        self._note_flows(planned)
        self.is_first = False
        self._tell_degraded()
        return len(dirty)

    def start_anew(self) -> None:
        """Read back what the kernel holds, and synchronise everything with that."""
        self.planner = self._read_back()
        self._model.dirty.update(self._model.services)
        self.is_first = True

    def undecided(self) -> Undecided | None:
        """Name what a former agent left and nobody has claimed; None before the first synchronisation."""
        if self.is_first:
            return None
        found = self.planner.found
        return Undecided(frozenset(frontend.service for frontend in found.values()), udp_ends(found))

    def _sync_leftovers(self, now: float) -> None:
        """Remove what a former agent left and nobody claims, once it is certain that nobody will."""
        if self._model.incomplete or not self.planner.has_leftovers:
            return
        unread = {str(key) for key in self._model.unread()}
        spared = self._names.ids_of(unread) if unread else set()
        plan = Plan()
        self.planner.plan_leftovers(plan, spared)
        self._apply(plan, now)

    def _apply(self, plan: Plan, now: float) -> None:
        self._dataplane.store.apply(plan)
        for base, size in plan.freed:
            self.planner.allocator.rest(base, size, now)
        for number in plan.freed_tables:
            self.planner.tables.rest(number, now)
        if plan.removed_frontends or plan.removed_source_ranges:
            self._model.dirty.update(key for key, _ in self.planner.degraded)
            if self._flows:
                self._flows.note_removed(plan.removed_frontends)

    def _plan(self, keys: Iterable[ObjectKey], planned: set[ObjectKey], plan: Plan) -> None:
        planner = self.planner
        unread = self._model.unread() if self._model.malformed else {}
        has_leftovers = planner.has_leftovers
        for key in keys:
            desired = self._resolve(key)
            if desired and has_leftovers:
                desired = self._certain(key, desired, unread.get(key, ()))
            if desired is None:
                continue
            planner.plan_service(key, self._created(key), desired, plan)
            self._metrics.lacks_local(key, [(it.port.family, policy) for it in desired for policy in it.lacks_local])
        again, planner.to_replan = planner.to_replan, set()
        if again:
            planned |= again
            self._plan(sorted(again, key=self._age), planned, plan)

    def _certain(
        self, key: ObjectKey, desired: list[DesiredPort], unread: Container[Family]
    ) -> list[DesiredPort] | None:
        """Leave out the ports that are to stay as a former agent left them, since they could not be read yet.

        None = the Service is to stay so as a whole.
        """
        left = {want.port for want in desired if self.planner.is_found(want.frontends)}
        if left and self._model.incomplete:
            self._held.add(key)
            return None
        left -= {placement.port for placement in self.planner.placements.get(key, ())}
        return [want for want in desired if want.port not in left or want.port.family not in unread]

    def _created(self, key: ObjectKey) -> str:
        service = self._model.services.get(key)
        return service.created if service else ""

    def _age(self, key: ObjectKey) -> tuple[str, ObjectKey]:
        """Sort the older first: what is adopted at start then goes to the one who had it, and never through another."""
        return self._created(key), key

    def _resolve(self, key: ObjectKey) -> list[DesiredPort] | None:
        """Resolve one Service; one that cannot be costs no other."""
        try:
            return list(self._model.desired(key))
        except Exception:
            self._metrics.error("resolve")
            log.exception("service %s cannot be resolved; what is programmed for it stays", key)
            return None

    def _note_flows(self, planned: set[ObjectKey]) -> None:
        if self._flows is None:
            return
        for key in planned:
            self._flows.note(key, self.planner.placements.get(key, ()))
        if self.is_first:
            self._flows.note_all(self._model.services)
            self._flows.check_all()

    def _read_back(self) -> Planner:
        store = self._dataplane.store
        sizes = self._dataplane.options.sizes
        # One frontend is left to the self-test, which an agent must pass also where the map is full.
        state, last_id = store.read_state(), self._names.last_id
        return Planner(sizes.segments, sizes.frontends - 1, state, last_id, sizes.source_ranges, sizes.maglev_tables)

    def _tell_degraded(self) -> None:
        degraded = dict(self.planner.degraded)
        for place, reason in degraded.items():
            if self._told.get(place) != reason:
                service, port = place
                log.error("service %s port %s is degraded: %s", service, port, reason)
                self._on_degraded(service, f"port {port}: {reason}")
        self._told = degraded
