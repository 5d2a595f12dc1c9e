"""Entries: precedence ends up in prefixes; the way from some to others passes by no third verdict."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from agent.core.abi import PEER_ANY, Direction
from agent.core.policy import ADMIN, BASELINE, NETWORK, Decision, Entries, Ports, agree, decide, flatten, prefixes
from agent.core.policy_plan import PolicyPlan, PolicySizes, PolicyState, PolicyTable
from agent.core.policy_records import Action
from tests.policy_reference import PolicyMaps

ROW = 16, Direction.INGRESS
PEERS = (16, 17, 18)
SAMPLED = [(6, 0), (6, 1), (6, 2), (6, 3), (6, 4), (6, 65535), (17, 2), (1, 0)]
_ports = st.builds(
    lambda protocol, first, size: Ports(protocol, first, min(first + size, 65535)),
    st.sampled_from([6, 6, 17]),
    st.sampled_from([0, 1, 2, 3, 65535]),
    st.sampled_from([0, 1, 2, 65535]),
)
_decisions = st.lists(
    st.builds(
        Decision,
        st.sampled_from([ADMIN, NETWORK, BASELINE]),
        st.sampled_from(Action),
        st.none() | st.lists(_ports, max_size=3).map(tuple),
        st.integers(1, 3),
    ),
    max_size=4,
).map(lambda said: tuple(sorted(said, key=lambda decision: decision.stage)))
_entries = st.builds(lambda said, isolated: flatten(said, is_isolated=isolated), _decisions, st.booleans())
_columns = st.fixed_dictionaries({PEER_ANY: _entries}, optional=dict.fromkeys(PEERS, _entries))


def judged(maps: PolicyMaps) -> list[bool]:
    return [maps.rule(ROW[0], peer, ROW[1], *port)[0] for peer in PEERS for port in SAMPLED]


@given(_columns, _columns)
def test_the_way_from_columns_to_columns_passes_by_no_third_verdict(old, new):
    table, maps = PolicyTable(PolicySizes().policy, {}), PolicyMaps(PolicyState())
    for columns in (old, new):
        plan = PolicyPlan()
        assert table.plan({ROW: columns}, {ROW: columns}, plan) == set()
        before = judged(maps)
        steps = [judged(maps) for _ in maps.writes(plan)]
        if columns is new:
            for step in steps:
                assert all(now in {was, will} for was, now, will in zip(before, step, steps[-1], strict=True))
        assert maps.state.policy == dict(table.entries())
        assert table.count == len(maps.state.policy)


@given(_decisions, st.booleans())
def test_the_longest_prefix_says_what_precedence_says(decisions, is_isolated):
    entries = flatten(decisions, is_isolated=is_isolated)
    plan, maps = PolicyPlan(), PolicyMaps()
    PolicyTable(PolicySizes().policy, {}).plan({ROW: {PEER_ANY: entries}}, {ROW: {PEER_ANY: entries}}, plan)
    maps.apply(plan)

    for protocol, port in SAMPLED:
        expected = decide(decisions, protocol if protocol in {6, 17} else 0, port, is_isolated=is_isolated)
        assert maps.rule(ROW[0], PEERS[0], ROW[1], protocol, port) == expected
    assert_shape(entries)


@given(_entries, _entries)
def test_what_agrees_says_the_same_of_every_port(one, other):
    maps = [PolicyMaps(), PolicyMaps()]
    for entries, them in zip((one, other), maps, strict=True):
        plan = PolicyPlan()
        PolicyTable(PolicySizes().policy, {}).plan({ROW: {PEER_ANY: entries}}, {ROW: {PEER_ANY: entries}}, plan)
        them.apply(plan)

    def said(port: int) -> list[list[bool]]:
        return [[it.rule(ROW[0], PEERS[0], ROW[1], protocol, port)[0] for protocol in (1, 6, 17, 132)] for it in maps]

    differs = any(first != second for first, second in map(said, (*range(8), 65534, 65535)))
    assert agree(one, other) is not differs
    assert agree(one, one)


def assert_shape(entries: Entries) -> None:
    bits = [entry.bits for entry in entries]
    assert bits == sorted(bits, reverse=True)
    assert bits.count(72) == 1
    assert len({entry[:3] for entry in entries}) == len(entries)


@given(st.integers(0, 65535), st.integers(0, 65535))
def test_prefixes_cover_a_range_and_nothing_else(one, other):
    first, last = sorted((one, other))
    covered = [(port, port + (1 << (16 - bits)) - 1) for port, bits in prefixes(first, last)]

    assert covered[0][0] == first
    assert covered[-1][1] == last
    assert all(end + 1 == start for (_, end), (start, _) in itertools.pairwise(covered))
    assert all(start % (end - start + 1) == 0 for start, end in covered)
    assert len(covered) <= 30
