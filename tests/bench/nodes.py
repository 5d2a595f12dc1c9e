"""A dataplane of the bench: the real programs and maps, on a worker's cgroup, filled without an agent."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from agent.core.abi import FIRST_FREE_SLOT, MapSizes
from agent.core.events import AddressesChanged
from agent.core.model import Model
from agent.core.network import Network, PodDetection
from agent.core.plan import Plan
from agent.core.planner import Planner
from agent.core.segments import block_size
from agent.kernel.dataplane import Dataplane, DataplaneOptions
from agent.kernel.netlink import Netlink, read_network
from agent.kernel.programs import ProgramOptions
from tests.bench.errors import BenchError
from tests.bench.lines import Line
from tests.bench.policy_maps import fill_policy, with_policy
from tests.bench.policy_population import PolicyPopulation
from tests.bench.population import NODE, POD_RANGE, Population
from tests.bench.stage import Stage
from tests.lab import netns


def sizes_for(population: Population) -> MapSizes:
    """The default sizes of a node with two CPUs, or larger ones where the Services would not fit."""
    # One UDP port, and the Local policies of one Service in a hundred.
    segments = population.services + 1 + population.services // 50
    slots = FIRST_FREE_SLOT + segments * block_size(1 + population.endpoints)
    default = MapSizes()
    return dataclasses.replace(
        default,
        frontends=max(default.frontends, population.services * 3),
        segments=max(default.segments, slots),
    )


def open_dataplane(
    stage: Stage, name: str, cgroup: Path, population: Population, ends: contextlib.ExitStack, *, remember_peer: bool
) -> Dataplane:
    """Open a dataplane, fill it and turn the socket hooks to it."""
    options = DataplaneOptions(
        stage.bpffs(name, ends), cgroup, sizes_for(population), ProgramOptions(remember_peer=remember_peer)
    )
    dataplane = _open(options, ends)
    _fill(dataplane, population, Network())
    dataplane.activate()
    return dataplane


def open_node(
    stage: Stage,
    line: Line,
    cgroup: Path,
    population: Population,
    ends: contextlib.ExitStack,
    *,
    socket_lb: bool,
    policy: tuple[PolicyPopulation, Mapping[int, int]] | None = None,
) -> Dataplane:
    """Open a dataplane for the node of a line: its devices get the packet path's programs too.

    ``policy``: what it is made of, and behind which devices its pods are, by their numbers; None = there is none.
    """
    sizes = sizes_for(population)
    options = DataplaneOptions(
        stage.bpffs(line.name, ends, line.node),
        cgroup,
        with_policy(sizes) if policy else sizes,
        ProgramOptions(policy=policy is not None),
        socket_lb,
        pods=PodDetection((POD_RANGE,)),
    )
    with netns.entered(line.node):
        dataplane = _open(options, ends)
        with Netlink() as netlink:
            network = read_network(netlink)
        dataplane.follow(network, ())
        _fill(dataplane, population, network)
        if policy:
            fill_policy(dataplane, *policy)
        dataplane.activate()
        while dataplane.is_behind:
            dataplane.catch_up()
    if dataplane.faults:
        raise BenchError(f"{line.name}: {dataplane.faults[0]}")
    return dataplane


def _open(options: DataplaneOptions, ends: contextlib.ExitStack) -> Dataplane:
    dataplane = Dataplane(options)
    ends.callback(dataplane.close)
    return dataplane


def _fill(dataplane: Dataplane, population: Population, network: Network) -> None:
    model = Model(NODE)
    model.apply(AddressesChanged(network.local, network.sources))
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
