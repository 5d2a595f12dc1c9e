"""What the agent relies on of an API server for policy, asked of the tests' own and of a real one alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.api_driver import (
    CLUSTER_POLICIES,
    NAMESPACES,
    PODS,
    POLICIES,
    SERVICES,
    ApiDriver,
    Object,
    Refused,
    are_cluster_policies_defined,
    cluster_policy,
    define_cluster_policies,
    network_policy,
    pod,
    running,
    take,
    undefine_cluster_policies,
    until,
)
from tests.cluster.api_servers import AnyApiServer, driver
from tests.cluster.test_api_contract import STREAM, names, seen, version

ALIVE = {"fieldSelector": "status.phase!=Succeeded,status.phase!=Failed"}


@pytest.fixture
def api(shared_api: AnyApiServer, namespace: str) -> ApiDriver:
    return driver(shared_api, namespace)


@pytest.fixture
def pods(namespace: str) -> str:
    return PODS.format(namespace)


def start(api: ApiDriver, pods: str, name: str, *addresses: str, **spec: str) -> Object:
    api.create(pods, pod(name, {"app": name}, **spec))
    return api.set_status(pods, name, running(*addresses))


def test_a_pod_begins_as_pending_whatever_it_says(api: ApiDriver, pods: str) -> None:
    created = api.create(pods, pod("web") | {"status": running("10.0.0.1")})

    assert created["status"]["phase"] == "Pending"
    assert "podIP" not in created["status"]


def test_a_pods_status_is_a_resource_of_its_own(api: ApiDriver, pods: str) -> None:
    found = start(api, pods, "web", "10.0.0.1", "fd00::1")
    patched = api.patch(pods, "web", {"metadata": {"labels": {"app": "other"}}, "status": {"podIP": "10.0.0.9"}})

    assert found["status"]["podIPs"] == [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]
    assert patched["status"] == found["status"]
    assert patched["metadata"]["labels"] == {"app": "other"}
    patched["status"]["podIP"] = "10.0.0.9"
    assert api.update(pods, patched)["status"] == found["status"]


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_ends_is_a_deletion(api: ApiDriver, pods: str, phase: str) -> None:
    start(api, pods, "web", "10.0.0.1")
    since = version(api.get(pods))
    with api.watch(pods, resourceVersion=since, **ALIVE) as events:
        ended = api.set_status(pods, "web", {"phase": phase})
        found = take(events, 1)
        api.create(pods, pod("next"))
        found += take(events, 1)

    assert seen(found) == [("DELETED", "web"), ("ADDED", "next")]
    assert version(found[0]["object"]) == version(ended)
    assert names(api.get(pods, **ALIVE)["items"]) == ["next"]
    assert names(api.get(pods)["items"]) == ["next", "web"]


def test_a_streaming_list_leaves_out_pods_that_ended(api: ApiDriver, pods: str) -> None:
    for name in ("ended", "web"):
        start(api, pods, name, "10.0.0.1")
    ended = api.set_status(pods, "ended", {"phase": "Failed"})
    until(lambda: int(version(api.get(pods, resourceVersion="0"))) >= int(version(ended)))
    with api.watch(pods, **STREAM, **ALIVE) as events:
        found = [next(events) for _ in range(2)]

    assert seen(found[:1]) == [("ADDED", "web")]
    assert found[1]["type"] == "BOOKMARK"


def test_pods_of_a_node_are_selected(api: ApiDriver, pods: str) -> None:
    start(api, pods, "here", "10.0.0.1", node_name="node-1")
    start(api, pods, "there", "10.0.0.2", node_name="node-2")

    assert names(api.get(pods, fieldSelector="spec.nodeName=node-1,status.phase=Running")["items"]) == ["here"]
    assert names(api.get(pods, fieldSelector="spec.nodeName!=node-1")["items"]) == ["there"]


@pytest.mark.parametrize(
    ("collection", "selector"),
    [(PODS, "status.message=x"), (SERVICES, "status.phase!=Failed")],
    ids=["pods", "services"],
)
def test_a_field_that_cannot_be_selected_by_is_refused(
    api: ApiDriver, namespace: str, collection: str, selector: str
) -> None:
    with pytest.raises(Refused) as refused:
        api.get(collection.format(namespace), fieldSelector=selector)

    assert refused.value.code == 400


def test_a_pod_on_a_node_terminates_before_it_is_gone(api: ApiDriver, pods: str) -> None:
    start(api, pods, "web", "10.0.0.1", node_name="node-1")
    since = version(api.get(pods))
    with api.watch(pods, resourceVersion=since, **ALIVE) as events:
        api.delete(pods, "web")
        (marked,) = take(events, 1)
        api.delete(pods, "web", gracePeriodSeconds="0")
        until(lambda: not api.get(pods)["items"])
        gone = take(events, 1)
        while gone[-1]["type"] != "DELETED":  # the real one says first that there is no grace left
            gone += take(events, 1)

    assert marked["type"] == "MODIFIED"
    assert marked["object"]["metadata"]["deletionTimestamp"]
    assert marked["object"]["metadata"]["deletionGracePeriodSeconds"] == 30
    assert marked["object"]["status"]["podIP"] == "10.0.0.1"
    assert gone[-1]["object"]["metadata"]["name"] == "web"


def test_a_pod_without_a_node_is_gone_at_once(api: ApiDriver, pods: str) -> None:
    api.create(pods, pod("web"))
    api.delete(pods, "web")

    assert api.get(pods)["items"] == []


def test_a_namespace_has_its_name_for_a_label(api: ApiDriver, namespace: str) -> None:
    found = api.get(f"{NAMESPACES}/{namespace}")

    assert found["metadata"]["labels"]["kubernetes.io/metadata.name"] == namespace


def test_network_policies_are_watched(api: ApiDriver, namespace: str) -> None:
    policies = POLICIES.format(namespace)
    since = version(api.get("/apis/networking.k8s.io/v1/networkpolicies"))
    with api.watch("/apis/networking.k8s.io/v1/networkpolicies", resourceVersion=since) as events:
        api.create(policies, network_policy("web", egress=[{}], policyTypes=["Egress"]))
        api.delete(policies, "web")
        found = take(events, 2)

    assert seen(found) == [("ADDED", "web"), ("DELETED", "web")]
    assert found[0]["object"]["spec"]["egress"] == [{}]


# A kind that a CustomResourceDefinition defines


@pytest.fixture
def defined(shared_api: AnyApiServer) -> Iterator[ApiDriver]:
    """A server that knows ClusterNetworkPolicies, until the test ends."""
    made = driver(shared_api)
    define_cluster_policies(made)
    try:
        yield made
    finally:
        if are_cluster_policies_defined(made):
            undefine_cluster_policies(made)


def test_a_kind_that_is_not_defined_is_not_found(api: ApiDriver) -> None:
    assert not are_cluster_policies_defined(api)
    with pytest.raises(Refused) as listed:
        api.get(CLUSTER_POLICIES)
    with pytest.raises(Refused) as watched, api.watch(CLUSTER_POLICIES, **STREAM):
        pass

    assert (listed.value.code, watched.value.code) == (404, 404)


def test_a_defined_kind_is_watched(defined: ApiDriver) -> None:
    since = version(defined.get(CLUSTER_POLICIES))
    with defined.watch(CLUSTER_POLICIES, resourceVersion=since) as events:
        created = defined.create(CLUSTER_POLICIES, cluster_policy("all", priority=7))
        found = take(events, 1)
        defined.delete(CLUSTER_POLICIES, "all")
        found += take(events, 1)

    assert seen(found) == [("ADDED", "all"), ("DELETED", "all")]
    assert found[0]["object"]["spec"] == created["spec"]
    assert created["spec"]["priority"] == 7


def test_the_end_of_a_definition_deletes_the_objects_and_ends_the_watch(defined: ApiDriver) -> None:
    defined.create(CLUSTER_POLICIES, cluster_policy("all"))
    since = version(defined.get(CLUSTER_POLICIES))
    with defined.watch(CLUSTER_POLICIES, resourceVersion=since) as events:
        undefine_cluster_policies(defined)
        found = [(event["type"], event["object"]["metadata"]["name"]) for event in events]

    assert found[-1:] == [("DELETED", "all")]
