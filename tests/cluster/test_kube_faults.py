"""The source against a server that does everything wrong; each fault is shown to have happened."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.events import ListEnded, ListStarted
from agent.core.records import SERVICE_KINDS, Kind
from tests.cluster.api_driver import SERVICES, SLICES, ApiDriver, endpoint_slice, service, until
from tests.cluster.api_faults import Do, Fault
from tests.cluster.api_servers import OUR_TOKEN, OurApiServer, driver
from tests.cluster.api_store import Resource, Store
from tests.cluster.apiserver import ApiServer, Options
from tests.cluster.followed import QUICK, assert_converges, following

WEB = SERVICES.format("web")
SERVICE = Resource("", "v1", "services")
KUBERNETES = service("kubernetes", 443, clusterIP="10.96.0.1")
ALWAYS = -1


@pytest.fixture
def ours() -> Iterator[OurApiServer]:
    server = OurApiServer(ApiServer(Options(bookmark_s=0.5, tokens={OUR_TOKEN})))
    server.server.start()
    yield server
    server.stop()


@pytest.fixture
def api(ours: OurApiServer) -> ApiDriver:
    made = driver(ours, "web")
    for number in range(5):
        made.create(WEB, service(f"web-{number}", clusterIP=f"10.96.1.{number}"))
    return made


def watches(ours: OurApiServer) -> int:
    return len(ours.server.asked("watch", "services"))


def lists(ours: OurApiServer) -> int:
    """The lists of Services the source asked for; a probe is not one, nor are this test's own, which have no limit."""
    pages = [query for query in ours.server.asked("list", "services") if query.get("limit", "1") != "1"]
    return len(ours.server.asked("stream", "services")) + len(pages)


BROKEN_STREAMS = [
    pytest.param(Fault(Do.CUT), "cut", id="cut-mid-event"),
    pytest.param(Fault(Do.END), "cut", id="ended-mid-event"),
    pytest.param(Fault(Do.HALF_CLOSE), "cut", id="half-closed"),
    pytest.param(Fault(Do.STALL), "timeout", id="stalled-mid-event"),
    pytest.param(Fault(Do.GARBAGE, body="<html>Bad Gateway</html>"), "garbage", id="html"),
    pytest.param(Fault(Do.GARBAGE, body='{"type":"ADDED","object":{"metadata":'), "garbage", id="truncated-json"),
    pytest.param(Fault(Do.GARBAGE, body='{"type":"RENAMED","object":{}}'), "garbage", id="unknown-type"),
    pytest.param(Fault(Do.GARBAGE, body="\xff\xfe\x00"), "garbage", id="binary"),
    pytest.param(Fault(Do.GARBAGE, body="x" * (9 * 1024 * 1024)), "oversize", id="oversize-line"),
]


@pytest.mark.parametrize(("fault", "cause"), BROKEN_STREAMS)
def test_a_broken_watch_resumes_where_it_was(
    ours: OurApiServer, api: ApiDriver, tmp_path: Path, fault: Fault, cause: str
) -> None:
    """The fault strikes at the second event of a watch that was resumed; nothing is listed again."""
    fault = ours.server.faults.add(replace(fault, resource="services", verb="watch", after_events=1))
    ours.server.faults.add(Fault(Do.CUT, resource="services", verb="stream", after_events=6))
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        for name in ("cuts-the-list-stream", "arrives", "breaks", "follows"):
            api.create(WEB, service(name, clusterIP="10.96.2.1"))
        until(lambda: followed.errors[cause] >= 1)
        assert_converges(followed, api)

    first, second, *_ = [int(query["resourceVersion"]) for query in ours.server.asked("watch", "services")]
    assert first < second
    assert fault.hits == 1
    assert lists(ours) == 1
    assert followed.count(ListStarted, Kind.SERVICE) == 1


@pytest.mark.parametrize(("fault", "cause"), BROKEN_STREAMS)
def test_a_broken_streaming_list_never_counts_as_whole(
    ours: OurApiServer, api: ApiDriver, tmp_path: Path, fault: Fault, cause: str
) -> None:
    fault = ours.server.faults.add(replace(fault, resource="services", verb="stream", after_events=3))
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        assert_converges(followed, api)

    assert fault.hits == 1
    assert followed.errors[cause] == 1
    assert followed.count(ListStarted, Kind.SERVICE) == 2
    assert followed.count(ListEnded, Kind.SERVICE) == 1


@pytest.mark.parametrize("verb", ["list", "page"])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        pytest.param(Fault(Do.CUT), "cut", id="cut"),
        pytest.param(Fault(Do.STALL), "timeout", id="stall"),
        pytest.param(Fault(Do.NO_ANSWER), "timeout", id="no-answer"),
        pytest.param(Fault(Do.GARBAGE, body="<html>"), "garbage", id="html"),
        pytest.param(Fault(Do.STATUS, code=500, body="<html>"), "server", id="500"),
        pytest.param(Fault(Do.STATUS, code=410), "gone", id="410"),
    ],
)
def test_a_broken_page_starts_the_list_again(
    ours: OurApiServer, api: ApiDriver, tmp_path: Path, fault: Fault, cause: str, verb: str
) -> None:
    ours.server.options.streaming = "refuse"
    fault = ours.server.faults.add(replace(fault, resource="services", verb=verb))
    with following(ours, tmp_path, replace(QUICK, page_size=2, list_read_s=0.5)) as (source, followed):
        until(lambda: source.is_synced)
        assert_converges(followed, api)

    assert (fault.hits, followed.errors[cause]) == (1, 1)
    assert followed.count(ListStarted, Kind.SERVICE) == (2 if verb == "page" else 1)
    assert followed.count(ListEnded, Kind.SERVICE) == 1
    assert len(ours.server.asked("page", "services")) == (3 if verb == "page" else 2)


@pytest.mark.parametrize("streaming", ["refuse", "ignore"])
def test_a_server_without_streaming_lists_is_read_in_pages(
    ours: OurApiServer, api: ApiDriver, tmp_path: Path, streaming: str
) -> None:
    ours.server.options.streaming = streaming
    with following(ours, tmp_path, replace(QUICK, page_size=2, initial_read_s=0.3)) as (source, followed):
        ours.server.options.bookmark_s = 60
        until(lambda: source.is_synced)
        api.delete(WEB, "web-3")
        assert_converges(followed, api)

    assert len(ours.server.asked("page", "services")) == 2
    assert followed.errors["invalid"] == 0


def test_a_busy_server_that_ignores_streaming_is_read_in_pages(
    ours: OurApiServer, api: ApiDriver, tmp_path: Path
) -> None:
    """It is never silent, and its bookmarks end no list; the first of them gives it away."""
    ours.server.options.streaming = "ignore"
    ours.server.options.bookmark_s = 0.2
    with following(ours, tmp_path, replace(QUICK, initial_read_s=60)) as (source, followed):
        until(lambda: source.is_synced)
        assert_converges(followed, api)

    assert followed.errors["invalid"] == 3
    assert followed.count(ListEnded, Kind.SERVICE) == 1
    assert len([query for query in ours.server.asked("list", "services") if query.get("limit") == "500"]) == 1


def test_a_response_that_ends_within_an_event_is_said_to(ours: OurApiServer, api: ApiDriver, tmp_path: Path) -> None:
    ours.server.faults.add(Fault(Do.END, "services", "stream", after_events=6))
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        api.create(WEB, service("late", clusterIP="10.96.2.1"))
        assert_converges(followed, api)

    assert "Service: the stream ended within an event" in followed.messages


@pytest.mark.parametrize(("initial_read_s", "read_s", "timeouts"), [(60, 0.4, True), (0.4, 60, False)])
def test_list_and_watch_have_timeouts_of_their_own(
    ours: OurApiServer, api: ApiDriver, tmp_path: Path, initial_read_s: float, read_s: float, timeouts: bool
) -> None:
    """Though both are one response."""
    ours.server.options.bookmark_s = 60
    with following(ours, tmp_path, replace(QUICK, initial_read_s=initial_read_s, read_s=read_s)) as (source, followed):
        until(lambda: source.is_synced)
        quiet_until = time.monotonic() + 1.2
        until(lambda: followed.errors["timeout"] >= 3 or time.monotonic() > quiet_until)

    assert (followed.errors["timeout"] >= 3) is timeouts


def test_gone_as_an_answer_lists_again(ours: OurApiServer, api: ApiDriver, tmp_path: Path) -> None:
    """The other way to say it, an ERROR event, is in the contract suite's `compact`."""
    cut = ours.server.faults.add(Fault(Do.CUT, "services", "stream", after_events=6))
    gone = ours.server.faults.add(Fault(Do.STATUS, "services", "watch", code=410))
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        api.delete(WEB, "web-0")
        until(lambda: followed.errors["gone"])
        assert_converges(followed, api)

    assert (cut.hits, gone.hits) == (1, 1)
    assert lists(ours) == 2
    assert followed.names(Kind.SERVICE) == {"web-1", "web-2", "web-3", "web-4"}


def test_a_watched_version_that_is_compacted_lists_again(ours: OurApiServer, api: ApiDriver, tmp_path: Path) -> None:
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        with ours.server.store.changed:  # no watch sees these before they are forgotten
            ours.server.store.delete(SERVICE, ("web", "web-0"))
            ours.server.store.compact()
        until(lambda: followed.errors["gone"])
        assert_converges(followed, api)


@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_is_honoured(ours: OurApiServer, api: ApiDriver, tmp_path: Path, code: int) -> None:
    fault = Fault(Do.STATUS, "services", "stream", times=2, code=code, retry_after="1")
    ours.server.faults.add(fault)
    started_at = time.monotonic()
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        took_s = time.monotonic() - started_at
        assert_converges(followed, api)

    assert fault.hits == 2
    assert 2.0 <= took_s < 4.0


def test_stop_does_not_wait_for_retry_after(ours: OurApiServer, tmp_path: Path) -> None:
    fault = ours.server.faults.add(Fault(Do.STATUS, times=ALWAYS, code=429, retry_after="3600"))
    with following(ours, tmp_path) as (source, _):
        until(lambda: fault.hits >= 3)
        started_at = time.monotonic()
        source.stop()
        assert time.monotonic() - started_at < 1


@pytest.mark.parametrize("do", [Do.NO_ANSWER, Do.SILENT, Do.STALL])
def test_stop_ends_blocked_reads(ours: OurApiServer, api: ApiDriver, tmp_path: Path, do: Do) -> None:
    fault = ours.server.faults.add(Fault(do, "services", "stream", times=ALWAYS))
    with following(ours, tmp_path, replace(QUICK, initial_read_s=60)) as (source, _):
        until(lambda: fault.hits)
        started_at = time.monotonic()
        source.stop()
        assert time.monotonic() - started_at < 1


def test_errors_back_off(ours: OurApiServer, tmp_path: Path) -> None:
    """In the first second after a start a server that always fails is asked a few times, not hundreds of times."""
    fault = ours.server.faults.add(Fault(Do.STATUS, "services", "stream", times=ALWAYS, code=500))
    with following(ours, tmp_path, replace(QUICK, backoff_first_s=0.05, backoff_last_s=10)) as (_, followed):
        started_at = time.monotonic()
        until(lambda: fault.hits >= 5)
        took_s = time.monotonic() - started_at

    assert took_s >= (0.05 + 0.1 + 0.2 + 0.4) / 2
    assert followed.errors["server"] >= 4


def test_a_slow_drip_is_read(ours: OurApiServer, api: ApiDriver, tmp_path: Path) -> None:
    fault = ours.server.faults.add(Fault(Do.DRIP, "services", "stream"))
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        api.create(WEB, service("late", clusterIP="10.96.2.1"))
        assert_converges(followed, api)

    assert fault.hits == 1
    assert not followed.errors


def test_a_silent_watch_is_noticed(ours: OurApiServer, api: ApiDriver, tmp_path: Path) -> None:
    cut = ours.server.faults.add(Fault(Do.CUT, "services", "stream", after_events=6))
    silent = ours.server.faults.add(Fault(Do.SILENT, "services", "watch"))
    with following(ours, tmp_path, replace(QUICK, read_s=0.7)) as (source, followed):
        until(lambda: source.is_synced)
        api.create(WEB, service("cuts", clusterIP="10.96.2.1"))
        until(lambda: silent.hits)
        api.create(WEB, service("missed", clusterIP="10.96.2.2"))
        assert_converges(followed, api)

    assert cut.hits == 1
    assert followed.errors["timeout"] == 1
    assert lists(ours) == 1


def test_bookmarks_keep_a_quiet_watch_alive_and_fresh(ours: OurApiServer, api: ApiDriver, tmp_path: Path) -> None:
    """Other resources move the counter on; without bookmarks the version would stay, and the watch time out."""
    ours.server.options.bookmark_s = 0.2
    with following(ours, tmp_path, replace(QUICK, read_s=1.0)) as (source, followed):
        until(lambda: source.is_synced)
        for number in range(20):
            api.create(SLICES.format("web"), endpoint_slice(f"other-{number}", "other", ["10.1.0.1"]))
        current = str(ours.server.store.current)
        until(lambda: source.status()[0].resource_version == current)
        quiet_until = time.time() + 1.5
        until(lambda: source.status()[0].last_contact > quiet_until)

    assert not followed.errors
    assert (lists(ours), watches(ours)) == (1, 0)


def test_an_outage_takes_nothing_away(ours: OurApiServer, api: ApiDriver, tmp_path: Path) -> None:
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        assert_converges(followed, api)
        held, count = dict(followed.held), len(followed.events)
        ours.server.stop()
        until(lambda: followed.errors["connect"] >= 6)
        assert (followed.held, len(followed.events)) == (held, count)
        assert source.is_synced
        assert "Connection refused" in source.status()[0].error
        ours.server.start()
        api.delete(WEB, "web-0")
        assert_converges(followed, api)

    assert lists(ours) == 1


def test_a_server_that_went_back_in_time_is_listed(ours: OurApiServer, api: ApiDriver, tmp_path: Path) -> None:
    """A watch from a version the new server has yet to reach would hide what it does until then."""
    with following(ours, tmp_path) as (source, followed):
        for number in range(50):
            api.patch(WEB, "web-0", {"metadata": {"labels": {"count": str(number)}}})
        until(lambda: source.is_synced)
        assert_converges(followed, api)
        ours.restart_empty()
        fresh = driver(ours, "web")
        fresh.create(WEB, service("new", clusterIP="10.96.2.1"))
        until(lambda: followed.errors["rewound"] >= 1)
        assert_converges(followed, fresh)

    assert followed.names(Kind.SERVICE) == {"new"}


def made_anew(store: Store, *, has_kubernetes: bool) -> Store:
    """Return the store of another server, which has come further than this one's, to other objects."""
    fresh = Store(first_version=store.current + 1000)
    if has_kubernetes:
        fresh.create(SERVICE, "default", KUBERNETES)
    for name, ip in (("new", "10.96.3.1"), ("web-0", "10.96.3.2")):
        fresh.create(SERVICE, "web", service(name, clusterIP=ip))
    fresh.create(
        Resource("discovery.k8s.io", "v1", "endpointslices"), "web", endpoint_slice("new", "new", ["10.1.0.9"])
    )
    return fresh


@pytest.mark.parametrize(
    ("had_kubernetes", "has_kubernetes"),
    [
        pytest.param(True, True, id="another-uid"),
        pytest.param(True, False, id="not-made-yet"),
        pytest.param(False, True, id="made-since"),
    ],
)
def test_another_server_that_came_further_is_listed(
    ours: OurApiServer, api: ApiDriver, tmp_path: Path, had_kubernetes: bool, has_kubernetes: bool
) -> None:
    """Its versions continue ours as if nothing had happened, but a watch would never say what is gone."""
    if had_kubernetes:
        ours.server.store.create(SERVICE, "default", KUBERNETES)
    api.create(SLICES.format("web"), endpoint_slice("old", "web-1", ["10.1.0.1"]))
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        assert_converges(followed, api)
        last_seen = int(source.status()[0].resource_version)
        ours.server.stop()
        ours.server.store = made_anew(ours.server.store, has_kubernetes=has_kubernetes)
        ours.server.start()
        assert_converges(followed, api)
        api.create(WEB, service("later", clusterIP="10.96.3.3"))
        assert_converges(followed, api)
        until(lambda: followed.errors["rewound"] == 3, what="each kind has found it out")

    assert followed.names(Kind.SERVICE) - {"kubernetes"} == {"web-0", "new", "later"}
    assert followed.names(Kind.ENDPOINT_SLICE) == {"new"}
    assert any("another server" in message for message in followed.messages)
    assert int(source.status()[0].resource_version) > last_seen


def test_the_same_server_back_again_is_resumed(ours: OurApiServer, api: ApiDriver, tmp_path: Path) -> None:
    ours.server.store.create(SERVICE, "default", KUBERNETES)
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        for name in ("first", "second"):
            found = len(ours.server.asked("find", "services"))
            ours.server.stop()
            ours.server.store.create(SERVICE, "web", service(name, clusterIP="10.96.3.1"))
            ours.server.start()
            until(lambda: len(ours.server.asked("find", "services")) >= found + 3)  # noqa: B023
            assert_converges(followed, api)

    assert (lists(ours), followed.errors["rewound"]) == (1, 0)
    assert [followed.count(ListStarted, kind) for kind in SERVICE_KINDS] == [1, 1, 1]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(Do.STATUS, code=500), id="500"),
        pytest.param(Fault(Do.GARBAGE, body="<html>"), id="html"),
        pytest.param(Fault(Do.CUT), id="cut"),
        pytest.param(Fault(Do.NO_ANSWER), id="no-answer"),
    ],
)
def test_nothing_is_resumed_until_the_server_has_said_who_it_is(
    ours: OurApiServer, api: ApiDriver, tmp_path: Path, fault: Fault
) -> None:
    ours.server.store.create(SERVICE, "default", KUBERNETES)
    with following(ours, tmp_path, replace(QUICK, list_read_s=0.3)) as (source, followed):
        until(lambda: source.is_synced)
        ours.server.stop()
        ours.server.store = made_anew(ours.server.store, has_kubernetes=True)
        fault = ours.server.faults.add(replace(fault, resource="services", verb="find", times=6))
        ours.server.start()
        assert_converges(followed, api)
        until(lambda: [followed.count(ListEnded, kind) for kind in SERVICE_KINDS] == [2, 2, 2])

    assert fault.hits == 6
    assert followed.names(Kind.SERVICE) == {"kubernetes", "web-0", "new"}


def test_a_server_that_may_not_say_who_it_is_is_followed(ours: OurApiServer, api: ApiDriver, tmp_path: Path) -> None:
    ours.server.faults.add(Fault(Do.STATUS, "services", "find", times=ALWAYS, code=403))
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        assert_converges(followed, api)

    assert not followed.errors


def test_a_malformed_object_costs_only_itself(ours: OurApiServer, api: ApiDriver, tmp_path: Path) -> None:
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        api.create(WEB, service("bad", clusterIP="not an address"))
        api.create(WEB, service("good", clusterIP="10.96.2.2"))
        until(lambda: "good" in followed.names(Kind.SERVICE))

    assert "bad" not in followed.names(Kind.SERVICE)
    assert not followed.errors
    assert lists(ours) == 1


def test_forbidden_names_the_resource_and_the_remedy(
    ours: OurApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours.server.faults.add(Fault(Do.STATUS, "endpointslices", times=4, code=403))
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)

    assert followed.errors["forbidden"] == 4
    told = [record.getMessage() for record in caplog.records if "forbidden resource" in record.getMessage()]
    assert len(told) == 1
    assert "endpointslices" in told[0]
    assert "ClusterRole" in told[0]


def test_a_failure_is_logged_once_until_it_is_over(
    ours: OurApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours.server.faults.add(Fault(Do.STATUS, "services", "stream", times=10, code=500))
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        until(lambda: source.status()[0].failures == 0)

    assert followed.errors["server"] == 10
    assert len([record for record in caplog.records if "cause=server" in record.getMessage()]) == 1


def test_a_port_that_is_not_http_is_survived(tmp_path: Path) -> None:
    """The server's port is somebody else's for a while."""
    ours = OurApiServer(ApiServer(Options(tokens={OUR_TOKEN})))
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        ours.server.port = squatter.getsockname()[1]
        stop = threading.Event()
        talker = threading.Thread(target=_talk_nonsense, args=(squatter, stop))
        talker.start()
        with following(ours, tmp_path) as (source, followed):
            until(lambda: followed.errors["cut"] >= 4)
            stop.set()
            talker.join()
            squatter.close()
            ours.server.start()
            until(lambda: source.is_synced)
    ours.stop()


def _talk_nonsense(squatter: socket.socket, stop: threading.Event) -> None:
    squatter.settimeout(0.05)
    while not stop.is_set():
        try:
            connection, _ = squatter.accept()
        except TimeoutError:
            continue
        with connection:
            connection.recv(4096)
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")


def test_events_arrive_at_once(ours: OurApiServer, api: ApiDriver, tmp_path: Path) -> None:
    """From the server's write to emit; the median must not hide a read that waits for a full buffer."""
    took_s: list[float] = []
    with following(ours, tmp_path) as (source, followed):
        until(lambda: source.is_synced)
        store = ours.server.store
        for number in range(50):
            followed.arrived.clear()
            started_at = time.perf_counter()
            store.merge(SERVICE, ("web", "web-0"), {"metadata": {"labels": {"count": str(number)}}})
            assert followed.arrived.wait(5)
            took_s.append(time.perf_counter() - started_at)

    took_s.sort()
    assert took_s[25] < 0.02
    print(f"median {took_s[25] * 1e6:.0f} us, worst {took_s[-1] * 1e6:.0f} us")
