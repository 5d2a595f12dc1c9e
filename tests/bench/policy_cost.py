"""What NetworkPolicy costs those whom it allows (G7): the same two pods of one node, with policy and without.

Each variant is a line of its own (lines.py), whose ends are two pods of its node, so that each packet is looked at
twice: where it leaves the one, and where it enters the other. Two variants without policy are alike.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, field

from agent.core.abi import Direction, Reason
from agent.kernel.dataplane import Dataplane
from agent.kernel.policy_maps import PolicyMaps
from agent.kernel.programs import PacketProgram
from tests.bench.agents import fdinfo
from tests.bench.connect import Blocks, Cast, Variant
from tests.bench.errors import BenchError
from tests.bench.hook import statistics
from tests.bench.lines import Line
from tests.bench.nodes import open_node
from tests.bench.policy_population import CLIENT, SERVER
from tests.bench.population import POD_PORT, Population
from tests.bench.result import Result
from tests.bench.scale import Scale
from tests.bench.stage import Stage
from tests.bench.statistics import Estimate, Values, difference, estimate, median, ratio
from tests.bench.worker import Target, Worker
from tests.lab import netns

OFF, OFF_AGAIN, ON = "policy off", "policy off again", "policy on"
VARIANTS = [OFF, OFF_AGAIN, ON]
_PROGRAMS = {
    "leaves the pod": (PacketProgram.INGRESS, PacketProgram.FROM_POD),
    "enters the pod": (PacketProgram.EGRESS, PacketProgram.TO_POD),
}
_COUNTED_BLOCKS = 5


@dataclass(slots=True)
class Isolated:
    """The variants, and what runs on their nodes."""

    cast: Cast = field(default_factory=Cast)
    dataplanes: dict[str, Dataplane] = field(default_factory=dict)


def assemble(stage: Stage, scale: Scale, ends: contextlib.ExitStack) -> Isolated:
    """Make every variant: a few Services on each node, which none of the connections is for."""
    isolated = Isolated()
    services = Population(min(scale.flat_services), scale.endpoints)
    target = Target(scale.isolation.address(SERVER), POD_PORT)
    for name in VARIANTS:
        line = Line(stage, name.replace(" ", "-"), ends)
        worker = Worker(stage, line.name, ends, line)
        with netns.entered(line.node):
            places = {CLIENT: socket.if_nametoindex(line.uplink), SERVER: socket.if_nametoindex(line.downlink)}
        policy = (scale.isolation, places) if name == ON else None
        isolated.cast.variants[name] = Variant(worker, target)
        isolated.dataplanes[name] = open_node(stage, line, worker.cgroup, services, ends, socket_lb=True, policy=policy)
    return isolated


def policy_cost(
    isolated: Isolated, requests: dict[str, Blocks], connections: dict[str, Blocks], scale: Scale
) -> list[Result]:
    """G7, of blocks of requests on one connection, and of connections with a request each. Raises: BenchError."""
    population = scale.isolation
    of = f"with policy / without, {population.identities} identities, {population.entries} entries"
    figures = {
        **_times({name: blocks.p50_us for name, blocks in requests.items()}, "request"),
        **_times({name: blocks.closed_us for name, blocks in connections.items()}, "connection"),
        **_programs(isolated, scale),
        **_judged(isolated.dataplanes[ON]),
    }

    def held(name: str, title: str, times: dict[str, Values], goal: float) -> Result:
        def rate(variant: str) -> Estimate:
            return estimate(ratio, times[OFF], times[variant])

        shown = figures if name == "G7" else {}
        return Result(name, f"{title} a second, {of}", rate(ON), goal, "x", rate(OFF_AGAIN), shown, at_least=True)

    return [
        held("G7", "requests", {name: blocks.p50_us for name, blocks in requests.items()}, 0.99),
        held("G7 connections", "connections", {name: blocks.closed_us for name, blocks in connections.items()}, 0.98),
    ]


def _times(times: dict[str, Values], what: str) -> dict[str, float]:
    return {
        f"{what} us": round(median(times[OFF]), 2),
        f"{what}, policy adds us": round(difference(times[ON], times[OFF]), 3),
        f"{what}, the same again adds us": round(difference(times[OFF_AGAIN], times[OFF]), 3),
    }


def _programs(isolated: Isolated, scale: Scale) -> dict[str, float]:
    """Nanoseconds of a run of each program, by the kernel's clock, which is in it."""
    figures = {}
    with statistics():
        for number, name in enumerate((OFF, ON)):
            descriptors = isolated.dataplanes[name].programs.packets
            variant = isolated.cast.variants[name]
            before = {where: _counted(descriptors[programs[number]]) for where, programs in _PROGRAMS.items()}
            for _ in range(_COUNTED_BLOCKS):
                variant.worker.block("rr", scale.block, variant.target)
            for where, programs in _PROGRAMS.items():
                time_ns, count = _counted(descriptors[programs[number]])
                figures[f"a packet that {where}, {name} ns"] = round(
                    (time_ns - before[where][0]) / (count - before[where][1]), 1
                )
    return figures


def _counted(program: int) -> tuple[int, int]:
    return fdinfo(program, "run_time_ns"), fdinfo(program, "run_cnt")


def _judged(dataplane: Dataplane) -> dict[str, int]:
    """Make sure that policy has looked at each connection at both its ends. Raises: BenchError."""
    counted = PolicyMaps(dataplane.store).read_counters()

    def count(direction: Direction, reason: Reason, *, is_allowed: bool) -> int:
        return counted[(direction * len(Reason) + reason) * 2 + is_allowed]

    allowed = {direction: count(direction, Reason.POLICY, is_allowed=True) for direction in Direction}
    dropped = sum(count(direction, reason, is_allowed=False) for direction in Direction for reason in Reason)
    if not all(allowed.values()) or dropped:
        raise BenchError(f"policy allowed {allowed} connections, and dropped {dropped} packets")
    return {f"connections judged, {direction.name.lower()}": number for direction, number in allowed.items()}
