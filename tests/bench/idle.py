"""What an agent costs that has nothing to do (G13)."""

from __future__ import annotations

import time

from tests.bench.agents import Agent
from tests.bench.result import Result
from tests.bench.scale import Scale
from tests.bench.statistics import Estimate


def idle_cpu(agent: Agent, scale: Scale) -> Result:
    """G13, in thousandths of a CPU."""
    begun, cpu = time.monotonic(), agent.cpu_s()
    time.sleep(scale.idle_s)
    milli = (agent.cpu_s() - cpu) / (time.monotonic() - begun) * 1000
    return Result("G13", f"CPU of an idle agent, over {scale.idle_s:.0f} s", Estimate(milli, milli, milli), 2, "mCPU")
