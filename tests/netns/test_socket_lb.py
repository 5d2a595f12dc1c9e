"""`socketLB`: how much the socket hooks take over."""

from __future__ import annotations

import pytest

from agent.kernel import attach
from tests.lab.traffic import MODES, churning

CASES = {
    "all": {"pod": "forward", "host": "forward"},
    "host": {"pod": "pass", "host": "forward"},
    "off": {"pod": "pass", "host": "pass"},
}

SILENCE_S = 0.2  # nobody answers an address that is not translated


def check(scene, mode):
    """Connections and `trace` agree on who is translated."""
    ips = scene.ips("web")
    for place, client in scene.clients.items():
        expected = CASES[mode][place]
        limit_s = 5 if expected == "forward" else SILENCE_S
        answers = [client.ask(how, ip, 80, limit_s) for how in MODES for ip in ips]
        assert {expected == "forward"} == {answer.name == "web-1" for answer in answers}, (place, answers)
        source = "host" if place == "host" else scene.shopper.v4
        said = scene.agent.json("trace", "--from", source, "--to", f"{ips[0]}:80")
        assert (place, expected) == (said["origin"], said["verdict"])


@pytest.mark.parametrize("mode", CASES)
def test_who_is_translated(make_scene, mode):
    scene = make_scene(web=1, socketLB=mode)
    scene.publish("web", scene.web)

    check(scene, mode)


def test_it_may_change_with_a_restart(make_scene):
    """What stays covered goes on without a failure; what is off is detached."""
    scene = make_scene(web=1)
    ips = scene.publish("web", scene.web)
    with churning(scene.node.host, [(how, ip, 80) for how in MODES for ip in ips]) as churn:
        for mode in ("host", "all"):
            scene.agent.stop()
            scene.agent.config["socketLB"] = mode
            scene.agent.start().wait()
            check(scene, mode)
            churn.wait_for(20)
        tally = churn.stop()
    assert tally.errors == {}

    scene.agent.stop()
    scene.agent.config["socketLB"] = "off"
    scene.agent.start().wait()

    check(scene, "off")
    assert attach.attached_programs(scene.agent.bpffs / "ebproxy" / "links") == {}
