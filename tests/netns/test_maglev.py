"""Maglev from an annotation to the kernel's table, through a real agent: built, followed, adopted, passed on."""

from __future__ import annotations

from array import array
from typing import Any

from agent.core.abi import unpack_maglev_table
from agent.core.maglev import build_table, walks
from agent.core.plan import split_slots
from tests.lab.manifests import Port
from tests.lab.polling import until
from tests.lab.scene import SIZES, Scene

ONE = [Port("http", 80, 8080)]
COMPILE_LIMIT_S = 60


def reached_at(address: str) -> dict[str, Any]:
    """A Service that clients outside reach at an address."""
    annotations = {"ebproxy.io/algorithm": "maglev"}
    return {"type": "LoadBalancer", "ingress": [address], "annotations": annotations}


def named_tables(scene: Scene) -> dict[int, tuple[array[int], array[int]]]:
    """Read the tables that headers name: what they hold, and what they should."""
    with scene.agent.maps() as store:
        state = store.read_state()
        return {
            number: (
                unpack_maglev_table(store.read_table(number)),
                build_table(walks(split_slots(state.segments[base][0]))),
            )
            for base, number in state.tables.items()
            if state.segments[base][0]
        }


def has_its_table(scene: Scene) -> bool:
    """Whether the one table there is holds what it should."""
    tables = named_tables(scene)
    return set(tables) == {1} and tables[1][0] == tables[1][1]


def test_a_table_is_built_followed_adopted_and_passed_on(make_scene):
    scene = make_scene(mapSizes=SIZES | {"maglevTables": 1})

    scene.publish("first", scene.web, ONE, **reached_at("198.51.100.7"))
    until(lambda: has_its_table(scene), "the program is compiled and the table built", COMPILE_LIMIT_S)
    (before, _) = named_tables(scene)[1]
    scene.publish("first", scene.web[:2], ONE, **reached_at("198.51.100.7"))
    until(lambda: has_its_table(scene), "the table follows the endpoints")
    (after, _) = named_tables(scene)[1]
    assert set(before) == {0, 1, 2}
    assert set(after) == {0, 1}

    scene.agent.kill()
    scene.agent.start()
    until(scene.agent.is_settled, "the successor is settled")
    assert has_its_table(scene)
    assert named_tables(scene)[1][0] == after

    scene.publish("second", scene.web, ONE, **reached_at("198.51.100.8"))
    until(lambda: scene.agent.metric("ebproxy_degraded_service_ports") == 1, "there is no second table")
    (told,) = scene.agent.status()["degraded"]
    assert "map maglev_tables is full" in told["reason"]
    assert {"web-1", "web-2", "web-3"} == set(scene.pod.spread("tcp", "198.51.100.8", 80, 60))

    scene.withdraw("first", ONE)
    until(scene.agent.is_settled, "the table of the first is the second's")
    until(lambda: has_its_table(scene), "it is built for the second's backends")
    assert set(named_tables(scene)[1][0]) == {0, 1, 2}
    (entry,) = (entry for entry in scene.agent.json("maps")["maps"] if entry["name"] == "maglev_tables")
    assert (entry["entries"], entry["capacity"]) == (1, 1)
