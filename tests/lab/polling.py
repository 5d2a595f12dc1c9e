"""Wait for a condition with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_PERIOD_S = 0.005


def until(condition: Callable[[], T], what: str, limit_s: float = 10) -> T:
    """Wait until a condition is true and return it. Raises: TimeoutError, saying what it last was."""
    deadline = time.monotonic() + limit_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {limit_s} s; last: {value!r}")
        time.sleep(_PERIOD_S)
