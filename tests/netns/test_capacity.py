"""A map that is full degrades one Service, loudly; the others go on, and it recovers when there is room."""

from __future__ import annotations

import pytest

from agent.errors import AgentUnreachable
from tests.lab.manifests import Endpoint, Port
from tests.lab.polling import until
from tests.lab.scene import SIZES

ONE = [Port("http", 80, 8080)]
# Endpoints that nobody asks, to take room: IPv4 alone, so a segment of count + 1 slots: a block of eight.
FILLING = [Endpoint(f"10.180.9.{number}") for number in range(1, 8)]


def degraded(agent):
    try:
        return {entry["service"]: entry["reason"] for entry in agent.status()["degraded"]}
    except AgentUnreachable:  # it is just starting
        return {}


def is_loud(agent, service, map_name):
    """Status, its exit status, a metric and the log all name it, and the log what to raise."""
    reason = until(lambda: degraded(agent), "something is degraded")[f"shop/{service}"]
    lines = agent.log.read_text(encoding="utf-8").splitlines()
    return (
        f"map {map_name} is full" in reason
        and agent.cli("status").returncode == 1
        and agent.metric("ebproxy_degraded_service_ports") >= 1
        and any(f"service shop/{service} port" in line and f"(mapSizes.{map_name})" in line for line in lines)
    )


def test_frontends_are_full(make_scene):
    """Room for six, two families of one Service: two ports and the ClusterIP itself; and for the self-test's one."""
    scene = make_scene(mapSizes=SIZES | {"frontends": 7})
    first = scene.publish("first", scene.web)
    assert scene.agent.metric("ebproxy_map_entries", map="frontends") == 6

    second = scene.write("second", scene.web[:1])

    assert is_loud(scene.agent, "second", "frontends")
    assert all(scene.host.is_unanswered("tcp", ip, 80) for ip in second)
    assert {"web-1", "web-2", "web-3"} == set(scene.pod.spread("tcp", first[0], 80, 60))
    scene.publish("first", scene.web[:2])
    assert {"web-1", "web-2"} == set(scene.pod.spread("tcp", first[0], 80, 60))

    scene.manifests.remove("first")

    scene.wait_for("second", 1)
    until(scene.agent.is_settled, "nothing is degraded any more")
    assert [scene.pod.ask("tcp", ip, 80).name for ip in second] == ["web-1"] * 2
    assert scene.agent.metric("ebproxy_degraded_service_ports") == 0


@pytest.fixture
def crowded(make_scene):
    """Twenty-eight slots: one Service with a segment of two, two of eight: no room for twelve."""
    scene = make_scene(mapSizes=SIZES | {"segments": 28})
    scene.manifests.write("node", scene.node.manifest())
    for name in ("block-1", "block-2"):
        scene.write(name, FILLING, ONE)
        scene.agent.wait_for(f"{scene.ips(name)[0]}:80/TCP", 7)
    scene.write("web", [scene.web[0].endpoint()], ONE)
    scene.agent.wait_for(f"{scene.ips('web')[0]}:80/TCP", 1)
    return scene


def test_segments_are_full_for_a_new_service(crowded):
    crowded.write("late", [*FILLING, crowded.web[1].endpoint()], ONE)

    assert is_loud(crowded.agent, "late", "segments")
    assert not crowded.host.ask("tcp", crowded.ips("late")[0], 80, 0.2).name
    assert crowded.host.ask("tcp", crowded.ips("web")[0], 80).name == "web-1"

    crowded.manifests.remove("block-1")
    crowded.manifests.remove("block-2")

    crowded.agent.wait_for(f"{crowded.ips('late')[0]}:80/TCP", 8)
    until(crowded.agent.is_settled, "nothing is degraded any more")


def test_segments_are_full_for_a_service_that_grows(crowded):
    """It takes in what fits where it is, and goes on with that."""
    ip = crowded.ips("web")[0]
    crowded.write("web", [crowded.web[1].endpoint(), *FILLING, crowded.web[2].endpoint()], ONE)

    assert is_loud(crowded.agent, "web", "segments")
    assert crowded.agent.count(f"{ip}:80/TCP") == 1
    answer = until(lambda: crowded.host.ask("tcp", ip, 80).name, "one that is still there answers")
    assert answer == "web-2"  # web-1 is no endpoint any more

    crowded.write("web", [crowded.web[1].endpoint(), crowded.web[2].endpoint()], ONE)

    crowded.agent.wait_for(f"{ip}:80/TCP", 2)
    until(crowded.agent.is_settled, "nothing is degraded any more")
    assert {"web-2", "web-3"} == set(crowded.host.spread("tcp", ip, 80, 40))


def test_an_agent_starts_again_where_the_map_is_full(make_scene):
    """Its self-test plants a frontend, for which there must be room."""
    scene = make_scene(mapSizes=SIZES | {"frontends": 7})
    first = scene.publish("first", scene.web)
    scene.write("second", scene.web[:1])
    assert is_loud(scene.agent, "second", "frontends")

    scene.agent.kill()
    scene.agent.start()

    assert is_loud(scene.agent, "second", "frontends")
    assert scene.agent.map_writes() == 0
    assert {"web-1", "web-2", "web-3"} == set(scene.pod.spread("tcp", first[0], 80, 60))
