"""Run the bench: `python -m tests.bench [--only G1,G9] [--quick]`.

Exit status 0 once everything is measured, whether or not it reaches its goal; 1 when a measurement cannot be made.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from rich.console import Console

from agent.errors import EbproxyError
from tests.bench.errors import BenchError
from tests.bench.report import print_table, write_json
from tests.bench.run import GOALS, Run
from tests.bench.scale import FULL, QUICK, TINY, Scale
from tests.bench.stage import Stage

OUTPUT = Path(__file__).resolve().parents[2] / "build" / "bench"


def measure(scale: Scale, goals: frozenset[str], output: Path, console: Console) -> list[str]:
    """Measure the goals, write results.json and plots to a directory; returns what could not be measured, and why."""
    output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    with Stage() as stage:
        run = Run(stage, scale, goals, output, console)
        results = run.everything()
    facts = {
        "kernel": os.uname().release,
        "cpus": len(os.sched_getaffinity(0)),
        "load": load,
        "seconds": round(time.monotonic() - begun, 1),
        "is_full": scale.is_full,
        "goals": sorted(goals),
        "failures": run.failures,
    }
    results.sort(key=lambda result: (int(result.name.split()[0][1:]), len(result.name.split())))
    write_json(results, facts, output / "results.json")
    print_table(results, facts, console)
    console.print(f"written to {output}")
    return run.failures


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure ebproxy beside its peers.")
    parser.add_argument("--only", metavar="G1,G9", default="", help=f"measure only these of {','.join(sorted(GOALS))}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", const=QUICK, dest="scale", help="fewer repetitions")
    size.add_argument("--tiny", action="store_const", const=TINY, dest="scale", help="only to see that it works")
    parser.add_argument("--output", metavar="DIR", type=Path, default=OUTPUT, help="default: build/bench")
    parser.set_defaults(scale=FULL)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the bench; returns the exit status."""
    arguments = _arguments(argv)
    goals = frozenset(filter(None, arguments.only.upper().split(","))) or GOALS
    if unknown := goals - GOALS:
        print(
            f"bench: no such goal: {', '.join(sorted(unknown))}; there are {', '.join(sorted(GOALS))}", file=sys.stderr
        )
        return 2
    if os.geteuid() != 0:
        print("bench: needs root, for namespaces, cgroups and BPF", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _end)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        failures = measure(arguments.scale, goals, arguments.output, console)
    except (BenchError, EbproxyError, OSError) as error:
        failures = [str(error)]
    for failure in failures:
        print(f"bench: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _end(number: int, _frame: FrameType | None) -> None:
    """End as if by an exception, so that everything is taken down."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
