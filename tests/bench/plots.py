"""Plots of a run, as PNG."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from tests.bench.connect import Blocks
from tests.bench.statistics import Values, difference, estimate

mpl.use("Agg")
_SIZE = (9, 5)
_DPI = 120


def connect_times(measured: dict[str, Blocks], names: list[str], path: Path) -> None:
    """The share of connects that took at most so long."""
    figure, axes = plt.subplots(figsize=_SIZE)
    for name in names:
        times = np.sort(measured[name].samples) / 1000
        axes.plot(times, np.arange(1, len(times) + 1) / len(times), label=name)
    axes.set(
        xscale="log", xlabel="connect, microseconds", ylabel="share of connects", title="Connecting through a Service"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path)


def connect_overheads(measured: dict[str, Blocks], path: Path) -> None:
    """What each variant adds to a direct connection."""
    names = [name for name in measured if name != "direct"]
    figures = [estimate(difference, measured[name].p50_us, measured["direct"].p50_us) for name in names]
    figure, axes = plt.subplots(figsize=_SIZE)
    values = np.array([item.value for item in figures])
    errors = np.array([[item.value - item.low, item.high - item.value] for item in figures]).T
    axes.barh(names, values, xerr=np.maximum(errors, 0))
    axes.set(xscale="symlog", xlabel="microseconds more than a direct connect, p50 and 95 % CI")
    axes.set_title("What a Service adds to a connect")
    axes.grid(alpha=0.3, axis="x")
    _save(figure, path)


def seconds(values: dict[str, float], title: str, path: Path) -> None:
    """Bars on a logarithmic scale, in seconds."""
    figure, axes = plt.subplots(figsize=_SIZE)
    bars = axes.barh(list(values), list(values.values()))
    axes.bar_label(bars, fmt=" %.3g s")
    axes.set(xscale="log", xlabel="seconds", title=title)
    axes.margins(x=0.2)
    _save(figure, path)


def rates(values: dict[str, float], path: Path) -> None:
    """Packets that a node forwards, for each second of its CPU."""
    suffix = ", packets a second of CPU"
    shown = {name.removesuffix(suffix): value / 1e6 for name, value in values.items() if name.endswith(suffix)}
    figure, axes = plt.subplots(figsize=_SIZE)
    bars = axes.barh(list(shown), list(shown.values()))
    axes.bar_label(bars, fmt=" %.2f")
    axes.set(xlabel="million packets a second and core", title="A NodePort under a flood of small datagrams")
    axes.margins(x=0.2)
    _save(figure, path)


def change_times(times_ms: Values, path: Path) -> None:
    """How long single changes took."""
    figure, axes = plt.subplots(figsize=_SIZE)
    axes.hist(times_ms, bins=60)
    axes.set(xlabel="milliseconds from the event's write to the value in the map", ylabel="changes")
    axes.set_title(f"One endpoint change, {len(times_ms)} times")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
