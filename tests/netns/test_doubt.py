"""What a former agent programmed stays until it is certain that it is to go, also when a manifest cannot be read."""

from __future__ import annotations

import pytest

from tests.lab.agents import HEALTH_PORT
from tests.lab.manifests import service
from tests.lab.polling import until
from tests.lab.stage import slice_of


@pytest.fixture
def restarted(make_scene):
    """Damage manifests while no agent runs, start another agent, and wait until it has read what it can."""
    scene = make_scene(web=2)

    def restart(damage):
        scene.agent.kill()
        damage(scene)
        scene.agent.start()
        until(lambda: answers(scene, "new"), "the new agent programs what it can read", 20)
        return scene

    scene.publish("web", scene.web)
    scene.publish("gone", scene.web[:1])
    return restart


def answers(scene, name):
    return scene.agent.count(f"{scene.ips(name)[0]}:80/TCP") is not None


def replace(scene, text):
    """Put a text in the place of the manifest of web, delete the Service gone, and add a new one."""
    path = scene.manifests.directory / "web.yaml"
    before = path.read_text()
    path.write_text(text(before) if callable(text) else text)
    scene.manifests.remove("gone")
    scene.write("new", scene.web[:1])
    return before


def is_told_and_ready(agent, path):
    """Status, metrics and the kubelet's probe are of one mind: the file is named, and nobody waits for it."""
    agent.wait()
    until(lambda: agent.get("/readyz", HEALTH_PORT)[0] == 200, "the node is ready")
    status = agent.cli("status")
    assert status.returncode == 0, status.stdout
    assert "programmed, but 1 cannot be read" in status.stdout
    assert f"{path}: " in status.stdout
    assert [agent.metric(f"ebproxy_{name}") for name in ("settled", "malformed_objects_current")] == [1, 1]


def test_a_file_that_cannot_be_parsed(restarted):
    """Nobody knows what it says, so nothing of the former agent's goes before it is mended; new Services come."""
    saved = []
    scene = restarted(lambda scene: saved.append(replace(scene, "{ half written")))

    assert {"web-1", "web-2"} == set(scene.pod.spread("tcp", scene.ips("web")[0], 80, 40))
    assert answers(scene, "gone")
    is_told_and_ready(scene.agent, scene.manifests.directory / "web.yaml")

    (scene.manifests.directory / "web.yaml").write_text(saved[0])
    until(lambda: not answers(scene, "gone"), "what is deleted goes once everything could be read")
    assert {"web-1", "web-2"} == set(scene.pod.spread("tcp", scene.ips("web")[0], 80, 40))
    assert scene.agent.is_settled()


@pytest.mark.parametrize(
    "damaged",
    [
        lambda text: text.replace("port: 80\n", "port: eighty\n", 1),
        lambda text: text.replace("addressType: IPv4", "addressType: 4"),
    ],
    ids=["service", "slice"],
)
def test_an_object_that_is_malformed(restarted, damaged):
    """It keeps what it had; the rest is brought up to date."""
    saved = []

    def damage(scene):
        before = replace(scene, damaged)
        assert (scene.manifests.directory / "web.yaml").read_text() != before
        saved.append(before)

    scene = restarted(damage)

    until(lambda: not answers(scene, "gone"), "a Service that was deleted goes")
    assert {"web-1", "web-2"} == set(scene.pod.spread("tcp", scene.ips("web")[0], 80, 40))

    (scene.manifests.directory / "web.yaml").write_text(saved[0])
    scene.wait_for("web", 2)
    scene.withdraw("web")


def unreadable(piece):
    """Spoil an address of a slice."""
    piece["endpoints"][0]["addresses"] = ["nowhere"]
    return piece


def test_a_slice_that_is_malformed_beside_one_that_is_not(restarted):
    """Of a family with a slice that can be read its endpoints are what counts; of the other, what was programmed."""

    def damage(scene):
        replace(scene, "")
        v4 = [slice_of("web", scene.web[1:]), unreadable(slice_of("web", scene.web[:1], name="web-bad"))]
        v6 = unreadable(slice_of("web", scene.web[1:], family=6))
        scene.manifests.write("web", service("web", scene.ips("web")), *v4, v6)

    scene = restarted(damage)
    v4, v6 = scene.ips("web")

    scene.agent.wait_for(f"{v4}:80/TCP", 1)
    assert {"web-2"} == set(scene.pod.spread("tcp", v4, 80, 6))
    assert scene.agent.count(f"[{v6}]:80/TCP") == 2
    assert {"web-1", "web-2"} == set(scene.pod.spread("tcp", v6, 80, 40))

    scene.write("web", scene.web[:1])
    scene.wait_for("web", 1)
    assert {"web-1"} == set(scene.pod.spread("tcp", v6, 80, 6))
