"""A dataplane of the bench: the real programs and maps, on a worker's cgroup, filled without an agent."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from agent.core.abi import MapSizes
from agent.core.model import Model
from agent.core.plan import Plan
from agent.core.planner import Planner
from agent.kernel.dataplane import Dataplane, DataplaneOptions
from tests.bench.errors import BenchError
from tests.bench.population import NODE, Population
from tests.bench.stage import Stage


def sizes_for(population: Population) -> MapSizes:
    """The default sizes, or larger ones where the Services would not fit."""
    # One UDP port, and the block that the shared empty segments are in.
    segments = population.services + 2
    slots = segments << population.endpoints.bit_length()
    default = MapSizes()
    return dataclasses.replace(
        default,
        frontends=max(default.frontends, population.services * 2),
        segments=max(default.segments, slots),
    )


def open_dataplane(
    stage: Stage, name: str, cgroup: Path, population: Population, ends: contextlib.ExitStack, *, remember_peer: bool
) -> Dataplane:
    """Open a dataplane, fill it and turn the hooks to it."""
    options = DataplaneOptions(stage.bpffs(name, ends), cgroup, sizes_for(population), remember_peer)
    dataplane = Dataplane(options)
    ends.callback(dataplane.close)
    _fill(dataplane, population)
    dataplane.activate()
    return dataplane


def _fill(dataplane: Dataplane, population: Population) -> None:
    model = Model(NODE)
    for event in population.events():
        model.apply(event)
    sizes = dataplane.options.sizes
    planner = Planner(sizes.segments, sizes.frontends, dataplane.store.read_state())
    plan = Plan()
    for key in sorted(model.dirty):
        planner.plan_service(key, "", list(model.desired(key)), plan)
    if planner.degraded:
        raise BenchError(f"{len(planner.degraded)} service ports do not fit: {next(iter(planner.degraded.values()))}")
    dataplane.store.apply(plan)
