"""The commands say what is so: held against real connections and the objects that were written."""

from __future__ import annotations

import pytest

from tests.lab.manifests import Endpoint
from tests.lab.polling import until

ALLOW = {"verdict": "allow"}


def to(ip, port=80):
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("place", ["pod", "host"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_trace_agrees_with_a_connection_that_is_forwarded(scene, name, family, place, protocol):
    ip = scene.publish(name, scene.web)[family]
    source = "host" if place == "host" else scene.shopper.addresses[family]

    said = scene.agent.json("trace", "--from", source, "--to", to(ip), "--proto", protocol)

    names = {to(pod.addresses[family], 8080): pod.name for pod in scene.web}
    assert ("forward", place, False) == (said["verdict"], said["origin"], said["source_nat"])
    assert sorted(names) == said["backends"]
    assert set(names.values()) == set(scene.clients[place].spread(protocol, ip, 80, 60))
    port = "http" if protocol == "tcp" else "http-udp"
    assert {"service": f"shop/{name}", "port": port, "kind": "ClusterIP"} == said["frontend"]
    assert ALLOW.items() <= said["policy"]["egress"].items()
    assert ALLOW.items() <= said["policy"]["ingress"].items()


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_trace_agrees_with_a_connection_that_is_refused(scene, name, family):
    ip = scene.publish(name, [])[family]

    said = scene.agent.json("trace", "--from", "host", "--to", to(ip))

    assert (said["verdict"], said["backends"]) == ("reject", [])
    assert scene.host.ask("tcp", ip, 80).error == "ECONNREFUSED"


def test_trace_agrees_with_a_connection_that_is_dropped(scene, name):
    ip = scene.write(name, [Endpoint("10.180.2.77", "node-2")], internalTrafficPolicy="Local")[0]
    scene.agent.wait_for(f"{ip}:80/TCP", 0)

    said = scene.agent.json("trace", "--from", "shop/shopper", "--to", to(ip))

    assert (said["verdict"], said["backends"], said["origin"]) == ("drop", [], "pod")
    assert scene.pod.ask("tcp", ip, 80).error == "timeout"


def test_trace_agrees_with_a_connection_that_passes(scene, name):
    scene.publish(name, scene.web[:1])
    pod = scene.web[0].v4

    said = scene.agent.json("trace", "--from", "host", "--to", to(pod, 8080))

    assert (said["verdict"], said["frontend"], said["backends"]) == ("pass", None, [])
    assert scene.host.ask("tcp", pod, 8080).name == "web-1"


@pytest.mark.parametrize(("port", "protocol"), [(81, "tcp"), (81, "udp"), (80, "sctp")])
def test_trace_agrees_with_a_connection_to_what_a_service_does_not_offer(scene, name, port, protocol):
    ip = scene.publish(name, scene.web[:1])[0]

    said = scene.agent.json("trace", "--from", "host", "--to", to(ip, port), "--proto", protocol)

    assert (said["verdict"], said["backends"]) == ("reject", [])
    assert said["frontend"] == {"service": f"shop/{name}", "port": "", "kind": "ClusterIP"}
    if protocol != "sctp":
        assert scene.host.ask(protocol, ip, port).error == "ECONNREFUSED"


@pytest.mark.parametrize(
    "arguments",
    [("--from", "host", "--to", "10.96.0.1"), ("--from", "nobody", "--to", "10.96.0.1:80")],
    ids=["no port", "no such source"],
)
def test_trace_refuses_what_it_cannot_read(scene, arguments):
    ran = scene.agent.cli("trace", *arguments)

    assert ran.returncode == 2
    assert "--to" in ran.stderr or "--from" in ran.stderr


def test_trace_and_services_answer_without_an_agent(make_scene):
    scene = make_scene(web=1)
    ips = scene.publish("web", scene.web)
    scene.agent.kill()

    said = scene.agent.json("trace", "--from", "host", "--to", to(ips[0]))
    services = scene.agent.json("service", "list")

    assert (said["verdict"], said["frontend"]["service"]) == ("forward", "shop/web")
    assert {"shop/web"} == {service["service"] for service in services}
    assert scene.agent.cli("status").returncode == 1


def test_services_are_listed_and_shown(scene, name):
    ips = scene.publish(name, scene.web)

    listed = [entry for entry in scene.agent.json("service", "list") if entry["service"] == f"shop/{name}"]
    shown = scene.agent.json("service", "show", f"shop/{name}")

    assert listed == shown
    assert {f"{to(ip)}/{protocol}" for ip in ips for protocol in ("TCP", "UDP")} == {
        frontend for entry in shown for frontend in entry["frontends"]
    }
    assert {to(address, 8080) for pod in scene.web for address in pod.addresses} == {
        backend for entry in shown for backend in entry["backends"]
    }
    assert scene.agent.cli("service", "show", "shop/nobody").returncode == 1


def test_maps_are_shown_with_what_is_in_them(make_scene):
    scene = make_scene(web=3)
    scene.publish("web", scene.web)

    maps = {entry["name"]: entry for entry in scene.agent.json("maps")["maps"]}

    assert maps["frontends"]["entries"] == 2 * (2 + 1)  # for each family its ports, and the cluster IP itself
    assert maps["segments"]["entries"] == 2 + 4 * (1 + 3)  # the shared empty ones, and blocks of four
    assert all(entry["memory"] > 0 for entry in maps.values() if entry["kind"] != "lpm_trie")  # empty ones take none
    assert scene.agent.map_ids() == {name: entry["id"] for name, entry in maps.items()}


def test_status_waits_until_everything_is_programmed(make_scene):
    scene = make_scene(web=1)
    scene.publish("web", scene.web)
    scene.agent.kill()
    assert scene.agent.cli("status", "--wait", "0.1").returncode == 1
    scene.agent.start()

    ran = scene.agent.cli("status", "--wait", "20")

    assert ran.returncode == 0, ran.stderr
    assert scene.agent.is_settled()
    assert "programmed" in ran.stdout


def test_status_does_not_wait_for_ever(make_scene):
    """A Service that does not fit is not programmed."""
    scene = make_scene(web=1, mapSizes={"frontends": 7, "segments": 64, "socketOrigins": 64, "peerOrigins": 64})
    scene.publish("first", scene.web)
    scene.write("second", scene.web)
    until(lambda: scene.agent.status()["degraded"], "the second is degraded")

    ran = scene.agent.cli("status", "--wait", "0.2", "-o", "json")

    assert ran.returncode == 1
    assert "shop/second" in ran.stdout


@pytest.mark.parametrize("arguments", [("status",), ("service", "list"), ("maps",)], ids=" ".join)
def test_tables_read_without_a_terminal(scene, name, arguments):
    scene.publish(name, scene.web)

    ran = scene.agent.cli(*arguments)

    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\x1b" not in ran.stdout
    assert len(ran.stdout.splitlines()) > 3
