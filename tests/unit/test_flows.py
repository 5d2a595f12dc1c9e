"""Which tracked flows are over, and which UDP ones stick to what is gone."""

from __future__ import annotations

import pytest

from agent.core.abi import FlowFlag as F
from agent.core.flows import Flow, State, Sweep, Timeouts, UdpServices, merged, state_of
from agent.core.plan import Placement
from agent.core.records import Family, Protocol
from agent.core.services import PortName
from tests.builders import frontend, key
from tests.flows import end, entry, pair

TCP, UDP, SCTP = Protocol
NOW = 1_000_000
LIMITS = Timeouts(
    tcp_established_s=1_000, tcp_close_wait_s=500, tcp_unreplied_s=60, tcp_closed_s=10, udp_s=30, udp_stream_s=120
)
DNS = frontend("10.96.0.10", 53, UDP)


def batch(*entries):
    return b"".join(k for k, _ in entries), b"".join(v for _, v in entries), len(entries)


def suspects(sweep, *entries):
    keys, values, count = batch(*entries)
    # What is past the count is whatever the buffer held before.
    return sweep.suspects(keys + b"\xff" * 80, values + b"\xff" * 104, count)


def placement(ident=7, serving=("10.1.0.1:53",), frontends=(DNS,), protocol=UDP, name="dns"):
    return Placement(
        key("dns"),
        PortName(name, protocol, Family.IPV4),
        ident,
        "",
        frontends=tuple(frontends),
        serving=frozenset(map(end, serving)) if protocol is UDP else None,
    )


def services(*placements):
    known = UdpServices()
    known.note(key("dns"), placements)
    return known


@pytest.mark.parametrize(
    ("protocol", "flags", "state"),
    [
        pytest.param(TCP, 0, State.UNREPLIED, id="syn"),
        pytest.param(TCP, F.REPLIED, State.UNREPLIED, id="syn-ack"),
        pytest.param(TCP, F.REPLIED | F.ESTABLISHED, State.ESTABLISHED, id="tcp"),
        pytest.param(TCP, F.REPLIED | F.ESTABLISHED | F.FIN, State.HALF_CLOSED, id="one-fin"),
        pytest.param(TCP, F.REPLIED | F.ESTABLISHED | F.PEER_FIN, State.HALF_CLOSED, id="the-other-fin"),
        pytest.param(TCP, F.REPLIED | F.ESTABLISHED | F.FIN | F.PEER_FIN, State.CLOSED, id="both-fins"),
        pytest.param(TCP, F.REPLIED | F.CLOSED, State.CLOSED, id="reset"),
        pytest.param(TCP, F.CLOSED | F.FIN, State.CLOSED, id="reset-after-fin"),
        pytest.param(TCP, F.DSR, State.UNREPLIED, id="tcp-dsr-syn"),
        pytest.param(TCP, F.DSR | F.REPLIED, State.ESTABLISHED, id="tcp-dsr"),
        pytest.param(UDP, 0, State.UNREPLIED, id="udp-one-way"),
        pytest.param(UDP, F.REPLIED, State.ESTABLISHED, id="udp"),
        pytest.param(UDP, F.DSR, State.UNREPLIED, id="udp-dsr"),
        pytest.param(SCTP, 0, State.UNREPLIED, id="sctp-init"),
        pytest.param(SCTP, F.REPLIED, State.ESTABLISHED, id="sctp"),
        pytest.param(SCTP, F.REPLIED | F.CLOSED, State.CLOSED, id="sctp-abort"),
    ],
)
def test_state(protocol, flags, state):
    assert state_of(protocol, flags) is state
    assert state_of(protocol, flags | F.REPLY | F.MASQUERADED | F.AT_EGRESS) is state


@pytest.mark.parametrize(
    ("flags", "other", "expected"),
    [
        pytest.param(0, F.REPLY | F.REPLIED, F.REPLIED, id="replied"),
        pytest.param(F.FIN, F.REPLY | F.FIN, F.FIN | F.PEER_FIN, id="each-its-own-fin"),
        pytest.param(0, F.REPLY | F.PEER_FIN, F.FIN, id="the-others-peer-is-this"),
        pytest.param(F.REPLY, F.CLOSED, F.REPLY | F.CLOSED, id="reset"),
        pytest.param(F.MASQUERADED, F.REPLY, F.MASQUERADED, id="stays-the-way-there"),
    ],
)
def test_both_sides_are_joined(flags, other, expected):
    assert merged(flags, other) == expected


@pytest.mark.parametrize(
    ("protocol", "flags", "limit"),
    [
        pytest.param(TCP, 0, 60, id="tcp-unreplied"),
        pytest.param(TCP, F.REPLIED, 60, id="tcp-handshake"),
        pytest.param(TCP, F.REPLIED | F.ESTABLISHED, 1_000, id="tcp-established"),
        pytest.param(TCP, F.ESTABLISHED | F.FIN, 500, id="tcp-half-closed"),
        pytest.param(TCP, F.ESTABLISHED | F.FIN | F.PEER_FIN, 10, id="tcp-closed"),
        pytest.param(TCP, F.CLOSED, 10, id="tcp-reset"),
        pytest.param(UDP, 0, 30, id="udp-unreplied"),
        pytest.param(UDP, F.REPLIED, 120, id="udp-stream"),
        pytest.param(SCTP, F.REPLIED, 1_000, id="sctp"),
    ],
)
@pytest.mark.parametrize("side", [0, 1], ids=["there", "back"])
def test_timeout(protocol, flags, limit, side):
    """To the second: an entry is over once it has been silent for longer than its state allows."""
    sweep = Sweep(LIMITS, NOW)
    for seen, is_over in ((NOW - limit, False), (NOW - limit - 1, True), (NOW, False)):
        entries = pair(protocol, seen=seen, flags=flags)
        flow, other = Flow.unpack(*entries[side]), Flow.unpack(*entries[1 - side])
        assert suspects(sweep, entries[side]) == [flow.key] * is_over
        assert sweep.is_over(flow, None) is is_over
        assert sweep.is_over(flow, other) is is_over


def test_a_pair_lives_by_its_younger_side():
    sweep = Sweep(LIMITS, NOW)
    there, _ = pair(UDP, seen=NOW - 500, flags=F.REPLIED)
    _, back = pair(UDP, seen=NOW - 1, flags=F.REPLIED)

    assert suspects(sweep, there, back) == [there[0]]
    assert not sweep.is_over(Flow.unpack(*there), Flow.unpack(*back))
    assert sweep.is_over(Flow.unpack(*there), None)


def test_a_pair_has_the_state_of_both_sides():
    """One way says that its end has closed, the other way that its own has: the flow is closed."""
    sweep = Sweep(LIMITS, NOW)
    there = Flow.unpack(*pair(TCP, seen=NOW - 20, flags=F.ESTABLISHED | F.FIN)[0])
    back = Flow.unpack(*pair(TCP, seen=NOW - 20, flags=F.ESTABLISHED | F.PEER_FIN)[1])

    assert not sweep.is_over(there, None)
    assert sweep.is_over(there, back)


def test_suspects_are_found_where_they_are():
    old = [pair(TCP, f"10.9.0.{i}:1000", seen=NOW - 61)[i % 2] for i in range(1, 50)]
    young = [pair(TCP, f"10.8.0.{i}:1000", seen=NOW)[i % 2] for i in range(1, 50)]
    mixed = [e for both in zip(old, young, strict=True) for e in both]

    assert suspects(Sweep(LIMITS, NOW), *mixed) == [k for k, _ in old]


@pytest.mark.parametrize("side", [0, 1], ids=["there", "back"])
@pytest.mark.parametrize("masquerade", ["", "172.30.0.1:20000"], ids=["client", "masqueraded"])
@pytest.mark.parametrize(
    "ends",
    [
        ("10.9.0.1:4000", "10.96.0.10:53", "10.1.0.1:5353"),
        ("[fd00::9]:4000", "[fd00:96::a]:53", "[fd00:1::1]:5353"),
    ],
    ids=["IPv4", "IPv6"],
)
def test_ends_of_a_flow(ends, masquerade, side):
    client, asked, backend = ends
    entries = pair(UDP, client, asked, backend, masquerade, flags=F.REPLIED)
    flow, other = Flow.unpack(*entries[side]), Flow.unpack(*entries[1 - side])

    assert (flow.client, flow.frontend, flow.backend) == (end(client), end(asked), end(backend))
    assert flow.backend_sees == end(masquerade or client)
    assert flow.is_reply == bool(side)
    assert flow.pair_key == other.key
    assert flow.is_pair_of(other)


def test_a_tuple_that_another_flow_took_is_no_pair():
    there, _ = (Flow.unpack(*e) for e in pair(UDP))
    k, v = pair(UDP, "10.9.9.9:4000")[1]
    taken = Flow.unpack(there.pair_key, v)

    assert k != there.pair_key
    assert not there.is_pair_of(taken)


@pytest.mark.parametrize(
    ("entries", "is_stale"),
    [
        pytest.param(pair(UDP, backend="10.1.0.1:53", seen=NOW), False, id="serving"),
        pytest.param(pair(UDP, backend="10.1.0.2:53", seen=NOW), True, id="backend-gone"),
        pytest.param(pair(UDP, backend="10.1.0.1:54", seen=NOW), True, id="target-port-changed"),
        pytest.param(pair(UDP, frontend="10.96.0.10:54", seen=NOW), True, id="port-changed"),
        pytest.param(pair(UDP, frontend="10.96.0.11:53", seen=NOW), True, id="address-changed"),
        pytest.param(pair(UDP, service=8, seen=NOW), False, id="of-another-id"),
        pytest.param(pair(UDP, service=8, backend="10.1.0.2:53", seen=NOW), True, id="of-another-id-backend-gone"),
        pytest.param(pair(UDP, service=8, frontend="10.96.0.11:53", seen=NOW), True, id="service-gone"),
        pytest.param(pair(UDP, service=9, frontend="10.96.0.11:53", seen=NOW), False, id="undecided"),
        pytest.param(pair(UDP, service=9, backend="10.1.0.2:53", seen=NOW), True, id="undecided-but-for-its-frontend"),
        pytest.param(
            pair(UDP, service=0, backend="10.1.0.2:53", seen=NOW, flags=F.DSR), False, id="another-node-knows"
        ),
        pytest.param(pair(TCP, service=8, backend="10.1.0.2:53", seen=NOW, flags=F.ESTABLISHED), False, id="tcp-never"),
        pytest.param(pair(SCTP, service=8, seen=NOW, flags=F.REPLIED), False, id="sctp-never"),
    ],
)
def test_stale(entries, is_stale):
    sweep = Sweep(LIMITS, NOW, services(placement()), spared={9})
    there, back = (Flow.unpack(*e) for e in entries)

    assert sweep.is_stale(there) is sweep.is_stale(back) is is_stale
    assert sweep.is_over(there, back) is sweep.is_over(back, there) is is_stale
    assert suspects(sweep, *entries) == [there.key] * is_stale


def test_nothing_is_stale_while_nothing_is_certain():
    assert suspects(Sweep(LIMITS, NOW), *pair(UDP, service=8, seen=NOW)) == []


@pytest.mark.parametrize(
    ("now", "lost"),
    [
        pytest.param([placement()], {}, id="nothing"),
        pytest.param([placement(serving=["10.1.0.1:53", "10.1.0.2:53"])], {}, id="one-more"),
        pytest.param([placement(serving=[])], {"10.96.0.10:53": ["10.1.0.1:53"]}, id="scaled-to-zero"),
        pytest.param([], {"10.96.0.10:53": ["10.1.0.1:53"]}, id="deleted"),
        pytest.param(
            [placement(serving=["10.1.0.2:53", "10.1.0.3:53"])], {"10.96.0.10:53": ["10.1.0.1:53"]}, id="replaced"
        ),
        pytest.param(
            [placement(frontends=[frontend("10.96.0.10", 54, UDP)])],
            {"10.96.0.10:53": ["10.1.0.1:53"]},
            id="port-changed",
        ),
        pytest.param([placement(frontends=[DNS, frontend("10.0.0.9", 53, UDP)])], {}, id="one-more-frontend"),
        pytest.param([placement(ident=8, name="renamed")], {}, id="renamed"),
        pytest.param(
            [placement(ident=8, serving=["10.1.0.2:53"], name="renamed")],
            {"10.96.0.10:53": ["10.1.0.1:53"]},
            id="renamed-and-replaced",
        ),
    ],
)
def test_what_a_service_lost(now, lost):
    known = services(placement())

    found = known.note(key("dns"), now)

    assert found == {end(asked): frozenset(map(end, gone)) for asked, gone in lost.items()}
    assert known.serving_at == {f[:18]: p.serving for p in now for f in p.frontends}


def test_only_udp_is_known():
    reserved = frontend("10.96.0.10", 0, UDP)[:18] + b"\x00\x00"
    known = services(
        placement(), placement(8, protocol=TCP, name="tcp"), placement(9, frontends=[reserved], name="reserved")
    )

    assert set(known.serving_at) == {end("10.96.0.10:53")}


def test_a_frontend_that_moves_to_another_service_is_that_ones():
    known = services(placement())
    other = placement(8, ["10.2.0.1:53"])

    known.note(key("other"), [other])
    lost = known.note(key("dns"), [])

    assert lost == {end("10.96.0.10:53"): frozenset([end("10.1.0.1:53")])}
    assert known.serving_at == {end("10.96.0.10:53"): other.serving}


def test_services_that_are_missing():
    known = services(placement())

    assert known.missing({key("dns")}) == []
    assert known.missing(set()) == [key("dns")]


def test_an_entry_of_no_protocol_goes_as_tcp_does():
    k, v = entry(0, "10.9.0.1:1", "10.96.0.1:1", "10.9.0.1:1", "10.1.0.1:1", seen=NOW - 61)

    assert suspects(Sweep(LIMITS, NOW), (k, v)) == [k]
