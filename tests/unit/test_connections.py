"""Which connections are over, and that the sweep deletes those and no others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.abi import CONNECTION, CONNECTION_TURNED, TUPLE, FlowFlag, MapSizes
from agent.core.connections import Expiry
from agent.core.flows import Timeouts
from agent.kernel.connections import ConnectionSweep
from agent.kernel.map_walk import PERIOD_S
from tests.policy_store import FakeMap, FakeStore

NOW = 1_000_000
TIMEOUTS = Timeouts(
    tcp_established_s=5_000, tcp_close_wait_s=600, tcp_unreplied_s=60, tcp_closed_s=10, udp_s=30, udp_stream_s=120
)
TCP, UDP, SCTP, ICMP = 6, 17, 132, 1
ANSWERED = FlowFlag.REPLIED
OPEN = FlowFlag.REPLIED | FlowFlag.ESTABLISHED


def key(number: int, protocol: int = TCP) -> bytes:
    return TUPLE.packer.pack(number.to_bytes(16, "big"), bytes(16), bytes(2), bytes(2), protocol, bytes(3))


def value(age_s: int, flags: int = 0) -> bytes:
    return CONNECTION.packer.pack(NOW - age_s, flags, bytes(8), bytes(16))


@pytest.mark.parametrize(
    ("protocol", "flags", "limit_s"),
    [
        (TCP, 0, 60),
        (TCP, ANSWERED, 60),
        (TCP, OPEN, 5_000),
        (TCP, OPEN | CONNECTION_TURNED, 5_000),
        (TCP, OPEN | FlowFlag.FIN, 600),
        (TCP, OPEN | FlowFlag.FIN | FlowFlag.PEER_FIN, 10),
        (TCP, OPEN | FlowFlag.CLOSED, 10),
        (SCTP, ANSWERED, 60),
        (SCTP, OPEN, 5_000),
        (UDP, 0, 30),
        (UDP, ANSWERED | CONNECTION_TURNED, 120),
        (ICMP, 0, 30),
        (ICMP, ANSWERED, 120),
        (47, ANSWERED, 120),
    ],
)
def test_a_connection_is_over_past_the_limit_of_its_state(protocol, flags, limit_s):
    expiry = Expiry(TIMEOUTS, NOW)

    assert not expiry.is_over(key(1, protocol), value(limit_s, flags))
    assert expiry.is_over(key(1, protocol), value(limit_s + 1, flags))


connections = st.lists(
    st.tuples(st.sampled_from([TCP, UDP, SCTP, ICMP]), st.integers(0, 6_000), st.integers(0, 0x11FF)), max_size=20
)


@given(connections)
def test_suspects_of_a_batch_are_those_that_are_over(found):
    expiry = Expiry(TIMEOUTS, NOW)
    pairs = [(key(i, protocol), value(age, flags)) for i, (protocol, age, flags) in enumerate(found)]
    behind = b"\xff" * TUPLE.size, b"\0" * CONNECTION.size  # what is past the count means nothing
    keys, values = (b"".join(column) for column in zip(*pairs, behind, strict=True))

    assert expiry.suspects(keys, values, len(pairs)) == [k for k, v in pairs if expiry.is_over(k, v)]


@pytest.fixture
def connected() -> FakeMap:
    made = FakeStore(MapSizes(connections=10_000)).maps["connections"]
    made.entries |= {key(i): value(7 if i % 3 else 70) for i in range(5_000)}
    return made


def sweep_of(connected: FakeMap, told: list[int]) -> ConnectionSweep:
    made = ConnectionSweep(connected, TIMEOUTS, told.append)  # type: ignore[arg-type]
    assert made.due_at > 0
    return made


def test_passes_delete_what_is_over_and_count_the_rest(connected):
    told: list[int] = []
    sweep = sweep_of(connected, told)
    turns = 0
    while not told:
        sweep.turn(NOW)
        turns += 1

    assert told == [5_000]
    assert connected.entries == {key(i): value(7) for i in range(5_000) if i % 3}
    assert sweep.deleted == len(range(0, 5_000, 3))
    assert sweep.due_at == NOW + PERIOD_S


def test_one_that_speaks_meanwhile_stays(connected):
    sweep = sweep_of(connected, [])
    read = connected.batches

    def batches(size: int):
        for batch in read(size):
            connected.entries[key(0)] = value(0)
            yield batch

    connected.batches = batches  # type: ignore[method-assign]
    while sweep.due_at < NOW:
        sweep.turn(NOW)

    assert key(0) in connected.entries
    assert key(3) not in connected.entries


def test_a_failed_pass_is_begun_again_later(connected):
    sweep = sweep_of(connected, [])

    def refuse(_size: int):
        yield bytes(0), bytes(0), 0
        raise OSError(1, "no")

    connected.batches = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(OSError, match="no"):
        sweep.turn(NOW)

    assert sweep.due_at == NOW + PERIOD_S
