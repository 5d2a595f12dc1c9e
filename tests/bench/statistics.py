"""Medians, and how sure of them one may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high."""
        return (self.low, self.high)

    def scaled(self, factor: float) -> Estimate:
        """The same in another unit."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


def estimate(statistic: Callable[..., float], *samples: Values) -> Estimate:
    """Bootstrap a statistic of samples that were taken together: the same places of each are drawn every time."""
    chance = np.random.default_rng(20240607)
    count = len(samples[0])
    drawn = []
    for _ in range(_RESAMPLES):
        places = chance.integers(0, count, count)
        drawn.append(statistic(*(sample[places] for sample in samples)))
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(float(statistic(*samples)), float(low), float(high))


def median(values: Values) -> float:
    """The median."""
    return float(np.median(values))


def percentile(rank: float) -> Callable[[Values], float]:
    """The statistic that is a percentile, 0 to 100."""
    return lambda values: float(np.percentile(values, rank))


def difference(values: Values, base: Values) -> float:
    """The median of paired differences."""
    return float(np.median(values - base))


def ratio(values: Values, base: Values) -> float:
    """The median of paired ratios."""
    return float(np.median(values / base))


def overhead_ratio(values: Values, peer: Values, base: Values) -> float:
    """What ``values`` add to ``base``, as a share of what ``peer`` adds."""
    return difference(values, base) / difference(peer, base)
