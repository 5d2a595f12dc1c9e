"""Ranges as prefixes, and how few entries verdicts take."""

from __future__ import annotations

import pytest

from agent.core.abi import POLICY_ENTRY
from agent.core.policy import ADMIN, BASELINE, NETWORK, Decision, Ports, flatten, prefixes
from agent.core.policy_records import Action

ACCEPT, DENY, PASS = Action.ACCEPT, Action.DENY, Action.PASS
RANGES = {
    "one port": (80, 80, [(80, 16)]),
    "aligned": (8080, 8087, [(8080, 13)]),
    "unprivileged": (1024, 65535, [(1024, 6), (2048, 5), (4096, 4), (8192, 3), (16384, 2), (32768, 1)]),
    "all": (0, 65535, [(0, 0)]),
    "privileged": (0, 1023, [(0, 6)]),
}


@pytest.mark.parametrize(("first", "last", "expected"), RANGES.values(), ids=RANGES)
def test_a_range_becomes_prefixes(first, last, expected):
    assert list(prefixes(first, last)) == expected


def test_the_worst_range_takes_thirty():
    assert len(list(prefixes(1, 65534))) == 30


def shown(*decisions: Decision, isolated: bool) -> list[str]:
    lines = []
    for bits, protocol, port, value in flatten(decisions, is_isolated=isolated):
        rule, allowed = POLICY_ENTRY.packer.unpack(value)
        lines.append(f"{bits} {protocol}/{port} {'allow' if allowed else 'deny'} {rule}")
    return lines


def tcp(first: int, last: int) -> tuple[Ports, ...]:
    return (Ports(6, first, last),)


FLAT = {
    "nothing said": ([], False, ["72 0/0 allow 0"]),
    "isolated": ([], True, ["72 0/0 deny 0"]),
    "everything": ([Decision(NETWORK, ACCEPT, None, 1)], True, ["72 0/0 allow 1"]),
    "a port": ([Decision(NETWORK, ACCEPT, tcp(80, 80), 1)], True, ["96 6/80 allow 1", "72 0/0 deny 0"]),
    "a protocol": ([Decision(NETWORK, ACCEPT, tcp(0, 65535), 1)], True, ["80 6/0 allow 1", "72 0/0 deny 0"]),
    "neighbours that agree are one": (
        [Decision(NETWORK, ACCEPT, (*tcp(8080, 8083), *tcp(8084, 8087)), 1)],
        True,
        ["93 6/8080 allow 1", "72 0/0 deny 0"],
    ),
    "neighbours of two rules are two": (
        [Decision(NETWORK, ACCEPT, tcp(8080, 8083), 1), Decision(NETWORK, ACCEPT, tcp(8084, 8087), 2)],
        True,
        ["94 6/8080 allow 1", "94 6/8084 allow 2", "72 0/0 deny 0"],
    ),
    "the protocol's own verdict is what takes the fewest": (
        [Decision(NETWORK, ACCEPT, tcp(1024, 65535), 1)],
        True,
        ["86 6/0 deny 0", "80 6/0 allow 1", "72 0/0 deny 0"],
    ),
    "precedence, not length": (
        [Decision(ADMIN, DENY, tcp(0, 1023), 1), Decision(ADMIN, ACCEPT, tcp(80, 80), 2)],
        False,
        ["86 6/0 deny 1", "72 0/0 allow 0"],
    ),
    "a pass skips its tier": (
        [Decision(ADMIN, PASS, tcp(80, 80), 1), Decision(ADMIN, DENY, None, 2), Decision(BASELINE, ACCEPT, None, 3)],
        False,
        ["96 6/80 allow 3", "72 0/0 deny 2"],
    ),
    "what an earlier rule says already": (
        [Decision(NETWORK, ACCEPT, None, 1), Decision(NETWORK, ACCEPT, tcp(80, 80), 2)],
        True,
        ["72 0/0 allow 1"],
    ),
}


@pytest.mark.parametrize(("decisions", "isolated", "expected"), FLAT.values(), ids=FLAT)
def test_decisions_become_entries(decisions, isolated, expected):
    assert shown(*decisions, isolated=isolated) == expected
