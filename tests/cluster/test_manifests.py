"""The manifests on a real API server: it takes them as they are, and their account may do what the agent does."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.core.events import Event
from agent.core.records import ObjectKey
from agent.sources.kube import KubeSource
from agent.sources.kube_client import KubeClient, KubeTarget
from agent.sources.kube_events import EventRecorder
from tests.cluster.api_driver import NODES, SERVICES, ApiDriver, Refused, until
from tests.cluster.api_servers import AnyApiServer, driver, write_kubeconfig
from tests.cluster.real_apiserver import RealApiServer

BASE = Path(__file__).resolve().parents[2] / "manifests/base"
COLLECTIONS = {
    "ServiceAccount": "/api/v1/namespaces/kube-system/serviceaccounts",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "ConfigMap": "/api/v1/namespaces/kube-system/configmaps",
    "DaemonSet": "/apis/apps/v1/namespaces/kube-system/daemonsets",
}
Json = dict[str, Any]


POLICY_RBAC = BASE.parent / "components/network-policy/rbac.yaml"


def objects() -> list[Json]:
    return [item for name in ("rbac", "daemonset") for item in yaml.safe_load_all((BASE / f"{name}.yaml").read_text())]


def policy_objects() -> list[Json]:
    return list(yaml.safe_load_all(POLICY_RBAC.read_text()))


@pytest.fixture
def api(shared_api: AnyApiServer) -> RealApiServer:
    if not isinstance(shared_api, RealApiServer):
        pytest.skip("no real API server: ours knows neither DaemonSets nor RBAC")
    return shared_api


@pytest.fixture
def admin(api: RealApiServer) -> Iterator[ApiDriver]:
    made = driver(api)
    until(lambda: "kube-system" in {item["metadata"]["name"] for item in made.get("/api/v1/namespaces")["items"]})
    yield made
    for item in [*objects(), *policy_objects()]:
        with contextlib.suppress(Refused):  # where applying them failed
            made.request("DELETE", f"{COLLECTIONS[item['kind']]}/{item['metadata']['name']}")


@pytest.fixture
def token(admin: ApiDriver) -> str:
    """Apply the manifests, strictly, and get the account's token as the kubelet does."""
    for item in objects():
        admin.request("POST", COLLECTIONS[item["kind"]], item, fieldValidation="Strict")
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    made = admin.request("POST", f"{COLLECTIONS['ServiceAccount']}/ebproxy/token", request)
    return str(made["status"]["token"])


def allow_policy(admin: ApiDriver, account: ApiDriver) -> None:
    """Apply the component, and wait until the server heeds it."""
    for item in policy_objects():
        admin.request("POST", COLLECTIONS[item["kind"]], item, fieldValidation="Strict")

    def is_allowed() -> bool:
        with contextlib.suppress(Refused):
            return bool(account.get("/api/v1/pods"))
        return False

    until(is_allowed, what="the component's role")


@pytest.mark.parametrize("policy", [False, True], ids=["services", "policy"])
def test_the_account_may_do_what_the_agent_does(
    api: RealApiServer, admin: ApiDriver, token: str, tmp_path: Path, *, policy: bool
) -> None:
    if policy:
        allow_policy(admin, ApiDriver(api.url, token, api.ca_file))
    client = KubeClient(KubeTarget(write_kubeconfig(tmp_path / "kubeconfig", api, token)))
    failures: list[tuple[str, str]] = []
    events: list[Event] = []

    def on_error(cause: str, message: str) -> None:
        failures.append((cause, message))

    source = KubeSource(client, "node-1", events.append, on_error, policy=policy)
    source.start()
    try:
        until(lambda: source.is_synced or failures, what="every list is complete")
        recorder = EventRecorder(client, "node-1")
        recorder.warn(ObjectKey("default", "web"), "DataplaneFull", "no room")
        posted = f"{SERVICES.format('default').removesuffix('services')}events"
        until(lambda: [e for e in admin.get(posted)["items"] if e["reason"] == "DataplaneFull"], what="the Event")
        recorder.stop()
    finally:
        source.stop()

    assert failures == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/v1/secrets"),
        ("GET", "/api/v1/pods"),
        ("GET", "/apis/networking.k8s.io/v1/networkpolicies"),
        ("GET", f"{NODES}/node-1"),
        ("DELETE", f"{SERVICES.format('default')}/kubernetes"),
    ],
    ids=["secrets", "pods", "policies", "one node", "delete"],
)
def test_the_account_may_do_nothing_else(api: RealApiServer, token: str, method: str, path: str) -> None:
    with pytest.raises(Refused) as refused:
        ApiDriver(api.url, token, api.ca_file).request(method, path)

    assert refused.value.code == 403


@pytest.mark.parametrize("overlay", ["cluster", "kind"])
def test_every_overlay_is_valid(admin: ApiDriver, overlay: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl: nothing builds the kustomizations")
    command = ["kubectl", "kustomize", str(BASE.parent / "overlays" / overlay)]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    for item in yaml.safe_load_all(rendered):
        admin.request("POST", COLLECTIONS[item["kind"]], item, fieldValidation="Strict", dryRun="All")
