"""Make socket calls for somebody else: a JSON request a line on standard input, a JSON answer a line on output.

A program of its own, so that its sockets belong to the network namespace and the cgroup it was started in. A request is
``[method, arguments...]``; an answer is ``{"value": ...}`` or ``{"error": "ECONNREFUSED"}``.
"""

from __future__ import annotations

import errno
import json
import socket
import struct
import sys
import time
from typing import Any

_LIMIT_S = 5.0
_ATTEMPT_LIMIT_S = 0.05
_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER 0: no TIME_WAIT, so no lack of local ports

_sockets: dict[int, socket.socket] = {}


def make(protocol: str, family: int, limit_s: float = _LIMIT_S) -> socket.socket:
    """Make a socket of ``tcp`` or ``udp``, in family 4 or 6."""
    sock = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, _KINDS[protocol])
    sock.settimeout(limit_s)
    if protocol == "tcp":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def exchange(mode: str, family: int, address: str, port: int, limit_s: float = _LIMIT_S) -> dict[str, Any]:
    """Ask a server once, from a new socket.

    ``mode`` is ``tcp``, ``udp`` (connected) or ``udp-unconnected``. Returns the server's name, port and what it saw
    of us, the peer (what getpeername says) and the source (what recvfrom says), or the error.
    """
    try:
        with make(mode[:3], family, limit_s) as sock:
            peer = None
            if mode == "udp-unconnected":
                sock.sendto(b"?\n", (address, port))
            else:
                sock.connect((address, port))
                peer = sock.getpeername()[:2]
                sock.sendall(b"?\n")
            reply, source = sock.recvfrom(4096)
            name, own_port, client = reply.decode().split()
    except OSError as error:
        return {"error": name_of(error)}
    return {"name": name, "port": int(own_port), "client": client, "peer": peer, "source": source and source[:2]}


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
