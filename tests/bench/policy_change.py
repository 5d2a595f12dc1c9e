"""An agent that enforces policy: its first sync (G18), its memory (G17), and how soon a change is enforced (G15)."""

from __future__ import annotations

import time

import numpy as np

from agent.core.abi import (
    POLICY_ENTRY,
    POLICY_KEY,
    POLICY_PORT_BITS,
    POLICY_STATE,
    SUBJECT,
    U32,
    Direction,
    port_bytes,
)
from agent.core.addresses import parse_address
from agent.core.records import Protocol
from agent.kernel import bpf
from tests.bench.agents import Agent
from tests.bench.errors import BenchError
from tests.bench.feed import Feed
from tests.bench.policy_population import OTHER_PORT, PolicyPopulation
from tests.bench.polling import until
from tests.bench.population import POD_PORT
from tests.bench.result import Result
from tests.bench.scale import Scale
from tests.bench.statistics import Estimate, estimate, median, percentile

_LIMIT_S = 60.0
_POLL_S = 0.001
_PAUSE_S = 0.005
_SETTLE_S = 3.0
_MIB = 1024
_MAPS = ("policy", "policy_states", "subjects", "identities")


def cold_sync(agent: Agent, feed: Feed, scale: Scale) -> Result:
    """G18: from the first byte the server writes to the last map entry; leaves the last agent running."""
    cluster = scale.cluster
    taken, sent = [], []
    for turn in range(scale.syncs):
        if turn:
            agent.kill()
            agent.forget()
        taken.append(sync_once(agent, feed, cluster))
        sent.append(feed.last_byte_at - feed.first_byte_at)
    return Result(
        "G18",
        f"cold sync of policy, {_size(cluster)}",
        estimate(median, np.array(taken)),
        1,
        "s",
        peers={"all s": [round(value, 3) for value in taken], "last byte taken in after s": round(np.median(sent), 3)}
        | {f"{name} entries": count for name, count in _entries(agent).items()},
        note=f"{feed.size / 1e6:.0f} MB of JSON",
    )


def sync_once(agent: Agent, feed: Feed, cluster: PolicyPopulation) -> float:
    """Start an agent on empty maps; returns seconds from the first byte to the last entry. Raises: BenchError."""
    feed.rewind()
    agent.start()
    subjects = agent.open_map("subjects")
    try:
        # Subjects are written last: what is asked about them is there.
        until(lambda: _count(subjects) == cluster.local, _LIMIT_S, "every subject is programmed", _POLL_S)
        done = time.monotonic()
    finally:
        subjects.close()
    agent.wait_settled()
    wanted = {"policy": cluster.entries, "identities": cluster.pods, "subjects": cluster.local}
    found = _entries(agent)
    if wanted.items() > found.items():
        raise BenchError(f"policy has {found}, not {wanted}")
    return done - feed.first_byte_at


def _count(opened: bpf.Map) -> int:
    return sum(count for _, _, count in opened.batches())


def _entries(agent: Agent) -> dict[str, int]:
    return {name: it["entries"] for name, it in agent.status()["policy"]["maps"].items()}


def _size(cluster: PolicyPopulation) -> str:
    return f"{cluster.pods} pods of {cluster.identities} identities, {cluster.policies} policies"


def residency(agent: Agent, cluster: PolicyPopulation) -> Result:
    """G17: the agent's memory, a few seconds after it has settled."""
    time.sleep(_SETTLE_S)
    steady = agent.memory_kib("VmRSS") / _MIB
    parts = {f"{field} MiB": round(agent.memory_kib(field) / _MIB, 1) for field in ("VmHWM", "RssAnon", "RssFile")}
    return Result("G17", f"agent RSS, {_size(cluster)}", Estimate(steady, steady, steady), 96, "MiB", peers=parts)


class PolicyChanges:
    """Changes policies on the server, each about a pod of this node, and watches for the verdicts in the maps."""

    def __init__(self, agent: Agent, feed: Feed, cluster: PolicyPopulation) -> None:
        self._feed = feed
        self._cluster = cluster
        self._maps = {name: agent.open_map(name) for name in _MAPS}
        self._count = 0
        self._policies = min(cluster.local, cluster.policies)

    def close(self) -> None:
        """Close the maps."""
        for opened in self._maps.values():
            opened.close()

    def one(self) -> float:
        """Allow another port by a policy, or take it back; returns seconds from the write on the socket to the verdict.

        That is what the maps say of a new connection, and a generation by which those that exist are judged again.
        """
        number, turn = self._count % self._policies, self._count // self._policies
        self._count += 1
        wanted = turn % 2 == 0
        ports = (POD_PORT, OTHER_PORT) if wanted else (POD_PORT,)
        source = self._cluster.policy(number, self._feed.next_version, ports)
        asked, generation = self._question(number), self._generation()
        if self._is_allowed(asked) == wanted:
            raise BenchError(f"policy {number} says so before it is changed")
        begun = self._feed.change_policy(number, source)
        while self._is_allowed(asked) != wanted or not self._is_over(generation):
            if time.monotonic() > begun + _LIMIT_S:
                raise BenchError(f"a changed policy is not enforced after {_LIMIT_S} s")
        return time.monotonic() - begun

    def _question(self, number: int) -> bytes:
        """The key by which a program asks whether a neighbour may connect to a pod's other port."""
        subject = self._maps["subjects"].lookup(self._address(number))
        neighbour = self._cluster.neighbours(self._cluster.app(number))[0]
        peer = self._maps["identities"].lookup(self._address(neighbour))
        if subject is None or peer is None:
            raise BenchError(f"pod {number} or {neighbour} is not in the maps")
        identities = SUBJECT.packer.unpack(subject)[0], U32.packer.unpack(peer)[0]
        port = port_bytes(OTHER_PORT)
        return POLICY_KEY.packer.pack(POLICY_PORT_BITS, *identities, Direction.INGRESS, Protocol.TCP, port)

    def _address(self, number: int) -> bytes:
        return parse_address(self._cluster.address(number))

    def _is_allowed(self, asked: bytes) -> bool:
        found = self._maps["policy"].lookup(asked)
        return found is not None and bool(POLICY_ENTRY.packer.unpack(found)[1])

    def _generation(self) -> int:
        found = self._maps["policy_states"].lookup(U32.packer.pack(0))
        generation: int = POLICY_STATE.packer.unpack(found)[0] if found else 0
        return generation

    def _is_over(self, before: int) -> bool:
        """Whether everything is judged by what was changed, and the change is complete: generations are even then."""
        now = self._generation()
        return now != before and now % 2 == 0


def one_change(changes: PolicyChanges, scale: Scale) -> list[Result]:
    """G15."""
    taken = []
    for _ in range(scale.changes):
        taken.append(changes.one())
        time.sleep(_PAUSE_S)
    times_ms = np.array(taken) * 1000
    figures = {f"p{rank} ms": round(percentile(rank)(times_ms), 2) for rank in (50, 90, 100)}
    title = f"a changed policy, event to verdict, {_size(scale.cluster)}, {scale.cluster.local} pods here, p99"
    return [Result("G15", title, estimate(percentile(99), times_ms), 50, "ms", peers=figures)]
