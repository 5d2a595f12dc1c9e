"""The sweep of columns decides as a plain reading of every flow does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.core.abi import FlowFlag as F
from agent.core.flows import Flow, Sweep, Timeouts, UdpServices
from agent.core.plan import Placement
from agent.core.records import Family, Protocol
from agent.core.services import PortName
from tests.builders import frontend, key
from tests.flows import end, entry, mirrored

NOW = 100_000
LIMITS = Timeouts(1_000, 500, 60, 10, 30, 120)
BACKENDS = [f"10.1.0.{number}:53" for number in range(1, 4)]
FRONTENDS = [f"10.96.0.{number}:53" for number in range(1, 4)]
IDS = range(6)
SPARED = {5}
ANOTHER_NODES = 0
AGES = sorted({0, *(limit + more for limit in (1_000, 500, 60, 10, 30, 120) for more in (-1, 0, 1))})
FLAGS = st.lists(st.sampled_from([F.REPLIED, F.ESTABLISHED, F.FIN, F.PEER_FIN, F.CLOSED, F.DSR, F.MASQUERADED])).map(
    sum
)


@st.composite
def ports(draw):
    """What UDP service ports serve, by id; a frontend belongs to one."""
    ids = draw(st.lists(st.sampled_from([1, 2, 3]), unique=True))
    return {ident: (draw(st.sets(st.sampled_from(BACKENDS))), FRONTENDS[ident - 1]) for ident in ids}


@st.composite
def flow(draw, number):
    """A flow, either way of which may have been evicted; both ways may differ in age and in what they know."""
    protocol = draw(st.sampled_from(list(Protocol)))
    client, asked, backend = f"10.9.0.{number}:1", draw(st.sampled_from(FRONTENDS)), draw(st.sampled_from(BACKENDS))
    flags = draw(FLAGS)
    other = draw(st.just(flags) | FLAGS)
    ages = draw(st.tuples(st.sampled_from(AGES), st.sampled_from(AGES)))
    service = draw(st.sampled_from(IDS))
    there = entry(protocol, client, asked, client, backend, seen=NOW - ages[0], flags=flags, service=service)
    back = entry(protocol, backend, client, asked, client, seen=NOW - ages[1], flags=mirrored(other), service=service)
    present = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    facts = (protocol, [flags, other], ages, service, asked, backend)
    return [e if is_there else None for e, is_there in zip((there, back), present, strict=True)], facts


def limit_of(protocol, flags):
    """The table of docs and kube-proxy, written down once more."""
    if protocol is Protocol.UDP:
        return 120 if flags & F.REPLIED else 30
    if flags & F.CLOSED or (flags & F.FIN and flags & F.PEER_FIN):
        return 10
    if flags & (F.FIN | F.PEER_FIN):
        return 500
    answered = flags & (F.ESTABLISHED if protocol is Protocol.TCP and not flags & F.DSR else F.REPLIED)
    return 1_000 if answered else 60


def is_over(sides, facts, known):
    """Decide about a flow by its facts."""
    protocol, flags, ages, service, asked, backend = facts
    there = [i for i in (0, 1) if sides[i]]
    joined = 0
    for i in there:
        joined |= flags[i]
    if min(ages[i] for i in there) > limit_of(protocol, joined):
        return True
    if protocol is not Protocol.UDP:
        return False
    return is_stale(service, asked, backend, known)


def is_stale(service, asked, backend, known):
    """Decide by who has the frontend now."""
    if service == ANOTHER_NODES:
        return False
    serving = next((serving for serving, own in known.values() if asked == own), None)
    return service not in SPARED if serving is None else backend not in serving


def services_of(known):
    services = UdpServices()
    for ident, (serving, asked) in known.items():
        address, _, port = asked.rpartition(":")
        name = key(f"svc-{ident}")
        services.note(
            name,
            [
                Placement(
                    name,
                    PortName("dns", Protocol.UDP, Family.IPV4),
                    ident,
                    "",
                    frontends=(frontend(address, int(port), Protocol.UDP),),
                    serving=frozenset(map(end, serving)),
                )
            ],
        )
    return services


@given(st.integers(0, 8).flatmap(lambda count: st.tuples(*(flow(number) for number in range(count)))), ports())
def test_the_sweep_decides_as_a_plain_reading_does(flows, known):
    sweep = Sweep(LIMITS, NOW, services_of(known), SPARED)
    held = dict(e for sides, _ in flows for e in sides if e)
    keys, values = b"".join(held), b"".join(held.values())

    deleted = set()
    for suspect in sweep.suspects(keys, values, len(held)):
        one = Flow.unpack(suspect, held[suspect])
        value = held.get(one.pair_key)
        pair = Flow.unpack(one.pair_key, value) if value else None
        if sweep.is_over(one, pair):
            deleted |= {one.key} | ({pair.key} if pair else set())

    expected = {e[0] for sides, facts in flows if is_over(sides, facts, known) for e in sides if e}
    assert deleted <= expected
    # The packet path writes state to both sides at once; where they differ, a flow may stay for as long as each allows.
    # And a stale way back alone translates nothing new: it ends with its silence.
    lasting = {e[0] for sides, (_, flags, *_) in flows if flags[0] != flags[1] or not sides[0] for e in sides if e}
    assert expected <= deleted | lasting


@given(flow(1), ports())
def test_both_ways_say_the_same_of_staleness(one, known):
    sides, (protocol, *_, service, asked, backend) = one
    sweep = Sweep(LIMITS, NOW, services_of(known), SPARED)
    stale = protocol is Protocol.UDP and is_stale(service, asked, backend, known)

    assert {sweep.is_stale(Flow.unpack(*side)) for side in sides if side} == {stale}
