"""`socketLB`: how much the socket hooks take over."""

from __future__ import annotations

import pytest

from agent.core.addresses import format_address
from agent.kernel import attach
from tests.lab.traffic import MODES, churning

CASES = {
    "all": {"pod": "socket", "host": "socket"},
    "host": {"pod": "packet", "host": "socket"},
    "off": {"pod": "packet", "host": "packet"},
}


def forget_flows(agent):
    """Empty what the packet path remembers."""
    with agent.maps() as store:
        flows = store.maps["conntrack"]
        for key, _ in list(flows.items()):
            flows.delete(key)


def followed(agent):
    """Whose flows the packet path follows: the sources of packets."""
    with agent.maps() as store:
        return {format_address(key[:16]) for key, _ in store.maps["conntrack"].items()}


def check(scene, mode):
    """Everybody is served, by sockets or by packets; `trace` says the same of both."""
    ips = scene.ips("web")
    for place, client in scene.clients.items():
        forget_flows(scene.agent)
        answers = [client.ask(how, ip, 80) for how in MODES for ip in ips]
        assert {answer.name for answer in answers} == {"web-1"}, (place, answers)
        own = set(scene.node.addresses if place == "host" else scene.shopper.addresses)
        assert (own & followed(scene.agent) == own) == (CASES[mode][place] == "packet"), (place, followed(scene.agent))
        source = "host" if place == "host" else scene.shopper.v4
        said = scene.agent.json("trace", "--from", source, "--to", f"{ips[0]}:80")
        assert (place, "forward") == (said["origin"], said["verdict"])


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
    left = attach.attached_programs(scene.agent.bpffs / "ebproxy" / "links")
    assert set(left) == {"post_bind4", "post_bind6"}, "all that guards NodePorts, and nothing that translates"
