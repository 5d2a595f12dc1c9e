"""sock_diag against this kernel: which sockets are listed, which are destroyed, what stays; and how often it looks."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from agent.core.abi import ORIGIN, PEER_KEY, PEER_ORIGIN
from agent.core.flows import UdpServices
from agent.core.plan import Placement
from agent.core.records import Family, Protocol
from agent.core.services import PortName
from agent.kernel import sockets as module
from agent.kernel.sockets import StaleSockets, destroy, list_connected
from tests.builders import frontend, key
from tests.flows import end
from tests.lab import netns
from tests.lab.polling import until
from tests.requirements import require_root

SO_COOKIE = 57
ASKED = {4: ("10.96.0.10", "10.96.0.10:53"), 6: ("fd00:96::a", "[fd00:96::a]:53")}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
ELSEWHERE = frozenset({end("127.0.0.2:5353")})
_numbers = itertools.count()


@pytest.fixture
def space():
    """A network namespace of the test's own."""
    require_root()
    name = f"ebproxy-sock-{os.getpid()}-{next(_numbers)}"
    try:
        netns.add(name)
        yield name
    finally:
        netns.remove(name)


@pytest.fixture
def opened():
    """Sockets that are closed in the end."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


@pytest.fixture
def diag(space):
    with netns.entered(space):
        netlink = module._diag()
    with netlink:
        yield netlink


def udp(space, family, to=None, port=5353):
    """A UDP socket in a namespace, connected if told to where."""
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    with netns.entered(space):
        made = socket.socket(kind, socket.SOCK_DGRAM)
    made.settimeout(5)
    if to:
        made.connect((to, port))
    return made


def cookie_of(sock):
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)


def is_connected(sock):
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("family", "to", "peer"),
    [
        pytest.param(4, "127.0.0.1", "127.0.0.1:5353", id="IPv4"),
        pytest.param(6, "::1", "[::1]:5353", id="IPv6"),
        pytest.param(6, "::ffff:127.0.0.1", "127.0.0.1:5353", id="mapped"),
    ],
)
def test_connected_sockets_are_listed_and_destroyed(space, diag, opened, family, to, peer):
    sock = opened(udp(space, family, to))
    bystander = opened(udp(space, family, to))

    listed = {found.cookie: found for found in list_connected(diag)}
    assert {cookie_of(sock), cookie_of(bystander)} == set(listed)
    found = listed[cookie_of(sock)]
    assert found.peer == end(peer)

    destroy(diag, found)

    assert not is_connected(sock)
    assert is_connected(bystander)
    with pytest.raises(ConnectionAbortedError):
        sock.recv(1)
    with pytest.raises(FileNotFoundError):
        destroy(diag, found)


def test_what_is_not_connected_is_not_listed(space, diag, opened):
    unbound, bound = opened(udp(space, 4)), opened(udp(space, 4))
    bound.bind(("127.0.0.1", 0))
    unbound.sendto(b"?", ("127.0.0.1", 5353))

    assert list_connected(diag) == []


def test_a_socket_that_turned_elsewhere_meanwhile_is_left_alone(space, diag, opened):
    sock = opened(udp(space, 4, "127.0.0.1"))
    (found,) = list_connected(diag)
    sock.connect(("127.0.0.2", 5353))

    with pytest.raises(FileNotFoundError):
        destroy(diag, found)

    assert is_connected(sock)


def test_a_socket_in_the_place_of_another_is_left_alone(space, diag, opened):
    """The same addresses and ports, and not the same cookie."""
    sock = opened(udp(space, 4, "127.0.0.1"))
    own = sock.getsockname()
    (found,) = list_connected(diag)
    sock.close()
    other = opened(udp(space, 4))
    other.bind(own)
    other.connect(("127.0.0.1", 5353))

    with pytest.raises(FileNotFoundError):
        destroy(diag, found)

    assert is_connected(other)


def test_many_sockets_take_several_answers(space, diag, opened):
    socks = [opened(udp(space, family, LOOPBACK[family])) for family in (4, 6) for _ in range(300)]

    assert {cookie_of(sock) for sock in socks} == {found.cookie for found in list_connected(diag)}


def served(*serving, family=4):
    """UDP services of one port: ASKED, served by these."""
    services = UdpServices()
    note(services, *serving, family=family)
    return services


def note(services, *serving, family=4):
    placement = Placement(
        key("dns"),
        PortName("dns", Protocol.UDP, Family(family)),
        7,
        "",
        frontends=(frontend(ASKED[family][0], 53, Protocol.UDP),),
        serving=frozenset(map(end, serving)),
    )
    return services.note(placement.service, [placement])


def backend(family):
    return f"[::1]:{5353}" if family == 6 else "127.0.0.1:5353"


def remember(store, sock, family, *, spilled=False):
    """Write what the connect hook writes of a socket."""
    cookie, peer, asked = cookie_of(sock), end(backend(family)), end(ASKED[family][1])
    if spilled:
        value = PEER_ORIGIN.packer.pack(asked[:16], asked[16:], 0)
        store.maps["peer_origins"].update(PEER_KEY.packer.pack(cookie, peer[:16], peer[16:], 0, 0), value)
        return
    index = cookie % store.maps["socket_origins"].info.max_entries
    value = ORIGIN.packer.pack(cookie, asked[:16], asked[16:], peer[16:], peer[12:16])
    store.maps["socket_origins"].update(index.to_bytes(4, sys.byteorder), value)


@pytest.fixture
def make(store):
    """Make what looks for stale sockets; its thread ends with the test."""
    with contextlib.ExitStack() as stack:

        def build(services):
            made = StaleSockets(store.maps["socket_origins"], store.maps["peer_origins"], services)
            stack.callback(made.stop)
            return made

        yield build


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("spilled", [False, True], ids=["slot", "spilled"])
@pytest.mark.parametrize("ask", ["lost", "gone", "all"])
def test_a_socket_that_sticks_is_destroyed_where_it_is(space, store, make, opened, family, spilled, ask):
    services = served(backend(family), family=family)
    sock, direct = (opened(udp(space, family, LOOPBACK[family])) for _ in range(2))
    remember(store, sock, family, spilled=spilled)
    stale = make(services)

    losses = services.note(key("dns"), []) if ask == "gone" else note(services, family=family)
    if ask == "all":
        stale.request_all(frozenset())
    else:
        stale.request(losses)

    until(lambda: not is_connected(sock), "the socket is destroyed")
    assert is_connected(direct)
    assert stale.counts == {"destroyed": 1}


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda s, _: s.request_all(frozenset({end(ASKED[4][1])})), id="undecided"),
        pytest.param(lambda s, _: s.request({end("10.96.0.11:53"): None}), id="another-frontend"),
        pytest.param(
            lambda s, _: s.request({end(ASKED[4][1]): frozenset({end("127.0.0.2:5353")})}), id="another-backend"
        ),
        pytest.param(lambda s, services: (note(services, backend(4)), s.request_all(frozenset())), id="it-came-back"),
    ],
)
def test_a_socket_that_is_not_meant_stays(space, store, make, opened, ask):
    """After whatever is asked for, something else is: that is served no earlier."""
    services = served()
    sock = opened(udp(space, 4, "127.0.0.1"))
    remember(store, sock, 4)
    stale = make(services)

    ask(stale, services)
    until(lambda: stale._thread is None, "both looks are over")

    assert is_connected(sock)
    assert stale.counts == {}


def test_what_a_slot_says_of_another_backend_is_no_longer_true(space, store, make, opened):
    sock = opened(udp(space, 4, "127.0.0.1"))
    remember(store, sock, 4)
    sock.connect(("127.0.0.1", 5354))
    stale = make(served())

    stale.request_all(frozenset())
    until(lambda: stale._thread is None, "both looks are over")

    assert is_connected(sock)


def test_no_namespace_is_entered_where_no_socket_may_be_meant(space, store, make, opened, monkeypatch):
    monkeypatch.setattr(StaleSockets, "_namespaces", lambda _: pytest.fail("namespaces are entered"))
    sock = opened(udp(space, 4, "127.0.0.1"))
    remember(store, sock, 4)
    stale = make(served())

    stale.request({end(ASKED[4][1]): ELSEWHERE, end("10.96.0.11:53"): None})
    until(lambda: stale._thread is None, "both looks are over")

    assert stale.counts == {}


def test_what_connected_while_the_maps_changed_is_found_by_the_second_look(space, store, make, opened):
    services = served(backend(4))
    sock = opened(udp(space, 4, "127.0.0.1"))
    stale = make(services)
    looked = threading.Semaphore(0)
    look = stale._look
    stale._look = lambda wanted: (look(wanted), looked.release())

    stale.request(note(services))
    assert looked.acquire(timeout=5)
    remember(store, sock, 4)

    until(lambda: not is_connected(sock), "the socket is destroyed")


def test_the_thread_ends_and_begins_again(space, store, make, opened):
    services = served(backend(4))
    stale = make(services)
    for _ in range(2):
        sock = opened(udp(space, 4, "127.0.0.1"))
        remember(store, sock, 4)
        note(services, backend(4))
        stale.request(note(services))
        until(lambda sock=sock: not is_connected(sock), "the socket is destroyed")
        until(lambda: stale._thread is None, "the thread ends")

    assert not any(thread.name == "sockets" for thread in threading.enumerate())


def test_a_look_that_fails_is_counted_and_not_the_last(space, store, make, opened, monkeypatch, caplog):
    services = served(backend(4))
    sock = opened(udp(space, 4, "127.0.0.1"))
    remember(store, sock, 4)
    stale = make(services)
    look, failures = stale._look, [OSError(5, "broken"), ValueError("surprise")]

    def fail_first(wanted):
        if failures:
            raise failures.pop(0)
        look(wanted)

    stale._look = fail_first
    losses = note(services)
    stale.request(losses)
    until(lambda: stale.counts["failed"] == 2, "both looks failed")
    stale.request(losses)

    until(lambda: not is_connected(sock), "the socket is destroyed")
    assert "broken" in caplog.text
    assert "surprise" in caplog.text


def test_a_name_without_a_namespace_is_passed_over(space, make, monkeypatch, tmp_path):
    (tmp_path / "leftover").write_text("")
    (tmp_path / "again").symlink_to(netns.RUN / space)
    monkeypatch.setattr(module, "_candidates", lambda: iter([*sorted(tmp_path.iterdir()), netns.RUN / space]))
    own = Path("/proc/thread-self/ns/net").stat()

    assert list(module._others(own)) == [tmp_path / "again"]
