"""The agent may die and come back at any moment: connections do not notice, and nothing is written again."""

from __future__ import annotations

import signal

import pytest

from agent.core.abi import MapSizes, map_specs
from tests.lab.agents import pins
from tests.lab.polling import until
from tests.lab.processes import end
from tests.lab.scene import SIZES
from tests.lab.traffic import MODES, churning

KILLS = 20


def targets(*services):
    """Every way to ask some services."""
    return [(mode, ip, 80) for ips in services for ip in ips for mode in MODES]


def check(tally):
    """Nothing failed, and both new and held connections went on."""
    assert tally.errors == {}
    assert tally.made > 0
    assert tally.held > 0


def test_twenty_kills_under_churn(make_scene):
    """No connection fails; each new agent adopts the maps as they are and writes nothing."""
    scene = make_scene()
    ips = [scene.publish(name, scene.web) for name in ("one", "two")]
    ids = scene.agent.map_ids()
    pinned = pins(scene.agent.bpffs)
    with churning(scene.shopper.place, targets(*ips)) as pod, churning(scene.node.host, targets(ips[0])) as host:
        for _ in range(KILLS):
            scene.agent.kill()
            pod.wait_for(10)
            scene.agent.start().wait()
            assert scene.agent.map_writes() == 0
        pod.wait_for(50)
        tallies = [pod.stop(), host.stop()]

    for tally in tallies:
        check(tally)
    assert ids == scene.agent.map_ids()
    assert pinned == pins(scene.agent.bpffs)


def test_kills_while_starting(make_scene):
    """Also before it has settled: at whatever it was doing, from nothing done to everything done."""
    scene = make_scene(web=2)
    ips = scene.publish("web", scene.web)
    with churning(scene.shopper.place, targets(ips)) as churn:
        for connections in (1, 20, 40, 60, 80, 100):
            scene.agent.kill()
            scene.agent.start()
            churn.wait_for(connections)
        scene.agent.kill()
        scene.agent.start().wait()
        tally = churn.stop()

    check(tally)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_agent_that_is_stopped_leaves_everything_programmed(make_scene, number):
    scene = make_scene(web=2)
    ips = scene.publish("web", scene.web)
    assert scene.agent.process

    assert end(scene.agent.process, number) == 0

    assert {"web-1", "web-2"} == set(scene.pod.spread("tcp", ips[0], 80, 40))


def test_what_changed_meanwhile_is_applied_and_nothing_else(make_scene):
    """One Service grew, one is gone, one is new, one stayed; nobody's connection notices."""
    scene = make_scene()
    stays, grows, goes = (scene.publish(name, scene.web[:1]) for name in ("stays", "grows", "goes"))
    with churning(scene.shopper.place, targets(stays, grows)) as churn:
        scene.agent.kill()
        scene.write("grows", scene.web[:2])
        scene.manifests.remove("goes")
        comes = scene.write("comes", scene.web[2:])
        churn.wait_for(20)
        assert {"web-1"} == set(scene.host.spread("tcp", grows[0], 80, 20))
        assert scene.host.ask("tcp", goes[0], 80).name == "web-1"

        scene.agent.start().wait()
        churn.wait_for(20)
        tally = churn.stop()

    check(tally)
    assert {"web-1", "web-2"} == set(scene.host.spread("tcp", grows[0], 80, 40))
    assert scene.host.is_unanswered("tcp", goes[0], 80)
    assert scene.host.ask("tcp", comes[0], 80).name == "web-3"
    # For each family and protocol, `grows` moves: a header, 2 backends and a frontend; `goes` loses its frontend;
    # `comes` is new: a header, a backend and a frontend. Each ClusterIP that goes or comes is a frontend, too.
    assert scene.agent.metric("ebproxy_map_writes_total", map="segments") == 4 * (3 + 2)
    assert scene.agent.metric("ebproxy_map_writes_total", map="frontends") == 4 * (1 + 1 + 1) + 2 * (1 + 1)


def test_nothing_is_deleted_before_the_lists_are_complete(make_scene):
    """An agent whose source says nothing keeps what it found, however long."""
    scene = make_scene(web=1)
    ips = scene.publish("web", scene.web)
    scene.agent.kill()
    hidden = scene.manifests.directory.rename(scene.node.directory / "hidden")

    scene.agent.start()
    until(lambda: scene.agent.has_ended() or scene.agent.state_dir.joinpath("agent.sock").exists(), "it is up")
    assert scene.pod.spread("tcp", ips[0], 80, 20) == {"web-1": 20}
    scene.agent.kill()
    hidden.rename(scene.manifests.directory)
    scene.agent.start().wait()

    assert scene.agent.map_writes() == 0
    assert scene.pod.spread("tcp", ips[0], 80, 20) == {"web-1": 20}


@pytest.mark.parametrize(
    "sizes",
    [{"frontends": 600}, {"segments": 4096}, {"socketOrigins": 2048}, {"peerOrigins": 2048}],
    ids=lambda sizes: next(iter(sizes)),
)
def test_a_former_layout_is_migrated_under_churn(make_scene, sizes):
    """Fill the new maps, turn the links, remove the old: connections see one or the other."""
    scene = make_scene(web=2)
    ips = scene.publish("web", scene.web)
    former = scene.agent.map_ids()
    with churning(scene.shopper.place, targets(ips), rate=600) as churn:
        scene.agent.kill()
        scene.agent.config["mapSizes"] = SIZES | sizes
        scene.agent.start().wait()
        churn.wait_for(100)
        tally = churn.stop()

    # Slots by cookie mean nothing in an array of another size: what sockets asked for is forgotten, and nothing else.
    forgets = "socketOrigins" in sizes
    assert [what for what in tally.errors if not (forgets and "the peer is" in what)] == []
    now = scene.agent.map_ids()
    carried = {spec.name for spec in map_specs(MapSizes()) if spec.carries_over}
    assert {"socket_origins", "peer_origins", "conntrack", "counters"} <= carried
    changed = (former.keys() - carried) | {
        {"socketOrigins": "socket_origins", "peerOrigins": "peer_origins"}.get(name, name) for name in sizes
    }
    assert changed == {name for name in now if now[name] != former[name]}
    assert carried - changed == {name for name in now if now[name] == former[name]}
    layout = scene.agent.status()["layout"]
    assert {"links", layout} == {path.name for path in (scene.agent.bpffs / "ebproxy").iterdir()}
    assert {"web-1", "web-2"} == set(scene.pod.spread("tcp", ips[0], 80, 40))


@pytest.mark.parametrize("socket_lb", ["all", "off"])
@pytest.mark.parametrize("family", [4, 6])
def test_sockets_opened_before_a_migration_go_on_and_know_what_they_asked_for(make_scene, family, socket_lb):
    scene = make_scene(web=1, socketLB=socket_lb)
    address = scene.publish("web", scene.web)[family == 6]
    held = [scene.pod.open(protocol, family) for protocol in ("tcp", "udp")]
    for sock in held:
        sock.connect(address, 80)
    scene.agent.kill()
    scene.agent.config["mapSizes"] = SIZES | {"frontends": 700}

    scene.agent.start().wait()

    assert [(address, 80)] * 2 == [sock.peer() for sock in held]
    assert [sock.ask() for sock in held] == ["web-1"] * 2


def test_flows_go_on_by_a_conntrack_of_another_size(make_scene):
    """Chosen anew, some would get another backend, as there is one less to choose from."""
    scene = make_scene(web=3, socketLB="off")
    address = scene.publish("web", scene.web)[0]
    held = [scene.pod.open("tcp", 4) for _ in range(8)]
    for sock in held:
        sock.connect(address, 80)
    backends = [sock.ask() for sock in held]
    scene.agent.kill()
    scene.write("web", scene.web[:2])
    scene.agent.config["mapSizes"] = SIZES | {"conntrack": 4096}

    scene.agent.start().wait()

    assert [sock.ask() for sock in held] == backends


def test_a_kill_in_the_middle_of_a_migration(make_scene):
    """Between two layouts, at several moments: whoever comes next finishes it."""
    scene = make_scene(web=2)
    ips = scene.publish("web", scene.web)
    with churning(scene.shopper.place, targets(ips)) as churn:
        for number, connections in enumerate((60, 120, 180, 240, 300)):
            scene.agent.kill()
            scene.agent.config["mapSizes"] = SIZES | {"frontends": 600 + number}
            scene.agent.start()
            churn.wait_for(connections)
        scene.agent.kill()
        scene.agent.start().wait()
        tally = churn.stop()

    assert tally.errors == {}
    layout = scene.agent.status()["layout"]
    assert {"links", layout} == {path.name for path in (scene.agent.bpffs / "ebproxy").iterdir()}


def test_a_second_agent_is_refused(scene):
    ran = scene.agent.cli("run", "--manifests", str(scene.manifests.directory), "--node-name", "other")

    assert ran.returncode == 1
    assert "another agent holds" in ran.stderr
    assert scene.agent.is_settled()
