"""The servers of health check node ports, over real sockets of the loopback."""

from __future__ import annotations

import errno
import http.client
import ipaddress
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from agent.core.addresses import parse_address
from agent.core.records import HealthCheck
from agent.observe import listeners
from agent.observe.health_checks import HealthCheckServers, answer
from agent.observe.listeners import EVERYWHERE, listening_hosts
from tests.builders import key
from tests.lab.polling import until

WEB, API = key("web"), key("api")
RETRY_S = 0.05


class Stage:
    """Servers under test, their health, and what they complained of."""

    def __init__(self) -> None:
        self.is_healthy = True
        self.complaints: list[tuple[str, str]] = []
        self.servers = HealthCheckServers(lambda: self.is_healthy, self._complain, RETRY_S)

    def _complain(self, service, reason) -> None:
        self.complaints.append((str(service), reason))


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.servers.stop()


@pytest.fixture
def free_ports() -> Callable[[int], list[int]]:
    """Find ports that nobody has, of either family."""

    def find(count: int) -> list[int]:
        held = [socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) for _ in range(count)]
        ports = [server.getsockname()[1] for server in held]
        for server in held:
            server.close()
        return ports

    return find


def ask(port: int, path: str = "/", method: str = "GET", host: str = "127.0.0.1", body: bytes | None = None):
    with closing(http.client.HTTPConnection(host, port, timeout=5)) as connection:
        connection.request(method, path, body=body)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def is_closed(port: int, host: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def serve(stage: Stage, checks: dict, hosts: tuple[str, ...] = (EVERYWHERE,)) -> None:
    stage.servers.update(checks, hosts)
    wanted = {(check.port, host, service) for service, check in checks.items() for host in hosts}
    until(lambda: stage.servers._listeners.keys() | stage.servers._failed.keys() == wanted, "every port tried")


@pytest.mark.parametrize(
    ("endpoints", "is_healthy", "code"),
    [
        pytest.param(1, True, 200, id="one"),
        pytest.param(7, True, 200, id="several"),
        pytest.param(0, True, 503, id="none"),
        pytest.param(7, False, 503, id="proxy-unhealthy"),
        pytest.param(0, False, 503, id="neither"),
    ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("path", ["/", "/healthz?a=b", "/any/thing"], ids=["root", "healthz", "other"])
def test_an_answer(stage, free_ports, endpoints, is_healthy, code, host, path):
    (port,) = free_ports(1)
    stage.is_healthy = is_healthy
    serve(stage, {WEB: HealthCheck(port, endpoints)})

    status, headers, body = ask(port, path, host=host)

    assert status == code
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Load-Balancing-Endpoint-Weight"] == str(endpoints)
    assert json.loads(body) == {
        "service": {"namespace": "ns", "name": "web"},
        "localEndpoints": endpoints,
        "serviceProxyHealthy": is_healthy,
    }


@pytest.mark.parametrize(
    ("request_text", "code", "has_body"),
    [
        pytest.param("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 200, True, id="get"),
        pytest.param("GET / HTTP/1.0\r\n\r\n", 200, True, id="1.0"),
        pytest.param("GET / HTTP/1.1\n\n", 200, True, id="bare line feeds"),
        pytest.param("HEAD / HTTP/1.1\r\n\r\n", 200, False, id="head"),
        pytest.param("POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", 200, True, id="post"),
        pytest.param("GET /\r\n\r\n", 400, False, id="no version"),
        pytest.param("\x16\x03\x01\r\n\r\n", 400, False, id="tls"),
        pytest.param("\r\n\r\n", 400, False, id="empty"),
    ],
)
def test_a_request(request_text, code, has_body):
    reply = answer(request_text.encode(), WEB, HealthCheck(1, 1), is_healthy=True)
    head, _, body = reply.partition(b"\r\n\r\n")

    assert int(head.split()[1]) == code
    assert bool(body) is has_body


def test_a_request_in_pieces_and_one_with_a_body_are_answered(stage, free_ports):
    (port,) = free_ports(1)
    serve(stage, {WEB: HealthCheck(port, 1)})

    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        for piece in (b"GET / HT", b"TP/1.1\r\nHost: a\r", b"\n\r", b"\n"):
            client.sendall(piece)
        with client.makefile("rb") as stream:
            assert stream.read().startswith(b"HTTP/1.1 200 OK\r\n")
    assert ask(port, method="POST", body=b"x" * 100_000)[0] == 200


def test_what_is_no_request_is_closed_and_costs_nobody_else_an_answer(stage, free_ports, monkeypatch):
    monkeypatch.setattr("agent.observe.health_checks._PATIENCE_S", 0.2)
    (port,) = free_ports(1)
    serve(stage, {WEB: HealthCheck(port, 1)})

    with socket.create_connection(("127.0.0.1", port), timeout=5) as silent:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as endless, pytest.raises(ConnectionError):
            endless.sendall(b"a" * 100_000_000)
        assert ask(port)[0] == 200

        assert silent.recv(1) == b""


def test_connections_beyond_the_limit_push_out_the_oldest(stage, free_ports, monkeypatch):
    monkeypatch.setattr("agent.observe.health_checks._MOST_CONNECTIONS", 3)
    (port,) = free_ports(1)
    serve(stage, {WEB: HealthCheck(port, 1)})

    clients = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(4)]
    try:
        assert clients[0].recv(1) == b""
        assert ask(port)[0] == 200
    finally:
        for client in clients:
            client.close()
    until(lambda: not stage.servers._connections, "connections closed")


def test_changes_are_followed(stage, free_ports):
    first, second, third = free_ports(3)
    serve(stage, {WEB: HealthCheck(first, 1), API: HealthCheck(second, 0)})
    assert (ask(first)[0], ask(second)[0]) == (200, 503)

    serve(stage, {WEB: HealthCheck(first, 0), API: HealthCheck(second, 2)})
    assert (ask(first)[0], ask(second)[0]) == (503, 200)

    serve(stage, {WEB: HealthCheck(third, 1), API: HealthCheck(first, 2)})
    assert is_closed(second)
    assert json.loads(ask(first)[2])["service"]["name"] == "api"
    assert json.loads(ask(third)[2])["service"]["name"] == "web"

    serve(stage, {})
    assert is_closed(first)
    assert is_closed(third)
    assert stage.complaints == []


def test_addresses_are_followed(stage, free_ports):
    (port,) = free_ports(1)
    checks = {WEB: HealthCheck(port, 1)}
    serve(stage, checks, ("127.0.0.1",))
    assert ask(port)[0] == 200
    assert is_closed(port, "127.0.0.2")
    assert is_closed(port, "::1")

    serve(stage, checks, ("127.0.0.2", "::1"))
    assert is_closed(port, "127.0.0.1")
    assert (ask(port, host="127.0.0.2")[0], ask(port, host="::1")[0]) == (200, 200)
    assert stage.servers.serving == 2


def test_an_address_that_is_only_just_coming_is_listened_on(stage, free_ports):
    (port,) = free_ports(1)
    serve(stage, {WEB: HealthCheck(port, 1)}, ("192.0.2.77", "2001:db8::77"))

    assert (stage.servers.serving, stage.servers.failed) == (2, 0)


def test_a_port_that_is_taken_is_said_once_counted_and_tried_again(stage, free_ports):
    taken, other = free_ports(2)
    with socket.create_server(("127.0.0.1", taken)):
        serve(stage, {WEB: HealthCheck(taken, 1), API: HealthCheck(other, 1)})
        until(lambda: stage.servers.failures >= 3, "tried again")

        assert stage.complaints == [
            ("ns/web", f"cannot serve the health check on port {taken}: Address already in use")
        ]
        assert (stage.servers.serving, stage.servers.failed) == (1, 1)
        assert ask(other)[0] == 200
    until(lambda: stage.servers.failed == 0, "the port is had")

    assert ask(taken)[0] == 200


def test_of_two_services_with_one_port_one_is_served_and_the_other_complains(stage, free_ports):
    (port,) = free_ports(1)
    serve(stage, {WEB: HealthCheck(port, 1), API: HealthCheck(port, 2)})

    assert json.loads(ask(port)[2])["service"]["name"] == "api"
    assert [service for service, _ in stage.complaints] == ["ns/web"]

    serve(stage, {WEB: HealthCheck(port, 1)})
    assert json.loads(ask(port)[2])["service"]["name"] == "web"


def test_hundreds_of_ports_take_one_thread(stage, free_ports):
    ports = free_ports(300)
    serve(stage, {key(f"s{port}"): HealthCheck(port, index % 2) for index, port in enumerate(ports)})

    assert {ask(port)[0] for port in ports[1::2]} == {200}
    assert {ask(port)[0] for port in ports[0::2]} == {503}
    assert stage.servers.serving == 300


def test_nothing_runs_before_there_is_a_port(stage):
    stage.servers.update({})

    assert stage.servers._thread.ident is None


def test_a_node_without_ipv6_listens_on_ipv4(monkeypatch, free_ports):
    (port,) = free_ports(1)
    make = socket.socket

    def without_ipv6(family, *rest):
        if family is socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6")
        return make(family, *rest)

    monkeypatch.setattr(listeners.socket, "socket", without_ipv6)
    with listeners.open_listener(EVERYWHERE, port) as listener:
        assert listener.family is socket.AF_INET


ADDRESSES = ("127.0.0.1", "192.0.2.1", "2001:db8::1", "fe80::1")


@pytest.mark.parametrize(
    ("chosen", "selected", "hosts"),
    [
        pytest.param((), ADDRESSES, ("*",), id="unset"),
        pytest.param(("192.0.2.0/24",), ("192.0.2.1", "2001:db8::1"), ("192.0.2.1", "::"), id="ipv4 alone"),
        pytest.param(("2001:db8::/64",), ("127.0.0.1", "2001:db8::1"), ("0.0.0.0", "2001:db8::1"), id="ipv6 alone"),
        pytest.param(("192.0.2.0/24", "::/0"), ADDRESSES[1:], ("192.0.2.1", "2001:db8::1"), id="both"),
        pytest.param(("192.0.2.0/24", "::/0"), (), (), id="none there yet"),
        pytest.param("primary", ADDRESSES[1:3], ("192.0.2.1", "2001:db8::1"), id="primary"),
        pytest.param("primary", ("192.0.2.1",), ("192.0.2.1",), id="primary of one family"),
    ],
)
def test_where_to_listen(chosen, selected, hosts):
    networks = chosen if isinstance(chosen, str) else tuple(map(ipaddress.ip_network, chosen))

    assert hosts == listening_hosts(networks, map(parse_address, selected))
