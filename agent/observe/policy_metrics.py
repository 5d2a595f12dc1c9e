"""Metrics of policy; there are none where it is off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, Metric

from agent.core.abi import POLICY_COUNTERS, Direction, Reason
from agent.observe import metrics as meter
from agent.observe.metrics import Metrics

# The goal is 50 ms at the 99th percentile.
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60)
_LOST = POLICY_COUNTERS - 1


class PolicyFacts(NamedTuple):
    """Numbers of one moment; ``counters`` as the map ``policy_counters`` has them."""

    counters: Mapping[int, int]
    revision: int = 0
    identities: int = 0
    subjects: int = 0
    rules: int = 0
    degraded: int = 0
    unplaced: int = 0
    """Pods whose device is not known."""
    expired: int = 0
    """Connections that were deleted because they were over."""
    is_settled: bool = False


class PolicyMetrics:
    """What is counted when it happens, and what ``read`` says at each scrape."""

    def __init__(self, metrics: Metrics, read: Callable[[], PolicyFacts]) -> None:
        self._read = read
        self._enforced = Histogram(
            "ebproxy_policy_enforcement_duration_seconds",
            "Time from a change of a pod, namespace or policy being received to its being in the maps",
            buckets=_BUCKETS,
            registry=metrics.registry,
        )
        metrics.add_live(self.collect)

    def enforced(self, durations_s: Iterable[float]) -> None:
        """Note how long changes took that are in force now."""
        for duration_s in durations_s:
            self._enforced.observe(duration_s)

    def collect(self) -> Iterator[Metric]:
        """Read everything."""
        facts = self._read()
        yield _verdicts("ebproxy_policy_dropped_packets", "Packets of pods dropped", facts.counters, allowed=0)
        text = "Connections of pods that began and are allowed, or are again under changed policy"
        yield _verdicts("ebproxy_policy_allowed_connections", text, facts.counters, allowed=1)
        lost = {"": float(facts.counters.get(_LOST, 0))}
        yield from meter.counter("ebproxy_policy_events_lost", "Flow events that nobody took in time", lost)
        expired = {"": float(facts.expired)}
        yield from meter.counter("ebproxy_policy_connections_expired", "Connections that were silent too long", expired)
        for name, text, value in (
            ("ebproxy_policy_revision", "How often verdicts have changed on this node", facts.revision),
            (
                "ebproxy_policy_identities",
                "Identities: kinds of pods and blocks that policies tell apart",
                facts.identities,
            ),
            ("ebproxy_policy_subjects", "Addresses of this node's pods under policy", facts.subjects),
            ("ebproxy_policy_rules", "Rules in force", facts.rules),
            ("ebproxy_degraded_subjects", "Pods and blocks whose policy does not fit", facts.degraded),
            ("ebproxy_policy_unplaced_pods", "Pods of this node whose device is not known", facts.unplaced),
            ("ebproxy_policy_settled", "Whether every policy that was listed is in force", facts.is_settled),
        ):
            yield from meter.gauge(name, text, {"": float(value)})


def _verdicts(name: str, text: str, counters: Mapping[int, int], *, allowed: int) -> Metric:
    family = CounterMetricFamily(name, text, labels=["direction", "reason"])
    for direction in Direction:
        for reason in Reason:
            index = (direction * len(Reason) + reason) * 2 + allowed
            family.add_metric([direction.name.lower(), reason.name.lower()], counters.get(index, 0))
    return family
