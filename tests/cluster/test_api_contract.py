"""What the agent relies on of an API server, asked of the tests' own and of a real one alike.

Source: https://kubernetes.io/docs/reference/using-api/api-concepts/
"""

from __future__ import annotations

import json

import pytest

from tests.cluster.api_driver import (
    NODES,
    SERVICES,
    SLICES,
    ApiDriver,
    Object,
    Refused,
    endpoint_slice,
    node,
    service,
    take,
    until,
)
from tests.cluster.api_servers import AnyApiServer, driver

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
STREAM = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "allowWatchBookmarks": "true"}


@pytest.fixture
def api(shared_api: AnyApiServer, namespace: str) -> ApiDriver:
    return driver(shared_api, namespace)


@pytest.fixture
def services(namespace: str) -> str:
    return SERVICES.format(namespace)


def names(items: list[Object]) -> list[str]:
    return [item["metadata"]["name"] for item in items]


def version(source: Object) -> str:
    found = source["metadata"]["resourceVersion"]
    assert isinstance(found, str)
    return found


def seen(events: list[Object]) -> list[tuple[str, str]]:
    return [(event["type"], event["object"]["metadata"]["name"]) for event in events]


def status_of(failure: Refused) -> Object:
    found: Object = json.loads(failure.body)
    return found


def test_versions_increase_with_each_change(api: ApiDriver, services: str) -> None:
    created = api.create(services, service("web"))
    patched = api.patch(services, "web", {"metadata": {"labels": {"a": "b"}}})
    listed = api.get(services)

    assert int(version(created)) < int(version(patched)) <= int(version(listed))
    assert version(listed["items"][0]) == version(patched)


def test_list_items_carry_no_kind(api: ApiDriver, services: str) -> None:
    api.create(services, service("web"))
    listed = api.get(services)

    assert (listed["kind"], listed["apiVersion"]) == ("ServiceList", "v1")
    assert "kind" not in listed["items"][0]


def test_an_update_that_changes_nothing_makes_no_version(api: ApiDriver, services: str) -> None:
    created = api.create(services, service("web"))

    assert version(api.update(services, created)) == version(created)


def test_update_of_a_stale_version_conflicts(api: ApiDriver, services: str) -> None:
    stale = api.create(services, service("web"))
    api.patch(services, "web", {"metadata": {"labels": {"a": "b"}}})
    stale["metadata"]["labels"] = {"a": "c"}
    with pytest.raises(Refused) as refused:
        api.update(services, stale)

    assert (refused.value.code, status_of(refused.value)["reason"]) == (409, "Conflict")


def test_create_twice_conflicts(api: ApiDriver, services: str) -> None:
    api.create(services, service("web"))
    with pytest.raises(Refused) as refused:
        api.create(services, service("web"))

    assert (refused.value.code, status_of(refused.value)["reason"]) == (409, "AlreadyExists")


def test_absent_object_is_not_found(api: ApiDriver, services: str) -> None:
    with pytest.raises(Refused) as refused:
        api.get(f"{services}/absent")

    assert (refused.value.code, status_of(refused.value)["reason"]) == (404, "NotFound")


def test_a_wrong_token_is_unauthorized(shared_api: AnyApiServer) -> None:
    with pytest.raises(Refused) as refused:
        ApiDriver(shared_api.url, "wrong", shared_api.ca_file).get("/api/v1/services")

    assert refused.value.code == 401


def test_a_new_server_has_another_service_of_its_own(shared_api: AnyApiServer) -> None:
    """Its UID is how one store is told from another."""
    narrowed = {"fieldSelector": "metadata.name=kubernetes"}

    def uid() -> str:
        items = driver(shared_api).get(SERVICES.format("default"), **narrowed)["items"]
        assert names(items) in ([], ["kubernetes"])
        return str(items[0]["metadata"]["uid"]) if items else ""

    before = until(uid)
    shared_api.compact()

    assert until(uid) == before
    shared_api.restart_empty()
    assert until(uid) != before


# Watch


def test_watch_from_a_list_sees_exactly_what_came_after(api: ApiDriver, services: str) -> None:
    api.create(services, service("before"))
    listed = api.get(services)
    api.create(services, service("web"))
    api.patch(services, "web", {"metadata": {"labels": {"a": "b"}}})
    api.delete(services, "before")
    with api.watch(services, resourceVersion=version(listed)) as events:
        found = take(events, 3)
        api.create(services, service("later"))
        found += take(events, 1)

    assert seen(found) == [("ADDED", "web"), ("MODIFIED", "web"), ("DELETED", "before"), ("ADDED", "later")]
    versions = [int(version(event["object"])) for event in found]
    assert versions == sorted(set(versions))
    assert int(version(listed)) < versions[0]


@pytest.mark.parametrize("start", ["", "0"])
def test_watch_without_a_version_begins_with_what_there_is(api: ApiDriver, services: str, start: str) -> None:
    created = api.create(services, service("web"))
    until(lambda: version(api.get(f"{services}/web", resourceVersion="0")) == version(created))
    query = {"resourceVersion": start} if start else {}
    with api.watch(services, **query) as events:
        found = take(events, 1)
        api.delete(services, "web")
        found += take(events, 1)

    assert seen(found) == [("ADDED", "web"), ("DELETED", "web")]
    assert found[0]["object"]["kind"] == "Service"


def test_watch_ends_in_time_and_says_how_far_it_came(api: ApiDriver, services: str) -> None:
    start = version(api.get(services))
    query = {"resourceVersion": start, "allowWatchBookmarks": "true", "timeoutSeconds": "6"}
    with api.watch(services, **query) as events:
        created = api.create(services, service("web"))
        found = list(events)

    assert found[0]["type"] == "ADDED"
    assert {event["type"] for event in found[1:]} == {"BOOKMARK"}
    assert int(version(found[-1]["object"])) >= int(version(created))


def test_no_bookmarks_unless_asked(api: ApiDriver, services: str) -> None:
    created = api.create(services, service("web"))
    with api.watch(services, resourceVersion=version(created), timeoutSeconds="3") as events:
        assert list(events) == []


def gone(api: ApiDriver, path: str, **query: str) -> Object:
    """Return the Status of a watch that is refused, in whichever of the two ways it is said."""
    try:
        with api.watch(path, **query) as events:
            event = next(events)
    except Refused as refused:
        return status_of(refused)
    assert event["type"] == "ERROR"
    found: Object = event["object"]
    return found


def test_watch_from_a_forgotten_version_is_gone(shared_api: AnyApiServer, api: ApiDriver, services: str) -> None:
    api.create(services, service("web"))
    shared_api.compact()
    status = gone(api, services, resourceVersion="1")

    assert (status["kind"], status["code"], status["reason"]) == ("Status", 410, "Expired")


# Streaming list


def test_streaming_list_ends_with_a_marked_bookmark_and_goes_on(api: ApiDriver, services: str) -> None:
    for name in ("a", "b"):
        api.create(services, service(name))
    last = api.get(services)
    with api.watch(services, **STREAM) as events:
        found = [next(events) for _ in range(3)]
        api.delete(services, "a")
        found.append(next(events))

    assert sorted(seen(found[:2])) == [("ADDED", "a"), ("ADDED", "b")]
    assert found[2]["type"] == "BOOKMARK"
    assert found[2]["object"]["metadata"]["annotations"] == {INITIAL_EVENTS_END: "true"}
    assert int(version(found[2]["object"])) >= int(version(last))
    assert seen(found[3:]) == [("DELETED", "a")]


def test_streaming_list_of_nothing_is_a_bookmark(api: ApiDriver, services: str) -> None:
    with api.watch(services, **STREAM) as events:
        first = next(events)

    assert first["type"] == "BOOKMARK"
    assert first["object"]["metadata"]["annotations"] == {INITIAL_EVENTS_END: "true"}


def test_watch_from_the_bookmark_repeats_nothing(api: ApiDriver, services: str) -> None:
    api.create(services, service("a"))
    with api.watch(services, **STREAM) as events:
        end = [next(events) for _ in range(2)][1]
    api.create(services, service("b"))
    with api.watch(services, resourceVersion=version(end["object"])) as events:
        assert seen(take(events, 1)) == [("ADDED", "b")]


@pytest.mark.parametrize(
    "query",
    [
        pytest.param({"sendInitialEvents": "true"}, id="without-match"),
        pytest.param({"resourceVersionMatch": "NotOlderThan", "resourceVersion": "1"}, id="match-without-initial"),
    ],
)
def test_streaming_list_asked_wrongly_is_invalid(api: ApiDriver, services: str, query: dict[str, str]) -> None:
    with pytest.raises(Refused) as refused, api.watch(services, **query):
        pass

    assert (refused.value.code, status_of(refused.value)["reason"]) == (422, "Invalid")


# Pages


def pages(api: ApiDriver, path: str, limit: int) -> list[Object]:
    found = [api.get(path, limit=str(limit))]
    while token := found[-1]["metadata"].get("continue"):
        found.append(api.get(path, **{"limit": str(limit), "continue": token}))
    return found


def test_pages_make_up_the_list(api: ApiDriver, services: str) -> None:
    wanted = [f"web-{number}" for number in range(7)]
    for name in wanted:
        api.create(services, service(name))
    found = pages(api, services, 3)

    assert [len(page["items"]) for page in found] == [3, 3, 1]
    assert names([item for page in found for item in page["items"]]) == wanted
    assert len({version(page) for page in found}) == 1
    assert found[0]["metadata"]["remainingItemCount"] == 4


def test_later_pages_show_the_time_of_the_first(api: ApiDriver, services: str) -> None:
    for name in ("a", "b", "c"):
        api.create(services, service(name))
    first = api.get(services, limit="2")
    api.delete(services, "c")
    api.create(services, service("d"))
    second = api.get(services, **{"limit": "2", "continue": first["metadata"]["continue"]})

    assert names(second["items"]) == ["c"]
    assert version(second) == version(first)
    with api.watch(services, resourceVersion=version(second)) as events:
        assert seen(take(events, 2)) == [("DELETED", "c"), ("ADDED", "d")]


def test_a_page_of_a_forgotten_version_is_gone(shared_api: AnyApiServer, api: ApiDriver, services: str) -> None:
    for name in ("a", "b", "c"):
        api.create(services, service(name))
    token = api.get(services, limit="2")["metadata"]["continue"]
    api.patch(services, "a", {"metadata": {"labels": {"a": "b"}}})
    shared_api.compact()
    with pytest.raises(Refused) as refused:
        api.get(services, **{"limit": "2", "continue": token})

    assert (refused.value.code, status_of(refused.value)["reason"]) == (410, "Expired")


def test_list_of_a_future_version_asks_for_patience(api: ApiDriver, services: str) -> None:
    future = str(int(version(api.get(services))) + 100_000)
    with pytest.raises(Refused) as refused:
        api.get(services, resourceVersion=future)

    assert (refused.value.code, status_of(refused.value)["reason"]) == (504, "Timeout")
    assert status_of(refused.value)["details"]["retryAfterSeconds"] == 1


# Selectors


def test_field_selector_shows_one_node(api: ApiDriver, namespace: str) -> None:
    mine, other = f"{namespace}-mine", f"{namespace}-other"
    query = {"fieldSelector": f"metadata.name={mine}"}
    start = version(api.get(NODES, **query))
    for name in (other, mine):
        api.create(NODES, node(name))

    assert names(api.get(NODES, **query)["items"]) == [mine]
    with api.watch(NODES, resourceVersion=start, **query) as events:
        assert seen(take(events, 1)) == [("ADDED", mine)]


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        ("!hidden", ["open"]),
        ("hidden", ["blue", "red"]),
        ("hidden=red", ["red"]),
        ("hidden!=red", ["blue", "open"]),
        ("hidden in (red,green)", ["red"]),
        ("hidden notin (red),hidden", ["blue"]),
    ],
)
def test_label_selectors(api: ApiDriver, services: str, selector: str, wanted: list[str]) -> None:
    api.create(services, service("open"))
    for colour in ("red", "blue"):
        api.create(services, service(colour, labels={"hidden": colour}))

    assert names(api.get(services, labelSelector=selector)["items"]) == wanted


def test_a_label_that_leaves_the_selector_is_a_deletion(api: ApiDriver, namespace: str) -> None:
    slices = SLICES.format(namespace)
    label = "service.kubernetes.io/headless"
    api.create(slices, endpoint_slice("web-1", "web", ["10.0.0.1"]))
    start = version(api.get(slices))
    with api.watch(slices, resourceVersion=start, labelSelector=f"!{label}") as events:
        changed = api.patch(slices, "web-1", {"metadata": {"labels": {label: ""}}})
        found = take(events, 1)
        api.patch(slices, "web-1", {"metadata": {"labels": {label: None}}})
        found += take(events, 1)
        api.delete(slices, "web-1")
        found += take(events, 1)

    assert seen(found) == [("DELETED", "web-1"), ("ADDED", "web-1"), ("DELETED", "web-1")]
    assert version(found[0]["object"]) == version(changed)
    assert label not in found[0]["object"]["metadata"]["labels"]


def test_watch_from_a_future_version_hides_the_way_there(api: ApiDriver, services: str) -> None:
    """Why a source that resumes after a failure asks first where the server is."""
    future = str(int(version(api.get(services))) + 100_000)
    with api.watch(services, resourceVersion=future, timeoutSeconds="2") as events:
        api.create(services, service("web"))

        assert list(events) == []
