"""The source of what policy is made of, against a server that does nothing wrong: ours, and a real one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.core.addresses import parse_address
from agent.core.events import ListEnded, ListStarted
from agent.core.policy_records import NetworkPolicyRecord, PodRecord
from agent.core.records import POLICY_KINDS, SERVICE_KINDS, Kind
from tests.cluster.api_driver import (
    CLUSTER_POLICIES,
    NAMESPACES,
    PODS,
    POLICIES,
    ApiDriver,
    are_cluster_policies_defined,
    cluster_policy,
    define_cluster_policies,
    network_policy,
    pod,
    running,
    undefine_cluster_policies,
    until,
)
from tests.cluster.api_faults import Do, Fault
from tests.cluster.api_servers import OUR_TOKEN, AnyApiServer, OurApiServer, driver
from tests.cluster.apiserver import ApiServer, Options
from tests.cluster.followed import NODE, Followed, assert_converges, following

KIND = Kind.CLUSTER_NETWORK_POLICY


@pytest.fixture
def api(shared_api: AnyApiServer, namespace: str) -> Iterator[ApiDriver]:
    made = driver(shared_api, namespace)
    yield made
    if are_cluster_policies_defined(made):
        undefine_cluster_policies(made)


@pytest.fixture
def followed(shared_api: AnyApiServer, tmp_path: Path) -> Iterator[Followed]:
    with following(shared_api, tmp_path, policy=True) as (source, followed):
        until(lambda: source.is_synced, 30)
        yield followed


def start(api: ApiDriver, pods: str, name: str, *addresses: str, **spec: object) -> None:
    api.create(pods, pod(name, {"app": name}, **spec))  # type: ignore[arg-type]
    api.set_status(pods, name, running(*addresses))


def test_what_policy_is_made_of_arrives(api: ApiDriver, namespace: str, followed: Followed) -> None:
    pods, policies = PODS.format(namespace), POLICIES.format(namespace)
    start(api, pods, "web", "10.0.0.1", "fd00::1", node_name=NODE)
    start(api, pods, "other", "10.0.0.2", node_name="elsewhere")
    api.create(policies, network_policy("web", ingress=[{"from": [{"podSelector": {}}]}]))
    api.create(policies, network_policy("gone"))
    assert_converges(followed, api, policy=True)
    api.patch(pods, "other", {"metadata": {"labels": {"app": "changed"}}})
    api.patch(NAMESPACES, namespace, {"metadata": {"labels": {"team": "a"}}})
    api.patch(policies, "web", {"spec": {"policyTypes": ["Ingress", "Egress"]}})
    api.delete(policies, "gone")
    api.delete(pods, "web")
    assert_converges(followed, api, policy=True)

    web, other = (followed.held[Kind.POD, f"{namespace}/{name}"] for name in ("web", "other"))
    changed = followed.held[Kind.NETWORK_POLICY, f"{namespace}/web"]
    assert isinstance(web, PodRecord)
    assert isinstance(other, PodRecord)
    assert isinstance(changed, NetworkPolicyRecord)
    assert (web.is_local, web.is_terminating) == (True, True)
    assert web.addresses == (parse_address("10.0.0.1"), parse_address("fd00::1"))
    assert (other.is_local, other.labels) == (False, (("app", "changed"),))
    assert changed.egress == ()
    assert not followed.errors


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_ends_is_gone(api: ApiDriver, namespace: str, followed: Followed, phase: str) -> None:
    pods = PODS.format(namespace)
    start(api, pods, "job", "10.0.0.1", node_name=NODE)
    until(lambda: (Kind.POD, f"{namespace}/job") in followed.held)
    api.set_status(pods, "job", {"phase": phase})
    until(lambda: (Kind.POD, f"{namespace}/job") not in followed.held)
    assert_converges(followed, api, policy=True)

    assert api.get(f"{pods}/job")["status"]["podIP"] == "10.0.0.1"


def test_off_nothing_of_policy_is_watched(shared_api: AnyApiServer, namespace: str, tmp_path: Path) -> None:
    api = driver(shared_api, namespace)
    start(api, PODS.format(namespace), "web", "10.0.0.1", node_name=NODE)
    with following(shared_api, tmp_path) as (source, followed):
        until(lambda: source.is_synced, 30)
        threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("watch-")}
        assert_converges(followed, api)

        assert threads == {f"watch-{kind}" for kind in SERVICE_KINDS}
        assert {watch.kind for watch in source.status()} == SERVICE_KINDS
    assert not [kind for kind in POLICY_KINDS if followed.count(ListStarted, kind)]
    assert not [kind for kind, _ in followed.held if kind in POLICY_KINDS]


# ClusterNetworkPolicies, which need not be defined


def test_a_kind_may_appear_and_vanish(shared_api: AnyApiServer, api: ApiDriver, tmp_path: Path) -> None:
    with following(shared_api, tmp_path, policy=True) as (source, followed):
        until(lambda: source.is_synced, 30)
        assert source.describe()[str(KIND)] == "not defined"
        assert [followed.count(event, KIND) for event in (ListStarted, ListEnded)] == [1, 1]

        define_cluster_policies(api)
        api.create(CLUSTER_POLICIES, cluster_policy("all"))
        until(lambda: followed.names(KIND) == {"all"}, 30)
        assert source.describe()[str(KIND)] == "listed"

        undefine_cluster_policies(api)
        until(lambda: not followed.names(KIND), 30)
        until(lambda: source.describe()[str(KIND)] == "not defined", 30)

        define_cluster_policies(api)
        api.create(CLUSTER_POLICIES, cluster_policy("again"))
        until(lambda: followed.names(KIND) == {"again"}, 30)
        assert_converges(followed, api, policy=True)


@pytest.fixture
def ours() -> Iterator[OurApiServer]:
    server = OurApiServer(ApiServer(Options(bookmark_s=0.3, tokens={OUR_TOKEN})), has_kubernetes=True)
    server.start()
    yield server
    server.stop()


def undefined(server: OurApiServer) -> int:
    return len(server.server.asked("undefined", "clusternetworkpolicies"))


def test_that_it_is_absent_is_no_error(ours: OurApiServer, tmp_path: Path) -> None:
    with following(ours, tmp_path, policy=True) as (source, followed):
        until(lambda: source.is_synced)
        until(lambda: undefined(ours) >= 6)
        (status,) = (watch for watch in source.status() if watch.kind is KIND)

    assert (status.is_absent, status.failures, status.error) == (True, 0, "")
    assert followed.count(ListStarted, KIND) == 1
    assert not followed.errors


def test_an_absence_that_another_server_tells_of_is_not_believed(ours: OurApiServer, tmp_path: Path) -> None:
    """Whoever answers 404 in place of the server that was listed says nothing about its policies."""
    api = driver(ours)
    define_cluster_policies(api)
    api.create(CLUSTER_POLICIES, cluster_policy("all"))
    with following(ours, tmp_path, policy=True) as (source, followed):
        until(lambda: source.is_synced)
        ours.server.stop()
        nobody = Fault(Do.STATUS, code=404, times=-1)
        ours.server.faults.add(nobody)
        ours.server.start()
        until(lambda: nobody.hits > 30)
        assert followed.names(KIND) == {"all"}
        assert source.describe()[str(KIND)] not in ("listed", "not defined")
        ours.server.faults.clear()
        assert_converges(followed, api, policy=True)

    assert followed.count(ListStarted, KIND) == 1


def test_absence_is_not_believed_of_a_server_without_services(ours: OurApiServer, tmp_path: Path) -> None:
    fault = ours.server.faults.add(Fault(Do.STATUS, "services", "find", code=404, times=-1))
    with following(ours, tmp_path, policy=True) as (source, followed):
        until(lambda: fault.hits > 30)
        assert not followed.count(ListStarted, KIND)
        ours.server.faults.clear()
        until(lambda: source.is_synced)

    assert followed.count(ListEnded, KIND) == 1


def test_an_error_that_is_not_absence_is_one(ours: OurApiServer, tmp_path: Path) -> None:
    fault = ours.server.faults.add(Fault(Do.STATUS, "networkpolicies", code=404, times=6))
    define_cluster_policies(driver(ours))
    refused = ours.server.faults.add(Fault(Do.STATUS, "clusternetworkpolicies", code=403, times=6))
    with following(ours, tmp_path, policy=True) as (source, followed):
        until(lambda: fault.hits == 6 and refused.hits == 6)
        until(lambda: source.is_synced)

    assert followed.errors["server"] == 6
    assert followed.errors["forbidden"] == 6
    assert followed.count(ListEnded, KIND) == 1
