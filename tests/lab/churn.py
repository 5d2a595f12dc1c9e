"""Open connections one after the other and count those that fail; standard output says how many, a JSON line at a time.

A program of its own: ``churn.py RATE MODE:FAMILY:ADDRESS:PORT...`` (the address may hold colons). Every target gets new
sockets in turn, and, for TCP, one connection that is held from the first to the last moment and asked now and then.
SIGTERM ends it with a last line.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from typing import Any, NamedTuple

from tests.lab import probe

_SAY_EVERY_S = 0.05
_ASK_HELD_EVERY_S = 0.02
_LIMIT_S = 3.0


class Target(NamedTuple):
    """What to connect to, and how."""

    mode: str
    family: int
    address: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``MODE:FAMILY:ADDRESS:PORT``."""
        mode, family, rest = text.split(":", 2)
        address, port = rest.rsplit(":", 1)
        return cls(mode, int(family), address, int(port))


class Count:
    """What happened so far."""

    def __init__(self) -> None:
        self.made = 0
        self.held = 0
        self.errors: dict[str, int] = {}
        self.names: dict[str, int] = {}

    def add(self, result: dict[str, Any], target: Target) -> None:
        """Count one exchange."""
        error = result.get("error") or _fault(result, target)
        if error:
            self.fail(f"{target.mode}/{target.family}: {error}")
        else:
            self.made += 1
            self.names[result["name"]] = self.names.get(result["name"], 0) + 1

    def fail(self, error: str) -> None:
        """Count one failure."""
        self.errors[error] = self.errors.get(error, 0) + 1

    def say(self) -> None:
        """Print it."""
        document = {"made": self.made, "held": self.held, "failed": sum(self.errors.values())}
        print(json.dumps({**document, "errors": self.errors, "names": self.names}), flush=True)


def _fault(result: dict[str, Any], target: Target) -> str:
    """What is wrong with an answer: it must come from the address that was asked."""
    said = result["peer"] if target.mode != "udp-unconnected" else result["source"]
    return "" if said[0] == target.address and said[1] == target.port else f"the peer is {said}"


def ask_held(held: list[tuple[Target, socket.socket]], count: Count) -> None:
    """Ask once on each held connection; one that broke is counted and given up."""
    for item in list(held):
        try:
            item[1].sendall(b"?\n")
            if not item[1].recv(4096):
                raise ConnectionResetError
            count.held += 1
        except OSError as error:
            count.fail(f"held {item[0].mode}/{item[0].family}: {probe.name_of(error)}")
            held.remove(item)


def hold(target: Target) -> tuple[Target, socket.socket]:
    """Open a connection that stays."""
    sock = probe.make(target.mode, target.family, _LIMIT_S)
    sock.connect((target.address, target.port))
    return target, sock


def main(rate: str, *texts: str) -> None:
    """Connect at ``rate`` a second until SIGTERM."""
    targets = [Target.parse(text) for text in texts]
    count, stop = Count(), []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    held = [hold(target) for target in targets if target.mode == "tcp"]
    period = 1 / float(rate)
    turn, next_at, said_at, asked_at = 0, time.monotonic(), 0.0, 0.0
    while not stop:
        target = targets[turn % len(targets)]
        count.add(probe.exchange(*target, _LIMIT_S), target)
        turn += 1
        now = time.monotonic()
        if now - asked_at > _ASK_HELD_EVERY_S:
            ask_held(held, count)
            asked_at = now
        if now - said_at > _SAY_EVERY_S:
            count.say()
            said_at = now
        next_at = max(next_at + period, now - 0.1)
        time.sleep(max(0.0, next_at - now))
    count.say()


if __name__ == "__main__":
    main(*sys.argv[1:])
