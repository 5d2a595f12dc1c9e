"""A packet of a socket that a socket hook has translated before: its flow must not look like what the hook let pass."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from scapy.layers.l2 import Ether

from agent.core.abi import ORIGIN, PEER_KEY, PEER_ORIGIN, port_bytes
from agent.core.addresses import parse_address
from tests.bpf import packet_path as at
from tests.bpf.packet_path import PacketPath, to
from tests.bpf.packets import End, packet
from tests.bpf.talk import NUMBERS, TARGET

ASKED, OTHER = ("10.96.0.10", "fd00:10:96::10"), ("10.96.0.11", "fd00:10:96::11")
CLIENT_PORT = 4000
NEXT_COOKIES = 8
_SO_COOKIE = 57
_LIMIT_S = 10.0


def cookie() -> int:
    """Take the next cookie there is on this CPU."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)


@contextmanager
def one_cpu() -> Iterator[None]:
    """Stay on one CPU: each deals out cookies of its own, in sequence."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Remembered:
    """What sockets asked for, of the next ones that have packets: of each, that one address stands for a backend."""

    def __init__(self, path: PacketPath, asked: End, backend: End, *, in_slot: bool) -> None:
        self._peers = path.store.maps["peer_origins"]
        self._slots = path.store.maps["socket_origins"]
        self._count = self._slots.info.max_entries
        self._asked, self._backend, self._in_slot = asked, backend, in_slot

    def write(self, cookie: int) -> None:
        asked = parse_address(self._asked.address), port_bytes(self._asked.port)
        address, port = parse_address(self._backend.address), port_bytes(self._backend.port)
        if self._in_slot:
            self._slots.update(self._slot(cookie), ORIGIN.packer.pack(cookie, *asked, port, address[12:]))
        else:
            self._peers.update(PEER_KEY.packer.pack(cookie, address, port, 0, 0), PEER_ORIGIN.packer.pack(*asked, 0))

    def clear(self) -> None:
        for key, _ in list(self._peers.items()):
            self._peers.delete(key)
        for index in range(self._count):
            self._slots.update(self._slot(index), bytes(ORIGIN.size))

    def _slot(self, number: int) -> bytes:
        return (number % self._count).to_bytes(4, sys.byteorder)


def run_as_socket(path: PacketPath, remembered: Remembered, sent: Ether) -> Ether:
    """Run a packet of a socket that has asked before: TEST_RUN makes one for each, which gets the next cookie."""
    deadline = time.monotonic() + _LIMIT_S
    with one_cpu():
        while time.monotonic() < deadline:
            before = cookie()
            for ahead in range(1, NEXT_COOKIES):
                remembered.write(before + ahead)
            ran = path.ingress("one", sent)
            taken = cookie() - before
            remembered.clear()
            if taken <= NEXT_COOKIES:  # none was dealt out that is not remembered
                return Ether(ran.packet)
            for key, _ in list(path.store.maps["conntrack"].items()):
                path.store.maps["conntrack"].delete(key)
    raise TimeoutError("somebody else takes all cookies")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("in_slot", [False, True], ids=["many peers", "connected"])
@pytest.mark.parametrize(
    ("protocol", "before", "backend", "keeps_its_port"),
    [
        pytest.param("udp", (OTHER, 80), (at.REMOTE_POD, TARGET), False, id="another service over the backend"),
        pytest.param("udp", (ASKED, 81), (at.REMOTE_POD, TARGET), False, id="another port over the backend"),
        pytest.param("udp", (ASKED, 80), (at.REMOTE_POD, TARGET), True, id="the same service"),
        pytest.param("udp", (OTHER, 80), (at.REMOTE_POD, TARGET + 1), True, id="another port of the backend's"),
        pytest.param("udp", (OTHER, 80), (at.POD_TWO, TARGET), True, id="another backend"),
        pytest.param("tcp", (OTHER, 80), (at.REMOTE_POD, TARGET), True, id="TCP has no such sockets"),
    ],
)
def test_what_a_socket_asked_for_before(path, protocol, before, backend, keeps_its_port, in_slot, number):
    client, frontend = End(at.POD_ONE[number], CLIENT_PORT), End(ASKED[number], 80)
    path.serve(protocol, frontend, inside=to(End(at.REMOTE_POD[number], TARGET)))
    known = (End(addresses[number], port) for addresses, port in (before, backend))

    ran = run_as_socket(path, Remembered(path, *known, in_slot=in_slot), packet(protocol, client, frontend))

    assert (ran[1].src, ran[1].dst) == (client.address, at.REMOTE_POD[number])
    assert (ran[2].sport == CLIENT_PORT) == keeps_its_port
    assert keeps_its_port or ran[2].sport in at.SOURCE_PORTS
