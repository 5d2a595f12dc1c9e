"""What is told of policy is so: flows, lists and traces, held against real connections of an agent's pods."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.lab.manifests import namespace, network_policy, pod
from tests.lab.polling import until
from tests.lab.processes import end
from tests.lab.scene import Scene
from tests.netns.policies import policy_scene
from tests.requirements import require_root

FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
COMMANDS = [("policy", "list"), ("identity", "list"), ("endpoint", "list"), ("flows",)]


@pytest.fixture(scope="module")
def told() -> Iterator[Scene]:
    """Give a node with policy: web takes port 8080 from shopper alone, web-2 may begin nothing."""
    require_root()
    with Scene(web=2, networkPolicy="standard", flowSample=1) as scene:
        labels = {"web-1": "web", "web-2": "mute", "shopper": "shopper"}
        for it in (*scene.web, scene.shopper):
            scene.manifests.write(f"pod-{it.name}", pod(it.name, scene.node.name, it.addresses, labels[it.name]))
        scene.manifests.write("namespace", namespace(team="sales"))
        from_shopper = {"from": [{"podSelector": {"matchLabels": {"app": "shopper"}}}]}
        ports = {"ports": [{"port": 8080}, {"port": 8080, "protocol": "UDP"}]}
        scene.manifests.write("policy-web", network_policy("web", "web", ingress=[from_shopper | ports]))
        scene.manifests.write("policy-mute", network_policy("mute", "mute", policyTypes=["Egress"]))
        scene.mute = scene.web[1].client()
        until(lambda: len(policies(scene)) == 2 and len(endpoints(scene)) == 6, "policy is in force")
        until(lambda: scene.mute.ask("tcp", scene.web[0].v4, 8080, 0.3).error == "timeout", "policy is enforced")
        yield scene


def policies(scene: Scene) -> dict[str, dict]:
    return {f"{it['namespace']}/{it['name']}": it for it in scene.agent.json("policy", "list")}


def endpoints(scene: Scene) -> list[dict]:
    return scene.agent.json("endpoint", "list")


def flows(scene: Scene, *arguments: str) -> list[dict]:
    """Read flows as JSON lines."""
    ran = scene.agent.cli("flows", "-o", "json", *arguments)
    assert (ran.returncode, ran.stderr) == (0, "")
    return [json.loads(line) for line in ran.stdout.splitlines()]


def refused(scene: Scene, port: int, family: int = 0) -> dict:
    """Have shopper ask web where it may not, and find what was told of it."""
    before = time.time_ns()
    assert scene.pod.ask("tcp", scene.web[0].addresses[family], port, 0.3).error == "timeout"
    return until(lambda: _find(scene, port, before), "the drop is told")


def _find(scene: Scene, port: int, since_ns: int) -> dict | None:
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(since_ns // 10**9)) + f".{since_ns % 10**9 // 1000:06}Z"
    found = flows(scene, "--since", since, "--verdict", "dropped")
    return next((it for it in found if it.get("destination", {}).get("port") == port), None)


@FAMILIES
def test_a_drop_names_both_ends_and_who_isolates(told: Scene, family: int) -> None:
    flow = refused(told, 8081, family)

    web = told.web[0]
    assert (flow["verdict"], flow["direction"], flow["protocol"], flow["reason"]) == (
        *("dropped", "ingress", "TCP", "policy"),
    )
    assert (flow["policy"], flow["isolated_by"]) == (None, ["shop/web"])
    assert flow["tcp_flags"] == ["SYN"]
    for side, name, address, app in (
        ("source", "shopper", told.shopper.addresses[family], "shopper"),
        ("destination", "web-1", web.addresses[family], "web"),
    ):
        assert (flow[side]["namespace"], flow[side]["pod"], flow[side]["address"]) == ("shop", name, address)
        assert flow[side]["labels"]["labels"] == {"app": app}


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_what_passes_names_the_rule(told: Scene, protocol: str) -> None:
    assert told.pod.ask(protocol, told.web[0].v4, 8080).name == "web-1"

    def found() -> list[dict]:
        passed = flows(told, "--verdict", "forwarded", "--pod", "shop/web-1")
        return [it for it in passed if (it["protocol"], it["direction"]) == (protocol.upper(), "ingress")]

    flow = until(found, "the connection is told")[-1]
    assert flow["policy"] == {"kind": "NetworkPolicy", "namespace": "shop", "name": "web", "rule": 0, "rule_name": ""}
    assert flow["why"] == "NetworkPolicy shop/web, ingress rule 0"


@pytest.mark.parametrize(
    ("arguments", "is_told"),
    [
        (("--pod", "shop/shopper"), True),
        (("--pod", "shop/web-1", "--verdict", "dropped"), True),
        (("--namespace", "shop", "--since", "1h"), True),
        (("--pod", "shop/web-2"), False),
        (("--verdict", "forwarded"), False),
        (("--namespace", "elsewhere"), False),
    ],
    ids=lambda it: " ".join(it) if isinstance(it, tuple) else "",
)
def test_flows_are_filtered(told: Scene, arguments: tuple[str, ...], is_told: bool) -> None:
    when = refused(told, 8081)["time"]

    assert (when in {it.get("time") for it in flows(told, *arguments)}) is is_told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--since", "2100-01-01"), "--since 2100-01-01 lies ahead"),
        (("--pod", "shop/nobody"), "pod shop/nobody is not"),
    ],
    ids=["a time to come", "a pod of nobody"],
)
def test_what_cannot_be_found_is_told(told: Scene, arguments: tuple[str, ...], words: str) -> None:
    refused(told, 8081)
    ran = told.agent.cli("flows", "-o", "json", *arguments)

    assert (ran.returncode, ran.stdout) == (0, "")
    assert ran.stderr.startswith(words)


@pytest.mark.parametrize(
    "arguments",
    [("--since", "yesterday"), ("--since", "2026-01-32"), ("--since", "5"), ("--pod", "web-1")],
    ids=" ".join,
)
def test_flows_refuse_what_they_cannot_read(told: Scene, arguments: tuple[str, ...]) -> None:
    ran = told.agent.cli("flows", *arguments)

    assert (ran.returncode, ran.stdout) == (2, "")
    assert arguments[0] in ran.stderr


@contextlib.contextmanager
def following(scene: Scene, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Follow flows, once the first one came."""
    place = scene.node.place("follower")
    # Whoever runs the tests in the background has SIGINT ignored, which children inherit.
    command = ("env", "--default-signal=SIGINT", *scene.agent.command("flows", "--follow", *arguments))
    with place.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            end(process, signal.SIGKILL)


def next_line(scene: Scene, process: subprocess.Popen[str], wanted: str) -> str:
    """Make a connection that is dropped until a line about one comes."""

    def line() -> str:
        scene.pod.ask("tcp", scene.web[0].v4, 8081, 0.1)
        assert process.stdout
        ready, _, _ = select.select([process.stdout], [], [], 0.5)
        read = process.stdout.readline() if ready else ""
        return read if wanted in read else ""

    return until(line, f"a line with {wanted}", 20)


@pytest.mark.parametrize("output", ["table", "json"])
def test_ctrl_c_ends_following_quietly(told: Scene, output: str) -> None:
    with following(told, "-o", output, "--verdict", "dropped") as process:
        line = next_line(told, process, "shop/web")
        process.send_signal(signal.SIGINT)
        assert (process.wait(10), process.stderr.read()) == (0, "")

    if output == "json":
        assert json.loads(line)["isolated_by"] == ["shop/web"]
    else:
        assert {"dropped", "ingress", "shop/shopper", "shop/web-1"} <= set(line.split())


def test_a_closed_pipe_ends_following_quietly(told: Scene) -> None:
    with following(told, "-o", "json") as process:
        next_line(told, process, "dropped")
        process.stdout.close()

        def has_ended() -> bool:
            told.pod.ask("tcp", told.web[0].v4, 8081, 0.1)
            return process.poll() is not None

        until(has_ended, "it ends")
        assert process.stderr.read() == ""


def test_policies_are_listed_with_the_pods_they_are_about(told: Scene) -> None:
    listed = policies(told)

    assert {name: (it["directions"], it["pods"], it["subject"]) for name, it in listed.items()} == {
        "shop/web": (["ingress"], ["shop/web-1"], "app=web"),
        "shop/mute": (["egress"], ["shop/web-2"], "app=mute"),
    }
    assert [it["fault"] for it in listed.values()] == ["", ""]


def test_a_policy_is_shown_with_its_rules(told: Scene) -> None:
    (shown,) = told.agent.json("policy", "show", "shop/web")
    text = told.agent.cli("policy", "show", "shop/web").stdout

    (rule,) = shown["rules"]
    assert (rule["direction"], rule["index"], rule["action"]) == ("ingress", 0, "allowed")
    assert rule["peers"] == ["pods app=shopper of its own namespace"]
    assert rule["ports"] == ["TCP/8080", "UDP/8080"]
    assert "pods app=shopper of its own namespace" in text
    missing = told.agent.cli("policy", "show", "shop/nobody")
    assert (missing.returncode, missing.stdout) == (1, "")


def test_endpoints_are_listed_with_what_concerns_them(told: Scene) -> None:
    by_pod = {it["pod"]: it for it in endpoints(told)}

    assert {pod: (it["ingress"]["policies"], it["egress"]["policies"]) for pod, it in by_pod.items()} == {
        "shop/web-1": (["NetworkPolicy shop/web"], []),
        "shop/web-2": ([], ["NetworkPolicy shop/mute"]),
        "shop/shopper": ([], []),
    }
    assert {it["state"] for it in by_pod.values()} == {"enforced"}


def test_identities_are_listed_with_their_labels(told: Scene) -> None:
    numbers = {it["identity"] for it in endpoints(told)}
    listed = {it["identity"]: it for it in told.agent.json("identity", "list")}

    assert set(listed) == numbers
    assert sorted(it["labels"]["app"] for it in listed.values()) == ["mute", "shopper", "web"]
    assert {it["addresses"] for it in listed.values()} == {2}


@FAMILIES
@pytest.mark.parametrize(
    ("client", "port", "egress", "ingress", "by"),
    [
        ("shopper", 8080, "allow", "allow", ("ingress", "NetworkPolicy shop/web, ingress rule 0")),
        ("shopper", 8081, "allow", "deny", ("ingress", "isolated by NetworkPolicy shop/web")),
        ("web-2", 8080, "deny", "deny", ("egress", "isolated by NetworkPolicy shop/mute")),
        ("host", 8080, "allow", "allow", ("ingress", "own node")),
    ],
    ids=["allowed", "denied in", "denied out", "own node"],
)
def test_trace_agrees_with_policy(
    told: Scene, family: int, client: str, port: int, egress: str, ingress: str, by: tuple[str, str]
) -> None:
    clients = {"shopper": told.pod, "web-2": told.mute, "host": told.host}
    address = told.web[0].addresses[family]
    end_ = f"[{address}]:{port}" if family else f"{address}:{port}"
    source = client if client == "host" else f"shop/{client}"

    said = told.agent.json("trace", "--from", source, "--to", end_)

    assert {side: it["verdict"] for side, it in said["policy"].items()} == {"egress": egress, "ingress": ingress}
    side, words = by
    assert words in said["policy"][side]["by"]
    is_denied = "deny" in (egress, ingress)
    assert said["verdict"] == ("drop" if is_denied else "pass")
    answer = clients[client].ask("tcp", address, port, 0.3 if is_denied else 10)
    assert (answer.error == "timeout") if is_denied else (answer.name == "web-1")


@FAMILIES
@pytest.mark.parametrize("name", ["shop/nosuch", "nowhere/shopper"])
def test_trace_of_a_pod_that_is_not_known_is_an_error(told: Scene, family: int, name: str) -> None:
    ran = told.agent.cli("trace", "--from", name, "--to", f"[{told.web[0].addresses[family]}]:8080")

    assert (ran.returncode, ran.stdout) == (1, "")
    assert f"pod {name} is not known" in ran.stderr


ODD = {
    "apiVersion": "policy.networking.k8s.io/v1alpha2",
    "kind": "ClusterNetworkPolicy",
    "metadata": {"name": "odd"},
    "spec": {
        "tier": "Admin",
        "priority": 1,
        "subject": {"namespaces": {"matchLabels": {"team": "nobodys"}}},
        "egress": [{"action": "Deny", "to": [{"domainNames": ["*.example.com"]}]}],
    },
}
NAMED = "spec.egress[0].to[0].domainNames: not understood, so that the rule denies everybody"


def test_what_is_not_understood_of_a_policy_is_told_wherever_one_looks(told: Scene) -> None:
    told.manifests.write("odd", ODD)
    try:
        until(lambda: "odd" in told.agent.cli("policy", "list").stdout, "the policy is listed")
        (row,) = (it for it in told.agent.cli("policy", "list").stdout.splitlines() if it.startswith("odd "))
        shown = told.agent.cli("policy", "show", "odd").stdout
        status = told.agent.json("status")
        table = told.agent.cli("status").stdout
        gauge = told.agent.metric("ebproxy_malformed_objects_current")
        lines = [it for it in told.agent.log.read_text().splitlines() if "domainNames" in it]
    finally:
        told.manifests.remove("odd")

    assert NAMED in row
    assert NAMED in shown
    assert "Deny, closed (not understood: spec.egress[0].to[0].domainNames)" in shown
    assert [(it["name"], it["field"]) for it in status["malformed"]] == [("odd", "spec.egress[0].to[0].domainNames")]
    assert status["policy"]["not_understood"] == gauge == 1
    assert "3, 1 not understood" in table
    assert len(lines) == 1, lines
    until(lambda: not told.agent.status()["malformed"], "it is forgotten with the policy")


def test_the_status_says_how_policy_stands(told: Scene) -> None:
    table = told.agent.cli("status").stdout
    rows = dict(it.strip().split(maxsplit=1) for it in table.splitlines() if it.strip())
    policy = told.agent.status()["policy"]

    assert rows["policy"] == f"standard, in force, revision {policy['revision']}"
    assert (rows["policies"], rows["identities"]) == ("2", "3")
    assert rows["subjects"].startswith("3, 2 isolated")
    assert (policy["local_pods"], policy["isolated_pods"], policy["degraded"]) == (3, 2, [])


def test_trace_of_a_service_tells_which_backends_policy_denies(told: Scene) -> None:
    ip = told.publish("both", told.web)[0]

    from_mute = told.agent.json("trace", "--from", told.web[1].v4, "--to", f"{ip}:80")
    from_shopper = told.agent.json("trace", "--from", told.shopper.v4, "--to", f"{ip}:80")

    assert (from_shopper["verdict"], from_shopper["policy"]["ingress"]["verdict"]) == ("forward", "allow")
    assert (from_mute["verdict"], from_mute["policy"]["egress"]["verdict"]) == ("forward", "varies")
    assert "policy denies 1 of 2" in from_mute["reason"]  # it may reach itself
    told.withdraw("both")


@pytest.mark.parametrize("arguments", [*COMMANDS, ("policy", "show", "shop/web"), ("status",)], ids=" ".join)
def test_tables_read_without_a_terminal(told: Scene, arguments: tuple[str, ...]) -> None:
    refused(told, 8081)

    ran = told.agent.cli(*arguments)

    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\x1b" not in ran.stdout
    assert len(ran.stdout.splitlines()) > 2


def test_an_agent_that_is_gone_is_said_to_be_and_trace_names_rules_all_the_same(told: Scene) -> None:
    with following(told) as process:
        next_line(told, process, "shop/web")
        told.agent.kill()
        assert process.wait(10) == 1
        assert "the agent" in process.stderr.read()
    try:
        for arguments in COMMANDS:
            ran = told.agent.cli(*arguments)
            assert (ran.returncode, ran.stdout) == (1, "")
            assert "no agent answers" in ran.stderr
        named = told.agent.cli("trace", "--from", "shop/shopper", "--to", f"{told.web[0].v4}:8080")
        assert (named.returncode, named.stdout) == (1, "")
        assert "pod shop/shopper is not looked up" in named.stderr
        said = told.agent.json("trace", "--from", told.shopper.v4, "--to", f"{told.web[0].v4}:8080")
        assert said["policy"]["ingress"] == {"verdict": "allow", "by": "NetworkPolicy shop/web, ingress rule 0"}
        denied = told.agent.json("trace", "--from", told.shopper.v4, "--to", f"{told.web[0].v4}:8081")
        assert (denied["verdict"], denied["policy"]["ingress"]["verdict"]) == ("drop", "deny")
    finally:
        told.agent.start().wait()


def test_without_policy_the_status_has_a_word_for_it(scene: Scene) -> None:
    assert "policy off" in [" ".join(it.split()) for it in scene.agent.cli("status").stdout.splitlines()]


def test_an_endpoint_whose_exception_has_no_room_says_so() -> None:
    """Once, the list said `enforced` while the exception was not."""
    require_root()
    with policy_scene(mapSizes={"blocks": 1}) as shop:
        ingress = [{"from": [{"ipBlock": {"cidr": "172.30.0.0/24", "except": ["172.30.0.101/32"]}}]}]
        shop.set(network_policy("web", "web", ingress=ingress))
        until(lambda: shop.agent.status()["policy"]["degraded"], "the block does not fit")
        states = {it["pod"]: (it["state"], it["reason"]) for it in shop.agent.json("endpoint", "list")}
        status = shop.agent.cli("status").stdout

        assert states["shop/shopper"] == ("enforced", "")
        state, reason = states["shop/web-1"]
        assert (state, "map blocks is full" in reason) == ("degraded", True), reason
        (listed,) = shop.agent.json("policy", "list")
        assert any("map blocks is full" in it for it in listed["not_enforced"])
        assert "IPBlock/" in status


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_without_policy_commands_say_what_to_do(scene: Scene, arguments: tuple[str, ...]) -> None:
    ran = scene.agent.cli(*arguments)

    assert (ran.returncode, ran.stdout) == (1, "")
    assert "networkPolicy: standard" in ran.stderr
