"""NetworkPolicy on one node, with real connections: who may talk to whom, and what becomes of those who do already."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from agent.observe.former_policies import FILE as POLICIES
from agent.observe.numbers import FILE
from tests.lab import forged, manifests
from tests.lab.agents import pins
from tests.lab.manifests import WEB, network_policy
from tests.lab.polling import until
from tests.lab.traffic import RemoteError, RemoteSocket, churning
from tests.netns.policies import CLIENTS, MODES, PolicyScene, policy_scene, questions
from tests.requirements import require_root

FAMILIES = [pytest.param(4, id="IPv4"), pytest.param(6, id="IPv6")]
ALL = questions()
HOST = questions(["host"])
SHOPPER = {"podSelector": {"matchLabels": {"app": "shopper"}}}
INN = {"namespaceSelector": {"matchLabels": {"kind": "inn"}}}


IN_ONE_MODE = pytest.mark.parametrize("shop", ["all"], indirect=True)
"""What has nothing to do with Services."""


@pytest.fixture(scope="module", params=["all", "off"])
def shop(request: pytest.FixtureRequest) -> Iterator[PolicyScene]:
    require_root()
    with policy_scene(socketLB=request.param, driftCheckPeriod="1h") as scene:
        yield scene


@pytest.fixture(scope="module")
def web_ips(shop: PolicyScene) -> tuple[str, str]:
    """The ClusterIPs of a Service before the server; its port is another than the pod's."""
    return shop.scene.publish("web", [shop.web], WEB)


@pytest.fixture(autouse=True)
def no_policy_before(request: pytest.FixtureRequest) -> None:
    """Begin each test without policies."""
    if "shop" in request.fixturenames:
        scene = request.getfixturevalue("shop")
        scene.set()
        scene.wait_for(ALL, ALL)


def ingress(*rules: dict[str, Any], app: str = "web", name: str = "web") -> manifests.Object:
    return network_policy(name, app, ingress=list(rules), policyTypes=["Ingress"])


def egress(*rules: dict[str, Any], app: str = "shopper", name: str = "out") -> manifests.Object:
    return network_policy(name, app, egress=list(rules), policyTypes=["Egress"])


def blocks(addresses: tuple[str, ...], *excepts: str) -> list[dict[str, Any]]:
    """Blocks of both families: of single addresses, or with exceptions the pods' whole ranges."""
    if not excepts:
        return [{"ipBlock": {"cidr": f"{address}/{128 if ':' in address else 32}"}} for address in addresses]
    wide = (("10.180.0.0/16", excepts[0]), ("fd00:10:180::/48", excepts[1]))
    return [{"ipBlock": {"cidr": cidr, "except": [hole]}} for cidr, hole in wide]


def only(clients: tuple[str, ...], modes: tuple[str, ...] = MODES, ports: tuple[int, ...] = (8080, 8081)) -> set[Any]:
    return HOST | questions(clients, modes, ports)


CASES = {
    "deny all": ([ingress()], HOST),
    "of another pod": ([ingress(app="nobody")], ALL),
    "of the other namespace": ([network_policy("x", namespace="inn", ingress=[])], ALL),
    "allow everybody": ([ingress({})], ALL),
    "by pod": ([ingress({"from": [SHOPPER]})], only(("shopper",))),
    "by namespace": ([ingress({"from": [INN]})], only(("guest",))),
    "by both, matching neither": ([ingress({"from": [{**SHOPPER, **INN}]})], HOST),
    "by either": ([ingress({"from": [SHOPPER, INN]})], ALL),
    "by name of the namespace": (
        [ingress({"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "inn"}}}]})],
        only(("guest",)),
    ),
    "by expression": (
        [ingress({"from": [{"podSelector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]}}]})],
        only(("shopper",)),
    ),
    "tcp port": ([ingress({"ports": [{"port": 8080}]})], only(CLIENTS, ("tcp",), (8080,))),
    "udp port": ([ingress({"ports": [{"port": 8081, "protocol": "UDP"}]})], only(CLIENTS, ("udp",), (8081,))),
    "sctp port": ([ingress({"ports": [{"port": 8081, "protocol": "SCTP"}]})], only(CLIENTS, ("sctp",), (8081,))),
    "whole protocol": ([ingress({"ports": [{"protocol": "UDP"}]})], only(CLIENTS, ("udp",))),
    "range": ([ingress({"ports": [{"port": 8000, "endPort": 8080}]})], only(CLIENTS, ("tcp",), (8080,))),
    "named port": (
        [ingress({"ports": [{"port": "web"}, {"port": "web", "protocol": "UDP"}]})],
        only(CLIENTS, ("tcp",), (8080,)) | only(CLIENTS, ("udp",), (8081,)),
    ),
    "pod and port": (
        [ingress({"from": [SHOPPER], "ports": [{"port": 8080}]}, {"from": [INN], "ports": [{"port": 8081}]})],
        HOST | questions(["shopper"], ["tcp"], [8080]) | questions(["guest"], ["tcp"], [8081]),
    ),
    "two policies": (
        [ingress({"from": [SHOPPER]}), ingress({"from": [INN], "ports": [{"protocol": "UDP"}]}, name="more")],
        only(("shopper",)) | only(("guest",), ("udp",)),
    ),
    "egress denied": ([egress()], ALL - questions(["shopper"])),
    "egress to a pod's port": (
        [egress({"to": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": 8081}]})],
        ALL - questions(["shopper"]) | questions(["shopper"], ["tcp"], [8081]),
    ),
    "egress to a named port": (
        [egress({"ports": [{"port": "web"}]})],
        ALL - questions(["shopper"]) | questions(["shopper"], ["tcp"], [8080]),
    ),
    "egress allowed, ingress denied": ([egress({}), ingress()], HOST),
    "ingress allowed, egress denied": ([egress(), ingress({})], ALL - questions(["shopper"])),
}


@IN_ONE_MODE
@pytest.mark.parametrize("case", CASES)
def test_who_may_talk(shop, case):
    policies, expected = CASES[case]
    shop.set(*policies)

    shop.wait_for(expected, ALL)


@IN_ONE_MODE
@pytest.mark.parametrize("case", ["block", "except", "another overrides the except", "the node's address"])
def test_blocks_of_addresses(shop, case):
    one = {"from": blocks(shop.shopper.addresses)}
    but_one = {"from": blocks((), *(f"{it}/{128 if ':' in it else 32}" for it in shop.shopper.addresses))}
    node = {"from": blocks(shop.scene.node.addresses)}
    rules, expected = {
        "block": ([one], only(("shopper",))),
        "except": ([but_one], only(("guest",))),
        "another overrides the except": ([but_one, one], ALL),
        "the node's address": ([node], HOST),
    }[case]
    shop.set(ingress(*rules))

    shop.wait_for(expected, ALL)


def test_policy_sees_the_backend_of_a_service(shop, web_ips):
    """Also where the Service's port is another than the pod's."""
    asked = questions(["shopper", "guest"], ["tcp", "udp"], [80])
    assert shop.answered(asked, web_ips) == asked
    shop.set(ingress({"from": [SHOPPER], "ports": [{"port": 8080}]}))
    shop.wait_for(only(("shopper",), ("tcp",), (8080,)), ALL)

    assert shop.answered(asked, web_ips) == {("shopper", "tcp", 80)}
    shop.set(egress({"to": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": 8080}]}))
    shop.wait_for(ALL - questions(["shopper"]) | questions(["shopper"], ["tcp"], [8080]), ALL)
    assert shop.answered(asked, web_ips) == asked - {("shopper", "udp", 80)}


@IN_ONE_MODE
@pytest.mark.parametrize("change", ["policy", "pod", "namespace"])
def test_an_edit_takes_effect_within_a_second(shop, change):
    asked = {("guest", "tcp", 8080)}
    allow = ingress(
        {
            "from": [
                {
                    "namespaceSelector": {"matchLabels": {"kind": "inn"}},
                    "podSelector": {"matchLabels": {"app": "guest"}},
                }
            ]
        }
    )
    node = shop.scene.node.name

    def write(*, allowed: bool) -> None:
        shop.set(allow if allowed or change != "policy" else ingress())
        shop.scene.manifests.write(
            "pods",
            manifests.namespace("shop", kind="shop"),
            manifests.namespace("inn", kind="inn" if allowed or change != "namespace" else "other"),
            manifests.pod("web-1", node, shop.web.addresses, "web", ports=[("web", 8080, "TCP"), ("web", 8081, "UDP")]),
            manifests.pod("shopper", node, shop.shopper.addresses, "shopper"),
            manifests.pod(
                "guest", node, shop.guest.addresses, "guest" if allowed or change != "pod" else "other", namespace="inn"
            ),
        )

    for allowed in (False, True, False, True):
        began = time.monotonic()
        write(allowed=allowed)
        shop.wait_for(asked if allowed else set(), asked)
        took_s = time.monotonic() - began
        assert took_s < (1.0 if allowed else 1.5), took_s  # it takes its time to tell silence from an answer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["ingress", "egress"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_revocation_cuts_what_is_established_and_an_allowance_does_not(shop, web_ips, family, direction, protocol):
    address = web_ips[family == 6]
    client = shop.clients["shopper"]
    held = client.open(protocol, family)
    held.connect(address, 80)
    assert held.ask() == "web-1"
    client.call(held._number, "settimeout", 0.3)
    allow = (
        ingress({"from": [SHOPPER]})
        if direction == "ingress"
        else egress({"ports": [{"port": 8080}, {"port": 8080, "protocol": "UDP"}]})
    )
    for policies in ([allow], [allow, ingress({"from": [SHOPPER]}, name="another")], [allow]):
        shop.set(*policies)
        shop.wait_for(
            questions(["guest"]) if direction == "egress" and len(policies) == 1 else set(), questions(["guest"])
        )
        assert held.ask() == "web-1", "an allowance breaks nothing"

    shop.set(ingress() if direction == "ingress" else egress())
    shop.wait_for(set(), questions(["shopper"]))
    with pytest.raises(RemoteError, match="timeout"):
        held.ask()

    shop.set(allow)
    shop.wait_for(questions(["shopper"], [protocol], [8080]), questions(["shopper"], [protocol], [8080]))
    client.call(held._number, "settimeout", 5.0)
    if protocol == "udp":
        assert held.ask() == "web-1"
    else:
        assert client.call(held._number, "recv", 4096).split()[0] == "web-1", "what was sent meanwhile arrives"
    held.close()


def test_a_restart_keeps_verdicts_and_connections(shop):
    shop.set(ingress({"from": [SHOPPER], "ports": [{"port": 8080}, {"port": 8080, "protocol": "UDP"}]}))
    expected = only(("shopper",), ("tcp", "udp"), (8080,))
    shop.wait_for(expected, ALL)
    revision = shop.agent.status()["policy"]["revision"]
    targets = [(mode, address, 8080) for mode in ("tcp", "udp") for address in shop.web.addresses]
    with churning(shop.shopper.place, targets) as churn:
        for _ in range(3):
            shop.agent.kill()
            assert shop.answered(ALL) == expected, "without an agent"
            shop.agent.start()
            churn.wait_for(30)
            assert shop.answered(questions(["guest"])) == set(), "while it starts"
            shop.agent.wait()
            assert shop.agent.map_writes() == 0
            assert shop.answered(ALL) == expected
        tally = churn.stop()

    assert tally.errors == {}
    assert tally.held > 0
    assert shop.agent.status()["policy"]["revision"] == revision


@IN_ONE_MODE
@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_an_error_about_what_is_allowed_comes_back(shop, family):
    """To a pod that nobody may ask: from a server at whose port nobody listens, and from nobody else."""
    address = shop.web.addresses[family]
    closed = {"port": 8099, "protocol": "UDP"}
    shop.set(ingress(app="shopper", name="none"), egress({"ports": [closed]}))
    asked = questions(["shopper"], ["udp"])
    shop.wait_for(set(), asked)

    assert shop.clients["shopper"].ask("udp", address, 8099, 2).error == "ECONNREFUSED"
    assert shop.clients["shopper"].is_unanswered("udp", address, 8098)


@IN_ONE_MODE
def test_a_pod_is_told_of_what_it_may_not_begin_where_that_is_set(shop):
    """By a reset or an ICMP error; who may not come in is never told."""
    restart(shop, policyAnswer="reject")
    try:
        shop.set(egress(), ingress({"from": [SHOPPER]}))
        shop.wait_for(HOST, ALL)
        for address in shop.web.addresses:
            assert shop.clients["shopper"].ask("tcp", address, 8080, 2).error == "ECONNREFUSED"
            assert shop.clients["shopper"].ask("udp", address, 8080, 2).error not in ("", "timeout")
            assert shop.clients["guest"].is_unanswered("tcp", address, 8080)
    finally:
        restart(shop, policyAnswer="drop")


@IN_ONE_MODE
def test_what_changed_meanwhile_is_enforced_by_the_next_agent(shop):
    shop.set(ingress({"from": [SHOPPER]}))
    shop.wait_for(only(("shopper",)), ALL)
    held = shop.clients["shopper"].open("tcp", 4)
    held.connect(shop.web.v4, 8080)
    assert held.ask() == "web-1"
    shop.agent.stop()
    shop.set(ingress({"from": [INN]}))

    shop.agent.start().wait()

    assert shop.answered(ALL) == only(("guest",))
    shop.clients["shopper"].call(held._number, "settimeout", 0.3)
    with pytest.raises(RemoteError, match="timeout"):
        held.ask()
    held.close()


def dropped(scene: PolicyScene, reason: str) -> float:
    return scene.agent.metric("ebproxy_policy_dropped_packets_total", reason=reason)


@IN_ONE_MODE
@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_a_pod_cannot_speak_for_another(shop, family):
    until(lambda: shop.agent.metric("ebproxy_policy_unplaced_pods") == 0, "the shopper's device is known")
    shop.set(ingress({"from": [INN]}))
    shop.wait_for(only(("guest",)), ALL)
    target = shop.web.addresses[family]
    before = dropped(shop, "spoofed"), dropped(shop, "policy")

    place = shop.shopper.netns
    forged.send(place, forged.datagram(shop.guest.addresses[family], target, 8080), target)
    until(lambda: dropped(shop, "spoofed") == before[0] + 1, "the packet is dropped and counted")
    forged.send(place, forged.datagram(shop.shopper.addresses[family], target, 8080), target)
    until(lambda: dropped(shop, "policy") == before[1] + 1, "its own is judged by policy")

    assert dropped(shop, "spoofed") == before[0] + 1


@IN_ONE_MODE
def test_what_happens_is_counted(shop):
    allowed = shop.agent.metric("ebproxy_policy_allowed_connections_total", direction="ingress", reason="policy")
    shop.set(ingress({"from": [SHOPPER]}))
    shop.wait_for(only(("shopper",)), ALL)
    before = dropped(shop, "policy")
    assert shop.clients["guest"].is_unanswered("udp", shop.web.v4, 8080)
    assert shop.clients["shopper"].ask("udp", shop.web.v4, 8080).name == "web-1"

    assert dropped(shop, "policy") > before  # what was denied before may still be tried again
    assert shop.agent.metric("ebproxy_policy_allowed_connections_total", direction="ingress", reason="policy") > allowed
    assert shop.agent.metric("ebproxy_policy_enforcement_duration_seconds_count") > 0
    assert shop.agent.metric("ebproxy_policy_settled") == 1
    assert shop.agent.metric("ebproxy_policy_subjects") == 6
    assert shop.agent.metric("ebproxy_policy_rules") == 1
    assert shop.agent.metric("ebproxy_degraded_subjects") == 0
    assert shop.agent.metric("ebproxy_map_pressure", map="subjects") == 6 / 1024


@pytest.mark.timeout(240)  # it compiles three times
def test_a_mode_is_chosen_at_each_start():
    """`strict` holds a pod that nobody has said anything of; `off` takes everything away; and on again."""
    require_root()
    with policy_scene(networkPolicy="strict", flowSample=1) as shop:
        agent, late = shop.agent, shop.scene.node.add_pod("late", 8080)
        host = shop.clients["host"]
        assert [host.is_unanswered("tcp", address, 8080) for address in late.addresses] == [True, True]
        assert late.client().is_unanswered("tcp", shop.web.v4, 8080)
        assert dropped(shop, "held") >= 3
        shop.scene.manifests.write("late", late.manifest("late"))
        for address in late.addresses:
            host.first_reply(address, 8080, ["late"], 2)

        shop.set(ingress())
        shop.wait_for(HOST, ALL)
        files = [agent.state_dir / name for name in (FILE, POLICIES)]
        assert all(file.exists() for file in files)
        switch(shop, "off")
        assert shop.answered(ALL) == ALL
        assert not any(file.exists() for file in files)
        assert "policy" not in agent.status()
        with agent.maps() as store:
            assert store.maps["policy"].info.max_entries == 1

        another = shop.scene.node.add_pod("another", 8080)
        older = {name: opened(shop, name) for name in ("guest", "shopper")}
        shop.set(ingress({"from": [INN]}))
        agent.config["antiSpoofing"] = False
        switch(shop, "standard")
        assert shop.answered(ALL) == only(("guest",))
        assert host.ask("tcp", another.v4, 8080).name == "another"
        assert [sock.ask() for sock in older["guest"]] == ["web-1"] * 4, "what is allowed goes on"
        for sock in older["shopper"]:
            with pytest.raises(RemoteError, match="timeout"):
                sock.ask()
        assert_anybody_may_speak_for_others(shop)

        agent.stop()
        assert agent.cli("cleanup").returncode == 0
        assert not agent.bpffs.exists() or pins(agent.bpffs) == []
        assert not agent.state_dir.exists()
        assert shop.answered(ALL) == ALL


def opened(shop: PolicyScene, name: str) -> list[RemoteSocket]:
    """Open connections to the server, in each family and two protocols."""
    client, made = shop.clients[name], []
    for (family, address), protocol in product(zip((4, 6), shop.web.addresses, strict=True), ("tcp", "udp")):
        made.append(client.open(protocol, family))
        made[-1].connect(address, 8080)
        assert made[-1].ask() == "web-1"
        client.call(made[-1]._number, "settimeout", 0.5)
    return made


def assert_anybody_may_speak_for_others(shop: PolicyScene) -> None:
    """What a pod sends in another's name is judged as that one's, and passes."""
    shop.set(ingress({"from": [INN]}))
    shop.wait_for(only(("guest",)), ALL)
    for address, source in zip(shop.web.addresses, shop.guest.addresses, strict=True):
        with forged.listener(shop.web.netns, address, 9000) as heard:
            forged.send(shop.shopper.netns, forged.datagram(source, address, 9000), address)
            assert heard.recvfrom(100)[1][0] == source
    assert dropped(shop, "spoofed") == 0


def switch(shop: PolicyScene, mode: str) -> None:
    """Restart the agent in another mode."""
    restart(shop, networkPolicy=mode)


def restart(shop: PolicyScene, **config: Any) -> None:
    """Restart the agent with other settings."""
    shop.agent.stop()
    shop.agent.config |= config
    shop.agent.start().wait()
