"""Waiting for what is not there yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tests.bench.errors import BenchError

T = TypeVar("T")


def until(condition: Callable[[], T | None], limit_s: float, what: str, every_s: float = 0.002) -> T:
    """Poll until something is true and return it. Raises: BenchError."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not within {limit_s} s")
        time.sleep(every_s)
    return value
