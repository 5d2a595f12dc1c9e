"""Ask many servers at once: a JSON request a line on standard input, a JSON answer a line on output.

A program of its own, as ``probe.py`` is. A request is ``[SILENCE_S, [[PROTOCOL, ADDRESS, PORT], ...]]``. It is answered
once every target has answered or nothing more has come for SILENCE_S, with one text for each target: the server's name
and port, ``INIT ACK`` of SCTP, the name of an error, or nothing at all for silence.
"""

from __future__ import annotations

import contextlib
import errno
import json
import random
import selectors
import socket
import sys
import time
from collections.abc import Callable

from tests.lab import sctp, speech
from tests.lab.probe import make, name_of

ACKNOWLEDGED = "INIT ACK"
_QUESTION = speech.question()
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_LOCAL_PORTS = range(32_768, 61_000)

Target = tuple[str, str, int]


class Inquiry:
    """One question to each target, TCP and UDP from a socket each, SCTP from one raw socket of each family."""

    def __init__(self, targets: list[Target], silence_s: float) -> None:
        self.answers = [""] * len(targets)
        self._silence_s = silence_s
        self._missing = len(targets)
        self._selector = selectors.DefaultSelector()
        self._associations: dict[tuple[int, int], int] = {}
        self._ports = iter(random.sample(_LOCAL_PORTS, len(targets)))
        self._stack = contextlib.ExitStack()
        self._raws = {family: self._make_raw(family) for family in (4, 6)}
        for number, (protocol, address, port) in enumerate(targets):
            try:
                self._begin(number, protocol, address, port)
            except OSError as error:
                self._note(number, name_of(error))

    def run(self) -> list[str]:
        """Hear the answers."""
        with self._stack, self._selector:
            deadline = time.monotonic() + self._silence_s
            while self._missing and (left_s := deadline - time.monotonic()) > 0:
                before = self._missing
                for key, _ in self._selector.select(left_s):
                    key.data()
                if self._missing < before:
                    deadline = time.monotonic() + self._silence_s
        return self.answers

    def _begin(self, number: int, protocol: str, address: str, port: int) -> None:
        family = 6 if ":" in address else 4
        if protocol == "sctp":
            own_port = next(self._ports)
            self._associations[family, own_port] = number
            segment = sctp.Segment(own_port, port, sctp.Chunk.INIT)
            self._raws[family].sendto(segment.pack(), (address, 0))
            return
        sock = self._stack.enter_context(make(protocol, family))
        sock.setblocking(False)
        if protocol == "udp":
            sock.connect((address, port))
            sock.send(_QUESTION)
            self._selector.register(sock, _READ, lambda: self._end(number, sock, _hear))
            return
        code = sock.connect_ex((address, port))
        if code not in {0, errno.EINPROGRESS}:
            raise OSError(code, "connect")
        self._selector.register(sock, _WRITE, lambda: self._on_connected(number, sock))

    def _on_connected(self, number: int, sock: socket.socket) -> None:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._end(number, sock, lambda _: errno.errorcode[code])
            return
        sock.send(_QUESTION)
        self._selector.modify(sock, _READ, lambda: self._end(number, sock, _hear))

    def _end(self, number: int, sock: socket.socket, hear: Callable[[socket.socket], str]) -> None:
        self._note(number, hear(sock))
        self._selector.unregister(sock)
        sock.close()

    def _note(self, number: int, answer: str) -> None:
        self.answers[number] = answer
        self._missing -= 1

    def _make_raw(self, family: int) -> socket.socket:
        raw = self._stack.enter_context(sctp.raw_socket(family))
        raw.setblocking(False)
        self._selector.register(raw, _READ, lambda: self._on_segments(raw, family))
        return raw

    def _on_segments(self, raw: socket.socket, family: int) -> None:
        """Take what has come; the questions to this pod's own server come by here, too."""
        with contextlib.suppress(BlockingIOError):
            while True:
                segment = sctp.read(raw.recv(sctp.MAX_SIZE), family)
                if segment is None or segment.chunk is not sctp.Chunk.INIT_ACK:
                    continue
                number = self._associations.pop((family, segment.destination_port), None)
                if number is not None:
                    self._note(number, ACKNOWLEDGED)


def _hear(sock: socket.socket) -> str:
    """Receive an answer: the server's name and port."""
    try:
        words = sock.recv(4096).decode().split()
    except OSError as error:
        return name_of(error)
    return " ".join(words[:2]) if words else "closed"


def main() -> None:
    """Serve requests until the input ends."""
    for line in sys.stdin:
        silence_s, targets = json.loads(line)
        print(json.dumps(Inquiry(targets, silence_s).run()), flush=True)


if __name__ == "__main__":
    main()
