"""Clients of the lab, from where the tests stand: sockets in a pod or on a node, and churn that counts failures."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.lab.processes import Place, end, program

MODES = ("tcp", "udp", "udp-unconnected")
PACKET_MODES = (*MODES, "sctp")
"""SCTP's raw sockets pass by the socket hooks."""
_ANSWER_LIMIT_S = 5.0
_SILENCE_S = 0.2


class Answer(NamedTuple):
    """What a client saw of one exchange.

    ``client``, ``client_port``: what the server saw of it. ``size``: bytes of the answer. ``error`` is an errno's name,
    empty where there was none.
    """

    name: str = ""
    port: int = 0
    client: str = ""
    peer: tuple[str, int] | None = None
    source: tuple[str, int] | None = None
    error: str = ""
    client_port: int = 0
    size: int = 0

    @classmethod
    def read(cls, said: dict[str, Any]) -> Answer:
        """Read what the probe says."""
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in said.items()}
        return cls(**fields)


class Client:
    """Makes socket calls somewhere else: in a pod, or among a node's own processes."""

    def __init__(self, place: Place) -> None:
        self._process = place.start(*program("probe"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(
        self,
        mode: str,
        address: str,
        port: int,
        limit_s: float = _ANSWER_LIMIT_S,
        *,
        source_port: int = 0,
        size: int = 0,
    ) -> Answer:
        """Ask a server once, from a new socket; ``::ffff:a.b.c.d`` makes it an IPv6 one.

        ``source_port`` 0: any. ``size``: bytes of the question, and of the answer.
        """
        request = ("exchange", mode, family_of(address), address, port, limit_s, source_port, size)
        return Answer.read(self._request(*request))

    def is_unanswered(self, mode: str, address: str, port: int) -> bool:
        """Whether nobody answers there, not even with a refusal."""
        return self.ask(mode, address, port, _SILENCE_S).error == "timeout"

    def ask_often(self, mode: str, address: str, port: int, count: int) -> list[Answer]:
        """Ask ``count`` times, each from a new socket."""
        return [Answer.read(a) for a in self._request("exchanges", mode, family_of(address), address, port, count)]

    def spread(self, mode: str, address: str, port: int, count: int) -> Counter[str]:
        """Ask ``count`` times and count who answered (errors by their names)."""
        return Counter(answer.name or answer.error for answer in self.ask_often(mode, address, port, count))

    def first_reply(self, address: str, port: int, names: list[str], limit_s: float = 5) -> float:
        """Connect until one of these servers answers; returns the monotonic time of that. Raises: TimeoutError."""
        at: float | None = self._request("first_reply", "tcp", family_of(address), address, port, names, limit_s)
        if at is None:
            raise TimeoutError(f"none of {names} answered at {address}:{port} within {limit_s} s")
        return at

    def open(self, protocol: str, family: int) -> RemoteSocket:
        """Open a socket that stays."""
        return RemoteSocket(self, self._request("open_socket", protocol, family))

    def call(self, number: int, method: str, *arguments: Any) -> Any:
        """Call a socket's method. Raises: RemoteError."""
        return self._request("call", number, method, *arguments)

    def close(self) -> None:
        """End the process."""
        end(self._process)

    def _request(self, *request: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise RemoteError(answer["error"])
        return answer["value"]


class RemoteError(Exception):
    """A socket call failed over there: the errno's name."""


class RemoteSocket:
    """A socket that lives in another process."""

    def __init__(self, client: Client, number: int) -> None:
        self._client = client
        self._number = number

    def bind(self, port: int) -> None:
        """Choose the source port."""
        self._client.call(self._number, "bind", ["", port])

    def connect(self, address: str, port: int) -> None:
        """Connect."""
        self._client.call(self._number, "connect", [address, port])

    def peer(self) -> tuple[str, int]:
        """What getpeername says."""
        return tuple(self._client.call(self._number, "getpeername"))

    def ask(self) -> str:
        """Ask the connected server its name."""
        self._client.call(self._number, "sendall", "?\n")
        return str(self._client.call(self._number, "recv", 4096)).split()[0]

    def client_port(self) -> int:
        """Ask the connected server which port it sees us at."""
        self._client.call(self._number, "sendall", "?\n")
        return int(str(self._client.call(self._number, "recv", 4096)).split()[3])

    def ask_at(self, address: str, port: int) -> tuple[str, tuple[str, int]]:
        """Send a datagram; returns who answered and from where."""
        self._client.call(self._number, "sendto", "?\n", [address, port])
        reply, source = self._client.call(self._number, "recvfrom", 4096)
        return reply.split()[0], tuple(source)

    def ask_at_once(self, targets: list[tuple[str, int]]) -> set[tuple[str, int]]:
        """Send a datagram to each, and only then receive as many; returns where they came from."""
        for address, port in targets:
            self._client.call(self._number, "sendto", "?\n", [address, port])
        return {tuple(self._client.call(self._number, "recvfrom", 4096)[1]) for _ in targets}

    def close(self) -> None:
        """Close."""
        self._client.call(self._number, "close")


def family_of(address: str) -> int:
    """4 or 6; ``::ffff:a.b.c.d`` is an address of an IPv6 socket."""
    return 6 if ":" in address else 4


@dataclass(slots=True)
class Tally:
    """What churn counted: connections and datagrams made, exchanges on held connections, failures by error."""

    made: int = 0
    held: int = 0
    failed: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)


class Churn:
    """New connections all the time; ``tally`` is what it last said."""

    def __init__(self, place: Place, targets: list[tuple[str, str, int]], rate: int = 300) -> None:
        texts = [f"{mode}:{family_of(address)}:{address}:{port}" for mode, address, port in targets]
        self.tally = Tally()
        self._process = place.start(*program("churn"), str(rate), *texts, stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.tally = Tally(**json.loads(line))

    def wait_for(self, more: int, limit_s: float = 10) -> None:
        """Wait until ``more`` connections than now were tried. Raises: TimeoutError."""
        goal = self._tried() + more
        deadline = time.monotonic() + limit_s
        while self._tried() < goal:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise TimeoutError(f"churn does not go on: {self.tally}")
            time.sleep(0.005)

    def _tried(self) -> int:
        return self.tally.made + self.tally.failed

    def stop(self) -> Tally:
        """End it and return the last count."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait(10)
        self._reader.join(10)
        end(self._process)
        return self.tally


@contextlib.contextmanager
def churning(place: Place, targets: list[tuple[str, str, int]], rate: int = 300) -> Iterator[Churn]:
    """Churn from here to the end, beginning when the first connections were made."""
    churn = Churn(place, targets, rate)
    try:
        churn.wait_for(10)
        yield churn
    finally:
        churn.stop()
