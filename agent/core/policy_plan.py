"""What a plan of policy is made of, and the table of its entries.

A plan keeps this promise: after every prefix of its writes, in this order, each verdict is the old or the new one.

        entries of peers, longest prefix first    so that a verdict is written before what it is an exception from
        entries of PEER_ANY, longest first        behind those of peers that had been judged by them
        blocks, identities                        which lead to entries that are there
        subjects
        removed subjects, identities, blocks
        removed entries, shortest first           PEER_ANY's before those of peers that come to be judged by them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from agent.core.abi import PEER_ANY, POLICY_KEY, Direction, port_bytes
from agent.core.policy import Entries, Entry, RuleName
from agent.core.selectors import IdentityName

Columns = Mapping[int, Entries]
"""Of one subject and direction: by peer. Never changed, as subjects that are told the same share them."""
Row = tuple[int, Direction]
_NOTHING: Columns = {}


@dataclass(frozen=True, slots=True)
class PolicySizes:
    """How many entries the maps may hold."""

    identities: int = 65_536
    blocks: int = 16_384
    policy: int = 131_072
    subjects: int = 1_024


@dataclass(slots=True)
class PolicyState:
    """What the maps hold: packed keys and values."""

    policy: dict[bytes, bytes] = field(default_factory=dict)
    blocks: dict[bytes, bytes] = field(default_factory=dict)
    identities: dict[bytes, bytes] = field(default_factory=dict)
    subjects: dict[bytes, bytes] = field(default_factory=dict)


class Numbers(msgspec.Struct):
    """What the numbers in the maps stand for; kept in a file. ``last_*``: the highest that was ever given out."""

    identities: dict[int, IdentityName] = {}
    rules: dict[int, RuleName] = {}
    last_identity: int = 0
    last_rule: int = 0


@dataclass(slots=True)
class PolicyPlan:
    """Writes and removals, to be carried out in the order of the fields; then the generation is raised, if it says so.

    ``bumps_generation``: a verdict that a connection was given may not be the one it would be given now.
    """

    policy: list[tuple[bytes, bytes]] = field(default_factory=list)
    blocks: dict[bytes, bytes] = field(default_factory=dict)
    identities: dict[bytes, bytes] = field(default_factory=dict)
    subjects: dict[bytes, bytes] = field(default_factory=dict)
    removed_subjects: list[bytes] = field(default_factory=list)
    removed_identities: list[bytes] = field(default_factory=list)
    removed_blocks: list[bytes] = field(default_factory=list)
    removed_policy: list[bytes] = field(default_factory=list)
    bumps_generation: bool = False

    def __bool__(self) -> bool:
        return self.size > 0

    @property
    def size(self) -> int:
        """How many writes and removals there are."""
        writes = len(self.policy) + len(self.blocks) + len(self.identities) + len(self.subjects)
        removals = len(self.removed_subjects) + len(self.removed_identities) + len(self.removed_blocks)
        return writes + removals + len(self.removed_policy)


class _Change(NamedTuple):
    """What leads from some columns to others."""

    writes: tuple[tuple[int, Entry], ...]
    added: int
    """How many of the writes are of keys that were not there."""


class PolicyTable:
    """The entries that are in the map once every plan so far is carried out."""

    def __init__(self, limit: int, found: Mapping[bytes, bytes]) -> None:
        self.limit = limit
        self.count = len(found)
        self.rows = _read(found)
        self._changes: dict[tuple[int, int], _Change] = {}
        self._gone: dict[tuple[int, int, int], tuple[tuple[int, Entry], ...]] = {}

    def numbers(self) -> Iterable[int]:
        """List every identity that an entry names."""
        for (subject, _), columns in self.rows.items():
            yield subject
            yield from columns

    def plan(
        self,
        during: Mapping[Row, Columns],
        final: Mapping[Row, Columns],
        plan: PolicyPlan,
        without: AbstractSet[int] = frozenset(),
    ) -> set[int]:
        """Plan the way by what has to be there while addresses change hands to what remains.

        Returns the subjects that there is no room for, and those of ``without``: whatever they have is removed. What is
        there only until addresses have changed hands has the room that others leave it.
        """
        self._changes.clear()
        self._gone.clear()
        writes: list[tuple[int, Direction, int, Entry]] = []
        remaining = {subject for subject, _ in final}
        had = {subject for subject, _ in self.rows}
        unwritten: set[int] = set()
        for subject in sorted({it for it, _ in during}, key=lambda it: (it not in remaining, it not in had, it)):
            if subject in without:
                unwritten.add(subject)
                continue
            rows = [row for row in _rows_of(subject) if row in during]
            changes = {row: self._change(self.rows.get(row, _NOTHING), during[row]) for row in rows}
            added = sum(change.added for change in changes.values())
            if self.count + added > self.limit:
                unwritten.add(subject)
                continue
            self.count += added
            for row, change in changes.items():
                writes += [(*row, *write) for write in change.writes]
        during = {row: columns for row, columns in during.items() if row[0] not in unwritten}
        final = {row: columns for row, columns in final.items() if row[0] not in unwritten}
        self._remove(during, final, plan)
        writes.sort(key=lambda it: (it[2] == PEER_ANY, -it[3].bits))
        plan.policy = [(_key(*write), write[3].value) for write in writes]
        return unwritten & remaining

    def _remove(self, during: Mapping[Row, Columns], final: dict[Row, Columns], plan: PolicyPlan) -> None:
        """Plan the removals, and settle on what remains."""
        gone: list[tuple[int, Direction, int, Entry]] = []
        for row in self.rows.keys() | during.keys():
            there = self.rows.get(row, _NOTHING)
            leftover = self._leftover(there, during.get(row, there), final.get(row, _NOTHING))
            gone += [(*row, *entry) for entry in leftover]
        gone.sort(key=lambda it: (it[2] != PEER_ANY, it[3].bits))
        plan.removed_policy = [_key(*entry) for entry in gone]
        self.rows = final
        self.count -= len(gone)

    def entries(self) -> Iterable[tuple[bytes, bytes]]:
        """Lay out every entry."""
        for row, columns in self.rows.items():
            for peer, entries in columns.items():
                for entry in entries:
                    yield _key(*row, peer, entry), entry.value

    def _change(self, there: Columns, wanted: Columns) -> _Change:
        """Compare columns; those that subjects share only once a plan."""
        if there is wanted:
            return _Change((), 0)
        pair = id(there), id(wanted)
        change = self._changes.get(pair)
        if change is None:
            change = self._changes[pair] = _compare(there, wanted)
        return change

    def _leftover(self, there: Columns, meanwhile: Columns, remains: Columns) -> Iterable[tuple[int, Entry]]:
        if there is remains and meanwhile is remains:
            return ()
        three = id(there), id(meanwhile), id(remains)
        gone = self._gone.get(three)
        if gone is None:
            gone = self._gone[three] = tuple(_leftover(there, meanwhile, remains))
        return gone


def _compare(there: Columns, wanted: Columns) -> _Change:
    writes: list[tuple[int, Entry]] = []
    added = 0
    for peer, entries in wanted.items():
        before = there.get(peer, ())
        if before is entries or before == entries:
            continue
        values = {entry[:3]: entry.value for entry in before}
        for entry in entries:
            value = values.get(entry[:3])
            if value != entry.value:
                writes.append((peer, entry))
                added += value is None
    return _Change(tuple(writes), added)


def _leftover(there: Columns, meanwhile: Columns, remains: Columns) -> Iterable[tuple[int, Entry]]:
    for peer in there.keys() | meanwhile.keys():
        kept = remains.get(peer, ())
        before, between = there.get(peer, ()), meanwhile.get(peer, ())
        if before == kept and between in {kept, ()}:
            continue
        keys = {entry[:3] for entry in kept}
        by_key = {entry[:3]: entry for entry in (*before, *between)}
        yield from ((peer, entry) for key, entry in by_key.items() if key not in keys)


def _rows_of(subject: int) -> tuple[Row, Row]:
    return (subject, Direction.INGRESS), (subject, Direction.EGRESS)


def _key(subject: int, direction: Direction, peer: int, entry: Entry) -> bytes:
    return POLICY_KEY.packer.pack(entry.bits, subject, peer, direction, entry.protocol, port_bytes(entry.port))


def _read(found: Mapping[bytes, bytes]) -> dict[Row, Columns]:
    """Sort what the map holds by subject, direction and peer."""
    rows: dict[Row, dict[int, list[Entry]]] = {}
    for key, value in found.items():
        bits, subject, peer, direction, protocol, port = POLICY_KEY.packer.unpack(key)
        entry = Entry(bits, protocol, int.from_bytes(port, "big"), value)
        rows.setdefault((subject, Direction(direction)), {}).setdefault(peer, []).append(entry)
    shared: dict[Entries, Entries] = {}
    read: dict[Row, Columns] = {}
    for row, columns in rows.items():
        ordered = {peer: tuple(sorted(entries, key=lambda it: (-it.bits, it))) for peer, entries in columns.items()}
        read[row] = {peer: shared.setdefault(entries, entries) for peer, entries in ordered.items()}
    return read
