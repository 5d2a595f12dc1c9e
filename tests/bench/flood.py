"""Datagrams of a client outside, as many as go: frames built here, sent by a worker in C."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
from pathlib import Path

from tests.bench.errors import BenchError
from tests.bench.lines import CLIENT, DEVICE, Line
from tests.bench.stage import Stage, command

_SOURCE = Path(__file__).with_name("flood_worker.c")
_END_LIMIT_S = 10
FIRST_PORT = 40_000
FLOWS = 64
_PAYLOAD = bytes(18)  # the shortest Ethernet frame there is
# Flags (checksum to be completed), no segments, header size, where the sum starts, and where it goes to.
_VIRTIO = struct.pack("=BBHHHH", 1, 0, 0, 0, 34, 6)


def frame(macs: tuple[bytes, bytes], port: int, target: tuple[str, int]) -> bytes:
    """Build a datagram from the client; its UDP checksum is one that the sender's device is to complete."""
    source, destination = socket.inet_aton(CLIENT), socket.inet_aton(target[0])
    size = 8 + len(_PAYLOAD)
    pseudo = _fold(source + destination + struct.pack("!HH", socket.IPPROTO_UDP, size))
    udp = struct.pack("!HHHH", port, target[1], size, pseudo)
    before, behind = (
        struct.pack("!BBHHHBB", 0x45, 0, 20 + size, 0, 0x4000, 64, socket.IPPROTO_UDP),
        source + destination,
    )
    checksum = struct.pack("!H", _fold(before + behind) ^ 0xFFFF)
    client, node = macs
    return node + client + b"\x08\x00" + before + checksum + behind + udp + _PAYLOAD


def _fold(words: bytes) -> int:
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Flood:
    """A sender in a line's client, of so many flows to one target."""

    def __init__(self, stage: Stage, line: Line, target: tuple[str, int], ends: contextlib.ExitStack) -> None:
        frames = [_VIRTIO + frame(line.macs(), FIRST_PORT + number, target) for number in range(FLOWS)]
        place = Path("/run/netns") / line.client
        arguments = (place, DEVICE, line.cpus.client, len(frames), len(frames[0]))
        self._process = subprocess.Popen(
            [_build(stage), *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        ends.callback(self._end)
        self._tell(b"".join(frames))
        if self._line() != b"ready\n":
            raise self._failure()

    def send(self, count: int, limit_ms: int) -> tuple[int, float]:
        """Send ``count`` frames, no longer than ``limit_ms``; returns how many were sent, and the seconds it took."""
        self._tell(b"%d %d\n" % (count, limit_ms))
        sent, _, elapsed_ns = self._line().partition(b" ")
        if not elapsed_ns:
            raise self._failure()
        return int(sent), int(elapsed_ns) / 1e9

    def _tell(self, sent: bytes) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(sent)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error

    def _line(self) -> bytes:
        assert self._process.stdout
        return self._process.stdout.readline()

    def _failure(self) -> BenchError:
        assert self._process.stderr
        return BenchError(f"flood worker: {self._process.stderr.read().decode(errors='replace').strip()}")

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=_END_LIMIT_S)


def _build(stage: Stage) -> Path:
    binary = stage.directory / "flood_worker"
    if not binary.exists():
        command("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(binary), str(_SOURCE))
    return binary
