"""Kill the agent and start it again while connections come and go (G16)."""

from __future__ import annotations

import time

import numpy as np

from tests.bench.agents import Agent
from tests.bench.population import SERVICE_PORT, Population
from tests.bench.result import Result
from tests.bench.scale import Scale
from tests.bench.statistics import Estimate, estimate, median
from tests.bench.worker import Target, Worker

_DOWN_S = 0.1


def kill_and_restart(agent: Agent, worker: Worker, population: Population, scale: Scale) -> list[Result]:
    """G16: connect to every Service in turn without a pause, meanwhile kill the agent and start another.

    The churn takes what CPU it gets: how long an agent needs that has the machine to itself is measured after it.
    """
    worker.begin_churn(Target(population.cluster_ip(0), SERVICE_PORT, population.services))
    beside = [_once(agent) for _ in range(scale.kills)]
    tried, failed = worker.end_churn()
    alone = np.array([_once(agent) for _ in range(scale.quiet_kills)])
    writes = agent.status()["map_writes"]
    return [
        Result(
            "G16",
            f"failed connects, {scale.kills} times kill -9 and restart",
            Estimate(failed, failed, failed),
            0,
            "failed",
            peers={"connects": tried, "entries the last agent wrote": writes},
        ),
        Result(
            "G16 ready",
            "start of the process to everything programmed",
            estimate(median, alone),
            1,
            "s",
            peers={"alone s": alone.round(2).tolist(), "beside the churn s": [round(value, 2) for value in beside]},
        ),
    ]


def _once(agent: Agent) -> float:
    """Kill the agent and start another; returns seconds until it has settled."""
    agent.kill()
    time.sleep(_DOWN_S)
    begun = agent.start()
    agent.wait_settled()
    return time.monotonic() - begun
