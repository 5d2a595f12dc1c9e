"""Prometheus metrics. Those that mean what kube-proxy's mean have kube-proxy's names, so its dashboards work.

Source: kube-proxy's ``kubeproxy_*`` metrics at 1.36; both families are served by one synchronisation here, so it counts
for each of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import agent
from agent.core.records import Family, Kind, ObjectKey

FAMILIES = ("IPv4", "IPv6")
_SYNC_BUCKETS = tuple(0.000_1 * 2**i for i in range(16))
# kube-proxy's own: 0.25 s to 5 minutes; ours start lower because a change takes less than a millisecond here.
_PROGRAMMING_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_BY_FAMILY = ("ip_family",)


class _Syncs:
    """Synchronisations: how long they took, when they were, and what they found."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.all = _durations(
            registry,
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "Time from the first change taken in to the last map entry written",
        )
        self.full = _durations(
            registry,
            "kubeproxy_sync_full_proxy_rules_duration_seconds",
            "The same, of synchronisations that compare every Service with what the maps hold",
        )
        self.partial = _durations(
            registry,
            "kubeproxy_sync_partial_proxy_rules_duration_seconds",
            "The same, of those that look at changed Services alone",
        )
        self.programming = _durations(
            registry,
            "kubeproxy_network_programming_duration_seconds",
            "Time from the change that caused an EndpointSlice's version to its being in the maps",
            _PROGRAMMING_BUCKETS,
        )
        self.synced_at = Gauge(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "When the maps were last written",
            _BY_FAMILY,
            registry=registry,
        )
        self.services = Counter("ebproxy_synced_services", "Services resolved and compared", registry=registry)


class _Changes:
    """Changes that were taken in, by kind, and when."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.queued_at = Gauge(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "When a change was last taken in",
            _BY_FAMILY,
            registry=registry,
        )
        self.by_kind = {
            Kind.SERVICE: Counter(
                "kubeproxy_sync_proxy_rules_service_changes", "Changes of Services taken in", registry=registry
            ),
            Kind.ENDPOINT_SLICE: Counter(
                "kubeproxy_sync_proxy_rules_endpoint_changes", "Changes of EndpointSlices taken in", registry=registry
            ),
        }


class _Cleanings:
    """Searches for flows whose backends are gone."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.durations = _durations(
            registry,
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "Time to delete the flows whose backends are gone",
        )
        self.deleted = Counter(
            "kubeproxy_conntrack_reconciler_deleted_entries",
            "Tracked flows deleted because their backend is gone",
            _BY_FAMILY,
            registry=registry,
        )


class _Faults:
    """What failed, could not be read, or was not as it was left."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.errors = Counter("ebproxy_errors", "Errors, by what failed", ("kind",), registry=registry)
        self.malformed = Counter(
            "ebproxy_malformed_objects",
            "Versions of objects that could not be read, or not all of them",
            ("kind",),
            registry=registry,
        )
        self.drift = Counter(
            "ebproxy_drift_entries", "Map entries and hooks found not as they were left, and healed", registry=registry
        )


class Metrics:
    """Everything the agent counts; ``registry`` is what ``/metrics`` serves."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self._started = time.time()
        self._syncs = _Syncs(registry)
        self._changes = _Changes(registry)
        self._cleanings = _Cleanings(registry)
        self._faults = _Faults(registry)
        self._no_local_endpoints = Gauge(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Service ports whose traffic policy is Local, with endpoints, and none of them here",
            (*_BY_FAMILY, "traffic_policy"),
            registry=registry,
        )
        for family, policy in itertools.product(FAMILIES, ("internal", "external")):
            self._no_local_endpoints.labels(family, policy)
        self._lacking: dict[ObjectKey, list[tuple[Family, str]]] = {}
        self.map_entries: dict[str, int] = {}
        """Of maps the programs write, what was last counted in them."""
        self.healthz = Counter("kubeproxy_proxy_healthz", "Answers of /healthz", ("code",), registry=registry)
        self.livez = Counter("kubeproxy_proxy_livez", "Answers of /livez", ("code",), registry=registry)
        build = Gauge("ebproxy_build_info", "The version that runs", ("version",), registry=registry)
        build.labels(agent.__version__).set(1)
        Gauge("ebproxy_start_time_seconds", "When the agent started", registry=registry).set(self._started)

    def taken_in(self, changes: Mapping[Kind, int]) -> None:
        """Count changes that were taken in together, by kind."""
        for kind, count in changes.items():
            if kind in self._changes.by_kind:
                self._changes.by_kind[kind].inc(count)
        for family in FAMILIES:
            self._changes.queued_at.labels(family).set_to_current_time()

    def synced(self, duration_s: float, services: int, triggers: Sequence[float], *, is_full: bool = False) -> None:
        """Note a synchronisation: its duration, and the Unix times of the changes that caused it.

        ``is_full``: it compared every Service with what the maps hold.
        """
        now = time.time()
        self._syncs.services.inc(services)
        for family in FAMILIES:
            self._syncs.all.labels(family).observe(duration_s)
            (self._syncs.full if is_full else self._syncs.partial).labels(family).observe(duration_s)
            self._syncs.synced_at.labels(family).set(now)
            for trigger in triggers:
                if trigger >= self._started:
                    self._syncs.programming.labels(family).observe(max(0.0, now - trigger))

    def cleaned(self, duration_s: float, deleted: Mapping[Family, int]) -> None:
        """Note a search for flows whose backends are gone: its duration, and how many of each family were deleted."""
        for family in Family:
            label = f"IPv{family.value}"
            self._cleanings.durations.labels(label).observe(duration_s)
            self._cleanings.deleted.labels(label).inc(deleted.get(family, 0))

    def lacks_local(self, service: ObjectKey, ports: Sequence[tuple[Family, str]]) -> None:
        """Note which ports of a Service have all their endpoints elsewhere: family and traffic policy of each."""
        before = self._lacking.pop(service, ())
        if ports:
            self._lacking[service] = list(ports)
        for sign, lacking in ((-1, before), (1, ports)):
            for family, policy in lacking:
                self._no_local_endpoints.labels(f"IPv{family.value}", policy).inc(sign)

    def counted(self, name: str, entries: int) -> None:
        """Note how many entries a map had when somebody went through all of it."""
        self.map_entries[name] = entries

    def error(self, kind: str) -> None:
        """Count an error."""
        self._faults.errors.labels(kind).inc()

    def malformed(self, kind: Kind) -> None:
        """Count a version of an object that could not be read, or not all of it."""
        self._faults.malformed.labels(kind.value).inc()

    def drift(self, entries: int) -> None:
        """Count entries that were healed."""
        self._faults.drift.inc(entries)

    def add_live(self, read: Callable[[], Iterable[Metric]]) -> None:
        """Have something read anew at each scrape."""
        self.registry.register(_Live(read))


class _Live(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Say nothing at registration: what is read may not be there yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._read()


def gauge(name: str, text: str, values: dict[str, float], label: str = "") -> Iterator[Metric]:
    """Make a gauge by one label; with no label, ``values`` has one value under the empty string."""
    family = GaugeMetricFamily(name, text, labels=[label] if label else [])
    for key, value in values.items():
        family.add_metric([key] if label else [], value)
    yield family


def counter(name: str, text: str, values: dict[str, float], label: str = "") -> Iterator[Metric]:
    """Make a counter by one label; with no label, ``values`` has one value under the empty string."""
    family = CounterMetricFamily(name, text, labels=[label] if label else [])
    for key, value in values.items():
        family.add_metric([key] if label else [], value)
    yield family


def _durations(
    registry: CollectorRegistry, name: str, text: str, buckets: Sequence[float] = _SYNC_BUCKETS
) -> Histogram:
    return Histogram(name, text, _BY_FAMILY, buckets=buckets, registry=registry)
