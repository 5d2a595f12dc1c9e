"""Verdicts of a running agent's programs on packets of pods that have no network namespace, taken by TEST_RUN.

What the programs say is held against the reference, for whoever may have had the addresses meanwhile: the changes that
were in force for certain before the program ran, and those that were written until it had run.
"""

from __future__ import annotations

import functools
import os
import random
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from agent.core.abi import POLICY_STATE, Direction
from agent.core.policy_records import PodRecord, PolicyRecord
from agent.core.records import Protocol
from agent.kernel import bpf
from agent.kernel.maps import MapStore
from agent.kernel.programs import PacketProgram
from tests.bpf.harness import TC_ACT_SHOT, TC_ACT_UNSPEC, Context, run_program
from tests.cluster.policy_churn import PORTS, Population, Slot, Witnesses
from tests.policy_reference import End, Reference

_MACS = bytes.fromhex("02000000000102000000000a")
_SYN, _ACK = 2, 16
_WATCHED = 300


class Question(NamedTuple):
    """Whether a packet of a connection passes at a subject's device."""

    subject: Slot
    peer: Slot
    direction: Direction
    family: int
    client_port: int
    port: int


class Sample(NamedTuple):
    """What a program said; ``first``, ``last``: after which changes at the earliest, and at the latest."""

    question: Question
    is_allowed: bool
    first: int
    last: int


def frame(source: bytes, destination: bytes, source_port: int, port: int, flags: int) -> bytes:
    """Write a TCP segment without payload; addresses are of 16 bytes, IPv4's mapped."""
    segment = struct.pack("!HHIIBBHHH", source_port, port, 1000, 2000, 5 << 4, flags, 4096, 0, 0)
    if source.startswith(bytes(10) + b"\xff\xff"):
        header = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0x4000, 64, socket.IPPROTO_TCP, 0)
        return _MACS + b"\x08\x00" + header + source[12:] + destination[12:] + segment
    header = struct.pack("!IHBB", 6 << 28, len(segment), socket.IPPROTO_TCP, 64)
    return _MACS + b"\x86\xdd" + header + source + destination + segment


class Sampler:
    """Asks the programs that are pinned; to be used in the node's network namespace."""

    def __init__(self, store: MapStore, pins: Path, population: Population, witnesses: Witnesses) -> None:
        self.samples: list[Sample] = []
        self._maps = store.maps
        self._population = population
        self._witnesses = witnesses
        self._chance = random.Random(7)
        # A device behind which no pod is known: whose packets are these, nobody can tell but by their addresses.
        self._context = Context(ifindex=socket.if_nametoindex("eth0"))
        programs = {Direction.EGRESS: PacketProgram.FROM_POD, Direction.INGRESS: PacketProgram.TO_POD}
        self._programs = {direction: bpf.obj_get(pins / name) for direction, name in programs.items()}
        self._watched = [self._question(population.local, population.busy) for _ in range(_WATCHED)]

    def close(self) -> None:
        """Close the programs."""
        for descriptor in self._programs.values():
            os.close(descriptor)

    def take(self, count: int) -> None:
        """Ask so many questions: of connections that are asked about again and again, and of new ones.

        These are about any pods, and about those that were replaced just now.
        """
        for turn in range(count):
            if turn % 2:
                self._ask(self._chance.choice(self._watched))
                continue
            recent = tuple(self._population.recent)
            near = [slot for slot in recent if slot.node]
            is_recent = turn % 4 == 0
            subjects = near if near and is_recent else self._population.local
            self._ask(self._question(subjects, recent if is_recent else self._population.slots))
        self._witnesses.look(self._is_in_force)

    def _question(self, subjects: Sequence[Slot], peers: Sequence[Slot]) -> Question:
        chance = self._chance
        subject, peer = chance.choice(subjects), chance.choice(peers)
        direction, family = chance.choice(list(Direction)), chance.randrange(2)
        return Question(subject, peer, direction, family, chance.randrange(40_000, 60_000), chance.choice(PORTS))

    def _ask(self, asked: Question) -> None:
        ends = asked.subject.packed[asked.family], asked.peer.packed[asked.family]
        source, destination = ends if asked.direction is Direction.EGRESS else reversed(ends)
        sent = frame(source, destination, asked.client_port, asked.port, self._chance.choice((_SYN, _ACK)))
        first = self._witnesses.in_force
        verdict = run_program(self._programs[asked.direction], sent, self._context).verdict
        last = self._population.written
        assert verdict in {TC_ACT_SHOT, TC_ACT_UNSPEC}, verdict
        self.samples.append(Sample(asked, verdict == TC_ACT_UNSPEC, first, last))

    def _is_in_force(self, address: bytes) -> bool:
        """Whether a witness is a peer, and the plan that made it one is carried out."""
        return self._maps["identities"].lookup(address) is not None and self._generation() % 2 == 0

    def _generation(self) -> int:
        found = self._maps["policy_states"].lookup((0).to_bytes(4, sys.byteorder))
        assert found
        generation: int = POLICY_STATE.packer.unpack(found)[0]
        return generation


class Judge:
    """Says of samples whether they are what the reference says of some state in question."""

    def __init__(self, policies: list[PolicyRecord]) -> None:
        reference = Reference(policies)

        @functools.cache
        def verdict(
            subject: PodRecord | None,
            peer: PodRecord | None,
            ends: tuple[bytes, bytes],
            direction: Direction,
            port: int,
        ) -> bool:
            one, other = (
                End(address, pod, reference.namespaces[pod.key.namespace] if pod else ())
                for pod, address in zip((subject, peer), ends, strict=True)
            )
            return reference.verdict(one, other, direction, Protocol.TCP, port)

        self._verdict = verdict

    def verdicts(self, sample: Sample) -> set[bool]:
        """Say what the verdict may be."""
        asked = sample.question
        ends = asked.subject.packed[asked.family], asked.peer.packed[asked.family]
        pairs = product(*(slot.owners(sample.first, sample.last) for slot in asked[:2]))
        return {self._verdict(one, other, ends, asked.direction, asked.port) for one, other in pairs}

    def wrong(self, samples: list[Sample]) -> Iterator[str]:
        """Describe what no state explains."""
        for it in samples:
            if it.is_allowed not in self.verdicts(it):
                said = "allowed" if it.is_allowed else "denied"
                subject, peer, direction, family, _, port = it.question
                owners = [slot.owners(it.first, it.last) for slot in (subject, peer)]
                ends = subject.addresses[family], peer.addresses[family]
                yield f"{direction.name} of {ends[0]} with {ends[1]} at {port} was {said}; of {owners}"
