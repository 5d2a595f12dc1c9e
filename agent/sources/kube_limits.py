"""How often the API server is asked at most, where that is configured."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RequestLimit:
    """Allows ``burst`` requests at once and ``qps`` a second in the long run; safe to share between threads.

    Source: client-go's token bucket, which kube-proxy's clientConnection.qps and burst set.
    """

    def __init__(self, qps: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = 1 / qps
        self._slack_s = (max(burst, 1) - 1) / qps
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = clock()
        """When the bucket would be full if nobody asked any more."""

    def reserve(self) -> float:
        """Take a turn; returns the seconds until it comes."""
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now) + self._interval_s
            return max(0.0, self._free_at - self._interval_s - self._slack_s - now)

    def wait(self, closing: threading.Event) -> None:
        """Wait for a turn, or until the client is closed."""
        delay_s = self.reserve()
        if delay_s:
            closing.wait(delay_s)
