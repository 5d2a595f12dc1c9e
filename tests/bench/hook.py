"""What the connect hook itself costs, by the kernel's own clock (G4)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.bench.agents import fdinfo
from tests.bench.connect import OURS, THREE_HASHES, Cast
from tests.bench.result import Result
from tests.bench.scale import Scale
from tests.bench.statistics import Values, estimate, median, ratio

_STATS = Path("/proc/sys/kernel/bpf_stats_enabled")


@contextlib.contextmanager
def statistics() -> Iterator[None]:
    """Have the kernel count what programs cost."""
    before = _STATS.read_text(encoding="ascii")
    _STATS.write_text("1", encoding="ascii")
    try:
        yield
    finally:
        _STATS.write_text(before, encoding="ascii")


def hook_cost(cast: Cast, scale: Scale) -> Result:
    """G4: nanoseconds a run, the kernel's own timing included, block by block in turns."""
    names = list(cast.programs)
    taken: dict[str, list[float]] = {name: [] for name in names}
    with statistics():
        for number in range(scale.warm_up_rounds + scale.rounds):
            for name in (*names[number % len(names) :], *names[: number % len(names)]):
                cost = _one_block(cast, name, scale)
                if number >= scale.warm_up_rounds:
                    taken[name].append(cost)
    costs: dict[str, Values] = {name: np.array(values) for name, values in taken.items()}
    return Result(
        "G4",
        "connect hook, ns a run / three hashes and an LRU hash",
        estimate(ratio, costs[OURS], costs[THREE_HASHES]),
        0.5,
        "x",
        peers={f"{name} ns": round(median(values)) for name, values in costs.items()},
    )


def _one_block(cast: Cast, name: str, scale: Scale) -> float:
    program, variant = cast.programs[name], cast.variants[name]
    time_ns, count = fdinfo(program, "run_time_ns"), fdinfo(program, "run_cnt")
    variant.worker.block("connect", scale.block, variant.target)
    return (fdinfo(program, "run_time_ns") - time_ns) / (fdinfo(program, "run_cnt") - count)
