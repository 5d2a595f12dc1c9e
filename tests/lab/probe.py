"""Make socket calls for somebody else: a JSON request a line on standard input, a JSON answer a line on output.

A program of its own, so that its sockets belong to the network namespace and the cgroup it was started in. A request is
``[method, arguments...]``; an answer is ``{"value": ...}`` or ``{"error": "ECONNREFUSED"}``.
"""

from __future__ import annotations

import errno
import json
import random
import socket
import struct
import sys
import time
from typing import Any

from tests.lab import sctp, speech

_LIMIT_S = 5.0
_ATTEMPT_LIMIT_S = 0.05
_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER 0: no TIME_WAIT, so no lack of local ports

_sockets: dict[int, socket.socket] = {}


def make(protocol: str, family: int, limit_s: float = _LIMIT_S, source_port: int = 0) -> socket.socket:
    """Make a socket of ``tcp`` or ``udp``, in family 4 or 6; ``source_port`` 0: the kernel's choice."""
    sock = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, _KINDS[protocol])
    sock.settimeout(limit_s)
    if protocol == "tcp":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if source_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", source_port))
    return sock


def exchange(
    mode: str,
    family: int,
    address: str,
    port: int,
    limit_s: float = _LIMIT_S,
    source_port: int = 0,
    size: int = 0,
) -> dict[str, Any]:
    """Ask a server once, from a new socket.

    ``mode`` is ``tcp``, ``udp`` (connected), ``udp-unconnected`` or ``sctp``. ``size``: bytes of the question, and of
    the answer; 0 = as few as may be. Returns the server's name, port and what it saw of us, the peer (what getpeername
    says) and the source (what recvfrom says), or the error.
    """
    asked = speech.sized_question(size) if size else speech.question()
    peer: Any = None
    try:
        if mode == "sctp":
            received, source = _associate(family, (address, port), asked, limit_s, source_port)
        else:
            with make(mode[:3], family, limit_s, source_port) as sock:
                if mode == "udp-unconnected":
                    sock.sendto(asked, (address, port))
                else:
                    sock.connect((address, port))
                    peer = sock.getpeername()[:2]
                    sock.sendall(asked)
                received, source = _receive(sock, size)
        reply = speech.read_reply(asked, received)
    except OSError as error:
        return {"error": name_of(error)}
    except ValueError as error:
        return {"error": f"garbled: {error}"}
    return {**reply._asdict(), "peer": peer, "source": source and source[:2]}


def _receive(sock: socket.socket, size: int) -> tuple[bytes, Any]:
    """Receive a datagram, or a stream until an answer of this size is complete; it ends with a newline."""
    received, source = sock.recvfrom(max(size, 4096))
    while sock.type == socket.SOCK_STREAM and not received.endswith(b"\n"):
        more = sock.recv(1 << 18)
        if not more:
            raise ConnectionResetError(errno.ECONNRESET, "the answer ended early")
        received += more
    return received, source


def _associate(family: int, server: tuple[str, int], asked: bytes, limit_s: float, port: int) -> tuple[bytes, Any]:
    """Ask over SCTP: INIT, DATA, SHUTDOWN, each with its answer."""
    own_port = port or random.randrange(32768, 61000)
    deadline = time.monotonic() + limit_s
    with sctp.raw_socket(family) as raw:
        raw.connect((server[0], 0))
        received = b""
        for chunk, body in ((sctp.Chunk.INIT, b""), (sctp.Chunk.DATA, asked), (sctp.Chunk.SHUTDOWN, b"")):
            raw.send(sctp.Segment(own_port, server[1], chunk, body).pack())
            answer = _segment_to(raw, family, own_port, deadline)
            received = answer.body or received
            source = (server[0], answer.source_port)  # a connected raw socket hears its peer only
    return received, source


def _segment_to(raw: socket.socket, family: int, port: int, deadline: float) -> sctp.Segment:
    while True:
        raw.settimeout(max(deadline - time.monotonic(), 0.001))
        segment = sctp.read(raw.recv(sctp.MAX_SIZE), family)
        if segment and segment.destination_port == port:
            return segment


def exchanges(mode: str, family: int, address: str, port: int, count: int) -> list[dict[str, Any]]:
    """Ask ``count`` times."""
    return [exchange(mode, family, address, port) for _ in range(count)]


def first_reply(mode: str, family: int, address: str, port: int, names: list[str], limit_s: float) -> float | None:
    """Ask until one of these servers answers; returns the monotonic time of that, None after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        # A short limit: until it is a service's, nobody answers at the address.
        if exchange(mode, family, address, port, _ATTEMPT_LIMIT_S).get("name") in names:
            return time.monotonic()
    return None


def open_socket(protocol: str, family: int) -> int:
    """Open a socket that stays; returns its number."""
    sock = make(protocol, family)
    _sockets[sock.fileno()] = sock
    return sock.fileno()


def call(number: int, method: str, *arguments: Any) -> Any:
    """Call a method of a socket that stays."""
    values = [tuple(a) if isinstance(a, list) else a.encode() if method.startswith("send") else a for a in arguments]
    result = getattr(_sockets[number], method)(*values)
    if method == "close":
        del _sockets[number]
    if method == "recvfrom":
        return [result[0].decode(), result[1][:2]]
    if isinstance(result, bytes):
        return result.decode()
    return result[:2] if isinstance(result, tuple) else result


def name_of(error: OSError) -> str:
    """Name an error as errno.h does."""
    if isinstance(error, TimeoutError) and error.errno is None:
        return "timeout"
    return errno.errorcode.get(error.errno or 0, repr(error))


METHODS = {f.__name__: f for f in (exchange, exchanges, first_reply, open_socket, call)}


def main() -> None:
    """Serve requests until the input ends."""
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer = {"value": METHODS[method](*arguments)}
        except OSError as error:
            answer = {"error": name_of(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
