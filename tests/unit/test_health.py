"""/healthz and /livez judge as kube-proxy does."""

from __future__ import annotations

from datetime import datetime

import pytest

from agent.observe.health import Health, Vitals

SYNC_S = 30.0


@pytest.mark.parametrize(
    ("vitals", "healthz", "livez"),
    [
        pytest.param(Vitals(None, is_node_eligible=True), 200, 200, id="nothing-waits"),
        pytest.param(Vitals(59.9, is_node_eligible=True), 200, 200, id="waits-not-yet-two-periods"),
        pytest.param(Vitals(60.0, is_node_eligible=True), 503, 503, id="waits-two-periods"),
        pytest.param(Vitals(None, is_node_eligible=False), 503, 200, id="node-is-going"),
        pytest.param(Vitals(60.0, is_node_eligible=False), 503, 503, id="both"),
        pytest.param(Vitals(None, is_node_eligible=True, has_failed=True), 503, 503, id="reconciler-failed"),
    ],
)
def test_status_and_body(vitals, healthz, livez):
    health = Health(lambda: vitals, SYNC_S)
    code, body = health.healthz()
    live_code, live_body = health.livez()

    assert (code, live_code) == (healthz, livez)
    assert health.is_healthy is (livez == 200)
    assert body["nodeEligible"] is vitals.is_node_eligible
    assert "nodeEligible" not in live_body
    for said in (body, live_body):
        assert said["healthy"] is (livez == 200)
        assert list(said["status"]) == ["IPv4", "IPv6"]
        assert said["status"]["IPv4"]["healthy"] is said["healthy"]
        assert datetime.fromisoformat(said["currentTime"]).tzinfo is not None


def test_last_updated_stands_still_while_unhealthy():
    vitals = [Vitals(None, is_node_eligible=True)]
    health = Health(lambda: vitals[0], SYNC_S)
    healthy = health.livez()[1]
    vitals[0] = Vitals(99.0, is_node_eligible=True)
    first, second = health.livez()[1], health.livez()[1]

    assert healthy["lastUpdated"] == healthy["currentTime"]
    assert first["lastUpdated"] == second["lastUpdated"] == healthy["lastUpdated"]
    assert second["currentTime"] > second["lastUpdated"]
