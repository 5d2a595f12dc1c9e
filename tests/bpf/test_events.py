"""The ring buffer's reader, against the kernel's own: what programs drop is read whole, in order, and not too fast."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from agent.core.abi import FLOW_EVENT, Direction, Reason
from agent.core.addresses import format_address
from agent.kernel.events import MOST_EACH_PERIOD, PERIOD_S, EventReader, RingBuffer
from agent.observe.flows import FlowEvent
from tests.bpf import packet_path as at
from tests.bpf.packets import End, packet
from tests.bpf.policy_path import ONE, REMOTE, PolicyPath
from tests.lab.polling import until

RECORD = 8 + FLOW_EVENT.size
ALL = 1 << 20


@pytest.fixture
def ring(policy: PolicyPath) -> Iterator[RingBuffer]:
    with contextlib.closing(RingBuffer(policy.store.maps["events"])) as opened:
        yield opened


def drop(policy: PolicyPath, port: int, times: int = 1) -> None:
    """Have the pod ``one`` be denied connections from a port."""
    policy.from_pod(sent_from(port), repeat=times)


@functools.cache
def sent_from(port: int) -> bytes:
    return bytes(packet("tcp", End(at.POD_ONE[0], port), End(at.REMOTE_POD[0], 80)))


def ports(records: Sequence[bytes]) -> list[int]:
    return [FlowEvent.unpack(record).source_port for record in records]


def test_an_event_says_what_the_program_said(policy: PolicyPath, ring: RingBuffer) -> None:
    before = time.monotonic_ns()
    drop(policy, 40_000)

    (record,) = ring.read(ALL)

    event = FlowEvent.unpack(record)
    ends = (format_address(event.source), event.source_port, format_address(event.destination), event.destination_port)
    assert ends == (at.POD_ONE[0], 40_000, at.REMOTE_POD[0], 80)
    assert (event.subject, event.peer, event.rule, event.protocol) == (ONE, REMOTE, 0, 6)
    assert (event.is_allowed, event.direction, event.reason) == (False, Direction.EGRESS, Reason.POLICY)
    assert event.device == policy.ifindex["one"]
    assert before < event.time_ns < time.monotonic_ns()
    assert ring.read(ALL) == []


@pytest.mark.parametrize("most", [1, 7, ALL], ids=["one by one", "some", "all"])
def test_all_are_read_in_order_round_and_round(policy: PolicyPath, ring: RingBuffer, most: int) -> None:
    """More than the ring holds, so that records lie across its end."""
    lost, laps = policy.lost(), 2 * (policy.store.maps["events"].info.max_entries // RECORD) // 331 + 1
    for _ in range(laps):
        for port in range(331):
            drop(policy, port + 1)
        read: list[int] = []
        while records := ring.read(most):
            assert len(records) <= most
            read += ports(records)
        assert read == list(range(1, 332))
    assert policy.lost() == lost


def test_what_finds_no_room_is_counted(policy: PolicyPath, ring: RingBuffer) -> None:
    lost, flood = policy.lost(), 20_011

    drop(policy, 40_000, times=flood)

    records = ring.read(ALL)
    assert len(records) == (policy.store.maps["events"].info.max_entries - 1) // RECORD
    assert policy.lost() - lost == flood - len(records)
    drop(policy, 40_001)
    assert ports(ring.read(ALL)) == [40_001]


class Taken:
    """What a reader told."""

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.lost = 0
        self.most = 0
        self.calls = 0

    def take(self, records: Sequence[bytes], lost: int) -> None:
        self.ports += ports(records)
        self.lost += lost
        self.most = max(self.most, len(records))
        self.calls += 1


@pytest.fixture
def taken() -> Taken:
    return Taken()


@pytest.fixture
def may_begin() -> threading.Event:
    return threading.Event()


@pytest.fixture
def reader(policy: PolicyPath, taken: Taken, may_begin: threading.Event) -> Iterator[EventReader]:
    maps = policy.store.maps
    opened = EventReader(maps["events"], maps["policy_counters"], taken.take, may_begin)
    opened.start()
    yield opened
    opened.stop()


def test_a_reader_is_woken(policy: PolicyPath, reader: EventReader, taken: Taken, may_begin: threading.Event) -> None:
    may_begin.set()
    for port in (1, 2, 3):
        drop(policy, port)
        until(lambda port=port: taken.ports == list(range(1, port + 1)), f"event {port} is told")


def test_what_came_before_anybody_could_name_it_is_told_then(
    policy: PolicyPath, reader: EventReader, taken: Taken, may_begin: threading.Event
) -> None:
    drop(policy, 1)
    assert taken.calls == 0
    may_begin.set()

    until(lambda: taken.ports == [1], "the event is told")


def test_a_flood_costs_next_to_nothing(
    policy: PolicyPath, reader: EventReader, taken: Taken, may_begin: threading.Event
) -> None:
    """The ring overflows many times over; each period a share is read, and every event is told or counted."""
    may_begin.set()
    flood, rounds = 10_007, 10
    began = time.monotonic()
    for _ in range(rounds):
        drop(policy, 40_000, times=flood)
    until(lambda: len(taken.ports) + taken.lost == flood * rounds, "all are told or counted", 30)
    took = time.monotonic() - began
    worked = time.clock_gettime(time.pthread_getcpuclockid(reader._thread.ident))

    assert worked < 0.05 * took
    assert taken.most == MOST_EACH_PERIOD
    assert len(taken.ports) <= (took / PERIOD_S + 2) * MOST_EACH_PERIOD
    assert taken.lost > 0


def test_a_reader_that_never_began_stops(policy: PolicyPath, taken: Taken) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    maps = policy.store.maps
    opened = EventReader(maps["events"], maps["policy_counters"], taken.take, threading.Event())
    opened.start()

    opened.stop()

    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
