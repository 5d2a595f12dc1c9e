"""An agent that one kind is refused to, for ever: it waits, and takes next to nothing of a CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.errors import AgentUnreachable
from tests.cluster.api_driver import NODES
from tests.cluster.api_faults import Do, Fault
from tests.cluster.api_servers import OurApiServer, driver
from tests.cluster.nodes import POD_RANGES, watching_agent
from tests.lab.agents import Agent
from tests.lab.lab import Lab
from tests.lab.polling import until
from tests.lab.scene import SIZES
from tests.requirements import require_root

DRIFT_CHECK_PERIOD = "500ms"
"""Over long before the end of what is measured."""
WINDOW_S = 2.0
IDLE = 0.2
ALWAYS = -1


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    require_root()
    with ExitStack() as made:
        yield made


def cpu_s(pid: int) -> float:
    """Read how long a process has run, in user and kernel mode. Source: proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(agent: Agent) -> float:
    """Measure which share of a CPU an agent takes, over a window."""
    assert agent.process
    began, before = time.monotonic(), cpu_s(agent.process.pid)
    until(lambda: time.monotonic() >= began + WINDOW_S, "the window is over")
    return (cpu_s(agent.process.pid) - before) / (time.monotonic() - began)


def not_listed(agent: Agent) -> list[str] | None:
    """Ask an agent which lists it lacks; None = it does not answer yet."""
    assert not agent.has_ended(), agent.log.read_text(encoding="utf-8")
    try:
        lacking: list[str] = agent.status()["not_listed"]
    except AgentUnreachable:
        return None
    return lacking


@pytest.mark.parametrize(
    ("refused", "kind", "network_policy"),
    [
        pytest.param("networkpolicies", "NetworkPolicy", "standard", id="policy"),
        pytest.param("endpointslices", "EndpointSlice", "off", id="services"),
    ],
)
def test_an_agent_without_a_list_is_idle_when_maps_are_to_be_compared(
    stack: ExitStack, refused: str, kind: str, network_policy: str
) -> None:
    """Once, when the drift period was over, its thread span until the list came."""
    api = OurApiServer()
    api.start()
    stack.callback(api.stop)
    fault = api.server.faults.add(Fault(Do.STATUS, refused, times=ALWAYS, code=403))
    node = stack.enter_context(Lab(1)).nodes[0]
    driver(api).create(NODES, node.manifest())
    given = {"clusterCIDR": POD_RANGES, "mapSizes": SIZES, "networkPolicy": network_policy}
    agent = watching_agent(stack, node, api, driftCheckPeriod=DRIFT_CHECK_PERIOD, **given)
    agent.start()
    stack.callback(agent.stop)

    until(lambda: not_listed(agent) == [kind], f"all but {refused} is listed", 60)
    taken = load(agent)

    assert fault.hits
    assert not_listed(agent) == [kind]
    assert taken < IDLE
