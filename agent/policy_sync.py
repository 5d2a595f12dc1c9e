"""Policy's turns on the reconciler's thread: objects to plans to maps, beside Services and independent of them.

event ─ model ─ planner ─ numbers on disk ─ maps ─ behind which device each pod is
                   ▲                          │
                   └── read back: at start, after a failure, and where maps are not as they were written
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from agent.core.enforced import Policy
from agent.core.events import Event
from agent.core.network import Network
from agent.core.policy_model import PolicyModel, PolicyName
from agent.core.policy_plan import Numbers, PolicySizes
from agent.core.policy_planner import BLOCKS, PolicyPlanner
from agent.core.records import ObjectKey
from agent.errors import DataplaneError
from agent.kernel.connections import ConnectionSweep
from agent.kernel.pod_devices import PodDevices
from agent.kernel.policy_maps import PolicyMaps
from agent.observe.metrics import Metrics
from agent.observe.numbers import NumberFile
from agent.observe.policy_metrics import PolicyFacts

log = logging.getLogger("ebproxy.policy")
_RETRY_FLOOR_S = 0.5
_MOST_STEPS = 16

SubjectListener = Callable[[ObjectKey, str], None]
"""Told of a pod whose policy does not fit, and why, once for each reason."""

PolicyKeeper = Callable[[Mapping[PolicyName, Policy], Iterable[PolicyName]], None]
"""Writes down the policies in force, of which these changed. Raises: OSError."""


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """How policy is enforced. ``retry_s`` bounds the wait before a failed write is tried again."""

    sizes: PolicySizes = field(default_factory=PolicySizes)
    fails_open: bool = False
    retry_s: float = 30.0
    drift_period_s: float = 300.0


class PolicySync:
    """Keeps the maps of policy as one model desires; all but ``facts`` belongs to the reconciler's thread."""

    def __init__(
        self,
        model: PolicyModel,
        maps: PolicyMaps,
        numbers: NumberFile,
        devices: PodDevices,
        connections: ConnectionSweep,
        metrics: Metrics,
        options: PolicyOptions,
        *,
        on_degraded: SubjectListener = lambda *_: None,
        keep_policies: PolicyKeeper = lambda *_: None,
    ) -> None:
        """Take up what the maps hold. Raises: OSError."""
        self.model = model
        self.maps = maps
        self.devices = devices
        self.connections = connections
        self.degraded: Mapping[ObjectKey, str] = {}
        self.is_settled = False
        """Whether everything that was listed is in force."""
        self.is_awaited = False
        """Whether a former layout enforces what these maps do not hold before everything is in force."""
        self.on_enforced: Callable[[list[float]], None] = lambda _: None
        """Told how long changes took that are in force now, in seconds."""
        self._numbers = numbers
        self._metrics = metrics
        self._options = options
        self._on_degraded = on_degraded
        self._keep_policies = keep_policies
        self._network: Network | None = None
        self._places_changed = True
        self._is_dirty = True
        self._is_lost = False
        """Whether the planner no longer knows what the maps hold."""
        self._was_enforced = False
        self._rules = len(numbers.numbers.rules)
        self._waiting: list[float] = []
        """When the changes were received that are not in force yet."""
        self._retry_at: float | None = None
        self._retry_s = _RETRY_FLOOR_S
        self._drift_at = time.monotonic() + options.drift_period_s
        self.planner = self._read_back(numbers.numbers)
        self._kept: tuple[int, int] | None = self.planner.numbers_version

    @property
    def is_behind(self) -> bool:
        """Whether changes wait although they could be in force: the lists are there."""
        return self.model.is_synced and not self.is_settled

    @property
    def due_at(self) -> float:
        """When something is due though nothing happens, in monotonic seconds; before the lists are there no turn is."""
        if not self.model.is_synced:
            return self.connections.due_at
        if self._retry_at is not None:
            return min(self._retry_at, self.connections.due_at)
        if self._is_dirty:
            return 0.0
        return min(self._drift_at, self.devices.due_at, self.connections.due_at)

    def take(self, event: Event, received_at: float) -> None:
        """Take in an event of policy's kinds."""
        before = self._dirt
        self.model.apply(event)
        if self._dirt > before:
            self._waiting.append(received_at)
        self._is_dirty = True
        self.is_settled = False

    @property
    def _dirt(self) -> int:
        return len(self.model.dirty_addresses) + len(self.model.dirty_policies)

    def follow(self, network: Network) -> None:
        """Take in the node's network."""
        self._network = network
        self._places_changed = True
        self._is_dirty = True

    def turn(self) -> None:
        """Bring the maps up to date, as far as that can be done now. Raises nothing that concerns policy alone."""
        now = time.monotonic()
        if not self.model.is_synced or (self._retry_at is not None and now < self._retry_at):
            return
        try:
            if self._is_lost:
                self._start_anew()
            elif now >= self._drift_at:
                self._heal_drift(now)
            if self._is_dirty or self._retry_at is not None:
                self._sync()
            if self._places_changed or now >= self.devices.due_at:
                self._place(now)
            if self._retry_at is None:
                self._retry_s = _RETRY_FLOOR_S
        except (DataplaneError, OSError) as error:
            self._recover(error)
        except Exception as error:
            log.exception("policy cannot be planned; what is in force stays")
            self._recover(error)

    def begin(self) -> None:
        """Take note that the programs are turned on: until now they knew of no connection. Raises: DataplaneError."""
        if not (self.maps.knows_connections or self._is_lost):
            self.maps.apply(self.planner.begin(int(time.monotonic())))

    def sweep(self) -> None:
        """Take a turn at the connections, a millisecond of work, if it is time for that."""
        now = time.monotonic()
        if now < self.connections.due_at:
            return
        try:
            self.connections.turn(now)
        except OSError as error:
            self._metrics.error("connections")
            log.error("sweeping connections: %s", error)

    def facts(self) -> PolicyFacts:
        """Say how it stands, in any thread: numbers and lengths alone, which need no lock."""
        return PolicyFacts(
            self.maps.read_counters(),
            revision=self.maps.revision,
            identities=self.planner.identity_count,
            subjects=self.planner.entry_counts["subjects"],
            rules=self._rules,
            degraded=len(self.degraded),
            unplaced=self.devices.missing,
            expired=self.connections.deleted,
            is_settled=self.is_settled,
        )

    def _sync(self) -> None:
        """Plan and carry out one step after another, until nothing is left to do."""
        for _ in range(_MOST_STEPS):
            plan = self.planner.plan()
            self._keep_numbers()
            if not plan:
                break
            self._places_changed |= bool(plan.subjects or plan.removed_subjects)
            self.maps.apply(plan)
        else:
            return  # more may have changed; Services have their turn
        self.maps.hold(is_full=self.planner.lacks_subjects and not self._options.fails_open)
        self.maps.settle()
        self._retry_at = None
        self._is_dirty = False
        self._tell_enforced()
        self._tell_degraded()
        if self.model.unkept_policies:
            self._write_policies()

    def _tell_enforced(self) -> None:
        is_first = not self._was_enforced
        waiting, self._waiting = self._waiting, []
        self.is_settled = self._was_enforced = True
        if is_first:
            log.info("policy is in force, %s entries, revision %d", self.planner.entry_counts, self.maps.revision)
        else:
            now = time.monotonic()
            self.on_enforced([now - received_at for received_at in waiting])

    def _keep_numbers(self) -> None:
        """Write down what numbers stand for before the maps hold them. Without it they are given anew at a restart."""
        version = self.planner.numbers_version
        if version == self._kept:
            return
        numbers = self.planner.numbers
        self._rules = len(numbers.rules)
        try:
            self._numbers.write(numbers)
        except OSError as error:
            self._metrics.error("numbers")
            log.error("writing what identities stand for: %s", error)
        else:
            self._kept = version

    def _write_policies(self) -> None:
        """Write down what is in force. Without it a restart loses the policies that cannot be read then."""
        try:
            self._keep_policies(self.model.policies, self.model.unkept_policies)
        except OSError as error:
            self._metrics.error("policies")
            log.error("writing which policies are in force: %s", error)
        else:
            self.model.unkept_policies.clear()

    def _place(self, now: float) -> None:
        """Find out behind which device each pod is."""
        if self._network is None:
            return
        pods: dict[ObjectKey, list[bytes]] = {}
        for address, (key, _) in self.planner.subject_pods().items():
            pods.setdefault(key, []).append(address)
        without_room = self.planner.unplaced_subjects()
        self.devices.turn(now, self._network, list(pods.values()), without_room, is_new=self._places_changed)
        self.maps.apply(self.planner.place(self.devices.places))
        self._places_changed = False

    def _heal_drift(self, now: float) -> None:
        """Compare the maps with what was planned; where they differ, plan anew from what is there."""
        self._drift_at = now + self._options.drift_period_s
        self._places_changed = True
        self.devices.forget()
        differing = self.planner.differences(self.maps.read())
        if differing:
            self._metrics.drift(differing)
            log.warning("%d entries of policy are not as they were written; healing", differing)
            self._start_anew()

    def _recover(self, error: Exception) -> None:
        """Have everything read back and planned anew, a little later."""
        self._metrics.error("policy")
        self._is_lost = True
        self._retry_at = time.monotonic() + self._retry_s
        self.is_settled = False
        log.error("policy: %s; trying again in %.1f s", error, self._retry_s)
        self._retry_s = min(self._retry_s * 2, self._options.retry_s)

    def _start_anew(self) -> None:
        self.devices.forget()
        self.planner = self._read_back(self.planner.numbers)
        self._kept = None
        self._is_lost = False
        self._is_dirty = self._places_changed = True

    def _read_back(self, numbers: Numbers) -> PolicyPlanner:
        options = self._options
        return PolicyPlanner(
            self.model,
            options.sizes,
            self.maps.read(),
            numbers,
            fails_open=options.fails_open,
            since=0 if self.maps.knows_connections else int(time.monotonic()),
        )

    def _tell_degraded(self) -> None:
        degraded = self.planner.degraded
        for key, reason in degraded.items():
            if self.degraded.get(key) != reason:
                log.error("policy of %s is degraded: %s", key, reason)
                if key.namespace != BLOCKS:
                    self._on_degraded(key, reason)
        self.degraded = degraded
