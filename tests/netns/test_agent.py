"""The agent beside its dataplane: drift is healed, malformed objects cost only themselves, its servers answer."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from agent.core.abi import Frontend, FrontendKey, Protocol
from agent.core.addresses import parse_address
from tests.lab.agents import HEALTH_PORT, METRICS_PORT
from tests.lab.manifests import service
from tests.lab.polling import until
from tests.lab.stage import slice_of


@pytest.fixture
def drifting(make_scene):
    """A node whose agent compares the maps with its plans often."""
    return make_scene(web=2, driftCheckPeriod="100ms")


def frontend_key(ip):
    return FrontendKey(parse_address(ip), 80, Protocol.TCP).pack()


def healed(agent):
    return agent.metric("ebproxy_drift_entries_total")


def lost_frontend(maps, ip):
    maps["frontends"].delete(frontend_key(ip))


def turned_frontend(maps, ip):
    maps["frontends"].update(frontend_key(ip), Frontend(77, 0, 0).pack())


def lost_backends(maps, ip):
    base = Frontend.unpack(maps["frontends"].lookup(frontend_key(ip))).inside
    maps["segments"].update(base.to_bytes(4, "little"), bytes(24))


def foreign_frontend(maps, ip):
    maps["frontends"].update(frontend_key("10.96.99.99"), maps["frontends"].lookup(frontend_key(ip)))


@pytest.mark.parametrize("damage", [lost_frontend, turned_frontend, lost_backends, foreign_frontend])
def test_drift_is_healed_and_counted(drifting, damage):
    ips = drifting.publish("web", drifting.web)
    other = drifting.publish("other", drifting.web[:1])
    assert healed(drifting.agent) == 0

    with drifting.agent.maps() as store:
        damage(store.maps, ips[0])

    until(lambda: healed(drifting.agent) >= 1, "the drift is counted")
    drifting.wait_for("web", 2)
    assert {"web-1", "web-2"} == set(drifting.pod.spread("tcp", ips[0], 80, 40))
    assert drifting.pod.ask("tcp", other[0], 80).name == "web-1"
    until(lambda: drifting.agent.count("10.96.99.99:80/TCP") is None, "what is nobody's is gone")
    assert healed(drifting.agent) <= 2  # a frontend that is lost takes its segment out of sight
    writes = drifting.agent.map_writes()
    drifting.publish("later", drifting.web[:1])
    assert healed(drifting.agent) <= 2
    assert (
        drifting.agent.map_writes() == writes + 4 * (1 + 1 + 1) + 2
    )  # a frontend, a slot and a header each; both ClusterIPs


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"clusterIPs": ["10.96.300.1"]}, "clusterIPs"),
        ({"ports": [{"name": "http", "port": "eighty", "protocol": "TCP"}]}, "port"),
        ({"ports": [{"name": "http", "port": 70000, "protocol": "TCP"}]}, "port"),
        ({"ports": "none"}, "ports"),
    ],
    ids=["address", "port is text", "port is too large", "ports is text"],
)
def test_a_malformed_object_costs_only_itself(scene, name, spec, field):
    """It is named and counted; what it said before stays, and its neighbours in the file change."""
    ips = scene.publish(name, scene.web[:1])
    other = scene.ips(f"{name}-other")
    counted = scene.agent.metric("ebproxy_malformed_objects_total", kind="Service")

    slices = [slice_of(name, scene.web[:1], family=family) for family in (4, 6)]
    neighbour = [service(f"{name}-other", other), slice_of(f"{name}-other", scene.web[1:2])]
    malformed = service(name, ips)
    malformed["spec"] |= spec
    scene.manifests.write(name, malformed, *slices, *neighbour)

    scene.agent.wait_for(f"{other[0]}:80/TCP", 1)
    assert scene.pod.ask("tcp", other[0], 80).name == "web-2"
    assert scene.pod.ask("tcp", ips[0], 80).name == "web-1"
    found = [entry for entry in scene.agent.status()["malformed"] if entry["name"] == f"shop/{name}"]
    assert [entry["kind"] for entry in found] == ["Service"]
    assert field in found[0]["field"]
    assert scene.agent.metric("ebproxy_malformed_objects_total", kind="Service") == counted + 1

    scene.publish(name, scene.web[1:])
    assert scene.agent.status()["malformed"] == []
    assert {"web-2", "web-3"} == set(scene.pod.spread("tcp", ips[0], 80, 40))


def test_a_half_written_file_is_no_change(scene, name):
    ips = scene.publish(name, scene.web[:1])
    whole = (scene.manifests.directory / f"{name}.yaml").read_text(encoding="utf-8")
    errors = scene.agent.metric("ebproxy_errors_total")

    scene.manifests.write_text(name, whole[: whole.index("clusterIPs") + 14] + '"')
    until(lambda: scene.agent.metric("ebproxy_errors_total") > errors, "the file is complained of")

    assert scene.pod.ask("tcp", ips[0], 80).name == "web-1"
    scene.manifests.write_text(name, whole)
    scene.write(name, scene.web[1:2])
    until(lambda: scene.pod.ask("tcp", ips[0], 80).name == "web-2", "the next version holds")


@pytest.mark.parametrize(
    ("port", "path", "code", "says"),
    [
        (METRICS_PORT, "/healthz", 200, "ok"),
        (METRICS_PORT, "/proxyMode", 200, "ebpf"),
        (METRICS_PORT, "/configz", 200, "kubeproxy.config.k8s.io"),
        (METRICS_PORT, "/metrics", 200, "kubeproxy_sync_proxy_rules_duration_seconds_count"),
        (METRICS_PORT, "/metrics", 200, "ebproxy_map_pressure"),
        (METRICS_PORT, "/nothing", 404, ""),
        (HEALTH_PORT, "/healthz", 200, '"nodeEligible": true'),
        (HEALTH_PORT, "/livez", 200, '"healthy": true'),
        (HEALTH_PORT, "/nothing", 404, ""),
    ],
)
def test_the_servers_answer(scene, port, path, code, says):
    answered, body = scene.agent.get(path, port)

    assert (code, True) == (answered, says in body)


def test_health_counts_who_asks(scene):
    before = scene.agent.metric("kubeproxy_proxy_healthz_total", code="200")

    scene.agent.get("/healthz", HEALTH_PORT)

    assert scene.agent.metric("kubeproxy_proxy_healthz_total", code="200") == before + 1


def test_a_node_about_to_go_is_not_eligible_and_lives(make_scene):
    """A load balancer is to stop sending; the kubelet is not to restart the agent."""
    scene = make_scene(web=1)
    assert scene.agent.get("/healthz", HEALTH_PORT)[0] == 200

    scene.manifests.remove("node")

    until(lambda: scene.agent.get("/healthz", HEALTH_PORT)[0] == 503, "healthz says 503")
    assert json.loads(scene.agent.get("/healthz", HEALTH_PORT)[1])["nodeEligible"] is False
    assert scene.agent.get("/livez", HEALTH_PORT)[0] == 200


def test_a_change_is_timed(scene, name):
    before = scene.agent.metric("kubeproxy_sync_proxy_rules_duration_seconds_count", ip_family="IPv4")

    scene.publish(name, scene.web)

    assert scene.agent.metric("kubeproxy_sync_proxy_rules_duration_seconds_count", ip_family="IPv4") > before


def test_what_did_not_change_is_not_written_again(scene, name):
    """The same file again, with other formatting, comments and order."""
    scene.publish(name, scene.web)
    text = (scene.manifests.directory / f"{name}.yaml").read_text(encoding="utf-8")
    writes = scene.agent.map_writes()

    scene.manifests.write_text(name, "# again\n" + "---\n".join(reversed(text.split("---\n"))))
    marker = f"{name}-marker"
    scene.publish(marker, scene.web[:1])

    assert (
        scene.agent.map_writes() == writes + 4 * (1 + 1 + 1) + 2
    )  # a frontend, a slot and a header each; both ClusterIPs  # the marker's headers, backends and frontends
    scene.withdraw(marker)


def test_one_changed_endpoint_writes_one_slot(scene, name):
    """Per family and protocol: the slot of the endpoint that was replaced, and nothing else."""
    scene.publish(name, scene.web[:2])
    writes = scene.agent.map_writes()

    ips = scene.write(name, [scene.web[0], scene.web[2]])
    until(lambda: "web-3" in scene.pod.spread("tcp", ips[1], 80, 20), "the new one answers")
    until(scene.agent.is_settled, "it is settled")

    assert scene.agent.map_writes() == writes + 4


def test_a_hook_that_somebody_detached_is_attached_again(drifting):
    """A Service is a plain address meanwhile; it is noticed at the next comparison, and counted."""
    ips = drifting.publish("hooked", drifting.web)
    before = healed(drifting.agent)
    (drifting.agent.bpffs / "ebproxy" / "links" / "connect4").unlink()

    until(lambda: healed(drifting.agent) > before, "the hook is counted as healed")
    assert drifting.pod.ask("tcp", ips[0], 80).name in {"web-1", "web-2"}


def test_a_source_that_is_not_there_puts_nothing_into_the_kernel(scene, tmp_path):
    ran = scene.agent.cli(
        "run", "--manifests", str(tmp_path / "none"), "--state-dir", str(tmp_path / "s"), "--bpffs", str(tmp_path / "b")
    )

    assert ran.returncode == 2
    assert "is not a directory" in ran.stderr
    assert not (tmp_path / "b").exists()


def test_the_agent_ignores_sigpipe(make_scene):
    """Else whoever hangs up while it writes would end it."""
    process = make_scene().agent.process
    status = Path(f"/proc/{process.pid}/status").read_text()
    ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)

    assert ignored >> (signal.SIGPIPE - 1) & 1
