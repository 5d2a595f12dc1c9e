"""Serve TCP and UDP, and answer every line or datagram with: name, own port, the client's address.

A program of its own: ``servers.py NAME ADDRESS[,ADDRESS] PORT...``. Prints ``ready`` once it listens everywhere.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
from collections.abc import Callable

Reader = Callable[[], None]


class Servers:
    """The sockets of one server, in one thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._selector = selectors.DefaultSelector()

    def listen(self, address: str, port: int) -> None:
        """Listen for both protocols at one address and port."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        tcp = socket.create_server((address, port), family=family, backlog=1024)
        tcp.setblocking(False)
        self._on_readable(tcp, lambda: self._accept(tcp))
        udp = socket.socket(family, socket.SOCK_DGRAM)
        udp.bind((address, port))
        udp.setblocking(False)
        self._on_readable(udp, lambda: self._answer_datagram(udp))

    def run(self) -> None:
        """Serve until killed."""
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _on_readable(self, sock: socket.socket, reader: Reader) -> None:
        self._selector.register(sock, selectors.EVENT_READ, reader)

    def _accept(self, server: socket.socket) -> None:
        try:
            client, _ = server.accept()
        except OSError:  # it is gone already
            return
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._on_readable(client, lambda: self._answer_line(client))

    def _answer_line(self, client: socket.socket) -> None:
        try:
            if client.recv(4096):
                client.sendall(self._answer(client, client.getpeername()))
                return
        except OSError:  # it was reset
            pass
        self._selector.unregister(client)
        client.close()

    def _answer_datagram(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # an ICMP error of a client that is gone
            _, peer = server.recvfrom(4096)
            server.sendto(self._answer(server, peer), peer)

    def _answer(self, sock: socket.socket, peer: tuple[str, int]) -> bytes:
        return f"{self._name} {sock.getsockname()[1]} {peer[0]}\n".encode()


def main(name: str, addresses: str, *ports: str) -> None:
    """Listen, say so, serve."""
    servers = Servers(name)
    for address in addresses.split(","):
        for port in ports:
            servers.listen(address, int(port))
    print("ready", flush=True)
    servers.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
