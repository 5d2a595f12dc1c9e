"""Health check node ports of a running agent: what a load balancer is told of this node."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from typing import Any, NamedTuple

import pytest

from tests.lab import netns
from tests.lab.manifests import Port
from tests.lab.polling import until

LOCAL = {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}
ELSEWHERE = "10.180.2.10"


class Answer(NamedTuple):
    status: int
    weight: str | None
    said: Any


def ask(scene, port: int, host: str = "", path: str = "/healthz") -> Answer | None:
    """Ask as a load balancer does, from the node itself; None = refused."""
    with netns.entered(scene.node.netns):
        connection = http.client.HTTPConnection(host or scene.node.addresses[0], port, timeout=10)
        try:
            connection.connect()
        except ConnectionRefusedError:
            return None
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return Answer(
            response.status, response.headers["X-Load-Balancing-Endpoint-Weight"], json.loads(response.read())
        )


def publish(scene, name: str, port: int, backends, **spec: Any) -> None:
    """Write a Service that load balancers ask about at this port."""
    scene.write(name, backends, PORTS[port], **(LOCAL | {"healthCheckNodePort": port} | spec))


PORTS = {port: (Port("http", 80, 8080, node_port=port - 1000),) for port in range(32_001, 32_020)}


@pytest.fixture
def port(request) -> int:
    """A port for each test of this module, since they share a node."""
    tests = [item.nodeid for item in request.session.items if item.path == request.node.path]
    return 32_001 + tests.index(request.node.nodeid)


def weight(scene, port: int, host: str = "") -> int | None:
    answer = ask(scene, port, host)
    return answer.said["localEndpoints"] if answer else None


def test_a_node_with_endpoints_says_how_many(scene, name, port):
    publish(scene, name, port, scene.web[:2])
    until(lambda: weight(scene, port) == 2, "two are told of")

    for host in (*scene.node.addresses, "127.0.0.1", "::1"):
        answer = ask(scene, port, host, "/any/path?at=all")
        assert (answer.status, answer.weight) == (200, "2")
        assert answer.said == {
            "service": {"namespace": "shop", "name": name},
            "localEndpoints": 2,
            "serviceProxyHealthy": True,
        }
    scene.withdraw(name, PORTS[port])


@pytest.mark.parametrize(
    "conditions",
    [
        pytest.param({"ready": False, "serving": True, "terminating": True}, id="terminating"),
        pytest.param({"ready": False, "serving": False}, id="unready"),
    ],
)
def test_endpoints_that_are_not_ready_do_not_count(scene, name, port, conditions):
    """A load balancer stops sending while the terminating ones still serve."""
    publish(scene, name, port, scene.web[:1])
    until(lambda: weight(scene, port) == 1, "one is told of")

    publish(scene, name, port, [scene.web[0].endpoint(family, **conditions) for family in (4, 6)])
    until(lambda: weight(scene, port) == 0, "none is told of")

    assert ask(scene, port).status == 503
    if conditions["serving"]:
        assert scene.pod.ask("tcp", scene.ips(name)[0], 80).name == "web-1"
    scene.withdraw(name, PORTS[port])


def test_endpoints_elsewhere_do_not_count(scene, name, port):
    publish(scene, name, port, [scene.web[0].endpoint()._replace(address=ELSEWHERE, node="node-2")])
    until(lambda: ask(scene, port), "the port is served")

    answer = ask(scene, port)
    assert (answer.status, answer.weight) == (503, "0")
    scene.withdraw(name, PORTS[port])


def test_changes_are_followed(scene, name, port):
    publish(scene, name, port, scene.web)
    until(lambda: weight(scene, port) == 3, "three are told of")

    publish(scene, name, port, scene.web[:1])
    until(lambda: weight(scene, port) == 1, "one is told of")

    publish(scene, name, port, scene.web[:1], externalTrafficPolicy="Cluster", healthCheckNodePort=None)
    until(lambda: ask(scene, port) is None, "the port is closed with the policy")

    publish(scene, name, port, scene.web[:1])
    until(lambda: weight(scene, port) == 1, "it is open again")

    scene.withdraw(name, PORTS[port])
    until(lambda: ask(scene, port) is None, "the port is closed with the Service")


def missing(scene) -> float:
    return scene.agent.metric("ebproxy_health_check_servers_missing")


def test_a_port_that_is_taken_is_counted_and_had_later(make_scene, name):
    """Told as an Event too: tests/cluster/test_health_checks.py."""
    scene = make_scene(web=1, syncPeriod="200ms")
    with netns.entered(scene.node.netns):
        server = socket.create_server(("", 32_001))
    with server:
        publish(scene, name, 32_001, scene.web)
        until(lambda: missing(scene) == 1, "it is missing")
        assert scene.agent.metric("ebproxy_health_check_bind_failures_total") >= 1

    until(lambda: missing(scene) == 0, "it is had")
    until(lambda: weight(scene, 32_001) == 1, "it answers")
    assert scene.agent.metric("ebproxy_health_check_servers") == 1
    assert scene.agent.log.read_text().count("cannot be served") == 1


def test_only_the_addresses_of_node_ports_are_listened_on_and_followed(make_scene, name):
    scene = make_scene(web=1, nodePortAddresses=["172.30.0.0/24", "fd00:172:30::/64"])
    v4, v6 = scene.node.addresses
    publish(scene, name, 32_001, scene.web)
    until(lambda: (weight(scene, 32_001, v4), weight(scene, 32_001, v6)) == (1, 1), "both addresses answer")
    assert ask(scene, 32_001, "127.0.0.1") is None
    assert ask(scene, 32_001, "::1") is None

    netns.configure(scene.node.netns, ["addr add 172.30.0.77/24 dev eth0"])
    until(lambda: weight(scene, 32_001, "172.30.0.77") == 1, "an address that comes answers")
