"""The sweep over a real map: what it deletes, what it leaves, and what it costs."""

from __future__ import annotations

import os
import threading
import time

import pytest

from agent.core.abi import FLOW, TUPLE, FlowFlag
from agent.core.flows import Flow, Timeouts, UdpServices
from agent.core.plan import Placement
from agent.core.records import Family, Protocol
from agent.core.services import PortName
from agent.kernel import bpf
from agent.kernel.conntrack import FlowSweep, Undecided
from tests.builders import frontend, key
from tests.flows import end, pair
from tests.requirements import require_root

TCP, UDP, SCTP = Protocol
LIMITS = Timeouts()
NOTHING_UNDECIDED = Undecided(frozenset(), frozenset())
REPLIED, ESTABLISHED = FlowFlag.REPLIED, FlowFlag.ESTABLISHED


class Requests:
    """Notes what the sweep asks of sockets."""

    def __init__(self):
        self.losses = []
        self.spared = []

    def request(self, losses):
        self.losses.append(losses)

    def request_all(self, spared):
        self.spared.append(spared)


def new_map(size=4096):
    return bpf.Map(bpf.map_create(bpf.MapType.LRU_HASH, TUPLE.size, FLOW.size, size, 0, "conntrack"))


@pytest.fixture
def flows():
    require_root()
    opened = new_map()
    yield opened
    opened.close()


def write(opened, *entries):
    opened.update_batch(b"".join(k for k, _ in entries), b"".join(v for _, v in entries), len(entries))


def sweep_of(opened, services=None, timeouts=LIMITS):
    return FlowSweep(opened, timeouts, Requests(), services or UdpServices())


def run(sweep, undecided=NOTHING_UNDECIDED, now=None):
    """Take turns until a pass is over; returns how many it took."""
    now = time.monotonic() if now is None else now
    sweep._due_at = now
    turns = 0
    while now >= sweep.due_at:
        sweep.turn(now, lambda: undecided)
        turns += 1
    return turns


def keys(opened):
    return {k for k, _ in opened.items()}


def dns(serving=("10.1.0.1:53",), ident=7):
    services = UdpServices()
    placement = Placement(
        key("dns"),
        PortName("dns", UDP, Family.IPV4),
        ident,
        "",
        frontends=(frontend("10.96.0.10", 53, UDP),),
        serving=frozenset(map(end, serving)),
    )
    services.note(placement.service, [placement])
    return services


def ago(seconds):
    return int(time.monotonic()) - seconds


def test_what_was_silent_too_long_goes_and_nothing_else(flows):
    old = [*pair(TCP, "10.9.0.1:1", seen=ago(62)), *pair(SCTP, "[fd00::1]:1", "[fd00:96::1]:5", "[fd00:1::1]:5")]
    young = [
        *pair(TCP, "10.9.0.2:1", seen=ago(58)),
        *pair(TCP, "10.9.0.3:1", seen=ago(4000), flags=REPLIED | ESTABLISHED),
        *pair(UDP, "10.9.0.4:1", seen=ago(119), flags=REPLIED),
    ]
    write(flows, *old, *young)
    sweep = sweep_of(flows, dns())

    run(sweep)

    assert keys(flows) == {k for k, _ in young}
    assert sweep.deleted == {"silent": 4}


def test_a_pair_stays_for_its_younger_side(flows):
    there, _ = pair(TCP, seen=ago(500))
    _, back = pair(TCP, seen=ago(1))
    write(flows, there, back)

    run(sweep_of(flows))

    assert keys(flows) == {there[0], back[0]}


@pytest.mark.parametrize("side", [0, 1], ids=["there", "back"])
@pytest.mark.parametrize(("age", "stays"), [(500, False), (1, True)], ids=["old", "young"])
def test_an_entry_whose_pair_is_gone(flows, side, age, stays):
    orphan = pair(TCP, seen=ago(age))[side]
    write(flows, orphan)

    run(sweep_of(flows))

    assert keys(flows) == ({orphan[0]} if stays else set())


def test_what_took_a_pairs_place_stays(flows):
    """The reply tuple of a flow that is over belongs to a new flow, masqueraded with the same port."""
    there, back = pair(TCP, "10.9.0.1:1", masquerade="172.30.0.1:20000", seen=ago(500))
    new_there, new_back = pair(TCP, "10.9.0.2:2", masquerade="172.30.0.1:20000", seen=ago(0))
    assert back[0] == new_back[0]
    write(flows, there, new_there, new_back)

    run(sweep_of(flows))

    assert keys(flows) == {new_there[0], new_back[0]}


@pytest.mark.parametrize(
    ("services", "undecided", "stays"),
    [
        pytest.param(dns(), NOTHING_UNDECIDED, True, id="serving"),
        pytest.param(dns(()), NOTHING_UNDECIDED, False, id="scaled-to-zero"),
        pytest.param(dns(["10.1.0.2:53"]), NOTHING_UNDECIDED, False, id="another-backend"),
        pytest.param(dns(["10.1.0.1:5353"]), NOTHING_UNDECIDED, False, id="another-port"),
        pytest.param(UdpServices(), NOTHING_UNDECIDED, False, id="service-gone"),
        pytest.param(UdpServices(), Undecided(frozenset([7]), frozenset()), True, id="undecided"),
        pytest.param(UdpServices(), None, True, id="nothing-is-certain"),
    ],
)
def test_udp_flows_that_stick(flows, services, undecided, stays):
    entries = pair(UDP, seen=ago(0), flags=REPLIED)
    others = [*pair(TCP, seen=ago(0), service=99), *pair(SCTP, seen=ago(0), service=99)]
    write(flows, *entries, *others)
    sweep = sweep_of(flows, services)
    passes = []
    sweep.on_pass = passes.append

    run(sweep, undecided)

    assert keys(flows) == {k for k, _ in others} | {k for k, _ in entries if stays}
    assert sweep.deleted == ({} if stays else {"stale": 2})
    assert [(swept.entries, swept.stale) for swept in passes] == [(6, {} if stays else {Family.IPV4: 2})]


def test_ids_of_a_former_layout_do_not_matter(flows):
    entries = pair(UDP, seen=ago(0), service=3)
    write(flows, *entries)
    sweep = sweep_of(flows, dns())

    run(sweep)
    assert keys(flows) == {k for k, _ in entries}

    sweep.note_all(set())
    run(sweep)
    assert keys(flows) == set()


def test_what_changes_is_looked_for_at_once(flows):
    write(flows, *pair(UDP, seen=ago(0), flags=REPLIED))
    sweep = sweep_of(flows, dns())
    run(sweep)
    assert sweep.due_at > time.monotonic() + 1

    sweep.note(key("dns"), ())

    assert sweep.due_at < time.monotonic() + 0.1
    assert sweep.sockets.losses == [{end("10.96.0.10:53"): frozenset([end("10.1.0.1:53")])}]
    run(sweep)
    assert keys(flows) == set()


def test_what_changes_during_a_pass_is_looked_for_by_another(flows):
    write(flows, *pair(UDP, seen=ago(0), flags=REPLIED))
    sweep = sweep_of(flows, dns())
    now = time.monotonic()
    sweep._pass = sweep._begin(now, NOTHING_UNDECIDED)
    sweep.note_removed([frontend("10.96.0.99", 53, UDP), frontend("10.96.0.99", 53, TCP)])

    while sweep.due_at == 0:
        sweep.turn(now, lambda: NOTHING_UNDECIDED)

    assert now <= sweep.due_at < now + 1
    assert sweep.sockets.losses == [{end("10.96.0.99:53"): None}]


def test_sockets_are_looked_over_once_everything_is_certain(flows):
    sweep = sweep_of(flows)
    sweep.check_all()
    run(sweep, None)
    assert sweep.sockets.spared == []

    sweep.check_all()
    run(sweep, Undecided(frozenset([1]), frozenset([b"x"])))
    run(sweep)

    assert sweep.sockets.spared == [frozenset([b"x"])]


def test_the_interval_stretches_only_where_nothing_is(flows):
    now = time.monotonic()
    sweep = sweep_of(flows)
    run(sweep, now=now)
    assert sweep.due_at == now + 30

    write(flows, *pair(TCP, seen=ago(0)))
    run(sweep, now=now)
    assert sweep.due_at == now + 10


def test_a_map_that_cannot_be_read_is_tried_again(flows):
    sweep = sweep_of(new_map(64))
    sweep._map.close()
    now = time.monotonic()

    with pytest.raises(OSError, match="bpf"):
        sweep.turn(now, lambda: NOTHING_UNDECIDED)

    assert sweep.due_at == now + 10


def test_deletion_goes_on_behind_a_key_that_is_missing(flows):
    entries = [pair(TCP, f"10.9.1.{number}:1")[0] for number in range(100)]
    write(flows, *entries[::3])

    assert flows.delete_present([k for k, _ in entries]) == len(entries[::3])
    assert keys(flows) == set()


def test_flows_that_live_survive_a_writer_and_a_sweep_side_by_side(flows):
    """Every flow is old when it is written and is refreshed all the time: the sweep must not take one that was."""
    live = [pair(TCP, f"10.9.2.{number}:1", seen=ago(0)) for number in range(1, 101)]
    dead = [pair(TCP, f"10.9.3.{number}:1", seen=ago(1000)) for number in range(1, 101)]
    write(flows, *(e for p in live for e in p))
    stop = threading.Event()

    def refresh():
        while not stop.is_set():
            write(flows, *(e for p in live for e in p))

    writer = threading.Thread(target=refresh)
    writer.start()
    try:
        sweep = sweep_of(flows)
        for _ in range(20):
            write(flows, *(e for p in dead for e in p))
            run(sweep)
    finally:
        stop.set()
        writer.join()

    assert keys(flows) == {k for p in live for k, _ in p}
    assert sweep.deleted == {"silent": 20 * 200}


def survivors(reads: bool) -> int:
    """Fill a map, use half of it, perhaps read all of it by batches, crowd it: how many that were used survive."""
    opened = new_map(2048)
    capacity = 2048
    entries = [pair(TCP, f"10.9.{number >> 8}.{number & 255}:1")[0] for number in range(capacity + capacity // 4)]
    used = entries[: capacity // 2]
    write(opened, *entries[:capacity])
    write(opened, *used)  # an update marks an entry as used, as a packet does
    if reads:
        for _ in range(3):
            assert sum(count for _, _, count in opened.batches(256)) > capacity // 2
    write(opened, *entries[capacity:])
    left = keys(opened)
    opened.close()
    return sum(k in left for k, _ in used)


def test_reading_by_batches_leaves_the_order_of_eviction_alone():
    """Were an entry that is read marked as used, those that really are would be evicted like any other."""
    require_root()
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})  # each CPU has free entries of its own
    try:
        assert survivors(reads=False) == survivors(reads=True) == 1024
    finally:
        os.sched_setaffinity(0, cpus)


def test_a_full_map_is_swept_in_short_turns():
    """131,072 entries: well under 200 ms of work, no turn of more than a few."""
    require_root()
    opened = new_map(131_072)
    flags = REPLIED | ESTABLISHED
    for block in range(64):
        clients = (f"10.{block}.{number >> 8}.{number & 255}:1" for number in range(1024))
        write(opened, *(e for c in clients for e in pair(UDP if block % 4 == 0 else TCP, c, seen=ago(0), flags=flags)))
    sweep = sweep_of(opened, dns())
    passes = []
    now = time.monotonic()
    for _ in range(3):
        sweep._due_at = now
        turns = []
        while now >= sweep.due_at:
            began = time.thread_time()  # others may have the CPU meanwhile
            sweep.turn(now, lambda: NOTHING_UNDECIDED)
            turns.append(time.thread_time() - began)
        passes.append(turns)

    examined = sum(1 for _ in opened.items())
    opened.close()
    assert examined > 100_000
    assert min(map(sum, passes)) < 0.2
    assert min(map(max, passes)) < 0.005


def test_flow_is_read_as_written():
    k, v = pair(UDP)[0]

    assert Flow.unpack(k, v).service == 7
