"""Policies that cannot be read, over a restart: what was in force stays, connections go on, and nothing opens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent.errors import AgentUnreachable
from agent.observe.former_policies import FILE
from tests.lab.manifests import network_policy, pod
from tests.lab.polling import until
from tests.lab.traffic import churning
from tests.netns.policies import CLIENTS, PolicyScene, policy_scene, questions
from tests.requirements import require_root

ALL = questions()
HOST = questions(["host"])
FORMER = HOST | questions(["shopper"], ["tcp", "udp"], [8080])
SHOPPER = {"from": [{"podSelector": {"matchLabels": {"app": "shopper"}}}]}
BOTH = [{"port": 8080}, {"port": 8080, "protocol": "UDP"}]
NEWER_PORT = {"port": 8081, "protocol": "QUIC"}
_LIMIT_S = 15


@pytest.fixture(scope="module")
def scene() -> Iterator[PolicyScene]:
    require_root()
    with policy_scene(driftCheckPeriod="1h") as made:
        yield made


@pytest.fixture
def shop(scene: PolicyScene) -> PolicyScene:
    """A policy that can be read is in force."""
    scene.set(policy({**SHOPPER, "ports": BOTH}))
    scene.wait_for(FORMER, ALL)
    return scene


def policy(*rules: Any, **spec: Any) -> dict[str, Any]:
    return network_policy("web", "web", ingress=list(rules), policyTypes=["Ingress"]) | ({"spec": spec} if spec else {})


def is_told(shop: PolicyScene) -> bool:
    """Whether policy is in force, and the agent says that there is something it cannot read."""
    try:
        status = shop.agent.status()
    except AgentUnreachable:
        return False
    unread = status["malformed"] or status["not_listed"] or status["source"]["faults"]
    return bool(unread) and status["policy"]["is_settled"]


def selector(shop: PolicyScene) -> None:
    shop.set(policy(podSelector={"matchLabels": 7}, ingress=[{}]))


def port(shop: PolicyScene) -> None:
    shop.set(policy({**SHOPPER, "ports": [*BOTH, NEWER_PORT]}, {}))


def file(shop: PolicyScene) -> None:
    shop.scene.manifests.write_text("policies", "{ half written")


UNREAD = [
    pytest.param(selector, id="its podSelector"),
    pytest.param(port, id="a port of it"),
    pytest.param(file, id="the file it is in"),
]


@pytest.mark.parametrize("spoil", UNREAD)
@pytest.mark.parametrize("is_running", [True, False], ids=["while an agent runs", "while none runs"])
def test_what_was_in_force_stays_when_a_policy_cannot_be_read(
    shop: PolicyScene, spoil: Callable[[PolicyScene], None], *, is_running: bool
) -> None:
    revision = shop.agent.status()["policy"]["revision"]
    targets = [(mode, address, 8080) for mode in ("tcp", "udp") for address in shop.web.addresses]
    with churning(shop.shopper.place, targets) as churn:
        if is_running:
            spoil(shop)
            until(lambda: is_told(shop), "the fault is told", _LIMIT_S)
        shop.agent.kill()
        if not is_running:
            spoil(shop)
        shop.agent.start()
        churn.wait_for(30)
        assert shop.answered(questions(["guest"])) == set(), "while it starts"
        until(lambda: is_told(shop), "policy is in force", _LIMIT_S)
        assert shop.answered(ALL) == FORMER
        tally = churn.stop()

    assert tally.errors == {}
    assert tally.held > 0
    assert shop.agent.status()["policy"]["revision"] == revision
    shop.set()
    shop.wait_for(ALL, ALL)


def test_what_can_be_read_is_in_force_where_no_former_version_is_known(shop: PolicyScene) -> None:
    """The rules that can be read allow what they say, and those that cannot open nothing."""
    shop.agent.kill()
    (shop.agent.state_dir / FILE).unlink()
    port_of_its_own = {"from": [{"namespaceSelector": {"matchLabels": {"kind": "inn"}}}], "ports": [NEWER_PORT]}
    shop.set(policy({**SHOPPER, "ports": [{"port": 8080}, NEWER_PORT]}, port_of_its_own))

    shop.agent.start().wait()

    assert shop.answered(ALL) == HOST | questions(["shopper"], ["tcp"], [8080])
    (listed,) = shop.agent.json("policy", "list")
    assert listed["in_force"] == "part"
    assert "spec.ingress[0].ports[1].protocol, spec.ingress[1].ports[0].protocol" in listed["fault"]
    header, row = shop.agent.cli("policy", "list").stdout.splitlines()
    assert "IN FORCE" in header
    assert " part " in row
    counts = shop.agent.status()["policy"]
    assert (counts["policies"], counts["unread"]) == (1, 1)
    shown = shop.agent.cli("policy", "show", "shop/web").stdout
    assert "what of it can be read" in shown

    shop.set(policy({}))
    shop.wait_for(questions(CLIENTS), ALL)


def test_a_bad_port_of_a_new_pod_costs_itself_and_not_its_policy(shop: PolicyScene) -> None:
    node, written = shop.scene.node, shop.scene.manifests
    late = node.pods.get("late") or node.add_pod("late", 8080)
    described = pod("late", node.name, late.addresses, "web", ports=[("bad", 70_000, "TCP"), ("http", 8080, "TCP")])

    def answered(client: str) -> list[bool]:
        asked = [shop.clients[client].ask("tcp", address, 8080, 0.3) for address in late.addresses]
        return [answer.name == late.name for answer in asked]

    assert answered("guest") == [True] * 2, "nobody knows of it"
    written.write("late", described)
    try:
        until(lambda: answered("guest") == [False] * 2, "its app's policy holds it", _LIMIT_S)
        assert answered("shopper") == [True] * 2
        assert [it["name"] for it in shop.agent.status()["malformed"]] == ["shop/late"]
    finally:
        written.remove("late")
    until(lambda: not is_told(shop), "it is gone", _LIMIT_S)
