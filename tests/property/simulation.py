"""An agent without a kernel: the real reconciler over maps in memory, with a clock that the test moves."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Container, Iterable, Iterator

import pytest

import agent.reconciler
from agent.core.abi import FrontendFlag, MapSizes
from agent.core.events import Event
from agent.core.frontends import Which
from agent.core.model import Model
from agent.core.plan import Placement, Plan
from agent.core.services import Backends
from agent.kernel.dataplane import DataplaneOptions
from agent.observe.metrics import Metrics
from agent.reconciler import Reconciler
from tests.property.fake_maps import REFUSED, SILENT, Answer, Answers, FakeMaps, Invariant
from tests.property.strategies import NODE_NAME, first_lists

METRICS = Metrics()
NEVER = 1e12
FOREVER = 1_000


class Crash(BaseException):
    """The agent dies in the middle of a plan."""


class Clock:
    """Stands for the module ``time`` in the reconciler."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


CLOCK = Clock()


@contextlib.contextmanager
def simulated_time() -> Iterator[None]:
    """Have the reconciler read the tests' clock, and say nothing."""
    logging.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(agent.reconciler, "time", CLOCK)
            yield
    finally:
        logging.disable(logging.NOTSET)


class WatchedMaps(FakeMaps):
    """Maps that check the invariant after every write. ``error``: what ``fail_after`` raises; None = the kernel's."""

    error: BaseException | None = None

    def apply(self, plan: Plan) -> None:
        invariant = Invariant(self, plan)
        self.watcher = invariant.check
        try:
            super().apply(plan)
        except Exception:
            if self.error is not None:
                raise self.error from None
            raise
        finally:
            self.fail_after = None
            self.watcher = lambda: None


class _Names:
    """The journal of names, which outlives agents."""

    def __init__(self) -> None:
        self.services: dict[int, str] = {}

    def record(self, placements: Iterable[Placement]) -> None:
        for placement in placements:
            assert placement.service_id > 0
            self.services[placement.service_id] = str(placement.service)

    @property
    def last_id(self) -> int:
        return max(self.services, default=0)

    def ids_of(self, services: Container[str]) -> set[int]:
        return {ident for ident, service in self.services.items() if service in services}


class _Dataplane:
    layout = "simulated"
    is_active = False
    is_in_use = True
    is_behind = False

    def __init__(self, maps: WatchedMaps, sizes: MapSizes) -> None:
        self.store = maps
        self.options = DataplaneOptions(None, None, sizes)  # type: ignore[arg-type]

    def activate(self) -> int:
        self.is_active = True
        return 0


class SimulatedAgent:
    """A node's maps, which stay, and an agent, which may be restarted. Nothing happens by itself."""

    def __init__(
        self, segment_slots: int = 2048, frontend_limit: int = 512, source_range_limit: int = 128, tables: int = 16
    ) -> None:
        # One frontend is the self-test's.
        self.sizes = MapSizes(
            frontends=frontend_limit + 1, segments=segment_slots, source_ranges=source_range_limit, maglev_tables=tables
        )
        self.maps = WatchedMaps(segment_slots, frontend_limit + 1, source_range_limit)
        self.names = _Names()
        self.start()
        self.take(first_lists())

    def start(self) -> None:
        """Start a new agent over the maps as they are; it knows no objects yet."""
        self.maps.fail_after, self.maps.error = None, None
        self.model = Model(NODE_NAME)
        self.reconciler = Reconciler(
            self.model,
            _Dataplane(self.maps, self.sizes),  # type: ignore[arg-type]
            METRICS,
            self.names,  # type: ignore[arg-type]
            sync_period_s=30,
            drift_period_s=NEVER,
            on_degraded=lambda *_: None,
        )

    def restart(self) -> None:
        """Start a new agent, which is told the objects anew."""
        told = self.model
        self.start()
        self.model.services, self.model.slices, self.model.node = told.services, told.slices, told.node
        self.model._owner_of_slice = told._owner_of_slice
        self.model._with_node_ports, self.model.node_port_addresses = told._with_node_ports, told.node_port_addresses
        self.model.dirty = {*told.services, *told.slices}
        self.model.unsynced = set()
        self.settle()

    def take(self, events: Iterable[Event]) -> None:
        """Take in a batch of events and do one turn."""
        for event in events:
            self.reconciler._take(event)
        self.reconciler._turn()

    def settle(self) -> None:
        """Let time pass until nothing is left to do."""
        for _ in range(FOREVER):
            CLOCK.now += 31
            self.reconciler._turn()
            if self.reconciler._retry_at is None and self.reconciler.planner.next_wake is None:
                return
        raise AssertionError("it never settles")

    def replan_all(self) -> None:
        """Plan every Service again, though none has changed."""
        self.model.dirty.update(self.model.services)
        self.reconciler._turn()

    @property
    def placed(self) -> dict[bytes, bytes]:
        """Ids and bases, by frontend."""
        return dict(self.maps.frontends)

    @property
    def writes(self) -> int:
        """Count what was written, but for tables, which each agent builds anew."""
        return self.maps.writes.total() - self.maps.writes["maglev_tables"]


def expected_answers(model: Model) -> dict[bytes, Answers]:
    """Say what every frontend should answer, thought out without planner and maps: the older Service has its claim."""
    answers: dict[bytes, Answers] = {}
    for service in sorted(model.services.values(), key=lambda service: (service.created, service.key)):
        for want in sorted(model.desired(service.key), key=lambda want: want.port):
            gets = {Which.NOTHING: REFUSED, Which.CLUSTER: _answer(want.cluster), Which.LOCAL: _answer(want.local)}
            ranges = frozenset(address + bytes([bits]) for address, bits in want.source_ranges)
            for frontend, role in zip(want.frontends, want.roles, strict=True):
                timeout_s = want.affinity_timeout_s if role.inside else 0
                limit = ranges if role.flags & FrontendFlag.SOURCE_RANGES else None
                answer = Answers(gets[role.inside], gets[role.outside], limit, (timeout_s, role.flags))
                answers.setdefault(frontend, answer)
    return answers


def _answer(backends: Backends | None) -> Answer:
    if backends is None:
        return REFUSED
    if backends.slots:
        return Answer(frozenset(backends.slots))
    return SILENT if backends.is_silent else REFUSED
