"""What health is judged by: how long a change waits, and whether this node is to be sent clients."""

from __future__ import annotations

import pytest

from agent.config import load
from agent.core.events import Delete, ListEnded, ListStarted, Upsert
from agent.core.records import Kind, NodeRecord, ObjectKey
from agent.observe.health import Health
from agent.servers import read_vitals
from agent.status import is_as_desired
from tests.builders import service
from tests.property.simulation import Clock, SimulatedAgent
from tests.property.strategies import NODE_NAME

SYNC_S = 30.0
CONFIG = load(None, {}, {}, NODE_NAME)
NODE = ObjectKey("", NODE_NAME)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    for module in ("agent.reconciler", "agent.servers"):
        monkeypatch.setattr(f"{module}.time", made)
    return made


@pytest.fixture
def starting(clock) -> SimulatedAgent:
    """An agent that no list was delivered to yet."""
    made = SimulatedAgent()
    made.start()
    made.reconciler._drift_at = clock.now + 1e6
    return made


def submit(agent: SimulatedAgent, *events) -> None:
    for event in events:
        agent.reconciler.submit(event)


def turn(agent: SimulatedAgent) -> None:
    assert agent.reconciler._take_in()
    agent.reconciler._turn()


def codes(agent: SimulatedAgent) -> tuple[int, int]:
    """What a load balancer and the kubelet are told."""
    health = Health(lambda: read_vitals(CONFIG, agent.reconciler), SYNC_S)
    return health.healthz()[0], health.livez()[0]


def test_healthy_while_starting_however_long_lists_take(starting, clock):
    """Else the kubelet would restart, over and over, an agent whose API server is slow."""
    submit(starting, ListStarted(Kind.SERVICE), Upsert(service()))
    turn(starting)
    clock.now += 100 * SYNC_S

    assert starting.reconciler.pending_since is not None
    assert codes(starting) == (200, 200)


@pytest.mark.parametrize(
    ("waits_s", "code"), [(2 * SYNC_S - 1, 200), (2 * SYNC_S, 503)], ids=["for-a-while", "for-two-periods"]
)
def test_a_change_that_waits(starting, clock, waits_s, code):
    for kind in Kind:
        submit(starting, ListStarted(kind), ListEnded(kind))
    turn(starting)
    submit(starting, Upsert(NodeRecord(NODE_NAME)))
    turn(starting)
    submit(starting, Upsert(service()))
    clock.now += waits_s

    assert codes(starting) == (code, code)
    turn(starting)
    assert codes(starting) == (200, 200)


@pytest.mark.parametrize(
    ("events", "healthz"),
    [
        pytest.param([Upsert(NodeRecord(NODE_NAME))], 200, id="there"),
        pytest.param([Upsert(NodeRecord(NODE_NAME, deleting=True))], 503, id="about-to-go"),
        pytest.param([Upsert(NodeRecord(NODE_NAME)), Delete(Kind.NODE, NODE)], 503, id="gone"),
        pytest.param([ListStarted(Kind.NODE), ListEnded(Kind.NODE)], 503, id="never-there"),
        pytest.param([], 200, id="not-listed-yet"),
    ],
)
def test_the_node_counts_for_load_balancers_alone(starting, events, healthz):
    for event in events:
        starting.model.apply(event)

    assert codes(starting) == (healthz, 200)


@pytest.mark.parametrize("is_complete", [True, False], ids=["all of it", "but for a file"])
def test_what_cannot_be_read_keeps_nothing_waiting(starting, is_complete):
    """Neither a rollout nor who waits for the status could wait for it to be mended."""
    for kind in Kind:
        submit(starting, ListStarted(kind), ListEnded(kind, is_complete=is_complete))
    assert not is_as_desired(starting.reconciler)
    turn(starting)

    assert starting.reconciler.is_settled.is_set()
    assert is_as_desired(starting.reconciler)
