"""Metrics are counted under kube-proxy's names where they mean what kube-proxy's mean."""

from __future__ import annotations

import time

import pytest

from agent.core.records import Family, Kind
from agent.observe import metrics as meter
from agent.observe.metrics import Metrics
from tests.builders import key

SERVICES = "kubeproxy_sync_proxy_rules_service_changes_total"
ENDPOINTS = "kubeproxy_sync_proxy_rules_endpoint_changes_total"


def test_changes_are_counted_by_kind():
    metrics = Metrics()
    before = time.time()
    metrics.taken_in({Kind.SERVICE: 2, Kind.ENDPOINT_SLICE: 3, Kind.NODE: 5})
    read = metrics.registry.get_sample_value

    assert read(SERVICES) == 2
    assert read(ENDPOINTS) == 3
    for family in ("IPv4", "IPv6"):
        assert read("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", {"ip_family": family}) >= before


def test_a_synchronisation_counts_for_both_families_and_skips_what_is_older_than_the_agent():
    metrics = Metrics()
    now = time.time()
    metrics.synced(0.001, 3, [now - 86_400, now + 1])

    for family in ({"ip_family": "IPv4"}, {"ip_family": "IPv6"}):
        read = metrics.registry.get_sample_value
        assert read("kubeproxy_sync_proxy_rules_duration_seconds_count", family) == 1
        assert read("kubeproxy_network_programming_duration_seconds_count", family) == 1
        assert read("kubeproxy_network_programming_duration_seconds_sum", family) == 0
        assert read("kubeproxy_sync_proxy_rules_last_timestamp_seconds", family) >= now
    assert metrics.registry.get_sample_value("ebproxy_synced_services_total") == 3


@pytest.mark.parametrize(("is_full", "counts"), [(True, (1, 0)), (False, (0, 1))], ids=["full", "partial"])
def test_a_synchronisation_is_full_or_partial(is_full, counts):
    metrics = Metrics()
    metrics.synced(0.001, 3, [], is_full=is_full)

    for family in ({"ip_family": "IPv4"}, {"ip_family": "IPv6"}):
        assert counts == tuple(
            metrics.registry.get_sample_value(f"kubeproxy_sync_{extent}_proxy_rules_duration_seconds_count", family)
            or 0
            for extent in ("full", "partial")
        )


def test_deleted_flows_count_for_their_family():
    metrics = Metrics()
    metrics.cleaned(0.25, {Family.IPV4: 3})
    metrics.cleaned(0.25, {Family.IPV6: 1})
    read = metrics.registry.get_sample_value

    for family, deleted in (({"ip_family": "IPv4"}, 3), ({"ip_family": "IPv6"}, 1)):
        assert read("kubeproxy_conntrack_reconciler_deleted_entries_total", family) == deleted
        assert read("kubeproxy_conntrack_reconciler_sync_duration_seconds_count", family) == 2
        assert read("kubeproxy_conntrack_reconciler_sync_duration_seconds_sum", family) == 0.5


def no_local_endpoints(metrics: Metrics) -> list[float]:
    name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"
    labels = [{"ip_family": f, "traffic_policy": p} for f in ("IPv4", "IPv6") for p in ("internal", "external")]
    return [metrics.registry.get_sample_value(name, each) for each in labels]


def test_ports_without_local_endpoints_are_counted_as_they_are_now():
    metrics = Metrics()
    assert no_local_endpoints(metrics) == [0, 0, 0, 0]

    metrics.lacks_local(key("web"), [(Family.IPV4, "internal"), (Family.IPV4, "external"), (Family.IPV6, "external")])
    metrics.lacks_local(key("api"), [(Family.IPV4, "external"), (Family.IPV4, "external")])
    assert no_local_endpoints(metrics) == [1, 3, 0, 1]

    metrics.lacks_local(key("web"), [(Family.IPV4, "internal")])
    metrics.lacks_local(key("api"), ())
    assert no_local_endpoints(metrics) == [1, 0, 0, 0]


def test_errors_drift_and_malformed_objects():
    metrics = Metrics()
    metrics.error("dataplane")
    metrics.drift(7)
    metrics.malformed(Kind.SERVICE)
    read = metrics.registry.get_sample_value

    assert read("ebproxy_errors_total", {"kind": "dataplane"}) == 1
    assert read("ebproxy_drift_entries_total") == 7
    assert read("ebproxy_malformed_objects_total", {"kind": "Service"}) == 1


def test_live_metrics_are_read_anew_at_each_scrape():
    metrics, values = Metrics(), {"": 1.0}
    metrics.add_live(lambda: meter.gauge("ebproxy_test", "text", values))
    assert metrics.registry.get_sample_value("ebproxy_test") == 1
    values[""] = 2.0

    assert metrics.registry.get_sample_value("ebproxy_test") == 2
