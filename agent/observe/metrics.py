"""Prometheus metrics. Those that mean what kube-proxy's mean have kube-proxy's names, so its dashboards work.

Source: kube-proxy's ``kubeproxy_*`` metrics at 1.36; both families are served by one synchronisation here, so it counts
for each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import agent
from agent.core.records import Family, Kind, Malformed, ObjectKey

FAMILIES = ("IPv4", "IPv6")
_SYNC_BUCKETS = tuple(0.000_1 * 2**i for i in range(16))
# kube-proxy's own: 0.25 s to 5 minutes; ours start lower because a change takes less than a millisecond here.
_PROGRAMMING_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Everything the agent counts; ``registry`` is what ``/metrics`` serves."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._started = time.time()
        registry = self.registry
        family = ("ip_family",)
        self._sync = Histogram(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "Time from the first change taken in to the last map entry written",
            family,
            buckets=_SYNC_BUCKETS,
            registry=registry,
        )
        self._full_sync = Histogram(
            "kubeproxy_sync_full_proxy_rules_duration_seconds",
            "The same, of synchronisations that compare every Service with what the maps hold",
            family,
            buckets=_SYNC_BUCKETS,
            registry=registry,
        )
        self._partial_sync = Histogram(
            "kubeproxy_sync_partial_proxy_rules_duration_seconds",
            "The same, of those that look at changed Services alone",
            family,
            buckets=_SYNC_BUCKETS,
            registry=registry,
        )
        self._cleaning = Histogram(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "Time to delete the flows whose backends are gone",
            family,
            buckets=_SYNC_BUCKETS,
            registry=registry,
        )
        self._cleaned = Counter(
            "kubeproxy_conntrack_reconciler_deleted_entries",
            "Tracked flows deleted because their backend is gone",
            family,
            registry=registry,
        )
        self._no_local_endpoints = Gauge(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Service ports whose traffic policy is Local, with endpoints, and none of them here",
            (*family, "traffic_policy"),
            registry=registry,
        )
        self._lacking: dict[ObjectKey, list[tuple[Family, str]]] = {}
        for each in FAMILIES:
            for policy in ("internal", "external"):
                self._no_local_endpoints.labels(each, policy)
        self._programming = Histogram(
            "kubeproxy_network_programming_duration_seconds",
            "Time from the change that caused an EndpointSlice's version to its being in the maps",
            family,
            buckets=_PROGRAMMING_BUCKETS,
            registry=registry,
        )
        self._synced_at = Gauge(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "When the maps were last written",
            family,
            registry=registry,
        )
        self._queued_at = Gauge(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "When a change was last taken in",
            family,
            registry=registry,
        )
        self._changes = {
            Kind.SERVICE: Counter(
                "kubeproxy_sync_proxy_rules_service_changes", "Changes of Services taken in", registry=registry
            ),
            Kind.ENDPOINT_SLICE: Counter(
                "kubeproxy_sync_proxy_rules_endpoint_changes", "Changes of EndpointSlices taken in", registry=registry
            ),
        }
        self.map_entries: dict[str, int] = {}
        """Of maps the programs write, what was last counted in them."""
        self.healthz = Counter("kubeproxy_proxy_healthz", "Answers of /healthz", ("code",), registry=registry)
        self.livez = Counter("kubeproxy_proxy_livez", "Answers of /livez", ("code",), registry=registry)
        self._synced_services = Counter("ebproxy_synced_services", "Services resolved and compared", registry=registry)
        self._errors = Counter("ebproxy_errors", "Errors, by what failed", ("kind",), registry=registry)
        self._malformed = Counter(
            "ebproxy_malformed_objects", "Versions of objects that could not be read", ("kind",), registry=registry
        )
        self._drift = Counter(
            "ebproxy_drift_entries", "Map entries and hooks found not as they were left, and healed", registry=registry
        )
        Gauge("ebproxy_build_info", "The version that runs", ("version",), registry=registry).labels(
            agent.__version__
        ).set(1)
        Gauge("ebproxy_start_time_seconds", "When the agent started", registry=registry).set(self._started)

    def taken_in(self, changes: Mapping[Kind, int]) -> None:
        """Count changes that were taken in together, by kind."""
        for kind, count in changes.items():
            if kind in self._changes:
                self._changes[kind].inc(count)
        for family in FAMILIES:
            self._queued_at.labels(family).set_to_current_time()

    def synced(self, duration_s: float, services: int, triggers: Sequence[float], *, is_full: bool = False) -> None:
        """Note a synchronisation: its duration, and the Unix times of the changes that caused it.

        ``is_full``: it compared every Service with what the maps hold.
        """
        now = time.time()
        self._synced_services.inc(services)
        for family in FAMILIES:
            self._sync.labels(family).observe(duration_s)
            (self._full_sync if is_full else self._partial_sync).labels(family).observe(duration_s)
            self._synced_at.labels(family).set(now)
            for trigger in triggers:
                if trigger >= self._started:
                    self._programming.labels(family).observe(max(0.0, now - trigger))

    def cleaned(self, duration_s: float, deleted: Mapping[Family, int]) -> None:
        """Note a search for flows whose backends are gone: its duration, and how many of each family were deleted."""
        for family in Family:
            label = f"IPv{family.value}"
            self._cleaning.labels(label).observe(duration_s)
            self._cleaned.labels(label).inc(deleted.get(family, 0))

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
        self._errors.labels(kind).inc()

    def malformed(self, event: Malformed) -> None:
        """Count a version of an object that could not be read."""
        self._malformed.labels(event.kind.value).inc()

    def drift(self, entries: int) -> None:
        """Count entries that were healed."""
        self._drift.inc(entries)

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
