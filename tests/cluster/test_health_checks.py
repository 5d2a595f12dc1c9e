"""A node's health, as its agent has it from an API server: what becomes of the Node, and Events on Services."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from agent.sources.decode import DELETING_TAINT
from tests.cluster.api_driver import NODES, SERVICES, SLICES, ApiDriver
from tests.cluster.api_servers import OurApiServer, driver, write_kubeconfig
from tests.cluster.relay import Relay
from tests.lab import netns
from tests.lab.agents import HEALTH_PORT, Agent
from tests.lab.lab import Lab, Node, Pod
from tests.lab.manifests import NAMESPACE, Port, endpoint_slice, service
from tests.lab.polling import until
from tests.lab.scene import SIZES
from tests.requirements import require_root

PORT = 32_001
PORTS = (Port("http", 80, 8080, node_port=31_001),)
LOCAL = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": PORT}
EVENTS = f"/api/v1/namespaces/{NAMESPACE}/events"


class Stage:
    """One node, its agent, and the API server it takes its objects from."""

    def __init__(self, api: ApiDriver, node: Node, agent: Agent, pod: Pod) -> None:
        self.api = api
        self.node = node
        self.agent = agent
        self.pod = pod

    def create(self, name: str) -> None:
        """Create a Service that load balancers ask about, with an endpoint on this node."""
        self.api.create(SERVICES.format(NAMESPACE), service(name, ["10.96.0.10"], PORTS, **LOCAL))
        self.api.create(SLICES.format(NAMESPACE), endpoint_slice(name, [self.pod.endpoint()], PORTS))

    def health(self) -> tuple[int, bool]:
        """Ask /healthz: its status, and whether the node is eligible."""
        status, body = self.agent.get("/healthz", HEALTH_PORT)
        return status, json.loads(body)["nodeEligible"]

    def is_served(self) -> bool:
        """Whether the Service's health check answers that it has an endpoint."""
        try:
            return self.agent.get("/", PORT)[0] == 200
        except ConnectionRefusedError:
            return False


@pytest.fixture
def stage() -> Iterator[Stage]:
    require_root()
    with ExitStack() as stack:
        server = OurApiServer()
        server.start()
        stack.callback(server.stop)
        (node,) = stack.enter_context(Lab()).nodes
        stack.enter_context(Relay(node.netns, urlsplit(server.url).port or 0))
        api = driver(server, NAMESPACE)
        api.create(NODES, node.manifest())
        kubeconfig = write_kubeconfig(node.directory / "kubeconfig", server)
        agent = Agent(node, flags=("--kubeconfig", str(kubeconfig)), mapSizes=SIZES, syncPeriod="200ms")
        stack.enter_context(agent)
        yield Stage(api, node, agent, node.add_pod("web-1", 8080))


def test_a_port_that_is_taken_is_said_of_the_service(stage: Stage) -> None:
    with netns.entered(stage.node.netns):
        server = socket.create_server(("", PORT))
    with server:
        stage.create("web")
        events = until(lambda: stage.api.get(EVENTS)["items"], "an Event is posted")
        until(lambda: stage.agent.metric("ebproxy_health_check_bind_failures_total") >= 3, "it is tried again")
    until(stage.is_served, "the port is had")

    (event,) = events
    (web,) = stage.api.get(SERVICES.format(NAMESPACE))["items"]
    assert (event["type"], event["reason"]) == ("Warning", "FailedToStartServiceHealthcheck")
    assert (event["involvedObject"]["kind"], event["involvedObject"]["name"]) == ("Service", "web")
    assert event["involvedObject"]["uid"] == web["metadata"]["uid"]
    assert f"port {PORT}: Address already in use" in event["message"]
    assert len(stage.api.get(EVENTS)["items"]) == 1


def tainted(node: Node, *taints: str) -> dict:
    manifest = node.manifest()
    manifest["spec"]["taints"] = [{"key": taint, "effect": "NoSchedule"} for taint in taints]
    return manifest


def test_a_node_that_is_to_go_is_not_eligible_and_the_agent_lives(stage: Stage) -> None:
    """Load balancers are to stop sending; the kubelet is not to restart the agent, whose Services go on."""
    stage.create("web")
    until(stage.is_served, "the health check is served")
    assert stage.health() == (200, True)

    for change in (
        lambda: stage.api.update(NODES, tainted(stage.node, DELETING_TAINT)),
        lambda: stage.api.delete(NODES, stage.node.name),
    ):
        change()
        until(lambda: stage.health() == (503, False), "the node is not eligible")
        assert stage.agent.get("/livez", HEALTH_PORT)[0] == 200
        assert stage.is_served()

    stage.api.create(NODES, tainted(stage.node, "other"))
    until(lambda: stage.health() == (200, True), "another taint, and a Node that is there again, count for nothing")
