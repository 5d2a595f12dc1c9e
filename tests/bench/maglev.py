"""Maglev tables (G14): how long the kernel takes to build one, and whom a backend that goes takes along."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.core.abi import MAGLEV_SIZE, MapSizes, Walk, map_specs, pack_backends, unpack_maglev_table
from agent.core.addresses import parse_address
from agent.core.maglev import build_table, walks
from agent.core.plan import split_slots
from agent.kernel import bpf, bpffs
from agent.kernel.dataplane import NAME
from agent.kernel.maglev import MaglevTables
from agent.kernel.maps import MapStore
from agent.kernel.programs import ProgramOptions
from tests.bench.errors import BenchError
from tests.bench.result import Result
from tests.bench.scale import Scale
from tests.bench.stage import Stage, command
from tests.bench.statistics import Values, estimate, median

BACKENDS = 100
_PLAIN = Path(__file__).with_name("plain_maglev.c")
_COMPILE_LIMIT_S = 60
_TABLE = 1
_LIMIT_MS, _LIMIT_PER_CENT = 0.5, 2.0


def tables(stage: Stage, scale: Scale, ends: contextlib.ExitStack) -> list[Result]:
    """Build tables for as many backends as the goal speaks of."""
    store, built = _open(stage, ends)
    backends = b"".join(pack_backends(parse_address(f"10.128.7.{number}"), 8080)[0] for number in range(BACKENDS))
    times = _build_times(stage, scale, built, backends)
    extra = _disruptions(store, built, split_slots(backends))
    kernel = times["kernel"]
    return [
        Result(
            "G14",
            f"Maglev table of {MAGLEV_SIZE} for {BACKENDS} backends, built in the kernel",
            estimate(median, kernel),
            _LIMIT_MS,
            "ms",
            peers={f"{name} ms": round(median(values), 3) for name, values in times.items()},
        ),
        Result(
            "G14 disruption",
            "entries that one removal moves besides its own: the worst of all removals",
            estimate(lambda values: float(values.max()), extra),
            _LIMIT_PER_CENT,
            "%",
            peers={"mean %": round(float(extra.mean()), 2), "least %": round(float(extra.min()), 2)},
        ),
    ]


def _open(stage: Stage, ends: contextlib.ExitStack) -> tuple[MapStore, MaglevTables]:
    directory = stage.bpffs("maglev", ends)
    bpffs.ensure_mounted(directory)
    specs = map_specs(MapSizes())
    store = MapStore.open(directory / NAME / "tables", specs)
    ends.callback(store.close)
    compiled = threading.Event()
    built = MaglevTables(store, directory / NAME / "tables", specs, ProgramOptions(), compiled.set)
    ends.callback(built.close)
    built.build(_TABLE, pack_backends(parse_address("10.128.7.1"), 8080)[0])
    if not compiled.wait(_COMPILE_LIMIT_S):
        raise BenchError(built.fault or "the builder of Maglev tables does not compile")
    return store, built


def _build_times(stage: Stage, scale: Scale, built: MaglevTables, backends: bytes) -> dict[str, Values]:
    """Build by each way in turns, milliseconds: all that we do, of that the kernel's part, plain C, and Python."""
    turns = walks(split_slots(backends))
    plain = _plain_c(stage, turns)
    run, spent = bpf.run_repeatedly, [0.0]

    def timed(program: int, repeat: int) -> int:
        begun = time.perf_counter()
        result = run(program, repeat)
        spent[0] += time.perf_counter() - begun
        return result

    ways: dict[str, Callable[[], object]] = {
        "whole": lambda: built.build(_TABLE, backends),
        "plain C": plain,
        "Python": lambda: build_table(turns),
    }
    taken: dict[str, list[float]] = {name: [] for name in ("kernel", *ways)}
    bpf.run_repeatedly = timed
    try:
        for number in range(scale.warm_up_rounds + scale.tables):
            spent[0] = 0.0
            times = {name: _time_ms(way) for name, way in ways.items() if name != "Python" or number % 20 == 0}
            times["kernel"] = spent[0] * 1000
            if number >= scale.warm_up_rounds or "Python" in times:
                for name, value in times.items():
                    taken[name].append(value)
    finally:
        bpf.run_repeatedly = run
    return {name: np.array(values) for name, values in taken.items()}


def _time_ms(way: Callable[[], object]) -> float:
    begun = time.perf_counter()
    way()
    return (time.perf_counter() - begun) * 1000


def _plain_c(stage: Stage, turns: list[Walk]) -> Callable[[], object]:
    """Compile the plain builder and give it the same walks. Raises: BenchError."""
    library = stage.directory / "plain_maglev.so"
    command("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library), str(_PLAIN))
    build = ctypes.CDLL(str(library)).build
    offsets, skips = [array("I", column) for column in zip(*((it.offset, it.skip) for it in turns), strict=True)]
    table = array("H", bytes(2 * MAGLEV_SIZE))

    def run() -> None:
        moving = offsets[:]  # as it moves them
        build(len(turns), *(ctypes.c_void_p(it.buffer_info()[0]) for it in (moving, skips, table)))

    run()
    if array("H", (turns[turn].place for turn in table)) != build_table(turns):
        raise BenchError("plain C builds another table than Python")
    return run


def _disruptions(store: MapStore, built: MaglevTables, backends: list[bytes]) -> Values:
    """Remove each backend in turn: the share of entries, in per cent, that move though theirs is still there."""
    before = _owners(store, built, list(range(len(backends))), backends)
    extra = []
    for gone in range(len(backends)):
        staying = [number for number in range(len(backends)) if number != gone]
        after = _owners(store, built, staying, backends)
        extra.append(100 * np.count_nonzero((after != before) & (before != gone)) / MAGLEV_SIZE)
    return np.array(extra)


def _owners(store: MapStore, built: MaglevTables, numbers: list[int], backends: list[bytes]) -> NDArray[np.int64]:
    """Build a table for some backends; returns the number of the backend of each entry."""
    built.build(_TABLE, b"".join(backends[number] for number in numbers))
    return np.array(numbers)[np.array(unpack_maglev_table(store.read_table(_TABLE)))]
