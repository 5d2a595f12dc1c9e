"""How the reconciler takes in what sources submit, and what it says of waiting; on maps in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from agent.core.events import Upsert
from agent.core.records import Fault, Kind
from agent.reconciler import _AWAIT_POLICY_S, _PATIENCE_LIMIT_S
from tests.builders import key, service
from tests.property.simulation import METRICS, Clock, SimulatedAgent

SYNC_S = 2.0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("agent.reconciler.time", made)
    return made


@pytest.fixture
def agent(clock) -> SimulatedAgent:
    made = SimulatedAgent()
    made.reconciler._drift_at = clock.now + 3600
    return made


def submit(agent: SimulatedAgent, *ips: str) -> None:
    for ip in ips:
        agent.reconciler.submit(Upsert(service("web", ip)))


def turn(agent: SimulatedAgent) -> None:
    assert agent.reconciler._take_in()
    agent.reconciler._turn()


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 100])
def test_events_keep_their_order_though_more_gathered_than_one_turn_takes(agent, monkeypatch, limit):
    """Once, the first event beyond the limit went to the end of the queue, behind newer versions of its object."""
    monkeypatch.setattr("agent.reconciler._BATCH_LIMIT", limit)
    submit(agent, *(f"10.0.0.{number}" for number in range(1, 6)))

    while not agent.reconciler.is_settled.is_set():
        turn(agent)

    assert agent.model.services[key("web")] == service("web", "10.0.0.5")


def test_a_stop_ends_what_gathered_before_it(agent):
    submit(agent, "10.0.0.1")
    agent.reconciler.stop()

    assert not agent.reconciler._take_in()
    assert agent.model.services[key("web")] == service("web", "10.0.0.1")


def busy(agent: SimulatedAgent, clock: Clock, monkeypatch) -> None:
    """Have something submitted during every synchronisation, which takes its time."""
    sync_all = agent.reconciler._sync_all

    def sync(now: float) -> None:
        sync_all(now)
        clock.now += SYNC_S
        submit(agent, "10.0.0.1")

    monkeypatch.setattr(agent.reconciler, "_sync_all", sync)


def test_under_changes_without_end_nothing_waits_longer_than_two_synchronisations(agent, clock, monkeypatch):
    """Else /livez would have a busy agent restarted."""
    submit(agent, "10.0.0.1")
    busy(agent, clock, monkeypatch)
    for _ in range(50):
        turn(agent)

        assert clock.now - agent.reconciler.pending_since <= 2 * SYNC_S


def test_what_one_turn_does_not_take_in_has_waited_since_it_came(agent, clock, monkeypatch):
    monkeypatch.setattr("agent.reconciler._BATCH_LIMIT", 1)
    began = clock.now
    submit(agent, "10.0.0.1", "10.0.0.2", "10.0.0.3")
    busy(agent, clock, monkeypatch)
    turn(agent)
    turn(agent)

    assert agent.reconciler.pending_since == began


def test_nothing_waits_once_all_is_written(agent):
    submit(agent, "10.0.0.1", "10.0.0.2")
    assert agent.reconciler.pending_since is not None
    turn(agent)

    assert agent.reconciler.pending_since is None


@pytest.fixture
def synced(agent) -> list[int]:
    """How many Services the model had each time everything was said to be programmed."""
    told: list[int] = []
    agent.reconciler._on_synced = lambda: told.append(len(agent.model.services))
    return told


def test_who_waits_for_what_is_programmed_is_told_once_for_each_change(agent, synced):
    submit(agent, "10.0.0.1", "10.0.0.2")
    turn(agent)
    agent.reconciler._turn()

    assert synced == [1]


def test_who_waits_is_told_after_a_failure_when_the_maps_have_it(agent, clock, synced):
    submit(agent, "10.0.0.1")
    agent.maps.fail_after = 0
    turn(agent)
    assert synced == []

    clock.now += 60
    agent.reconciler._turn()
    assert synced == [1]


def test_what_is_left_out_of_an_object_is_counted_and_told(agent, caplog):
    def count() -> float:
        return METRICS.registry.get_sample_value("ebproxy_malformed_objects_total", {"kind": "Service"}) or 0

    before = count()
    left_out = Fault("spec.externalIPs[0]", "'x' is no address"), Fault("spec.externalIPs[2]", "'y' is no address")
    agent.reconciler.submit(Upsert(service(), left_out))
    turn(agent)

    assert [record.getMessage() for record in caplog.records] == [
        "Service ns/web: spec.externalIPs[0]: 'x' is no address; it is left out",
        "Service ns/web: spec.externalIPs[2]: 'y' is no address; it is left out",
    ]
    assert count() == before + 1


class Awaited:
    """Policy that a former layout enforces, and that these maps do not hold yet; says what it is asked to do."""

    is_awaited, is_settled, is_behind = True, False, False

    def __init__(self, agent: SimulatedAgent) -> None:
        self.maps = self
        self.due_at = math.inf
        self._agent = agent
        self.seen: list[tuple[str, bool]] = []

    def turn(self) -> None:
        self.seen.append(("turn", self._agent.reconciler.dataplane.is_active))

    def begin(self) -> None:
        self.seen.append(("begin", self._agent.reconciler.dataplane.is_active))

    def unsettle(self) -> None:
        self.seen.append(("unsettle", self._agent.reconciler.dataplane.is_active))

    def settle(self) -> None:
        self.seen.append(("settle", self._agent.reconciler.dataplane.is_active))


@pytest.fixture
def awaited(agent) -> Awaited:
    policy = agent.reconciler.policy = Awaited(agent)
    agent.reconciler.dataplane.is_active = False
    return policy


@pytest.mark.parametrize("is_in_use", [True, False])
def test_policy_begins_with_the_first_hook_that_is_turned(agent, awaited, is_in_use):
    """Not with an agent that starts again: what it knows of connections it has known since."""
    agent.reconciler.dataplane.is_in_use = is_in_use
    awaited.is_settled = True
    submit(agent, "10.0.0.1")
    turn(agent)

    begun = [] if is_in_use else [("begin", False)]
    assert awaited.seen == [("turn", False), *begun, ("unsettle", False), ("settle", True)]


def test_another_layout_is_not_turned_to_before_it_enforces_what_the_former_does(agent, awaited):
    submit(agent, "10.0.0.1")
    turn(agent)
    assert awaited.seen == [("turn", False)]
    assert not agent.reconciler.is_settled.is_set()

    awaited.is_settled = True
    submit(agent, "10.0.0.2")
    turn(agent)

    assert awaited.seen[1:] == [("turn", False), ("unsettle", False), ("settle", True)]
    assert agent.reconciler.is_settled.is_set()


@pytest.mark.parametrize("is_behind", [False, True], ids=["lists missing", "lists there"])
def test_to_wait_for_policys_lists_is_no_failure(agent, awaited, is_behind):
    """Once, with a short sync period, /livez had the agent restarted before it went on without policy, for ever."""
    awaited.is_behind = is_behind
    submit(agent, "10.0.0.1")
    turn(agent)

    assert (agent.reconciler.pending_since is not None) is is_behind
    assert not agent.reconciler.dataplane.is_active
    assert not agent.reconciler.is_settled.is_set()


def test_how_long_hooks_wait_for_policy_counts_from_when_services_are_programmed(agent, awaited, clock):
    """Once it counted from the start, and the first turn that had Services gave policy up."""
    agent.model.unsynced = {Kind.ENDPOINT_SLICE}
    submit(agent, "10.0.0.1")
    turn(agent)
    clock.now += 2 * _AWAIT_POLICY_S
    assert agent.reconciler._patience() == _PATIENCE_LIMIT_S

    agent.model.unsynced = set()
    for waited in range(3):
        agent.reconciler._turn()
        assert not agent.reconciler.dataplane.is_active
        assert agent.reconciler._patience() == _AWAIT_POLICY_S - waited
        clock.now += 1
    clock.now += _AWAIT_POLICY_S
    assert agent.reconciler._patience() == 0
    agent.reconciler._turn()

    assert awaited.seen[-2:] == [("unsettle", False), ("settle", True)]
    assert agent.reconciler._patience() == agent.reconciler._drift_at - clock.now, "no more is waited for"


def test_in_the_end_services_go_on_without_it(agent, awaited, clock):
    submit(agent, "10.0.0.1")
    turn(agent)
    assert agent.reconciler._patience() <= _AWAIT_POLICY_S

    clock.now += 2 * _AWAIT_POLICY_S
    submit(agent, "10.0.0.2")
    turn(agent)

    assert agent.reconciler.dataplane.is_active


def test_hooks_that_cannot_be_turned_are_tried_again_ever_later(agent, clock, monkeypatch):
    """Services are synchronised meanwhile, which must not count as success."""

    def fail() -> int:
        attempts.append(clock.now)
        raise OSError(16, "Device or resource busy")

    attempts: list[float] = []
    agent.reconciler.dataplane.is_active = False
    monkeypatch.setattr(agent.reconciler.dataplane, "activate", fail)
    submit(agent, "10.0.0.1")
    turn(agent)
    for _ in range(3):
        clock.now += agent.reconciler._retry_at - clock.now
        agent.reconciler._turn()

    waits = [after - before for before, after in itertools.pairwise(attempts)]
    assert waits == [0.5, 1.0, 2.0]
    assert not agent.reconciler.is_settled.is_set()


def drift(agent: SimulatedAgent, due_at: float) -> None:
    agent.reconciler._drift_at = due_at


def room(agent: SimulatedAgent, due_at: float) -> None:
    agent.reconciler._services.planner = SimpleNamespace(degraded=[key("web")], next_wake=due_at)


def giving_up(agent: SimulatedAgent, due_at: float) -> None:
    agent.reconciler.policy = Awaited(agent)
    agent.reconciler.dataplane.is_active = False
    agent.reconciler._activation_at = due_at


def has_lists(_agent: SimulatedAgent) -> None:
    """Leave it as it is."""


def lacks_lists(agent: SimulatedAgent) -> None:
    agent.model.unsynced = {Kind.ENDPOINT_SLICE}


def has_failed(agent: SimulatedAgent) -> None:
    agent.maps.fail_after = 0
    submit(agent, "10.0.0.1")
    turn(agent)


@pytest.mark.parametrize("overdue", [drift, room, giving_up])
@pytest.mark.parametrize(
    ("state", "patience"),
    [
        pytest.param(has_lists, 0, id="all listed"),
        pytest.param(lacks_lists, _PATIENCE_LIMIT_S, id="a list missing"),
        pytest.param(has_failed, 0.5, id="a retry ahead"),
    ],
)
def test_what_a_turn_would_not_do_is_not_waited_for(
    agent, clock, state: Callable[..., None], overdue: Callable[..., None], patience: float
):
    """Once it was due for ever, and the thread span."""
    state(agent)
    overdue(agent, clock.now - 1)

    assert agent.reconciler._patience() == patience
