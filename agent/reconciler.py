"""The reconciler: the one thread that owns the model and is the only writer of the maps.

Watchers hand it typed events; it takes in what has gathered, and has the Services that changed synchronised
(service_sync.py). What fails is read back and tried again.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from agent.core.events import AddressesChanged, Delete, Event, Malformed, Upsert, kind_of
from agent.core.model import Model
from agent.core.network import Network
from agent.core.planner import Planner
from agent.core.records import POLICIES, POLICY_KINDS, Kind, SliceRecord
from agent.errors import DataplaneError, LoaderError
from agent.kernel.conntrack import FlowSweep, Undecided
from agent.kernel.dataplane import Dataplane
from agent.observe.metrics import Metrics
from agent.observe.names import NameJournal
from agent.service_sync import DegradedListener, ServiceSync

if TYPE_CHECKING:
    from agent.policy_sync import PolicySync  # not loaded where policy is off

log = logging.getLogger("ebproxy.reconciler")
T = TypeVar("T")
_BATCH_LIMIT = 20_000
_RETRY_FLOOR_S = 0.5
_PATIENCE_LIMIT_S = 3600.0
"""What a queue can wait for is finite, though nothing may be due."""
_AWAIT_POLICY_S = 60.0
"""How long the programs of a former layout go on, with Services as they were, because policy is not filled in yet."""
_STANDS = {
    "former": "what it said before stays",
    "part": "never read here before: what can be read is in force",
    "none": "never read here before: nothing of it is in force, its pods are not isolated by it",
}
"""What holds of an object that cannot be read."""

Question = Callable[[], None]
"""Called on the reconciler's thread."""


class _Received(NamedTuple):
    """An event of policy, and when it was received, in monotonic seconds."""

    event: Event
    at: float


class Reconciler:
    """Keeps one dataplane as one model desires.

    ``sync_period_s`` bounds the wait before a failed write is tried again; every ``drift_period_s`` the maps are read
    back, compared and healed. ``on_synced`` is called on the thread, whenever what was taken in is programmed.
    """

    def __init__(
        self,
        model: Model,
        dataplane: Dataplane,
        metrics: Metrics,
        names: NameJournal,
        *,
        sync_period_s: float,
        drift_period_s: float,
        on_degraded: DegradedListener,
        flows: FlowSweep | None = None,
        policy: PolicySync | None = None,
        on_synced: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.dataplane = dataplane
        self.flows = flows
        self.policy = policy
        self._services = ServiceSync(model, dataplane, metrics, names, flows, on_degraded)
        self.is_settled = threading.Event()
        """Set while everything that was listed is programmed."""
        self.pending_since: float | None = None
        """Monotonic time of the oldest change that could be in the kernel and is not; None = there is none."""
        self.failure: BaseException | None = None
        self._metrics = metrics
        self._sync_period_s = sync_period_s
        self._drift_period_s = drift_period_s
        self._on_synced = on_synced
        self._has_news = True
        """Whether anything was taken in since ``on_synced`` was last called."""
        self._queue: queue.SimpleQueue[Event | Network | _Received | Question | None] = queue.SimpleQueue()
        self._settling = threading.Lock()
        self._triggers: list[float] = []
        self._taken: Tally[Kind] = Tally()
        self._drained_at: float | None = None
        """When all that had been submitted was taken in; None = more had gathered than one turn takes."""
        self._retry_at: float | None = None
        self._retry_s = _RETRY_FLOOR_S
        self._drift_at = time.monotonic() + drift_period_s
        self._activation_at: float | None = None
        """When hooks are turned though policy is not complete; None = they have not had to wait for policy alone."""
        self._network: Network | None = None
        self._followed: tuple[Network | None, tuple[str, ...] | None] | None = None
        self._faults: tuple[str, ...] = ()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)

    @property
    def planner(self) -> Planner:
        """What is planned, and so in the maps."""
        return self._services.planner

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after what it is doing; everything stays programmed."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, event: Event | Network) -> None:
        """Take an event from a source, or the node's network as it is now, in any thread."""
        with self._settling:
            if self.pending_since is None:
                self.pending_since = time.monotonic()
                self.is_settled.clear()
            if self.policy is not None and not isinstance(event, Network) and kind_of(event) in POLICY_KINDS:
                self._queue.put(_Received(event, time.monotonic()))
            else:
                self._queue.put(event)

    def ask(self, question: Callable[[], T], timeout_s: float = 10) -> T:
        """Answer a question about the model or the plans on the thread that owns them. Raises: TimeoutError."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(question())
            except Exception as error:  # noqa: BLE001 - belongs to who asked
                answer.set_exception(error)

        self._queue.put(run)
        return answer.result(timeout_s)

    def build_tables(self) -> None:
        """Build the Maglev tables that waited for their program; from any thread, done on this one."""
        self._queue.put(self._build_tables)

    def _build_tables(self) -> None:
        try:
            self.dataplane.tables.check()
        except OSError as error:
            self._metrics.error("maglev")
            log.error("%s; trying again in %.0f s", error, self._drift_period_s)

    def _run(self) -> None:
        try:
            while self._take_in():
                self._turn()
                self._sweep_flows()
                if self.policy is not None:
                    self.policy.sweep()
        except BaseException as error:
            log.exception("the reconciler stopped; what is programmed stays")
            self.failure = error
            raise

    def _take_in(self) -> bool:
        """Wait for work and take in all that has gathered; False = stop."""
        self._drained_at = None
        rest = _BATCH_LIMIT
        try:
            item = self._queue.get(timeout=self._patience())
            while item is not None:
                self._take(item)
                rest -= 1
                if not rest:
                    break
                item = self._queue.get_nowait()
            else:
                return False
        except queue.Empty:
            self._drained_at = time.monotonic()
        if self._taken:
            self._metrics.taken_in(self._taken)
            self._taken.clear()
        return True

    def _take(self, item: Event | Network | _Received | Question) -> None:
        if isinstance(item, _Received):
            self._take_policy(item)
            return
        if isinstance(item, Upsert):
            record = item.record
            self._taken[record.kind] += 1
            if item.left_out:
                self._tell_left_out(item, "; it is left out")
            if isinstance(record, SliceRecord) and record.changed_at:
                self._triggers.append(record.changed_at)
        elif isinstance(item, Delete):
            self._taken[item.kind] += 1
        elif isinstance(item, Malformed):
            self._tell_malformed(item)
        elif isinstance(item, Network):
            self._network = item
            if self.policy is not None:
                self.policy.follow(item)
            item = AddressesChanged(item.local, item.sources)
        elif callable(item):
            item()
            return
        self._has_news = True
        self.model.apply(item)

    def _tell_left_out(self, item: Upsert, outcome: str) -> None:
        record = item.record
        self._metrics.malformed(record.kind)
        for field, reason in item.left_out:
            log.warning("%s %s: %s: %s%s", record.kind, record.key, field, reason, outcome)

    def _take_policy(self, received: _Received) -> None:
        assert self.policy is not None  # noqa: S101 - else nothing is received as such
        event = received.event
        self.policy.take(event, received.at)
        if isinstance(event, Malformed):
            name = event.kind, event.key
            in_force = self.policy.model.in_force(name) if event.kind in POLICIES else "former"
            self._tell_malformed(event, _STANDS[in_force])
        elif isinstance(event, Upsert) and event.left_out:
            # Of a policy the reason says what its rule comes to.
            self._tell_left_out(event, "; it is left out" if event.record.kind is Kind.POD else "")

    def _tell_malformed(self, event: Malformed, stands: str = _STANDS["former"]) -> None:
        self._metrics.malformed(event.kind)
        log.warning("%s %s: %s: %s; %s", event.kind, event.key, event.field, event.reason, stands)

    def _patience(self) -> float:
        """Seconds until something is due though nothing happens."""
        if self.dataplane.is_behind:
            return 0.0
        now = time.monotonic()
        due = [now + _PATIENCE_LIMIT_S, self._services_due_at()]
        if self.flows:
            due.append(self.flows.due_at)
        if self.policy is not None:
            due.append(self.policy.due_at)
        return max(0.0, min(due) - now)

    def _services_due_at(self) -> float:
        """Say when something of Services is due though nothing happens, in monotonic seconds; infinite = nothing is.

        What ``_turn_services`` would not do then is not due: counted, it would be due for ever, and the thread spin.
        """
        if not self.model.is_synced:
            return math.inf
        if self._retry_at is not None:
            return self._retry_at
        due = [self._drift_at]
        if self.planner.degraded and self.planner.next_wake is not None:
            due.append(self.planner.next_wake)
        if self._activation_at is not None and not self.dataplane.is_active:
            due.append(self._activation_at)
        return min(due)

    def _turn(self) -> None:
        """Give Services their turn, then policy, whatever became of the other.

        Hooks that wait for policy's lists are no failure: to have the agent restarted would bring no list sooner.
        """
        is_programmed = self._turn_services()
        if self.policy is not None:
            self.policy.turn()
        if is_programmed and not self.dataplane.is_active and self._may_activate():
            is_programmed = self._activate()
        if is_programmed:
            self._retry_s = _RETRY_FLOOR_S
            if not (self.policy and self.policy.is_behind):
                self._settle()

    def _turn_services(self) -> bool:
        """Bring Services up to date, as far as that can be done now; returns whether they are."""
        now = time.monotonic()
        self._follow()
        if not self.model.is_synced or (self._retry_at is not None and now < self._retry_at):
            return False
        self._retry_at = None
        try:
            if now >= self._drift_at:
                self._heal_drift()
            self._sync_all(now)
        except (DataplaneError, LoaderError, OSError) as error:
            self._recover(error)
            return False
        if self._has_news:
            self._has_news = False
            self._on_synced()
        return True

    def _settle(self) -> None:
        """Say that nothing waits, unless something came meanwhile; and that all is programmed, if it was all listed."""
        with self._settling:
            if self._queue.empty():
                self.pending_since = None
                if self.policy is None or self.policy.is_settled:
                    self.is_settled.set()
            elif self._drained_at is not None:
                self.pending_since = self._drained_at  # what waits now came later

    def _sweep_flows(self) -> None:
        """Take a turn at the tracked flows, a millisecond of work, if it is time for that."""
        now = time.monotonic()
        if self.flows is None or now < self.flows.due_at:
            return
        try:
            self.flows.turn(now, self._undecided)
        except OSError as error:
            self._metrics.error("conntrack")
            log.error("sweeping tracked flows: %s", error)

    def _undecided(self) -> Undecided | None:
        """Name what a former agent left and nobody has claimed; None while what is programmed is not as planned."""
        return self._services.undecided() if self._retry_at is None else None

    def _follow(self) -> None:
        """Bring devices and addresses up to date, whether or not the model is to be believed yet."""
        wanted = (self._network, self.model.node.pod_cidrs if self.model.is_synced else None)
        if self._network is None:
            return
        if wanted != self._followed:
            self.dataplane.follow(self._network, wanted[1])
            self._followed = wanted
        elif self.dataplane.is_behind:
            self.dataplane.catch_up()
        else:
            return
        self._tell_faults()

    def _tell_faults(self) -> None:
        faults = self.dataplane.faults
        for fault in faults:
            if fault not in self._faults:
                self._metrics.error("network")
                log.error("%s; trying again every %.0f s", fault, self._drift_period_s)
        self._faults = faults

    def _sync_all(self, now: float) -> None:
        """Synchronise until nothing is left; what one plan makes room for is changed by the next."""
        self._services.wake(now)
        while self._services.is_due:
            is_full = self._services.is_first
            count = self._services.sync(now)
            self._metrics.synced(time.monotonic() - now, count, self._triggers, is_full=is_full)
            self._triggers.clear()

    def _may_activate(self) -> bool:
        """Whether policy, too, is filled in, where the former layout's programs enforce it; in the end without it."""
        policy = self.policy
        if policy is None or not policy.is_awaited or policy.is_settled:
            return True
        now = time.monotonic()
        if self._activation_at is None:
            self._activation_at = now + _AWAIT_POLICY_S
        if now < self._activation_at:
            return False
        log.warning("policy is not complete after %.0f s; Services go on without what was in force", _AWAIT_POLICY_S)
        return True

    def _activate(self) -> bool:
        """Turn the hooks to this layout, now that it is filled: what was judged until now was by the former.

        Returns whether that is done.
        """
        try:
            if self.policy is not None:
                if not self.dataplane.is_in_use:
                    self.policy.begin()
                self.policy.maps.unsettle()
            changed = self.dataplane.activate()
            if self.policy is not None:
                self.policy.maps.settle()
        except (DataplaneError, LoaderError, OSError) as error:
            self._recover(error)
            return False
        log.info("socket hooks turned: %d changed, layout %s", changed, self.dataplane.layout)
        return True

    def _recover(self, error: Exception) -> None:
        """Read back what the kernel holds, plan everything anew, and try again a little later."""
        self._metrics.error("dataplane")
        self._retry_at = time.monotonic() + self._retry_s
        log.error("%s; trying again in %.1f s", error, self._retry_s)
        self._retry_s = min(self._retry_s * 2, self._sync_period_s)
        try:
            self._services.start_anew()
        except (DataplaneError, OSError) as second:
            log.error("reading back the maps: %s", second)

    def _heal_drift(self) -> None:
        """Compare hooks and maps with what was planned; attach again, or read back and plan anew."""
        self._drift_at = time.monotonic() + self._drift_period_s
        if reattached := self.dataplane.reattach() if self.dataplane.is_active else 0:
            self._metrics.drift(reattached)
            log.warning("%d hooks or entries of the node were not as they are to be; healed", reattached)
        self._tell_faults()
        differing = self.planner.differences(self.dataplane.store.read_state())
        if differing:
            self._metrics.drift(differing)
            log.warning("%d map entries are not as they were written; healing", differing)
            self._services.start_anew()
