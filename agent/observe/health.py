"""/healthz and /livez, as kube-proxy answers them.

livez: 503 when a change has waited for two sync periods or more; healthy while starting. healthz: also when this
node is gone, being deleted, or about to be taken by the cluster autoscaler. Cloud load balancers probe healthz.
Source: KEP-3836.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from agent.observe.metrics import FAMILIES


@dataclass(frozen=True, slots=True)
class Vitals:
    """What health is judged by: how long the oldest change has waited (seconds), and whether the node is eligible."""

    pending_s: float | None
    is_node_eligible: bool
    has_failed: bool = False


class Health:
    """Judges vitals. ``read`` is called for each probe and must not block."""

    def __init__(self, read: Callable[[], Vitals], sync_period_s: float) -> None:
        self._read = read
        self._limit_s = 2 * sync_period_s
        self._healthy_at = time.time()

    def healthz(self) -> tuple[int, dict[str, Any]]:
        """Answer a load balancer: status code and body."""
        vitals = self._read()
        code, body = self._judge(vitals)
        body["nodeEligible"] = vitals.is_node_eligible
        return (code if vitals.is_node_eligible else 503), body

    def livez(self) -> tuple[int, dict[str, Any]]:
        """Answer the kubelet: status code and body."""
        return self._judge(self._read())

    @property
    def is_healthy(self) -> bool:
        """Whether the agent does its work; what becomes of the node does not count."""
        return self._is_well(self._read())

    def _is_well(self, vitals: Vitals) -> bool:
        is_late = vitals.pending_s is not None and vitals.pending_s >= self._limit_s
        return not is_late and not vitals.has_failed

    def _judge(self, vitals: Vitals) -> tuple[int, dict[str, Any]]:
        is_healthy = self._is_well(vitals)
        now = time.time()
        if is_healthy:
            self._healthy_at = now
        status = {"lastUpdated": _rfc3339(self._healthy_at), "healthy": is_healthy}
        body = {
            "lastUpdated": _rfc3339(self._healthy_at),
            "currentTime": _rfc3339(now),
            "healthy": is_healthy,
            "status": dict.fromkeys(FAMILIES, status),
        }
        return (200 if is_healthy else 503), body


def _rfc3339(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat().replace("+00:00", "Z")
