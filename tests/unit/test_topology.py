"""Which endpoints a node may use, as tables of the reference behaviour.

An endpoint is a word: its last octet, then traits. ``1`` is ready on another node; ``L`` local, ``N`` not ready
(nor serving), ``T`` serving while terminating, ``X`` terminating and not serving, ``R`` ready though terminating,
``[a,b]`` zone hints, ``@`` a node hint for this node, ``%`` one for another.
"""

from __future__ import annotations

import re

import pytest

from agent.core.addresses import format_address
from agent.core.records import Traits
from agent.core.topology import Run, categorize
from tests.builders import addresses

WORD = re.compile(r"(?P<octet>\d+)(?P<traits>[LNTXR@%]*)(\[(?P<zones>.*)\])?(?P<more>[NT]?)(:(?P<port>\d+))?")


def run_of(word: str) -> Run:
    """Read one endpoint."""
    match = WORD.fullmatch(word)
    assert match, word
    flags, zones = match["traits"] + match["more"], match["zones"]
    traits = Traits(
        ready=not set(flags) & set("NTX"),
        serving=not set(flags) & set("NX"),
        terminating=bool(set(flags) & set("TXR")),
        local="L" in flags,
        zones=None if zones is None else frozenset(filter(None, zones.split(","))),
        node_hint={"@": True, "%": False}.get("".join(set(flags) & set("@%"))),
    )
    return Run(traits, addresses(f"10.0.0.{match['octet']}"), int(match["port"] or 80))


def octets(runs: list[Run]) -> str:
    """The last octets, in order of the runs, with the port where it is not 80."""
    return " ".join(
        format_address(run.addresses[i : i + 16]).rpartition(".")[2] + ("" if run.port == 80 else f":{run.port}")
        for run in runs
        for i in range(0, len(run.addresses), 16)
    )


# endpoints, cluster, local, anywhere
READINESS = [
    pytest.param("", "", "", False, id="none"),
    pytest.param("1 2L", "1 2", "2", True, id="ready"),
    pytest.param("1 2", "1 2", "", True, id="ready-none-local"),
    pytest.param("1 2N 3T", "1", "", True, id="ready-before-terminating"),
    pytest.param("1N 2N", "", "", False, id="none-ready"),
    pytest.param("1N 2T 3TL 4X", "2 3", "3", True, id="serving-while-terminating-if-none-is-ready"),
    pytest.param("1X 2XL", "", "", False, id="terminating-and-not-serving"),
    pytest.param("1 2TL", "1", "2", True, id="local-falls-back-by-itself"),
    pytest.param("1L 2TL", "1", "1", True, id="local-ready-before-local-terminating"),
    pytest.param("1T 2XL", "1", "", True, id="terminating-elsewhere-only"),
    pytest.param("1R 2N", "1", "", True, id="publish-not-ready-addresses-while-terminating"),
    pytest.param("1RL 2", "1 2", "1", True, id="ready-though-terminating-is-ready"),
]

DUPLICATES = [
    pytest.param("1T 1N 2T", "2", "", True, id="a-staying-copy-overrules-a-terminating-one"),
    pytest.param("1T 1N", "", "", False, id="nothing-left-after-overruling"),
    pytest.param("1T 1N:81", "1", "", True, id="another-port-is-another-endpoint"),
    pytest.param("1R 1N 2", "2", "", True, id="a-staying-copy-that-is-not-ready-overrules-a-ready-one-that-goes"),
    pytest.param("1TL 1TL", "1 1", "1 1", True, id="both-terminating"),
    pytest.param("1 1T 2", "1 2", "", True, id="a-ready-copy-is-enough"),
    pytest.param("1T:80 1N:80 1T:81", "1:81", "", True, id="ports-are-told-apart"),
]

NODE_HINTS = [
    pytest.param("1@ 2%", "1", "", True, id="all-hint-one-names-us"),
    pytest.param("1% 2%", "1 2", "", True, id="none-names-us"),
    pytest.param("1@ 2", "1 2", "", True, id="one-hint-missing"),
    pytest.param("1@ 2N", "1", "", True, id="not-ready-needs-no-hint"),
    pytest.param("1@ 2T", "1", "", True, id="terminating-needs-no-hint"),
    pytest.param("1@N 2%", "2", "", True, id="a-hint-of-one-not-ready-does-not-count"),
    pytest.param("1@T 2%T", "1 2", "", True, id="terminating-ignores-hints"),
    pytest.param("1@[b] 2%[a]", "1", "", True, id="node-before-zone"),
    pytest.param("1%[a] 2%[b]", "1", "", True, id="node-then-zone"),
    pytest.param("1@[a] 2[b]", "1", "", True, id="incomplete-node-hints-then-zone"),
    pytest.param("1%[c] 2%[b]", "1 2", "", True, id="node-then-zone-then-all"),
    pytest.param("1L@ 2L%", "1", "1 2", True, id="local-ignores-hints"),
]

ZONE_HINTS = [
    pytest.param("1[a] 2[b]", "1", "", True, id="all-hint-one-names-ours"),
    pytest.param("1[a,b] 2[b] 3[c,a]", "1 3", "", True, id="several-zones"),
    pytest.param("1[b] 2[c]", "1 2", "", True, id="none-names-ours"),
    pytest.param("1[a] 2", "1 2", "", True, id="one-hint-missing"),
    pytest.param("1[a] 2N", "1", "", True, id="not-ready-needs-no-hint"),
    pytest.param("1[a]N 2[b]", "2", "", True, id="a-hint-of-one-not-ready-does-not-count"),
    pytest.param("1[a]T 2[b]T", "1 2", "", True, id="terminating-ignores-hints"),
    pytest.param("1[] 2[a]", "2", "", True, id="a-hint-for-no-zone"),
    pytest.param("1L[b] 2[a]", "2", "1", True, id="local-ignores-hints"),
]


def words(endpoints: str) -> list[Run]:
    return [run_of(word) for word in endpoints.split()]


@pytest.mark.parametrize(
    ("endpoints", "cluster", "local", "anywhere"), READINESS + DUPLICATES + NODE_HINTS + ZONE_HINTS
)
def test_endpoints_of_a_node_in_zone_a(endpoints, cluster, local, anywhere):
    reachable = categorize(words(endpoints), "a")

    assert (octets(reachable.cluster), octets(reachable.local), reachable.anywhere) == (cluster, local, anywhere)


@pytest.mark.parametrize(
    ("endpoints", "zone", "cluster"),
    [
        pytest.param("1[a] 2[b]", "b", "2", id="another-zone"),
        pytest.param("1[a] 2[b]", "", "1 2", id="zone-not-known"),
        pytest.param("1[] 2[]", "", "1 2", id="zone-not-known-and-hints-for-none"),
        pytest.param("1@[a] 2%[b]", "", "1", id="node-hints-need-no-zone"),
    ],
)
def test_zones_count_where_the_node_has_one(endpoints, zone, cluster):
    assert octets(categorize(words(endpoints), zone).cluster) == cluster


def test_a_run_of_many_is_split_only_where_copies_differ():
    going = Traits(ready=False, terminating=True)
    staying = Traits(ready=False, serving=False)
    runs = [
        Run(going, addresses("10.0.0.1", "10.0.0.2", "10.0.0.3"), 80),
        Run(staying, addresses("10.0.0.2", "10.0.0.9"), 80),
    ]

    assert octets(categorize(runs, "").cluster) == "1 3"
