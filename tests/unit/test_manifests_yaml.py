"""What is deployed: valid YAML, RBAC of exactly what is read, arguments and metrics that the agent knows."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.cli.flags import add_flags, overrides_from
from agent.config import load
from agent.config_fields import Reading, read_fields
from agent.core.abi import Counter, Reason
from agent.core.records import Kind, ObjectKey
from agent.kernel.programs import COMPILE_LIMIT_S
from agent.kernel.sockets import _NAMED as NAMED_NAMESPACES
from agent.observe.policy_metrics import _BUCKETS as ENFORCEMENT_BUCKETS
from agent.sources.kube import resources
from agent.sources.kube_events import Complaint, EventRecorder, event_body
from agent.sources.kube_inquiry import INQUIRY_LIMIT_S

Json = dict[str, Any]
REPOSITORY = Path(__file__).resolve().parents[2]
MANIFESTS = REPOSITORY / "manifests"
YAML_FILES = sorted([*MANIFESTS.rglob("*.yaml"), REPOSITORY / "kind-config.yaml"])
KUSTOMIZATIONS = sorted(path.parent for path in MANIFESTS.glob("[bo]*/**/kustomization.yaml"))
CONFIGS = sorted(MANIFESTS.rglob("config.yaml"))
# What each capability is for is in daemonset.yaml; tests/image/ shows what goes wrong without it.
CAPABILITIES = ["BPF", "NET_ADMIN", "PERFMON"]
_METRIC = re.compile(r"\b(?:ebproxy|kubeproxy)_[a-z_]+\b")
# A heading, or the bold words that a paragraph begins with.
_PLACE = r"(?m)^(?:#+ |\*\*){}(?:\.\*\*)?"
_SUFFIXES = ("_total", "_bucket", "_sum", "_count")
METRIC_SOURCES = ("observe/metrics.py", "observe/policy_metrics.py", "live_metrics.py")


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def documents(path: Path) -> list[Json]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def daemonset() -> Json:
    (found,) = documents(MANIFESTS / "base/daemonset.yaml")
    return found


def pod() -> Json:
    spec: Json = daemonset()["spec"]["template"]["spec"]
    return spec


def container() -> Json:
    (found,) = pod()["containers"]
    return dict(found)


def rendered(directory: Path) -> list[Json]:
    ran = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return list(yaml.safe_load_all(ran.stdout))


def metric_families() -> set[str]:
    """The names of metrics in the agent's source: strings that are nothing but such a name."""
    trees = (ast.parse((REPOSITORY / "agent" / name).read_text(encoding="utf-8")) for name in METRIC_SOURCES)
    strings = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {text for text in strings if isinstance(text, str) and _METRIC.fullmatch(text)}


def family_of(series: str) -> str:
    return next((series.removesuffix(suffix) for suffix in _SUFFIXES if series.endswith(suffix)), series)


@pytest.mark.parametrize("path", YAML_FILES, ids=name_of)
def test_every_file_is_yaml(path: Path) -> None:
    assert all(isinstance(document, dict) for document in documents(path))


NETWORK_POLICY = "components/network-policy/rbac.yaml"


def granted(*files: str) -> set[tuple[str, str, str]]:
    """The groups, resources and verbs that the ClusterRoles of some files allow."""
    roles = [it for file in files for it in documents(MANIFESTS / file) if it["kind"] == "ClusterRole"]
    return {
        (group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


class TestRbac:
    @pytest.mark.parametrize(
        ("policy", "files"),
        [(False, ["base/rbac.yaml"]), (True, ["base/rbac.yaml", NETWORK_POLICY])],
        ids=["base", "with policy"],
    )
    def test_grants_what_is_used_and_nothing_else(self, policy: bool, files: list[str]) -> None:
        watched = [resource.path.split("/") for resource in resources("node", policy=policy)]
        groups = {path[-1]: path[2] if path[1] == "apis" else "" for path in watched}
        used = {(group, name, verb) for name, group in groups.items() for verb in ("list", "watch")}

        assert used | {("", "events", "create")} == granted(*files)

    def test_events_are_posted_as_granted(self) -> None:
        posted: list[tuple[str, str]] = []
        read: list[str] = []

        class Poster:
            def read(self, path: str, query: Sequence[tuple[str, str]], read_timeout_s: float) -> bytes:
                read.append(path)
                return b'{"items":[]}'

            def post(self, path: str, body: Json, read_timeout_s: float = 10.0) -> None:
                posted.append((path, body["apiVersion"]))

        recorder = EventRecorder(Poster(), "node")
        recorder.warn(ObjectKey("shop", "web"), "DataplaneFull", "no room")
        recorder.stop()

        assert posted == [("/api/v1/namespaces/shop/events", "v1")]
        assert read == ["/api/v1/namespaces/shop/services"]  # a list, which is granted
        assert event_body(Complaint(Kind.NODE, ObjectKey("", "node"), "r", "m"), "node")["kind"] == "Event"

    def test_the_binding_is_the_daemonsets(self) -> None:
        account, _, binding = documents(MANIFESTS / "base/rbac.yaml")
        role, other = documents(MANIFESTS / NETWORK_POLICY)

        assert pod()["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
        assert binding["subjects"] == other["subjects"]
        assert other["roleRef"]["name"] == role["metadata"]["name"]


class TestDaemonSet:
    def test_is_not_privileged(self) -> None:
        security = container()["securityContext"]

        assert security["capabilities"] == {"drop": ["ALL"], "add": CAPABILITIES}
        assert (security["privileged"], security["allowPrivilegeEscalation"]) == (False, False)
        assert security["readOnlyRootFilesystem"] is True

    def test_sees_of_the_host_what_it_needs(self) -> None:
        shared = {key: value for key, value in pod().items() if key.startswith("host")}
        paths = sorted(volume["hostPath"]["path"] for volume in pod()["volumes"] if "hostPath" in volume)

        assert shared == {"hostNetwork": True}
        assert paths == ["/run/ebproxy", "/sys/fs/bpf", "/sys/fs/cgroup"]

    def test_selects_its_own_pods(self) -> None:
        spec = daemonset()["spec"]

        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]

    def test_mounts_every_volume_once(self) -> None:
        volumes = [volume["name"] for volume in pod()["volumes"]]
        mounts = [mount["name"] for mount in container()["volumeMounts"]]

        assert sorted(volumes) == sorted(mounts)

    def test_hides_no_file_system_of_the_runtimes(self) -> None:
        paths = {mount["mountPath"] for mount in container()["volumeMounts"]}

        assert "/sys/fs/cgroup" not in paths

    def test_runs_everywhere_and_first(self) -> None:
        assert pod()["tolerations"] == [{"operator": "Exists"}]
        assert pod()["priorityClassName"] == "system-node-critical"

    def test_resolves_names_without_the_clusters_dns(self) -> None:
        assert pod()["dnsPolicy"] == "Default"

    def test_arguments_are_the_agents(self, tmp_path: Path) -> None:
        command, *arguments = container()["args"]
        parser = argparse.ArgumentParser(exit_on_error=False)
        add_flags(parser)
        args = parser.parse_args(arguments)
        mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}

        assert command == "run"
        assert str(args.config) == f"{mounts['config']}/config.yaml"
        assert overrides_from(args) == {}

    def test_the_node_names_itself(self) -> None:
        (variable,) = container()["env"]

        assert (variable["name"], variable["valueFrom"]) == ("NODE_NAME", {"fieldRef": {"fieldPath": "spec.nodeName"}})
        assert load(environment={"NODE_NAME": "node-7"}).node_name == "node-7"

    def test_defaults_are_where_volumes_are(self) -> None:
        config = load(environment={"NODE_NAME": "node-7"})
        mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}

        assert {str(config.bpffs), str(config.state_dir)} <= mounts

    def test_probes_ask_the_health_server(self) -> None:
        address = load(environment={"NODE_NAME": "node-7"}).healthz_address
        ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
        asked = {container()[probe]["httpGet"]["path"]: container()[probe]["httpGet"]["port"] for probe in PROBES}

        assert address is not None
        assert asked == {"/livez": "healthz", "/readyz": "healthz"}
        assert ports["healthz"] == address.port

    def test_liveness_does_not_end_a_first_start(self) -> None:
        """Nothing listens before credentials are read and the programs are compiled; each may take its limit."""
        startup, liveness = container()["startupProbe"], container()["livenessProbe"]

        assert startup["httpGet"] == liveness["httpGet"]
        assert startup["periodSeconds"] * startup["failureThreshold"] > INQUIRY_LIMIT_S + COMPILE_LIMIT_S


PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_configuration_is_valid(path: Path) -> None:
    config = load(path, environment={"NODE_NAME": "node-7"})

    assert config.unused == ()
    assert bool(config.api_server) == (path.parent.name != "base")


def test_what_the_base_suggests_is_valid() -> None:
    """Each suggestion taken, one at a time: some exclude others."""
    text = (MANIFESTS / "base/config.yaml").read_text(encoding="utf-8")
    suggested = re.findall(r"^# ([a-zA-Z]+: .+)$", text, re.MULTILINE)
    alone = {yaml.safe_dump(yaml.safe_load(line)) for line in suggested if not line.startswith("detectLocal")}
    together = yaml.safe_dump(yaml.safe_load("\n".join(suggested)))

    assert len(suggested) > len(alone) > 10
    for document in (*alone, together):
        reading = Reading()
        read_fields(yaml.safe_load(document), reading)
        assert (reading.faults, reading.unused) == ([], [])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl: nothing builds the kustomizations")
class TestKustomize:
    @pytest.mark.parametrize("directory", KUSTOMIZATIONS, ids=name_of)
    def test_builds(self, directory: Path) -> None:
        objects = rendered(directory)
        kinds = sorted(item["kind"] for item in objects)
        namespaces = {item["metadata"].get("namespace") for item in objects}

        assert kinds == ["ClusterRole", "ClusterRoleBinding", "ConfigMap", "DaemonSet", "ServiceAccount"]
        assert namespaces == {None, "kube-system"}

    @pytest.mark.parametrize("directory", KUSTOMIZATIONS, ids=name_of)
    def test_the_pod_has_the_generated_configuration(self, directory: Path) -> None:
        objects = {item["kind"]: item for item in rendered(directory)}
        volumes = objects["DaemonSet"]["spec"]["template"]["spec"]["volumes"]
        (name,) = (volume["configMap"]["name"] for volume in volumes if "configMap" in volume)

        assert objects["ConfigMap"]["metadata"]["name"] == name
        assert list(objects["ConfigMap"]["data"]) == ["config.yaml"]

    def test_kind_mounts_bpffs_before_the_agent(self) -> None:
        objects = {item["kind"]: item for item in rendered(MANIFESTS / "overlays/kind")}
        spec = objects["DaemonSet"]["spec"]["template"]["spec"]
        (mounter,) = spec["initContainers"]
        (agent,) = spec["containers"]

        assert mounter["securityContext"]["privileged"] is True
        assert mounter["image"] == agent["image"] == "ebproxy:kind"

    @pytest.mark.parametrize("name", ["cluster", "kind"])
    def test_overlays_may_have_policy(self, name: str, tmp_path: Path) -> None:
        """With the lines that the overlay has for it, RBAC and configuration go together."""
        shutil.copytree(MANIFESTS, tmp_path / "manifests")
        overlay = tmp_path / "manifests/overlays" / name
        for file, off, on in (
            ("kustomization.yaml", "\n# - ../../components/network-policy ", "\n  - ../../components/network-policy "),
            ("config.yaml", "\n# networkPolicy: ", "\nnetworkPolicy: "),
        ):
            text = (overlay / file).read_text(encoding="utf-8")
            assert off in text
            (overlay / file).write_text(text.replace(off, on))
        objects = rendered(overlay)
        roles = {item["metadata"]["name"] for item in objects if item["kind"] == "ClusterRoleBinding"}
        config = next(item["data"]["config.yaml"] for item in objects if item["kind"] == "ConfigMap")

        assert roles == {"ebproxy", "ebproxy-network-policy"}
        assert yaml.safe_load(config)["networkPolicy"] == "standard"

    @pytest.mark.parametrize("name", ["cluster", "kind"])
    def test_overlays_may_enter_the_namespaces_of_pods(self, name: str) -> None:
        objects = {item["kind"]: item for item in rendered(MANIFESTS / "overlays" / name)}
        spec = objects["DaemonSet"]["spec"]["template"]["spec"]
        (agent,) = spec["containers"]
        (mount,) = (mount for mount in agent["volumeMounts"] if mount["name"] == "netns")
        (volume,) = (volume for volume in spec["volumes"] if volume["name"] == "netns")

        assert agent["securityContext"]["capabilities"]["add"] == [*CAPABILITIES, "SYS_ADMIN"]
        assert agent["securityContext"]["privileged"] is False
        assert volume["hostPath"]["path"] == mount["mountPath"] == str(NAMED_NAMESPACES)
        assert mount["mountPropagation"] == "HostToContainer"
        assert {key for key in spec if key.startswith("host")} == {"hostNetwork"}

    def test_monitoring_opens_the_metrics_port(self, tmp_path: Path) -> None:
        shutil.copytree(MANIFESTS, tmp_path / "manifests")
        overlay = tmp_path / "manifests/overlays/monitored"
        overlay.mkdir()
        parts = {"resources": ["../../base"], "components": ["../../components/monitoring"]}
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": "kube-system", **parts}))
        objects = {item["kind"]: item for item in rendered(overlay)}
        spec = objects["DaemonSet"]["spec"]["template"]["spec"]["containers"][0]
        parser = argparse.ArgumentParser()
        add_flags(parser)
        overrides = overrides_from(parser.parse_args(spec["args"][1:]))
        scraped = {item["port"] for item in objects["PodMonitor"]["spec"]["podMetricsEndpoints"]}
        address = load(None, overrides, environment={"NODE_NAME": "node-7"}).metrics_address

        assert address is not None
        assert {port["containerPort"] for port in spec["ports"] if port["name"] in scraped} == {address.port}


class TestMonitoring:
    directory = MANIFESTS / "components/monitoring"

    @pytest.mark.parametrize("name", ["alerts.yaml", "dashboard.json"])
    def test_every_metric_is_one_the_agent_serves(self, name: str) -> None:
        used = {family_of(series) for series in _METRIC.findall((self.directory / name).read_text(encoding="utf-8"))}

        assert used
        assert used - metric_families() == set()

    def test_every_alert_says_what_to_do(self) -> None:
        (rule,) = documents(self.directory / "alerts.yaml")
        alerts = [alert for group in rule["spec"]["groups"] for alert in group["rules"]]

        assert all({"summary", "description"} == set(alert["annotations"]) for alert in alerts)
        assert {alert["labels"]["severity"] for alert in alerts} == {"critical", "warning"}

    @pytest.mark.parametrize("name", ["alerts.yaml", "dashboard.json"])
    def test_every_value_of_a_label_is_one_the_agent_serves(self, name: str) -> None:
        text = (self.directory / name).read_text(encoding="utf-8").replace("\\", "")
        known = {"event": Counter, "reason": Reason}
        used = {label: re.findall(rf'\b{label}=~?"([a-z_|]+)"', text) for label in known}
        values = {(label, value) for label, found in used.items() for it in found for value in it.split("|")}

        assert values
        assert values <= {(label, member.name.lower()) for label, members in known.items() for member in members}

    def test_alerts_name_headings_that_are_there(self) -> None:
        text = re.sub(r"\s+", " ", (self.directory / "alerts.yaml").read_text(encoding="utf-8"))
        named = re.findall(r'(docs/\w+\.md), "([^"]+)"', text)
        texts = {path: (REPOSITORY / path).read_text(encoding="utf-8") for path, _ in named}

        assert named
        assert [
            (path, title) for path, title in named if not re.search(_PLACE.format(re.escape(title)), texts[path])
        ] == []

    def test_the_alert_of_slow_policy_is_at_a_bound_of_a_bucket(self) -> None:
        """Else the quantile is interpolated across it, and the alert comes too early or too late."""
        (rule,) = documents(self.directory / "alerts.yaml")
        alerts = {alert["alert"]: alert for group in rule["spec"]["groups"] for alert in group["rules"]}
        threshold = float(alerts["EbproxyPolicySlow"]["expr"].rpartition(">")[2])

        assert threshold in ENFORCEMENT_BUCKETS

    def test_panels_do_not_overlap(self) -> None:
        panels = json.loads((self.directory / "dashboard.json").read_text(encoding="utf-8"))["panels"]
        places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}

        assert len(places) == len(panels)


def test_kind_has_no_kube_proxy_and_both_families() -> None:
    (config,) = documents(REPOSITORY / "kind-config.yaml")
    overlay = load(MANIFESTS / "overlays/kind/config.yaml", environment={"NODE_NAME": "n"})

    assert (config["networking"]["kubeProxyMode"], config["networking"]["ipFamily"]) == ("none", "dual")
    assert [node["role"] for node in config["nodes"]] == ["control-plane", *["worker"] * 3]
    assert overlay.api_server == f"https://{config['name']}-control-plane:6443"
    assert ",".join(map(str, overlay.cluster_cidrs)) == config["networking"]["podSubnet"]
