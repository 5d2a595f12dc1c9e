"""The body of one watch response, as it should be or as a fault has it."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterable
from typing import BinaryIO

from tests.cluster.api_faults import Do, Fault

_BATCH = 64


class EventStream:
    """Lines in chunks; each call of `send` reaches the wire before it returns."""

    def __init__(
        self, out: BinaryIO, connection: socket.socket, fault: Fault | None, stopping: threading.Event
    ) -> None:
        self.is_broken = False
        self._out = out
        self._connection = connection
        self._fault = fault
        self._stopping = stopping
        self._sent = 0

    def is_silent(self) -> bool:
        """Play the fault of saying nothing, if it is planned; returns when it is over."""
        if self._fault is None or self._fault.do != Do.SILENT:
            return False
        self._stopping.wait()
        self.is_broken = True
        return True

    def send(self, lines: Iterable[bytes]) -> None:
        """Send events."""
        lines = iter(lines)
        while not self.is_broken and (batch := list(itertools.islice(lines, 1 if self._fault else _BATCH))):
            if self._fault:
                self._send_faulty(batch[0], self._fault)
            else:
                self._chunk(b"".join(batch))

    def end(self) -> None:
        """Complete the response, unless it is broken."""
        if not self.is_broken:
            self._out.write(b"0\r\n\r\n")

    def _send_faulty(self, line: bytes, fault: Fault) -> None:
        if self._sent < fault.after_events:
            self._chunk(line)
        elif fault.do == Do.DRIP:
            for at in range(len(line)):
                self._chunk(line[at : at + 1])
        elif fault.do == Do.GARBAGE:
            self._chunk(fault.body.encode() + b"\n")
            self._chunk(line)
        else:
            self._break(line, fault)
        self._sent += 1

    def _break(self, line: bytes, fault: Fault) -> None:
        self._chunk(line[: len(line) // 2])
        self.is_broken = True
        if fault.do == Do.END:
            self._out.write(b"0\r\n\r\n")
        elif fault.do == Do.HALF_CLOSE:
            self._connection.shutdown(socket.SHUT_WR)
            self._stopping.wait(5)
        elif fault.do == Do.STALL:
            self._stopping.wait()

    def _chunk(self, data: bytes) -> None:
        self._out.write(b"%x\r\n%s\r\n" % (len(data), data))
