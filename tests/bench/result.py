"""A figure, and the goal it is held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.bench.statistics import Estimate


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table; ``name`` starts with the goal's id in docs/goals.md.

    ``aa`` is the same figure for two variants that do not differ: nothing smaller than its spread means anything.
    ``peers`` holds what the figure is compared with, and what it was made of. ``at_least``: more is better.
    """

    name: str
    title: str
    estimate: Estimate
    goal: float
    unit: str
    aa: Estimate | None = None
    peers: dict[str, Any] = field(default_factory=dict)
    at_least: bool = False
    note: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the goal is reached."""
        value = self.estimate.value
        return value >= self.goal if self.at_least else value <= self.goal

    def as_json(self) -> dict[str, Any]:
        """What results.json says of it."""
        return {
            "title": self.title,
            "value": self.estimate.value,
            "goal": self.goal,
            "at_least": self.at_least,
            "met": self.is_met,
            "unit": self.unit,
            "ci": list(self.estimate.interval),
            "aa": list(self.aa.interval) if self.aa else None,
            "peers": self.peers,
            "note": self.note,
        }
