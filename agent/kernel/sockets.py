"""Connected UDP sockets that the socket hooks pinned to a backend that is gone: found and destroyed.

No packet of such a socket passes a hook that could turn it, so it would talk to nobody for ever. Destroyed
(SOCK_DESTROY), it is disconnected, its owner is told (ECONNABORTED where it reads, EDESTADDRREQ where it sends), and
connects again. Only sockets whose state, cookie and peer all say that they are meant are touched; one that is not
connected never is.

Sockets are listed in their own network namespace, so this enters one after another, on a thread of its own that lives
for as long as there is something to do. That takes CAP_SYS_ADMIN, and the namespaces in sight: /proc of the node
(hostPID), or /run/netns. Without, only the agent's own is looked after.
Source: include/uapi/linux/inet_diag.h, sock_diag.h; net/ipv4/udp_diag.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agent.core.abi import ORIGIN, PEER_KEY, PEER_ORIGIN
from agent.core.addresses import IPV4_PREFIX
from agent.core.flows import Losses, UdpServices
from agent.core.records import Protocol
from agent.kernel import bpf

log = logging.getLogger("ebproxy.sockets")
_OWN = Path("/proc/thread-self/ns/net")
_NAMED = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_CAP_SYS_ADMIN = 21
_REST_S = 1.0
"""After a change, when to look once more: for a socket that was connecting while the maps changed."""
_REST_FACTOR = 10
"""How many times what a look took the next one waits: at most a tenth of a core, however much changes."""
_ENDING = 6
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class _Wanted:
    """What to look for. ``losses`` as in core, but of a backend only what a slot keeps: its last word and its port.

    With ``everything``, whatever asked for a frontend that is not ``spared``.
    """

    losses: dict[bytes, frozenset[bytes] | None] = field(default_factory=dict)
    everything: bool = False
    spared: frozenset[bytes] = frozenset()

    def __bool__(self) -> bool:
        return self.everything or bool(self.losses)

    def add(self, losses: Losses) -> None:
        """Look for more."""
        for frontend, backends in losses.items():
            before = self.losses.get(frontend, frozenset())
            endings = None if backends is None else frozenset(backend[-_ENDING:] for backend in backends)
            self.losses[frontend] = None if before is None or endings is None else before | endings

    def concerns(self, frontend: bytes, backend: bytes) -> bool:
        """Whether a socket that asked for a frontend and got a backend, or one that ends like this, may be meant."""
        if self.everything:
            return frontend not in self.spared
        if frontend not in self.losses:
            return False
        lost = self.losses[frontend]
        return lost is None or backend[-_ENDING:] in lost


class StaleSockets:
    """Destroys connected UDP sockets whose backend no longer serves what they asked for.

    ``counts``: sockets ``destroyed``, those that were ``gone`` by then, ``failed``; namespaces ``unreached`` (one for
    all where none may be entered).
    """

    def __init__(self, origins: bpf.Map, peers: bpf.Map, services: UdpServices) -> None:
        self.counts: Tally[str] = Tally()
        self._origins = _Origins(origins, peers)
        self._services = services
        self._wanted = _Wanted()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._told: set[str] = set()

    def request(self, losses: Losses) -> None:
        """Look for sockets that stick to what these frontends lost. Does not wait."""
        with self._wake:
            self._wanted.add(losses)
            self._start()

    def request_all(self, spared: frozenset[bytes]) -> None:
        """Look for sockets that stick to anything, unless they asked for one of ``spared``. Does not wait."""
        with self._wake:
            self._wanted.everything = True
            self._wanted.spared = spared
            self._start()

    def _start(self) -> None:
        self._wake.notify()
        if self._thread is None and not self._is_stopping:
            self._thread = threading.Thread(target=self._run, name="sockets", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread, if there is one, after the namespace it is in."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
            thread = self._thread
        if thread:
            thread.join()

    def _run(self) -> None:
        """Serve requests, each twice, until none is left."""
        again = _Wanted()
        while not self._is_stopping:
            with self._wake:
                if not self._wanted and again:
                    self._wake.wait(_REST_S)
                first, self._wanted = self._wanted, _Wanted()
                if not (first or again):
                    self._thread = None
                    return
            began = time.monotonic()
            try:
                self._look(_joined(first, again))
            except OSError as error:
                self.counts["failed"] += 1
                self._tell(f"looking for UDP sockets whose backend is gone: {error}")
            except Exception:
                self.counts["failed"] += 1
                log.exception("UDP sockets whose backend is gone are not looked for until the next change")
            again = first
            with self._wake:
                self._wake.wait_for(lambda: self._is_stopping, (time.monotonic() - began) * _REST_FACTOR)

    def _look(self, wanted: _Wanted) -> None:
        if not self._origins.mention(wanted):
            return
        for netlink in self._namespaces():
            with netlink:
                if self._is_stopping:
                    return
                for found in list_connected(netlink):
                    if self._is_stale(found, wanted):
                        self._destroy(netlink, found)

    def _is_stale(self, found: ConnectedSocket, wanted: _Wanted) -> bool:
        frontend = self._origins.asked(found.cookie, found.peer)
        if frontend is None or not wanted.concerns(frontend, found.peer):
            return False
        return found.peer not in self._services.serving_at.get(frontend, ())

    def _destroy(self, netlink: socket.socket, found: ConnectedSocket) -> None:
        try:
            destroy(netlink, found)
        except FileNotFoundError:  # closed, or connected elsewhere
            self.counts["gone"] += 1
        except OSError as error:
            self.counts["failed"] += 1
            self._tell(f"a UDP socket whose backend is gone cannot be destroyed: {error}; its owner has to reconnect")
        else:
            self.counts["destroyed"] += 1

    def _namespaces(self) -> Iterator[socket.socket]:
        """Open sock_diag in every network namespace in sight, the agent's own first."""
        home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield _diag()
            if not _may_enter():
                self._tell("UDP sockets of other network namespaces cannot be looked after: SYS_ADMIN is missing")
                self.counts["unreached"] += 1
                return
            for path in _others(os.fstat(home)):
                try:
                    yield _diag_in(path, home)
                except FileNotFoundError:  # it ended
                    continue
                except OSError as error:
                    self.counts["unreached"] += 1
                    self._tell(f"UDP sockets of other network namespaces cannot be looked after: {error}")
        finally:
            os.close(home)

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("%s", message)


def _joined(first: _Wanted, second: _Wanted) -> _Wanted:
    both = _Wanted(dict(first.losses), first.everything or second.everything, first.spared or second.spared)
    both.add(second.losses)  # endings of endings are the same
    return both


class _Origins:
    """What sockets asked for, as the hooks remember it (``bpf/origin.h``)."""

    def __init__(self, origins: bpf.Map, peers: bpf.Map) -> None:
        self._slots = origins
        self._peers = peers

    def asked(self, cookie: int, backend: bytes) -> bytes | None:
        """Find the frontend a socket asked for when it got this backend; None = it is none of ours."""
        index = cookie & (self._slots.info.max_entries - 1)
        slot = self._slots.lookup(index.to_bytes(4, sys.byteorder)) or bytes(ORIGIN.size)
        holder, address, port, backend_port, backend_word = ORIGIN.packer.unpack(slot)
        if (holder, backend_word + backend_port) == (cookie, backend[12:]):
            return bytes(address + port)
        known = self._peers.lookup(PEER_KEY.packer.pack(cookie, backend[:16], backend[16:], 0, 0))
        return known[:18] if known else None

    def mention(self, wanted: _Wanted) -> bool:
        """Tell whether any socket may be meant: most often none is, and nothing has to be entered or listed."""
        return any(wanted.concerns(frontend, backend) for frontend, backend in self._entries())

    def _entries(self) -> Iterator[tuple[bytes, bytes]]:
        for _, values, count in self._slots.batches(2_048):
            for cookie, address, port, *backend in ORIGIN.packer.iter_unpack(values[: count * ORIGIN.size]):
                if cookie:
                    yield address + port, backend[1] + backend[0]
        for keys, values, count in self._peers.batches(2_048):
            backends = PEER_KEY.packer.iter_unpack(keys[: count * PEER_KEY.size])
            asked = PEER_ORIGIN.packer.iter_unpack(values[: count * PEER_ORIGIN.size])
            for (_, backend, backend_port, *_), (address, port, _) in zip(backends, asked, strict=True):
                yield address + port, backend + backend_port


@dataclass(frozen=True, slots=True)
class ConnectedSocket:
    """A connected UDP socket: ``ident`` is the kernel's ``inet_diag_sockid``, ``peer`` an address and a port."""

    family: int
    ident: bytes
    cookie: int
    peer: bytes


_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_SOCK_DESTROY = 21
_DUMP = 0x300
_REQUEST = 0x1
_ACK = 0x4
_ERROR = 2
_DONE = 3
_ESTABLISHED = 1 << 1
_HEADER = struct.Struct("=IHHII")
_REQUEST_BODY = struct.Struct("=BBBBI48s")
_ANSWER_LIMIT_S = 5.0


def list_connected(netlink: socket.socket) -> list[ConnectedSocket]:
    """List the connected UDP sockets of a namespace, both families. Raises: OSError."""
    return [
        _read_socket(body)
        for family in (socket.AF_INET, socket.AF_INET6)
        for body in _ask(netlink, _SOCK_DIAG_BY_FAMILY, _DUMP, family, bytes(48))
    ]


def _read_socket(body: bytes) -> ConnectedSocket:
    family, ident = body[0], body[4:52]
    address = ident[20:36] if family == socket.AF_INET6 else IPV4_PREFIX + ident[20:24]
    return ConnectedSocket(family, ident, int.from_bytes(ident[40:48], sys.byteorder), address + ident[2:4])


def destroy(netlink: socket.socket, found: ConnectedSocket) -> None:
    """Disconnect a socket and tell its owner; the kernel checks peer and cookie again.

    Raises: FileNotFoundError when it is not as it was; OSError.
    """
    for _ in _ask(netlink, _SOCK_DESTROY, _ACK, found.family, found.ident):
        pass


def _ask(netlink: socket.socket, kind: int, flags: int, family: int, ident: bytes) -> Iterator[bytes]:
    """Send a request and yield the bodies of its answers. Raises: OSError with the kernel's errno."""
    body = _REQUEST_BODY.pack(family, Protocol.UDP, 0, 0, _ESTABLISHED, ident)
    netlink.send(_HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, 0, 0) + body)
    while True:
        answer = netlink.recv(65_536)
        offset = 0
        while offset < len(answer):
            length, answered, *_ = _HEADER.unpack_from(answer, offset)
            if answered == _DONE:
                return
            if answered == _ERROR:
                (code,) = struct.unpack_from("=i", answer, offset + _HEADER.size)
                if code:
                    raise OSError(-code, os.strerror(-code))
                return
            yield answer[offset + _HEADER.size : offset + length]
            offset += (length + 3) & ~3


def _diag() -> socket.socket:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
    netlink.settimeout(_ANSWER_LIMIT_S)
    return netlink


def _diag_in(path: Path, home: int) -> socket.socket:
    """Open sock_diag in another namespace; this thread is back in its own afterwards."""
    there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(there)
        try:
            return _diag()
        finally:
            _enter(home)
    finally:
        os.close(there)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")


def _may_enter() -> bool:
    """Whether this process may enter namespaces at all."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    effective = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
    return bool(int(effective, 16) & 1 << _CAP_SYS_ADMIN)


def _others(own: os.stat_result) -> Iterator[Path]:
    """Find the network namespaces that processes are in or that have a name, each once."""
    seen = {own.st_ino}
    for path in _candidates():
        with contextlib.suppress(OSError):  # the process ended, or is not for us to see
            stat = path.stat()
            if stat.st_dev == own.st_dev and stat.st_ino not in seen:  # else a name without a namespace
                seen.add(stat.st_ino)
                yield path


def _candidates() -> Iterator[Path]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield entry / "ns/net"
    with contextlib.suppress(OSError):
        yield from _NAMED.iterdir()
