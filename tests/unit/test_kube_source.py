"""The parts of the Kubernetes source that need no server."""

from __future__ import annotations

import email.utils
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.records import Kind, ObjectKey
from agent.errors import SourceError
from agent.sources.kube import resources
from agent.sources.kube_client import retry_after_s
from agent.sources.kube_events import Complaint, EventRecorder, event_body
from agent.sources.kube_failures import ApiFailure, Backoff, Cause
from agent.sources.kube_identity import read_uid
from agent.sources.kube_stream import LineFramer, is_older, read_event, read_head

# Framing


@given(lines=st.lists(st.binary().map(lambda b: b.replace(b"\n", b"")), max_size=8), cuts=st.lists(st.integers(0, 200)))
def test_lines_come_out_whole_however_they_were_cut(lines: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    edges = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    framer = LineFramer()
    found = [line for a, b in pairwise(edges) for line in framer.feed(stream[a:b])]

    assert found == [line for line in lines if line.strip()]
    assert framer.is_between_lines


def test_an_unfinished_line_is_known_to_be_one() -> None:
    framer = LineFramer()

    assert framer.feed(b'{"a":1}\n{"b"') == [b'{"a":1}']
    assert not framer.is_between_lines


@pytest.mark.parametrize("chunks", [[b"x" * 11], [b"x" * 6, b"x" * 6], [b"ok\n" + b"x" * 11]])
def test_a_line_has_a_limit(chunks: list[bytes]) -> None:
    framer = LineFramer(limit_bytes=10)
    with pytest.raises(ApiFailure) as failed:
        list(map(framer.feed, chunks))

    assert failed.value.cause == Cause.OVERSIZE


def test_a_long_line_in_drips_takes_linear_time() -> None:
    framer = LineFramer()
    started_at = time.process_time()
    for _ in range(300_000):
        framer.feed(b"x")

    assert framer.feed(b"\n") == [b"x" * 300_000]
    assert time.process_time() - started_at < 3


@pytest.mark.parametrize("line", [b"<html>", b"[]", b'{"type":"ADDED"}', b'{"type":1,"object":{}}', b"\xff", b"{"])
def test_what_is_no_event_is_garbage(line: bytes) -> None:
    with pytest.raises(ApiFailure) as failed:
        read_event(line)

    assert failed.value.cause == Cause.GARBAGE


def test_heads_are_read() -> None:
    head = read_head(b'{"metadata":{"name":"a","namespace":"n","resourceVersion":"7","uid":"u"},"spec":{}}')

    assert (head.key, head.version, head.is_initial_end) == (ObjectKey("n", "a"), "7", False)


@pytest.mark.parametrize(
    ("version", "than", "older"),
    [
        ("9", "10", True),
        ("10", "9", False),
        ("10", "10", False),
        ("", "10", False),
        ("a", "b", False),
        ("1", "", False),
    ],
)
def test_versions_compare_as_numbers_or_not_at_all(version: str, than: str, older: bool) -> None:
    assert is_older(version, than) is older


# Failures


@pytest.mark.parametrize(
    ("code", "body", "cause"),
    [
        (0, b'{"code":410,"reason":"Expired","message":"too old"}', Cause.GONE),
        (0, b'{"code":500,"reason":"InternalError"}', Cause.SERVER),
        (0, b"{}", Cause.SERVER),
        (400, b"{}", Cause.INVALID),
        (401, b"Unauthorized", Cause.UNAUTHORIZED),
        (403, b"", Cause.FORBIDDEN),
        (404, b"", Cause.SERVER),
        (410, b"<html>", Cause.GONE),
        (422, b'{"reason":"Invalid"}', Cause.INVALID),
        (429, b"slow down", Cause.THROTTLED),
        (502, b"\xff\xfe<html>", Cause.SERVER),
    ],
)
def test_statuses_have_causes(code: int, body: bytes, cause: Cause) -> None:
    assert ApiFailure.of_status(code, body).cause == cause


def test_what_a_proxy_said_is_kept() -> None:
    assert "Bad Gateway" in str(ApiFailure.of_status(502, b"<h1>Bad Gateway</h1>"))


@pytest.mark.parametrize(
    ("value", "wanted"), [(None, 0), ("", 0), ("7", 7), (" 7 ", 7), ("soon", 0), ("-1", 0), ("Sun, 06 Nov 1994", 0)]
)
def test_retry_after_in_seconds(value: str | None, wanted: float) -> None:
    assert retry_after_s(value) == wanted


def test_retry_after_as_a_date() -> None:
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)

    assert 55 < retry_after_s(in_a_minute) <= 60


@pytest.mark.parametrize(("draw", "wanted"), [(0.0, [0.5, 1, 2, 2, 2]), (1.0, [1, 2, 4, 4, 4])], ids=["low", "high"])
def test_backoff_doubles_to_its_limit(draw: float, wanted: list[float]) -> None:
    backoff = Backoff(1, 4, draw=lambda: draw)

    assert [backoff.next_s() for _ in wanted] == wanted
    backoff.reset()
    assert backoff.next_s() == wanted[0]


def test_backoff_honours_what_the_server_asks() -> None:
    assert Backoff(0.1, 1, draw=lambda: 0.5).next_s(at_least_s=10) == 10.5


# Resources


def test_what_is_watched() -> None:
    assert [(found.kind, found.plural, found.selector) for found in resources("n1")] == [
        (Kind.SERVICE, "services", ()),
        (Kind.ENDPOINT_SLICE, "endpointslices", (("labelSelector", "!service.kubernetes.io/headless"),)),
        (Kind.NODE, "nodes", (("fieldSelector", "metadata.name=n1"),)),
    ]


def test_what_is_watched_for_policy() -> None:
    policy = resources("n1", policy=True)[len(resources("n1")) :]

    assert [(found.kind, found.path, found.selector, found.is_optional) for found in policy] == [
        (Kind.POD, "/api/v1/pods", (("fieldSelector", "status.phase!=Succeeded,status.phase!=Failed"),), False),
        (Kind.NAMESPACE, "/api/v1/namespaces", (), False),
        (Kind.NETWORK_POLICY, "/apis/networking.k8s.io/v1/networkpolicies", (), False),
        (
            Kind.CLUSTER_NETWORK_POLICY,
            "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
            (),
            True,
        ),
    ]


# Events


class FakePoster:
    """Keeps what is posted; ``gate`` holds it back, as a slow server does. ``found`` is the answer to every list."""

    def __init__(self, failure: SourceError | None = None, found: bytes | SourceError = b'{"items":[]}') -> None:
        self.found = found
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.posted: list[tuple[str, dict[str, Any]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self._failure = failure

    def read(self, path: str, query: Sequence[tuple[str, str]], read_timeout_s: float) -> bytes:
        self.asked.append((path, dict(query)))
        if isinstance(self.found, SourceError):
            raise self.found
        return self.found

    def post(self, path: str, body: dict[str, Any], read_timeout_s: float = 10.0) -> None:
        self.gate.wait(10)
        self.posted.append((path, body))
        if self._failure:
            raise self._failure


KEY = ObjectKey("shop", "web")


def test_a_warning_is_posted_beside_its_object() -> None:
    poster = FakePoster(found=b'{"items":[{"metadata":{"name":"web","uid":"u-1"}}]}')
    recorder = EventRecorder(poster, "n1")
    assert recorder.warn(KEY, "MapFull", "no room")
    recorder.stop()
    [(path, body)] = poster.posted

    assert path == "/api/v1/namespaces/shop/events"
    assert body["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Service",
        "name": "web",
        "namespace": "shop",
        "uid": "u-1",
    }
    assert (body["type"], body["reason"], body["message"], body["source"]["host"]) == (
        "Warning",
        "MapFull",
        "no room",
        "n1",
    )


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(b'{"items":[]}', id="deleted"),
        pytest.param(b'{"items":null}', id="null"),
        pytest.param(b'{"items":[{"metadata":{"name":"other","uid":"u-2"}}]}', id="another"),
        pytest.param(b"<html>", id="garbage"),
        pytest.param(ApiFailure(Cause.FORBIDDEN, "no"), id="forbidden"),
        pytest.param(ApiFailure(Cause.TIMEOUT, "late"), id="timeout"),
    ],
)
def test_a_warning_is_posted_though_its_object_is_not_found(found: bytes | SourceError) -> None:
    poster = FakePoster(found=found)
    recorder = EventRecorder(poster, "n1")
    recorder.warn(KEY, "MapFull", "no room")
    recorder.stop()
    [(_, body)] = poster.posted

    assert body["involvedObject"]["name"] == "web"
    assert "uid" not in body["involvedObject"]


@pytest.mark.parametrize(
    ("kind", "key", "path"),
    [
        (Kind.SERVICE, KEY, "/api/v1/namespaces/shop/services"),
        (Kind.ENDPOINT_SLICE, KEY, "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices"),
        (Kind.NODE, ObjectKey("", "web"), "/api/v1/nodes"),
        (Kind.POD, KEY, "/api/v1/namespaces/shop/pods"),
        (Kind.NAMESPACE, ObjectKey("", "web"), "/api/v1/namespaces"),
        (Kind.NETWORK_POLICY, KEY, "/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies"),
        (
            Kind.CLUSTER_NETWORK_POLICY,
            ObjectKey("", "web"),
            "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
        ),
    ],
    ids=str,
)
def test_an_object_is_looked_up_by_its_name(kind: Kind, key: ObjectKey, path: str) -> None:
    poster = FakePoster(found=b'{"items":[{"metadata":{"name":"web","uid":"u-1"}}]}')

    assert read_uid(poster, kind, key, 1) == "u-1"
    assert poster.asked == [(path, {"fieldSelector": "metadata.name=web"})]


def test_warnings_are_repeated_only_after_a_while() -> None:
    now = [0.0]
    poster = FakePoster()
    recorder = EventRecorder(poster, "n1", clock=lambda: now[0])
    said = [recorder.warn(KEY, "MapFull", "x"), recorder.warn(KEY, "MapFull", "x"), recorder.warn(KEY, "Other", "x")]
    now[0] = 601
    said.append(recorder.warn(KEY, "MapFull", "x"))
    recorder.stop()

    assert said == [True, False, True, True]
    assert len(poster.posted) == 3


def test_warnings_are_limited_in_rate() -> None:
    now = [0.0]
    poster = FakePoster()
    recorder = EventRecorder(poster, "n1", burst=3, rate_per_s=0.5, clock=lambda: now[0])
    said = [recorder.warn(ObjectKey("shop", str(number)), "MapFull", "x") for number in range(5)]
    now[0] = 2.0
    said.append(recorder.warn(ObjectKey("shop", "later"), "MapFull", "x"))
    said.append(recorder.warn(ObjectKey("shop", "too soon"), "MapFull", "x"))
    recorder.stop()

    assert said == [True, True, True, False, False, True, False]


def test_a_slow_server_blocks_nobody() -> None:
    poster = FakePoster()
    poster.gate.clear()
    recorder = EventRecorder(poster, "n1", burst=100, depth=4)
    said = [recorder.warn(ObjectKey("shop", str(number)), "MapFull", "x") for number in range(20)]
    poster.gate.set()
    recorder.stop()

    assert 4 <= sum(said) <= 5
    assert len(poster.posted) == sum(said)


def test_a_refused_event_does_not_end_the_recorder() -> None:
    poster = FakePoster(ApiFailure(Cause.FORBIDDEN, "no"))
    recorder = EventRecorder(poster, "n1")
    recorder.warn(ObjectKey("shop", "a"), "MapFull", "x")
    recorder.warn(ObjectKey("shop", "b"), "MapFull", "x")
    recorder.stop()

    assert len(poster.posted) == 2


def test_events_about_nodes_and_long_messages() -> None:
    body = event_body(Complaint(Kind.NODE, ObjectKey("", "n1"), "Odd", "x" * 5000), "n1")

    assert body["metadata"] == {"generateName": "n1.", "namespace": "default"}
    assert "namespace" not in body["involvedObject"]
    assert len(body["message"]) == 1024
