"""What a connection through a Service costs its client (G1, G2, G3, G5), and the connect hook by itself (G4).

All variants take turns in one run: a block of each, in an order that rotates, and what is compared are blocks of one
round. Two of the variants are alike (direct and direct again) and say what a difference means.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agent.kernel.bpf import AttachType
from tests.bench import peers
from tests.bench.nodes import open_dataplane
from tests.bench.population import POD_PORT, SERVICE_PORT, Population
from tests.bench.result import Result
from tests.bench.scale import Scale
from tests.bench.stage import Stage
from tests.bench.statistics import Estimate, Values, difference, estimate, median, overhead_ratio, ratio
from tests.bench.three_hashes import open_hook
from tests.bench.worker import Samples, Target, Worker

OURS, BARE, THREE_HASHES = "ebproxy", "ebproxy without memory", "three hashes"


@dataclass(frozen=True, slots=True)
class Variant:
    """Who connects, and where to."""

    worker: Worker
    target: Target


@dataclass(slots=True)
class Cast:
    """Everybody who takes turns; the descriptors of the connect hooks among them; what the peers took to load."""

    variants: dict[str, Variant] = field(default_factory=dict)
    programs: dict[str, int] = field(default_factory=dict)
    load_s: dict[str, float] = field(default_factory=dict)
    change_s: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Blocks:
    """One variant's blocks: the median of each, in microseconds, without and with the close; and every exchange."""

    p50_us: Values
    closed_us: Values
    samples: Samples


def assemble(stage: Stage, scale: Scale, ends: contextlib.ExitStack) -> Cast:
    """Make every variant that connects."""
    cast = Cast()
    population = Population(scale.services, scale.endpoints)
    direct = Target(population.endpoint(population.middle, 0), POD_PORT)
    pool = scale.endpoints * min(scale.flat_services)
    vip = _service_targets(population)[0]
    for name in ("direct", "direct again"):
        worker = Worker(stage, name.replace(" ", "-"), ends)
        cast.variants[name] = Variant(worker, direct)
        cast.variants[f"{name}, any of {pool}"] = Variant(worker, Target(population.endpoint(0, 0), POD_PORT, pool))
    for name, remember_peer in ((OURS, True), (BARE, False)):
        worker = _ours(stage, cast, name, population, ends, remember_peer=remember_peer)
        cast.variants[name] = Variant(worker, vip)
    cast.variants["ebproxy, no service"] = Variant(cast.variants[OURS].worker, direct)
    worker = Worker(stage, "three-hashes", ends)
    cast.programs[THREE_HASHES] = open_hook(stage, worker.cgroup, population, ends)
    cast.variants[THREE_HASHES] = Variant(worker, vip)
    for count in sorted((scale.services, *scale.flat_services)):
        other = Population(count, scale.endpoints, pool)
        worker = _ours(stage, cast, _any_of(count), other, ends, remember_peer=True)
        one, spread = _service_targets(other)
        cast.variants[_one_of(count)], cast.variants[_any_of(count)] = Variant(worker, one), Variant(worker, spread)
    _add_peers(stage, cast, population, scale, ends)
    return cast


def _one_of(services: int) -> str:
    return f"ebproxy, one of {services}"


def _any_of(services: int) -> str:
    return f"ebproxy, any of {services}"


def _service_targets(population: Population) -> tuple[Target, Target]:
    """The Service in the middle, and any."""
    one = Target(population.cluster_ip(population.middle), SERVICE_PORT)
    return one, Target(population.cluster_ip(0), SERVICE_PORT, population.services)


def _ours(
    stage: Stage, cast: Cast, name: str, population: Population, ends: contextlib.ExitStack, *, remember_peer: bool
) -> Worker:
    place = name.replace(",", "").replace(" ", "-")
    worker = Worker(stage, place, ends)
    dataplane = open_dataplane(stage, place, worker.cgroup, population, ends, remember_peer=remember_peer)
    cast.programs[name] = dataplane.programs.sockets[AttachType.CONNECT4]
    return worker


def _add_peers(stage: Stage, cast: Cast, population: Population, scale: Scale, ends: contextlib.ExitStack) -> None:
    vip = _service_targets(population)[0]
    for name, load, change in peers.PEERS:
        worker = Worker(stage, name, ends)
        cast.load_s[name] = load(population, worker.netns.name)
        cast.change_s[name] = peers.repeat(change, population, worker.netns.name, scale.peer_changes)
        cast.variants[name] = Variant(worker, vip)


def take_turns(cast: Cast, scale: Scale, verb: str, names: list[str]) -> dict[str, Blocks]:
    """Run a block of each variant, round after round; the first rounds are not counted."""
    taken: dict[str, list[Samples]] = {name: [] for name in names}
    for number in range(scale.warm_up_rounds + scale.rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            variant = cast.variants[name]
            samples = variant.worker.block(verb, scale.block, variant.target)
            if number >= scale.warm_up_rounds:
                taken[name].append(samples)
    return {name: _blocks(samples) for name, samples in taken.items()}


def _blocks(samples: list[Samples]) -> Blocks:
    stacked = np.stack(samples).astype(np.float64) / 1000
    closed = np.median(stacked.sum(axis=2), axis=1)
    return Blocks(np.median(stacked[:, :, 0], axis=1), closed, np.concatenate(samples)[:, 0])


def overheads(measured: dict[str, Blocks], base: str = "direct") -> dict[str, Any]:
    """What every variant adds to a direct connection, in microseconds."""
    table: dict[str, Any] = {f"{base} p50 us": round(median(measured[base].p50_us), 2)}
    for name, blocks in measured.items():
        if name != base:
            added = estimate(difference, blocks.p50_us, measured[base].p50_us)
            closed = difference(blocks.closed_us, measured[base].closed_us)
            table[f"{name} +us"] = [round(figure, 3) for figure in added]
            table[f"{name} +us, with close"] = round(closed, 3)
    return table


def connect_overhead(measured: dict[str, Blocks], scale: Scale) -> list[Result]:
    """G1."""
    base, again = measured["direct"].p50_us, measured["direct again"].p50_us
    ours, bare = measured[OURS].p50_us, measured[BARE].p50_us
    nft, iptables = measured["nft"].p50_us, measured["iptables"].p50_us

    def share(name: str, title: str, values: Values, peer: Values, goal: float, of: str) -> Result:
        return Result(
            name,
            title,
            estimate(overhead_ratio, values, peer, base),
            goal,
            f"x {of} overhead",
            estimate(overhead_ratio, again, peer, base),
            overheads(measured) if name == "G1" else {},
        )

    at = f"connect at {scale.services} services"
    legacy = peers.iptables_name()
    return [
        share("G1", f"{at}, peer remembered", ours, nft, 0.25, "nft's"),
        share("G1 without memory", f"{at}, peer not remembered", bare, nft, 0.10, "nft's"),
        share("G1 iptables", f"{at}, against {legacy}", ours, iptables, 0.02, "iptables' middle"),
        Result(
            "G1 direct",
            f"{at}, against a direct one",
            estimate(ratio, ours, base),
            1.03,
            "x direct",
            estimate(ratio, again, base),
        ),
    ]


def flatness(measured: dict[str, Blocks], scale: Scale) -> list[Result]:
    """G3: to one Service again and again, and each time to any, where a connect pays for the memory it touches.

    All have the same few endpoints: what the kernel itself keeps for each peer would be measured else.
    """
    few = min(scale.flat_services)
    pool = few * scale.endpoints
    aa = estimate(ratio, measured["direct again"].p50_us, measured["direct"].p50_us)
    goals = {scale.services: 1.02} | {count: 1.05 for count in scale.flat_services if count != few}
    base = measured[f"direct, any of {pool}"].p50_us
    figures = {
        f"any of {count}, +us": [
            round(figure, 3) for figure in estimate(difference, measured[_any_of(count)].p50_us, base)
        ]
        for count in (few, *goals)
    }
    return [
        Result(
            " ".join(["G3", *([str(count)] if count != scale.services else []), *suffix]),
            f"connect to {words} of {count} services / of {few}",
            estimate(ratio, measured[variant(count)].p50_us, measured[variant(few)].p50_us),
            goal,
            "x",
            aa,
            figures if suffix and count == scale.services else {},
        )
        for suffix, words, variant in (((), "one", _one_of), (("any",), "any", _any_of))
        for count, goal in goals.items()
    ]


def connection_rate(measured: dict[str, Blocks]) -> Result:
    """G2: connect, a byte there and back, close."""
    base = measured["direct"].closed_us

    def rate(name: str) -> Estimate:
        return estimate(ratio, base, measured[name].closed_us)

    return Result(
        "G2",
        "connection rate (CRR), Service / direct",
        rate(OURS),
        0.98,
        "x",
        rate("direct again"),
        {name: round(rate(name).value, 4) for name in measured if name not in ("direct", OURS)}
        | {"direct, exchange and close us": round(median(base), 2)},
        at_least=True,
    )


def udp_exchange(measured: dict[str, Blocks]) -> Result:
    """G5: a byte there and back on an unconnected socket."""
    base = measured["direct"].p50_us
    return Result(
        "G5",
        "UDP request and response, Service / direct",
        estimate(ratio, measured[OURS].p50_us, base),
        1.05,
        "x",
        estimate(ratio, measured["direct again"].p50_us, base),
        {"nft": round(ratio(measured["nft"].p50_us, base), 4), "direct us": round(median(base), 2)},
    )
