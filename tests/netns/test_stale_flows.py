"""Flows that the packet path follows: those of UDP move when their backend goes, those of TCP never do."""

from __future__ import annotations

import contextlib
import itertools

import pytest

from tests.lab.manifests import Port
from tests.lab.polling import until
from tests.lab.scene import SIZES, Scene
from tests.lab.traffic import RemoteError
from tests.requirements import require_root

SPEC = {"type": "NodePort"}
GONE = {"ready": False, "serving": False, "terminating": True}
DRAINING = {"ready": False, "serving": True, "terminating": True}
_serial = itertools.count(1)


class Stage:
    """A NodePort of its own over ``web-1``, and a client outside."""

    def __init__(self, scene, outside):
        self.scene, self.outside = scene, outside
        self.number = 30_000 + next(_serial)
        self.name = f"web-{self.number}"
        self.ports = tuple(Port(f"http-{p.lower()}", 80, 8080, p, self.number) for p in ("TCP", "UDP"))
        self.write(scene.web[:1])
        scene.wait_for(self.name, 1)

    def write(self, backends, ports=()):
        self.scene.write(self.name, backends, ports or self.ports, **SPEC)

    def remove(self):
        self.scene.manifests.remove(self.name)

    def write_ending(self, **conditions):
        """The first backend on its way out, the second in its place."""
        self.write([*(self.scene.web[0].endpoint(f, **conditions) for f in (4, 6)), self.scene.web[1]])

    def connect(self, protocol, family):
        sock = self.outside.open(protocol, family)
        sock.connect(self.scene.node.addresses[family == 6], self.number)
        sock._client.call(sock._number, "settimeout", 0.2)
        return sock

    def open(self, protocol, family):
        """A client's socket that has been answered by the first backend."""
        sock = self.connect(protocol, family)
        assert until(lambda: ask(sock), "the NodePort answers") == "web-1"
        return sock

    def answered_by(self, name):
        """Open another, if it is answered by this backend."""
        sock = self.connect("udp", 4)
        return sock if ask(sock) == name else None

    def flows(self, protocol="udp"):
        found = self.scene.agent.json("ct", "list", "--protocol", protocol)
        return [flow for flow in found if flow["frontend"].endswith(f":{self.number}")]

    def passes(self):
        return self.scene.agent.metric("kubeproxy_conntrack_reconciler_sync_duration_seconds_count")

    def deleted(self, reason):
        return self.scene.agent.metric("ebproxy_flow_entries_deleted_total", reason=reason)


def ask(sock):
    """Ask; empty where nobody answers in time, the error's name where the node refuses."""
    with contextlib.suppress(RemoteError):
        return sock.ask()
    return ""


def refusal(sock):
    try:
        return f"answered by {sock.ask()}"
    except RemoteError as error:
        return str(error)


@pytest.fixture(scope="module")
def shared():
    require_root()
    with Scene(web=2) as scene:
        yield scene, scene.lab.outsider().client()


@pytest.fixture
def stage(shared):
    made = Stage(*shared)
    yield made
    with contextlib.suppress(FileNotFoundError):
        made.remove()


@pytest.fixture
def own_stage(make_scene):
    """One whose agent's configuration may change."""
    scene = make_scene(web=2)
    return Stage(scene, scene.lab.outsider().client())


@pytest.mark.parametrize("family", [4, 6])
def test_a_flow_moves_when_its_backend_is_replaced(stage, family):
    sock = stage.open("udp", family)
    (before,) = stage.flows()
    assert (before["state"], before["service"], before["port"]) == ("established", f"shop/{stage.name}", "http-udp")

    stage.write(stage.scene.web[1:2])

    until(lambda: ask(sock) == "web-2", "the flow moves")
    (after,) = stage.flows()
    assert after["client"] == before["client"]
    assert after["backend"] != before["backend"]
    assert stage.deleted("stale") >= 2
    deleted = "kubeproxy_conntrack_reconciler_deleted_entries_total"
    assert stage.scene.agent.metric(deleted, ip_family=f"IPv{family}") >= 2


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("ending", ["scaled-to-zero", "not-serving"])
def test_a_flow_ends_with_the_last_backend(stage, family, ending):
    """The client is refused, rather than sent for ever to who is gone (k#139628)."""
    sock = stage.open("udp", family)

    if ending == "scaled-to-zero":
        stage.write([])
    else:
        stage.write([stage.scene.web[0].endpoint(f, **GONE) for f in (4, 6)])

    until(lambda: refusal(sock) == "ECONNREFUSED", "the client is refused")
    stage.write(stage.scene.web[1:2])
    until(lambda: ask(sock) == "web-2", "the flow goes on with the next backend")


@pytest.mark.parametrize("family", [4, 6])
def test_a_flow_ends_with_its_service(stage, family):
    """Also where the backend goes on to answer (k#141371)."""
    stage.open("udp", family)

    stage.remove()

    until(lambda: stage.flows() == [], "the flow is gone")


def test_a_backend_that_terminates_and_serves_keeps_its_flows(stage):
    sock = stage.open("udp", 4)
    stage.write_ending(**DRAINING)
    until(lambda: ask(stage.connect("udp", 4)) == "web-2", "new ones go to the other")

    assert [ask(sock) for _ in range(5)] == ["web-1"] * 5

    stage.write_ending(**GONE)
    until(lambda: ask(sock) == "web-2", "it no longer serves")


def test_a_port_that_is_renamed_keeps_its_flows(stage):
    """To clients it is the same; only what its backends serve counts."""
    sock, before = stage.open("udp", 4), stage.deleted("stale")
    renamed = [port._replace(name=f"new-{port.name}") for port in stage.ports]
    stage.write(stage.scene.web[:2], renamed)
    other = until(lambda: stage.answered_by("web-2"), "new ones may go to the other")
    assert [ask(sock) for _ in range(5)] == ["web-1"] * 5
    passes = stage.passes()

    stage.write(stage.scene.web[:1], renamed)

    until(lambda: ask(other) == "web-1", "the other's flow moves")
    until(lambda: stage.passes() > passes, "flows are looked over")
    assert stage.deleted("stale") == before + 2
    assert ask(sock) == "web-1"


def test_tcp_is_never_touched(stage):
    """Its backend goes on to answer while it can: nobody resets, nobody moves."""
    udp, tcp = stage.open("udp", 4), stage.open("tcp", 4)

    stage.write(stage.scene.web[1:2])
    until(lambda: ask(udp) == "web-2", "flows of UDP move")
    assert ask(tcp) == "web-1"
    stage.remove()
    until(lambda: stage.flows() == [], "flows of UDP are gone")

    assert ask(tcp) == "web-1"
    assert [flow["state"] for flow in stage.flows("tcp")] == ["established"]


@pytest.mark.parametrize("change", ["replaced", "deleted", "scaled-to-zero"])
def test_what_went_while_no_agent_ran(stage, change):
    sock = stage.open("udp", 4)
    stage.scene.agent.kill()
    if change == "deleted":
        stage.remove()
    else:
        stage.write(stage.scene.web[1:2] if change == "replaced" else [])
    assert ask(sock) == "web-1"

    stage.scene.agent.start().wait()

    match change:
        case "replaced":
            until(lambda: ask(sock) == "web-2", "the flow moves")
        case "deleted":
            until(lambda: stage.flows() == [], "the flow is gone")
        case "scaled-to-zero":
            until(lambda: refusal(sock) == "ECONNREFUSED", "the client is refused")


def test_a_restart_leaves_flows_alone(stage):
    """An agent that begins is no reason to move (k#122740)."""
    check_that_flows_survive(stage)


def test_a_migration_leaves_flows_alone(own_stage):
    """Also to maps of another layout, in which service ports have other ids."""
    check_that_flows_survive(own_stage, mapSizes=SIZES | {"frontends": 700})


def check_that_flows_survive(stage, **config):
    """A restart with another configuration."""
    agent = stage.scene.agent
    udp, tcp = stage.open("udp", 4), stage.open("tcp", 6)
    stage.write(stage.scene.web[:2])
    stage.scene.wait_for(stage.name, 2)
    agent.kill()
    agent.config |= config

    agent.start().wait()
    until(lambda: stage.passes() > 0, "flows are looked over")

    assert stage.deleted("stale") == 0
    assert [ask(udp) for _ in range(5)] == ["web-1"] * 5
    assert ask(tcp) == "web-1"

    stage.write(stage.scene.web[1:2])
    until(lambda: ask(udp) == "web-2", "the flow moves all the same")
    assert ask(tcp) == "web-1"


def test_an_idle_flow_is_swept(own_stage):
    """By the timeouts of the configuration."""
    own_stage.scene.agent.stop()
    own_stage.scene.agent.config["conntrack"] = {"udpStreamTimeout": "1s", "udpTimeout": "1s"}
    own_stage.scene.agent.start().wait()
    own_stage.open("udp", 4)

    until(lambda: own_stage.flows() == [], "the flow is over", 30)
    assert own_stage.deleted("silent") == 2
