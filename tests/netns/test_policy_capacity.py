"""Maps of policy that are too small, with real connections: whose policy does not fit, what becomes of it, and after.

It is the pods that do not fit whose connections fail, all of them or none, as it is set; the others are as they were.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agent.errors import AgentUnreachable
from tests.lab.lab import Pod
from tests.lab.manifests import network_policy, pod
from tests.lab.polling import until
from tests.lab.scene import SIZES
from tests.lab.traffic import Client, RemoteError
from tests.netns.policies import PolicyScene, policy_scene, questions, write_pods
from tests.requirements import require_root

MODES = ("tcp", "udp")
ASKED = questions(modes=MODES)
HOST = questions(["host"], MODES)
GUEST = questions(["guest"], MODES)
FROM_SHOPPER = network_policy("web", "web", ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "shopper"}}}]}])
TO_8080 = network_policy("out", "shopper", egress=[{"ports": [{"port": 8080}]}], policyTypes=["Egress"])
FITS = HOST | questions(["shopper"], ["tcp"], [8080])
# Ports that no prefix joins: more verdicts than there is room for.
WIDE = network_policy("wide", "web", ingress=[{"ports": [{"port": number} for number in range(1, 64, 2)]}])
LATE = network_policy("late", "late", ingress=[], policyTypes=["Ingress"])
GUARD = {
    "apiVersion": "policy.networking.k8s.io/v1alpha2",
    "kind": "ClusterNetworkPolicy",
    "metadata": {"name": "guard"},
    "spec": {
        "tier": "Admin",
        "priority": 1,
        "subject": {"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}}},
        "ingress": [
            {
                "action": "Deny",
                "from": [{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "late"}}}}],
            }
        ],
    },
}
_DROPPED = "ebproxy_policy_dropped_packets_total"
_SILENCE_S = 0.2


class SmallScene:
    """Room for the policies of three pods, and for the addresses of four; ``late`` is one that nobody knows of yet."""

    def __init__(self, scene: PolicyScene, *, fails_open: bool) -> None:
        self.fails_open = fails_open
        self.policies = scene
        self.agent = scene.agent
        self.late: Pod = scene.scene.node.add_pod("late", 8080)
        self.late_client: Client = self.late.client()

    def tell_of(self, name: str, app: str = "") -> None:
        """Have a pod in the cluster; one that is not in the lab takes room, on another node."""
        node = self.policies.scene.node
        made = node.pods.get(name)
        third = 200 + len(name)
        addresses = made.addresses if made else (f"10.180.{third}.9", f"fd00:10:180:{third}::9")
        described = pod(name, node.name if made else "elsewhere", addresses, app or name)
        self.policies.scene.manifests.write(name, described)

    def forget(self, *names: str) -> None:
        """Have pods of these names no more."""
        for name in names:
            (self.policies.scene.manifests.directory / f"{name}.yaml").unlink(missing_ok=True)

    def degraded(self) -> dict[str, str]:
        """Say what does not fit, and why; nothing while no agent answers, or knows."""
        try:
            return {it["pod"]: it["reason"] for it in self.agent.status()["policy"]["degraded"]}
        except AgentUnreachable:
            return {}

    def wait_for_degraded(self, map_name: str, *names: str) -> None:
        """Status, its exit status, a metric and the log name these and no others."""
        until(lambda: self.degraded().keys() == set(names), f"{names} do not fit")
        assert all(f"map {map_name} is full" in reason for reason in self.degraded().values())
        assert self.agent.cli("status").returncode == 1
        assert self.agent.metric("ebproxy_degraded_subjects") == len(names)
        log = self.agent.log.read_text(encoding="utf-8")
        assert all(f"policy of {name} is degraded: map {map_name}" in log for name in names)

    def wait_for_room(self) -> None:
        """Wait until nothing is degraded any more, and everything is in force."""
        until(lambda: self.agent.is_settled() and not self.degraded(), "everything fits")
        assert self.agent.cli("status").returncode == 0
        assert self.agent.metric("ebproxy_degraded_subjects") == 0

    def dropped(self, reason: str) -> float:
        """Count what was dropped."""
        return self.agent.metric(_DROPPED, reason=reason)

    def asks_late(self) -> list[bool]:
        """Ask it from another pod, in both families and protocols; returns what is answered."""
        client = self.policies.clients["guest"]
        asked = [(mode, address) for mode in MODES for address in self.late.addresses]
        return [client.ask(mode, address, 8080, _SILENCE_S).name == "late" for mode, address in asked]

    def late_asks(self) -> list[bool]:
        """Have it ask the server; returns what is answered."""
        web = self.policies.web
        asked = [(mode, address) for mode in MODES for address in web.addresses]
        return [self.late_client.ask(mode, address, 8080, _SILENCE_S).name == web.name for mode, address in asked]


@pytest.fixture(scope="module", params=["closed", "open"])
def narrow(request: pytest.FixtureRequest) -> Iterator[SmallScene]:
    require_root()
    sizes = SIZES | {"policy": 16, "subjects": 6, "identities": 8, "blocks": 1}
    with policy_scene(policyOverflow=request.param, mapSizes=sizes) as scene:
        made = SmallScene(scene, fails_open=request.param == "open")
        made.tell_of("guest")
        write_pods(scene.scene)
        yield made


@pytest.fixture
def small(narrow: SmallScene) -> Iterator[SmallScene]:
    """Give the scene with nothing degraded, and leave it so."""
    yield narrow
    narrow.policies.set()
    narrow.forget("late", "far", "further")
    narrow.tell_of("guest")
    narrow.wait_for_room()


def test_verdicts_that_do_not_fit(small: SmallScene) -> None:
    scene = small.policies
    scene.set(FROM_SHOPPER, TO_8080)
    scene.wait_for(FITS, ASKED)
    held = scene.clients["shopper"].open("tcp", 4)
    held.connect(scene.web.v4, 8080)
    assert held.ask() == "web-1"
    before = small.dropped("overflow")

    scene.set(FROM_SHOPPER, TO_8080, WIDE)
    small.wait_for_degraded("policy", "shop/web-1")
    # The shopper's policy fits, and is what it was.
    scene.wait_for(FITS | GUEST if small.fails_open else HOST, ASKED)
    assert small.agent.metric("ebproxy_map_entries", map="policy") <= 16
    if small.fails_open:
        assert held.ask() == "web-1"
        assert small.dropped("overflow") == before
    else:
        scene.clients["shopper"].call(held._number, "settimeout", 0.3)
        with pytest.raises(RemoteError, match="timeout"):
            held.ask()
        assert small.dropped("overflow") > before

    scene.set(FROM_SHOPPER, TO_8080)
    small.wait_for_room()
    scene.wait_for(FITS, ASKED)
    held.close()


def test_a_pod_that_does_not_fit(small: SmallScene) -> None:
    """It is no subject: it is held where that is set, and otherwise as if no policy were about it."""
    scene = small.policies
    scene.set(FROM_SHOPPER, LATE)
    expected = HOST | questions(["shopper"], MODES)
    scene.wait_for(expected, ASKED)
    assert small.asks_late() == [True] * 4, "nobody knows of it"
    before = small.dropped("held")

    small.tell_of("late")
    small.wait_for_degraded("subjects", "shop/late")
    assert small.agent.metric("ebproxy_map_entries", map="subjects") == 6
    until(lambda: small.asks_late() == [small.fails_open] * 4, "it does as it is set")
    assert (small.dropped("held") > before) is not small.fails_open
    assert scene.answered(ASKED) == expected, "to the others it makes no difference"

    small.agent.kill()
    small.agent.start()
    while not small.degraded():
        assert not small.agent.has_ended()
        assert small.asks_late() == [small.fails_open] * 4, "while the next agent starts, too"

    small.forget("guest")
    small.wait_for_room()
    assert small.asks_late() == [False] * 4, "its own policy is in force"
    scene.set(FROM_SHOPPER)
    until(lambda: small.asks_late() == [True] * 4, "nothing holds it")


def test_a_peer_that_does_not_fit(small: SmallScene) -> None:
    """Whoever would take it for the world, and be wrong, fails; whoever judges it as the world does not."""
    scene = small.policies
    small.forget("guest")
    small.tell_of("far")
    small.tell_of("further")
    scene.set(GUARD, TO_8080)
    expected = HOST | GUEST | questions(["shopper"], ["tcp"], [8080])
    scene.wait_for(expected, ASKED)

    small.tell_of("late")
    small.wait_for_degraded("identities", "shop/late", "shop/web-1")
    assert small.late_asks() == [small.fails_open] * 4
    assert scene.answered(HOST) == HOST, "which may always"
    # The shopper's egress, by ports alone, is what it was; its ingress nobody asks about.
    assert scene.answered(GUEST) == (GUEST if small.fails_open else set())

    small.forget("further")
    small.wait_for_room()
    assert small.late_asks() == [False] * 4, "denied by name"
    scene.wait_for(expected, ASKED)


def test_a_block_that_does_not_fit(small: SmallScene) -> None:
    """Whom a policy about it concerns fails, and not only in what concerns the block."""
    scene = small.policies
    blocks = [{"ipBlock": {"cidr": cidr}} for cidr in ("10.180.0.0/16", "172.30.0.0/16")]
    scene.set(network_policy("out", "shopper", egress=[{"to": blocks}], policyTypes=["Egress"]))
    small.wait_for_degraded("blocks", "IPBlock/10.180.0.0/16", "shop/shopper")
    scene.wait_for(ASKED if small.fails_open else ASKED - questions(["shopper"]), ASKED)

    scene.set(network_policy("out", "shopper", egress=[{"to": blocks[:1]}], policyTypes=["Egress"]))
    small.wait_for_room()
    shopper = scene.clients["shopper"]
    answers = [shopper.ask("tcp", address, 8080, _SILENCE_S).name for address in scene.web.addresses]
    assert answers == [scene.web.name, ""]


def test_an_exception_that_does_not_fit(small: SmallScene) -> None:
    """It is never judged as the block that it is cut from."""
    scene = small.policies
    shopper, web = scene.clients["shopper"], scene.web

    def answers() -> list[bool]:
        return [shopper.ask("tcp", address, 8080, _SILENCE_S).name == web.name for address in web.addresses]

    block: dict[str, object] = {"cidr": "10.180.0.0/16"}
    scene.set(network_policy("out", "shopper", egress=[{"to": [{"ipBlock": block}]}], policyTypes=["Egress"]))
    until(lambda: answers() == [True, False], "the block is allowed, and nothing else")

    block["except"] = [f"{web.v4}/32"]
    scene.set(network_policy("out", "shopper", egress=[{"to": [{"ipBlock": block}]}], policyTypes=["Egress"]))
    small.wait_for_degraded("blocks", f"IPBlock/{web.v4}/32", "shop/shopper")
    assert answers() == [small.fails_open] * 2
