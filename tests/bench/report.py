"""Say what was measured: a table for people, results.json for programs, plots for both."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.result import Result
from tests.bench.statistics import Estimate


def write_json(results: list[Result], facts: dict[str, Any], path: Path) -> None:
    """Write every result under its name, and the facts of the run under ``run``."""
    body = {result.name: result.as_json() for result in results} | {"run": facts}
    path.write_text(json.dumps(body, indent=2, default=float) + "\n")


def print_table(results: list[Result], facts: dict[str, Any], console: Console) -> None:
    """Print a line a result, and below it what it is compared with."""
    table = Table(title="ebproxy bench", title_justify="left", caption=_caption(facts), caption_justify="left")
    for column, justify in (("goal", "left"), ("what", "left"), ("measured", "right"), ("95 % CI", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("A/A", "wanted", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        verdict = "[green]met[/green]" if result.is_met else "[red]MISSED[/red]"
        table.add_row(
            result.name,
            result.title,
            f"{figure(result.estimate.value)} {result.unit}",
            _interval(result.estimate),
            _interval(result.aa) if result.aa else "",
            f"{'>=' if result.at_least else '<='} {figure(result.goal)}",
            verdict if facts["is_full"] else "[dim]small run[/dim]",
        )
    console.print(table)
    for result in results:
        if result.peers:
            console.print(f"[bold]{result.name}[/bold] {result.note}")
            console.print(
                "  " + "\n  ".join(f"{name}: {value}" for name, value in result.peers.items()), highlight=False
            )


def figure(value: float) -> str:
    """Write a number with the digits that mean something."""
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _interval(estimate: Estimate) -> str:
    return f"{figure(estimate.low)} .. {figure(estimate.high)}"


def _caption(facts: dict[str, Any]) -> str:
    return f"kernel {platform.release()}, {facts['cpus']} CPUs, load {facts['load']}, {facts['seconds']:.0f} s"
