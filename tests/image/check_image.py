"""The agent from the image, with the DaemonSet's capabilities and no more: it does its job, and needs each of them.

Named so that pytest does not find it by itself: building an image takes minutes and the network (`make image-test`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.apiserver import ApiServer, Options, load
from tests.image.conftest import EMPTY, SERVICE
from tests.image.images import Image
from tests.image.pods import PodAgent
from tests.lab import cgroups, netns
from tests.lab.agents import HEALTH_PORT
from tests.lab.lab import Node
from tests.lab.manifests import Manifests, network_policy
from tests.lab.polling import until
from tests.lab.processes import REPOSITORY
from tests.lab.traffic import churning

DAEMONSET = yaml.safe_load((REPOSITORY / "manifests/base/daemonset.yaml").read_text(encoding="utf-8"))
(CONTAINER,) = DAEMONSET["spec"]["template"]["spec"]["containers"]
CAPABILITIES = CONTAINER["securityContext"]["capabilities"]["add"]
MONITORING = REPOSITORY / "manifests/components/monitoring"
MODES = ("tcp", "udp", "udp-unconnected")
MIB = 1 << 20
REFUSALS = {
    "BPF": "CAP_BPF missing",
    "NET_ADMIN": "CAP_NET_ADMIN missing",
    "PERFMON": "CAP_PERFMON missing",
}


def reaches_both(node: Node) -> None:
    """Hold that pods and host processes of the node get both backends by either address, and are told by its name."""
    for client in (node.client(), node.pods["one"].client()):
        for address in SERVICE:
            for mode in MODES:
                answers = client.ask_often(mode, address, 80, 20)
                assert {answer.name for answer in answers} == {"one", "two"}, (address, mode, answers)
                assert {answer.source if "un" in mode else answer.peer for answer in answers} == {(address, 80)}
        assert client.ask("tcp", EMPTY, 80).error == "ECONNREFUSED"
        client.close()


@pytest.mark.timeout(1200)
class TestImage:
    def test_is_small_enough(self, image: Image, capsys: pytest.CaptureFixture[str]) -> None:
        with capsys.disabled():
            print(f"\nimage: {image.size() / MIB:.0f} MiB unpacked", end=" ")

        assert image.size() < 600 * MIB

    def test_has_no_compiler_but_bcc(self, image: Image) -> None:
        commands = {
            path.name for directory in ("usr/bin", "usr/local/bin") for path in (image.root / directory).iterdir()
        }

        assert not {name for name in commands if re.fullmatch(r"(gcc|cc|clang|ld|as|make|pip3?)(-\d+)?", name)}

    def test_has_what_is_locked_and_nothing_else(self, image: Image) -> None:
        locked = set((REPOSITORY / "requirements.lock").read_text().splitlines())
        installed = (image.root / "opt/ebproxy/requirements.installed").read_text().splitlines()

        assert installed
        assert [line for line in installed if line not in locked] == []

    def test_keeps_nothing_of_the_builds_secrets(self, image: Image) -> None:
        assert not (image.root / "etc/pip.conf").exists()
        assert not list((image.root / "run").rglob("pip*"))

    @pytest.mark.parametrize("name", ["sh", "mount", "mountpoint"])
    def test_has_what_mounting_bpffs_takes(self, image: Image, name: str) -> None:
        assert (image.root / "usr/bin" / name).exists()

    def test_runs_the_agent_by_default(self, image: Image) -> None:
        assert (image.config["Entrypoint"], image.config["Cmd"]) == (["ebproxy"], ["run"])


@pytest.mark.timeout(180)
class TestPod:
    def test_connects_through_services(self, agent: PodAgent, node: Node) -> None:
        reaches_both(node)

    def test_attaches_at_the_nodes_root(self, agent: PodAgent, node: Node) -> None:
        (path,) = (mount["mountPath"] for mount in agent.container["volumeMounts"] if mount["name"] == "cgroup")

        assert agent.status()["cgroup"] == path
        assert str(agent.pid()) in map(str, cgroups.members(node.cgroup / "kubepods/ebproxy"))

    def test_has_exactly_the_capabilities(self, agent: PodAgent) -> None:
        lines = Path(f"/proc/{agent.pid()}/status").read_text().splitlines()
        sets = {key: int(value, 16) for key, value in (line.split(":") for line in lines if line.startswith("Cap"))}
        numbers = {"NET_ADMIN": 12, "PERFMON": 38, "BPF": 39}
        asked = sum(1 << numbers[name] for name in CAPABILITIES)

        assert (sets["CapEff"], sets["CapPrm"], sets["CapBnd"], sets["CapAmb"]) == (asked, asked, asked, 0)

    def test_commands_answer_in_the_container(self, agent: PodAgent) -> None:
        ran = {name: agent.exec("ebproxy", *name.split(), "-o", "json") for name in ("status", "service list", "maps")}
        traced = agent.exec("ebproxy", "trace", "--from", "host", "--to", f"{SERVICE[0]}:80", "-o", "json")

        assert {name: done.returncode for name, done in ran.items()} == dict.fromkeys(ran, 0), ran
        assert json.loads(traced.stdout)["backends"] == ["10.180.1.10:8080", "10.180.1.11:8080"]

    def test_doctor_finds_nothing_wrong(self, agent: PodAgent) -> None:
        ran = agent.exec("ebproxy", "doctor", "-o", "json")
        bad = [finding for finding in json.loads(ran.stdout)["findings"] if finding["level"] == "fail"]

        assert (ran.returncode, bad) == (0, [])

    @pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
    def test_answers_the_kubelets_probes(self, agent: PodAgent, probe: str) -> None:
        asked: dict[str, Any] = agent.container[probe]["httpGet"]
        ports = {port["name"]: port["containerPort"] for port in agent.container["ports"]}

        assert ports[asked["port"]] == HEALTH_PORT
        assert agent.get(asked["path"], HEALTH_PORT)[0] == 200

    def test_holds_little_memory(self, agent: PodAgent, capsys: pytest.CaptureFixture[str]) -> None:
        until(lambda: agent.memory() < 64 * MIB, "the agent gives back what starting took")
        with capsys.disabled():
            print(f"\nagent: {agent.memory() / MIB:.0f} MiB, at most {agent.memory('VmHWM') / MIB:.0f}", end=" ")


@pytest.mark.timeout(180)
class TestPolicy:
    def test_denies_a_connection_and_says_why(self, policed: PodAgent, node: Node, objects: Manifests) -> None:
        one, client = node.pods["one"], node.pods["two"].client()

        def answered() -> set[str]:
            return {client.ask(mode, address, 8080, 0.2).name for mode in MODES for address in one.addresses}

        until(lambda: answered() == {"one"}, "all is allowed")
        objects.write("policies", network_policy("quiet", "one", ingress=[]))
        until(lambda: answered() == {""}, "nothing is allowed")
        lines = policed.exec("ebproxy", "flows", "--verdict", "dropped", "-o", "json").stdout.splitlines()
        objects.remove("policies")
        until(lambda: answered() == {"one"}, "all is allowed again")
        client.close()

        dropped = [json.loads(line) for line in lines]
        assert {flow["protocol"] for flow in dropped} == {"TCP", "UDP"}
        assert all(flow["isolated_by"] == ["shop/quiet"] for flow in dropped), dropped[0]

    def test_has_the_metrics_that_alerts_and_dashboard_use(self, policed: PodAgent) -> None:
        # By their declarations: a series by label appears with its first value.
        served = re.findall(r"^# TYPE (\w+)", policed.get("/metrics")[1], re.MULTILINE)
        texts = [(MONITORING / name).read_text(encoding="utf-8") for name in ("alerts.yaml", "dashboard.json")]
        used = {name for text in texts for name in re.findall(r"\b(?:ebproxy|kubeproxy)_[a-z_]+", text)}

        assert {re.sub(r"_bucket$", "", name) for name in used} - set(served) == set()


@pytest.mark.timeout(180)
def test_adopts_what_its_predecessor_left(image: Image, node: Node, objects: Manifests) -> None:
    targets = [("tcp", address, 80) for address in SERVICE]
    with PodAgent(image, node, objects) as agent, churning(node.pods["one"].place, targets) as churn:
        before = agent.map_ids()
        for _ in range(3):
            agent.kill()
            churn.wait_for(50)
            agent.start().wait()
        churn.wait_for(50)
        tally = churn.stop()

        assert (agent.map_ids(), tally.failed, tally.errors) == (before, 0, {})


@pytest.mark.timeout(180)
def test_reads_an_api_server_with_its_service_account(image: Image, node: Node, objects: Manifests) -> None:
    server = ApiServer(Options(tokens={"of-the-account"}))
    load(server.store, sorted(objects.directory.glob("*.yaml")))
    with netns.entered(node.netns):
        server.start()
    try:
        with PodAgent(image, node, flags=(f"--api-server={server.url}",), token="of-the-account") as agent:
            reaches_both(node)

            assert agent.status()["source"]["server"] == server.url
    finally:
        server.stop()


@pytest.mark.timeout(180)
def test_cleans_the_node_from_such_a_container(image: Image, node: Node, objects: Manifests) -> None:
    with PodAgent(image, node, objects) as agent:
        refused = agent.exec("ebproxy", "cleanup")
    cleaned = agent.once("cleanup")

    assert (refused.returncode, cleaned.returncode) == (1, 0), cleaned.stderr
    assert not (agent.bpffs / "ebproxy").exists()
    assert list(agent.state_dir.iterdir()) == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize("flags", [("--socket-lb=host",), ("--socket-lb=off",)], ids=["host", "off"])
def test_every_way_of_compiling_loads(image: Image, node: Node, objects: Manifests, flags: tuple[str, ...]) -> None:
    with PodAgent(image, node, objects, flags=flags) as agent:
        assert agent.status()["is_settled"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("name", "words"), REFUSALS.items(), ids=REFUSALS)
def test_cannot_start_without(
    image: Image, node: Node, objects: Manifests, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = PodAgent(image, node, objects, without=name).start()
    try:
        until(agent.has_ended, f"the agent without {name} gives up", 30)
    finally:
        agent.stop()
    with capsys.disabled():
        print(f"\nwithout {name}: {agent.said().strip()[:300]}", end=" ")

    assert words in agent.said()


def test_nothing_else_is_asked_for() -> None:
    assert set(CAPABILITIES) == REFUSALS.keys()
