"""Serve TCP, UDP and SCTP, and answer every question with: name, own port, the client's address and port.

A program of its own: ``servers.py NAME ADDRESS[,ADDRESS] PORT...``. Prints ``ready`` once it listens everywhere.
What is said is in speech.py.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
from collections.abc import Callable

from tests.lab import sctp, speech

Reader = Callable[[int], None]
Answerer = Callable[[speech.Question, int, tuple[str, int]], bytes]
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Conversation:
    """One TCP connection: questions in, answers out, as large as they may be."""

    def __init__(self, sock: socket.socket, selector: selectors.BaseSelector, answer: Answerer) -> None:
        self._sock = sock
        self._selector = selector
        self._answer = answer
        self._received = bytearray()
        self._unsent = memoryview(b"")
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(sock, _READ, self.on_ready)

    def on_ready(self, events: int) -> None:
        """Go on."""
        try:
            goes_on = self._read() if events & _READ else True
            self._send()
        except BlockingIOError:
            return
        except OSError:  # it was reset
            goes_on = False
        if not goes_on:
            self._selector.unregister(self._sock)
            self._sock.close()

    def _read(self) -> bool:
        chunk = self._sock.recv(1 << 18)
        self._received += chunk
        while asked := speech.read_question(self._received):
            del self._received[: asked.length]
            said = self._answer(asked, self._sock.getsockname()[1], self._sock.getpeername())
            self._unsent = memoryview(bytes(self._unsent) + said)
        return bool(chunk)

    def _send(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        finally:
            self._selector.modify(self._sock, _READ | _WRITE if self._unsent else _READ, self.on_ready)


class Servers:
    """The sockets of one server, in one thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._selector = selectors.DefaultSelector()

    def listen(self, address: str, port: int) -> None:
        """Listen for TCP and UDP at one address and port."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        tcp = socket.create_server((address, port), family=family, backlog=1024)
        tcp.setblocking(False)
        self._on_readable(tcp, lambda _: self._accept(tcp))
        udp = socket.socket(family, socket.SOCK_DGRAM)
        udp.bind((address, port))
        udp.setblocking(False)
        self._on_readable(udp, lambda _: self._answer_datagram(udp))

    def listen_sctp(self, address: str, ports: frozenset[int]) -> None:
        """Listen for SCTP at one address."""
        family = 6 if ":" in address else 4
        raw = sctp.raw_socket(family)
        raw.bind((address, 0))
        raw.setblocking(False)
        self._on_readable(raw, lambda _: self._answer_segment(raw, family, ports))

    def run(self) -> None:
        """Serve until killed."""
        while True:
            for key, events in self._selector.select():
                key.data(events)

    def _on_readable(self, sock: socket.socket, reader: Reader) -> None:
        self._selector.register(sock, _READ, reader)

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is gone already
            Conversation(server.accept()[0], self._selector, self._answer)

    def _answer_datagram(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # an ICMP error of a client that is gone
            datagram, peer = server.recvfrom(1 << 16)
            asked = speech.read_question(datagram)
            if asked:
                server.sendto(self._answer(asked, server.getsockname()[1], peer), peer)

    def _answer_segment(self, raw: socket.socket, family: int, ports: frozenset[int]) -> None:
        with contextlib.suppress(OSError):
            packet, peer = raw.recvfrom(sctp.MAX_SIZE)
            segment = sctp.read(packet, family)
            if segment and segment.destination_port in ports:
                said = self._reply(segment, peer[0])
                if said:
                    raw.sendto(said.pack(), (peer[0], 0))

    def _reply(self, segment: sctp.Segment, client: str) -> sctp.Segment | None:
        if segment.chunk is sctp.Chunk.INIT:
            return segment.answer(sctp.Chunk.INIT_ACK)
        if segment.chunk is sctp.Chunk.SHUTDOWN:
            return segment.answer(sctp.Chunk.SHUTDOWN_ACK)
        asked = speech.read_question(segment.body) if segment.chunk is sctp.Chunk.DATA else None
        if not asked:
            return None
        said = self._answer(asked, segment.destination_port, (client, segment.source_port))
        return segment.answer(sctp.Chunk.DATA, said)

    def _answer(self, asked: speech.Question, port: int, client: tuple[str, int]) -> bytes:
        return speech.answer(asked, self._name, port, client)


def main(name: str, addresses: str, *ports: str) -> None:
    """Listen, say so, serve."""
    servers = Servers(name)
    for address in addresses.split(","):
        for port in ports:
            servers.listen(address, int(port))
        servers.listen_sctp(address, frozenset(map(int, ports)))
    print("ready", flush=True)
    servers.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
