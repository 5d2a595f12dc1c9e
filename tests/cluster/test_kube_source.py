"""The source against a server that does nothing wrong: ours, and a real one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.core.events import ListEnded
from agent.core.records import Kind, ObjectKey, ServiceRecord
from agent.sources.kube_client import KubeClient, KubeTarget
from agent.sources.kube_events import EventRecorder
from agent.sources.kube_failures import ApiFailure, Cause
from tests.cluster.api_driver import NODES, SERVICES, SLICES, ApiDriver, endpoint_slice, node, service, until
from tests.cluster.api_servers import AnyApiServer, driver, write_kubeconfig
from tests.cluster.followed import NODE, Followed, assert_converges, following


@pytest.fixture
def followed(shared_api: AnyApiServer, tmp_path: Path) -> Iterator[Followed]:
    with following(shared_api, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        yield followed


def test_creations_updates_and_deletions_arrive(shared_api: AnyApiServer, namespace: str, followed: Followed) -> None:
    api = driver(shared_api, namespace)
    services, slices = SERVICES.format(namespace), SLICES.format(namespace)
    for name in ("a", "b", "c"):
        api.create(services, service(name))
        api.create(slices, endpoint_slice(f"{name}-1", name, ["10.1.0.1", "10.1.0.2"]))
    assert_converges(followed, api)
    api.patch(services, "a", {"spec": {"internalTrafficPolicy": "Local"}})
    api.patch(slices, "b-1", {"endpoints": [{"addresses": ["10.1.0.3"], "conditions": {"ready": False}}]})
    api.delete(services, "c")
    api.patch(slices, "c-1", {"metadata": {"labels": {"service.kubernetes.io/headless": ""}}})
    assert_converges(followed, api)

    changed = followed.held[Kind.SERVICE, f"{namespace}/a"]
    assert isinstance(changed, ServiceRecord)
    assert changed.internal_local
    assert {"a", "b"} <= followed.names(Kind.SERVICE)
    assert "c-1" not in followed.names(Kind.ENDPOINT_SLICE)
    assert followed.count(ListEnded, Kind.SERVICE) == 1
    assert not followed.errors


def test_only_this_node_is_seen(shared_api: AnyApiServer, namespace: str, followed: Followed) -> None:
    api = driver(shared_api)
    api.create(NODES, node(f"other-{namespace}"))
    api.create(NODES, node(NODE, "zone-b"))
    until(lambda: followed.names(Kind.NODE))
    api.delete(NODES, NODE)
    until(lambda: not followed.names(Kind.NODE))


def test_pages_and_streams_give_the_same(shared_api: AnyApiServer, namespace: str, tmp_path: Path) -> None:
    api = driver(shared_api, namespace)
    for number in range(7):
        api.create(SERVICES.format(namespace), service(f"web-{number}"))
    with following(shared_api, tmp_path) as (source, followed):
        for reflector in source._reflectors:
            reflector._has_streaming_list = False
            reflector._tuning = type(reflector._tuning)(page_size=2)
        until(lambda: source.is_synced)
        assert_converges(followed, api)


def test_forgotten_versions_cost_a_list(shared_api: AnyApiServer, namespace: str, tmp_path: Path) -> None:
    api = driver(shared_api, namespace)
    with following(shared_api, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        api.create(SERVICES.format(namespace), service("before"))
        shared_api.compact()
        api.create(SERVICES.format(namespace), service("after"))
        api.delete(SERVICES.format(namespace), "before")
        assert_converges(followed, api, 40)


@pytest.mark.parametrize("extra", [0, 300], ids=["ahead", "behind"])
def test_a_server_made_anew_replaces_everything(
    shared_api: AnyApiServer, namespace: str, tmp_path: Path, extra: int
) -> None:
    """``extra`` changes before the restart put the new server's versions behind those the source has seen."""
    services = SERVICES.format(namespace)
    api = driver(shared_api, namespace)
    with following(shared_api, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        for name in ("old", "both"):
            api.create(services, service(name))
        for number in range(extra):
            api.patch(services, "old", {"metadata": {"labels": {"count": str(number)}}})
        assert_converges(followed, api)
        shared_api.restart_empty()
        api = driver(shared_api, namespace)
        for name in ("new", "both"):
            api.create(services, service(name))
        assert_converges(followed, api, 40)

    assert "old" not in followed.names(Kind.SERVICE)
    assert {"new", "both"} <= followed.names(Kind.SERVICE)


def test_a_server_made_anew_that_is_ahead_already(
    shared_api: AnyApiServer, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is held off until the new server's versions have passed those it has seen."""
    services = SERVICES.format(namespace)
    api = driver(shared_api, namespace)
    held_off = threading.Event()
    send = KubeClient._send

    def send_unless_held_off(client: KubeClient, *arguments: Any) -> Any:
        if held_off.is_set():
            raise ApiFailure(Cause.CONNECT, "held off")
        return send(client, *arguments)

    monkeypatch.setattr(KubeClient, "_send", send_unless_held_off)
    with following(shared_api, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        api.create(services, service("old"))
        assert_converges(followed, api)
        held_off.set()
        seen = max(int(watch.resource_version) for watch in source.status())
        shared_api.restart_empty()
        api = driver(shared_api, namespace)
        api.create(services, service("new"))
        advance(api, services, seen)
        held_off.clear()
        assert_converges(followed, api, 40)

    assert "old" not in followed.names(Kind.SERVICE)
    assert "new" in followed.names(Kind.SERVICE)
    assert any("another server" in message for message in followed.messages)


def advance(api: ApiDriver, services: str, beyond: int) -> None:
    """Change something until the server's versions are past one."""
    for number in range(20_000):
        changed = api.patch(services, "new", {"metadata": {"labels": {"count": str(number)}}})
        if int(changed["metadata"]["resourceVersion"]) > beyond:
            return
    pytest.fail(f"the server has not come to {beyond}")


def test_credentials_put_right_are_read_again(shared_api: AnyApiServer, tmp_path: Path) -> None:
    with following(shared_api, tmp_path, token="nobody") as (source, followed):
        until(lambda: followed.errors["unauthorized"] >= 6)
        assert not source.is_synced
        write_kubeconfig(tmp_path / "kubeconfig", shared_api)
        until(lambda: source.is_synced)


def test_a_warning_becomes_an_event(shared_api: AnyApiServer, namespace: str, tmp_path: Path) -> None:
    api = driver(shared_api, namespace)
    web = api.create(SERVICES.format(namespace), service("web"))
    client = KubeClient(KubeTarget(write_kubeconfig(tmp_path / "kubeconfig", shared_api)))
    recorder = EventRecorder(client, NODE)
    key = ObjectKey(namespace, "web")

    assert recorder.warn(key, "MapFull", "no room for 12 backends")
    assert not recorder.warn(key, "MapFull", "no room for 12 backends")
    as_kubectl_describe = {
        "fieldSelector": f"involvedObject.name=web,involvedObject.namespace={namespace},involvedObject.kind=Service"
        f",involvedObject.uid={web['metadata']['uid']}"
    }
    events = f"/api/v1/namespaces/{namespace}/events"
    found = until(lambda: api.get(events, **as_kubectl_describe)["items"], 20, "the event")
    recorder.stop()
    client.close()

    assert [(event["reason"], event["involvedObject"]["name"], event["type"]) for event in found] == [
        ("MapFull", "web", "Warning")
    ]
