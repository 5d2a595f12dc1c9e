"""Metrics that are read when somebody scrapes: what maps hold, what the programs counted, what waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import Metric

from agent.core.abi import MapSizes
from agent.observe import metrics as meter
from agent.observe.health_checks import HealthCheckServers
from agent.observe.metrics import Metrics
from agent.reconciler import Reconciler

_NO_FLOWS = {"silent": 0.0, "stale": 0.0}
_NO_SOCKETS = {"destroyed": 0.0, "gone": 0.0, "failed": 0.0, "unreached": 0.0}


class LiveMetrics:
    """Reads the agent's parts from the scraping thread: numbers and lengths alone, which need no lock."""

    def __init__(
        self,
        sizes: MapSizes,
        reconciler: Reconciler,
        health_checks: HealthCheckServers,
        metrics: Metrics,
        source_faults: Callable[[], int],
    ) -> None:
        """``source_faults``: counts what the source cannot read, so that nobody knows which objects it is."""
        self._sizes = sizes
        self._reconciler = reconciler
        self._health_checks = health_checks
        self._metrics = metrics
        self._source_faults = source_faults

    def read(self) -> Iterator[Metric]:
        """Read everything."""
        yield from self._maps()
        yield from self._gauges()
        store = self._reconciler.dataplane.store
        dataplane = {count.name.lower(): value for count, value in store.read_counters().items()}
        yield from meter.counter("ebproxy_map_writes", "Entries written or deleted", dict(store.writes), "map")
        yield from meter.counter("ebproxy_dataplane_events", "What the programs counted", dict(dataplane), "event")
        if flows := self._reconciler.flows:
            deleted, sockets = dict(flows.deleted), dict(flows.sockets.counts)
            text = "Entries of tracked flows deleted: silent too long, or stale (UDP whose backend is gone)"
            yield from meter.counter("ebproxy_flow_entries_deleted", text, {**_NO_FLOWS, **deleted}, "reason")
            text = "UDP sockets whose backend is gone, by what became of them; unreached: namespaces not entered"
            yield from meter.counter("ebproxy_stale_sockets", text, {**_NO_SOCKETS, **sockets}, "outcome")
        failures = {"": float(self._health_checks.failures)}
        yield from meter.counter(
            "ebproxy_health_check_bind_failures", "Health check node ports that could not be had", failures
        )

    def _maps(self) -> Iterator[Metric]:
        planner = self._reconciler.planner
        entries = {
            "frontends": planner.frontend_count,
            "segments": planner.allocator.used,
            "source_ranges": planner.source_ranges.count,
            "maglev_tables": planner.tables.used,
            **self._metrics.map_entries,
        }
        if self._reconciler.policy is not None:
            entries |= self._reconciler.policy.planner.entry_counts
        capacity = {name: getattr(self._sizes, name) for name in entries}
        yield from meter.gauge("ebproxy_map_entries", "Entries in use", dict(entries), "map")
        yield from meter.gauge("ebproxy_map_capacity_entries", "Entries there is room for", dict(capacity), "map")
        pressure = {name: used / capacity[name] for name, used in entries.items() if capacity[name]}
        yield from meter.gauge("ebproxy_map_pressure", "Share of a map that is in use, 0 to 1", pressure, "map")

    def _gauges(self) -> Iterator[Metric]:
        reconciler, model = self._reconciler, self._reconciler.model
        for name, text, value in (
            ("ebproxy_services", "Services known", len(model.services)),
            (
                "ebproxy_malformed_objects_current",
                "Objects and files that cannot be read, or not all",
                self._malformed(),
            ),
            ("ebproxy_degraded_service_ports", "Service ports not as desired", len(reconciler.planner.degraded)),
            ("ebproxy_settled", "Whether everything listed is programmed", float(reconciler.is_settled.is_set())),
            ("ebproxy_health_check_servers", "Sockets for health check node ports", self._health_checks.serving),
            ("ebproxy_health_check_servers_missing", "Such that cannot be had", self._health_checks.failed),
            ("kubeproxy_sync_proxy_rules_service_changes_pending", "Services to resolve", len(model.dirty)),
            (
                "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
                "The same: both are resolved together",
                len(model.dirty),
            ),
        ):
            yield from meter.gauge(name, text, {"": value})

    def _malformed(self) -> int:
        """Count objects with a fault, and files, by lengths alone, which need no lock."""
        policy = self._reconciler.policy
        count = len(self._reconciler.model.malformed) + self._source_faults()
        return count if policy is None else count + len(policy.model.malformed) + len(policy.model.left_out)
