"""The HTTP servers, over real sockets of the loopback."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from agent.observe.server import HttpServer, json_answer, metrics_route, text_answer


@pytest.fixture(params=["127.0.0.1", "::1"], ids=["ipv4", "ipv6"])
def server(request: pytest.FixtureRequest) -> Iterator[HttpServer]:
    registry = CollectorRegistry()
    Gauge("color", "Of the sky", registry=registry).set(7)
    routes = {
        "/metrics": metrics_route(registry),
        "/json": lambda _: json_answer(503, {"healthy": False}),
        "/proxyMode": lambda _: text_answer("ebpf"),
    }
    running = HttpServer(request.param, 0, routes)
    running.start()
    yield running
    running.stop()


def ask(
    server: HttpServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    host = server._server.server_address[0]
    connection = http.client.HTTPConnection(str(host), server.port, timeout=5)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers, body


@pytest.mark.parametrize(
    ("path", "status", "content_type", "body"),
    [
        pytest.param("/proxyMode", 200, "text/plain; charset=utf-8", b"ebpf", id="text"),
        pytest.param("/proxyMode?verbose=1", 200, "text/plain; charset=utf-8", b"ebpf", id="query"),
        pytest.param("/json", 503, "application/json", b'{"healthy": false}', id="json"),
        pytest.param("/", 404, "text/plain", b"not found\n", id="root"),
        pytest.param("/proxymode", 404, "text/plain", b"not found\n", id="case"),
    ],
)
def test_routes(server, path, status, content_type, body):
    code, headers, answer = ask(server, path)

    assert (code, headers["Content-Type"], answer) == (status, content_type, body)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert int(headers["Content-Length"]) == len(body)


def test_head_answers_without_a_body(server):
    code, headers, body = ask(server, "/json", "HEAD")

    assert (code, body) == (503, b"")
    assert int(headers["Content-Length"]) == len(json.dumps({"healthy": False}))


def test_other_methods_are_refused(server):
    assert ask(server, "/json", "POST")[0] == 501


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [("", "text/plain"), ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text")],
    ids=["plain", "openmetrics"],
)
def test_metrics_come_in_the_format_that_is_asked_for(server, accept, content_type):
    code, headers, body = ask(server, "/metrics", Accept=accept)

    assert code == 200
    assert headers["Content-Type"].startswith(content_type)
    assert b"color 7.0\n" in body


def test_a_port_that_is_taken_is_an_error(server):
    host = server._server.server_address[0]

    with pytest.raises(OSError, match="in use"):
        HttpServer(str(host), server.port, {})
