"""Plans: the writes that take the kernel's maps from what they hold to what is desired, and what is kept of both.

The order of a plan's writes keeps one invariant: after every prefix of it, no frontend leads to a segment or backend
that is not there, and no connection of an untouched service notices.

    source ranges -> backends -> Maglev tables -> headers -> frontends -> removed frontends -> removed source ranges
    -> freed segments and tables

A table may lead, for a moment, past the backends that its header counts: the programs then choose at random.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from agent.core.abi import (
    BASE_REJECT,
    FIRST_FREE_SLOT,
    SLOT,
    Frontend,
    pack_frontend,
    pack_header,
    pack_source_range,
)
from agent.core.frontends import Role
from agent.core.records import ObjectKey
from agent.core.services import PortName


@dataclass(slots=True)
class Plan:
    """Writes, by phase. ``backends`` are runs of slots: (first slot, slots end to end); source ranges are keys.

    ``tables``: by number, the backends a Maglev table is to be built for.
    """

    source_ranges: dict[bytes, None] = field(default_factory=dict)
    backends: list[tuple[int, bytes]] = field(default_factory=list)
    headers: list[tuple[int, bytes]] = field(default_factory=list)
    frontends: dict[bytes, bytes] = field(default_factory=dict)
    removed_frontends: dict[bytes, None] = field(default_factory=dict)
    removed_source_ranges: dict[bytes, None] = field(default_factory=dict)
    freed: list[tuple[int, int]] = field(default_factory=list)
    tables: dict[int, bytes] = field(default_factory=dict)
    freed_tables: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(
            self.backends
            or self.headers
            or self.frontends
            or self.removed_frontends
            or self.freed
            or self.source_ranges
            or self.removed_source_ranges
            or self.tables
            or self.freed_tables
        )

    def set_frontend(self, key: bytes, value: bytes) -> None:
        """Write a frontend; a removal planned before is taken back."""
        self.removed_frontends.pop(key, None)
        self.frontends[key] = value

    def remove_frontend(self, key: bytes) -> None:
        """Remove a frontend; a write planned before is taken back."""
        self.frontends.pop(key, None)
        self.removed_frontends[key] = None

    def allow(self, key: bytes) -> None:
        """Write a source range; a removal planned before is taken back."""
        self.removed_source_ranges.pop(key, None)
        self.source_ranges[key] = None

    def disallow(self, key: bytes) -> None:
        """Remove a source range; a write planned before is taken back."""
        self.source_ranges.pop(key, None)
        self.removed_source_ranges[key] = None


@dataclass(slots=True)
class Table:
    """A segment's Maglev table: its number, and the backends it was built for; 0 = none of its own, though named."""

    number: int
    slots: bytes = b""


@dataclass(slots=True)
class Segment:
    """Backends in the array: a block of ``size`` slots from ``base``, or a shared empty segment (nothing owned).

    ``slots`` are the backends end to end, in the order of the array.
    """

    base: int = BASE_REJECT
    size: int = 0
    slots: bytes = b""
    is_silent: bool = False
    table: Table | None = None

    @property
    def header(self) -> bytes:
        """Lay out its header."""
        return pack_header(self.count, drop=self.is_silent, table=self.table_number)

    @property
    def table_number(self) -> int:
        """The number of its table; 0 = none."""
        return self.table.number if self.table else 0

    @property
    def is_owned(self) -> bool:
        """Whether it is nobody else's, rather than a shared empty one."""
        return self.base >= FIRST_FREE_SLOT

    @property
    def count(self) -> int:
        """The number of backends."""
        return len(self.slots) // SLOT.size


Bases = tuple[int, int, int]
"""The base of each of Which."""


@dataclass(slots=True)
class Placement:
    """Where one service port of one family is in the kernel.

    ``cluster`` and ``local`` are the segments of both traffic policies; None = no frontend uses it. ``roles`` are what
    the ``frontends`` (packed keys) are.
    """

    service: ObjectKey
    port: PortName
    service_id: int
    created: str
    cluster: Segment | None = None
    local: Segment | None = None
    frontends: tuple[bytes, ...] = ()
    roles: tuple[Role, ...] = ()
    affinity_timeout_s: int = 0
    source_ranges: tuple[tuple[bytes, int], ...] = ()
    serving: frozenset[bytes] | None = None
    """UDP: every serving endpoint of any node, as address and port (18 bytes); None = not UDP."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Those that there are."""
        return tuple(filter(None, (self.cluster, self.local)))

    @property
    def count(self) -> int:
        """The number of backends: of all nodes, where a frontend leads to those."""
        segment = self.cluster or self.local
        return segment.count if segment else 0

    @property
    def bases(self) -> Bases:
        """The bases of its segments, by Which."""
        cluster = self.cluster.base if self.cluster else BASE_REJECT
        return BASE_REJECT, cluster, self.local.base if self.local else BASE_REJECT

    def value_of(self, role: Role, bases: Bases, affinity_timeout_s: int) -> bytes:
        """Lay out what a frontend of a role holds, with these bases and this timeout."""
        timeout_s = affinity_timeout_s if role.inside else 0
        return pack_frontend(self.service_id, bases[role.inside], bases[role.outside], timeout_s, role.flags)

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        """Lay out its frontends: packed keys and values."""
        bases, timeout_s = self.bases, self.affinity_timeout_s
        for key, role in zip(self.frontends, self.roles, strict=True):
            yield key, self.value_of(role, bases, timeout_s)

    def range_keys(self) -> Iterator[bytes]:
        """Lay out the keys of its source ranges."""
        for address, prefix_bits in self.source_ranges:
            yield pack_source_range(self.service_id, address, prefix_bits)

    @property
    def rank(self) -> tuple[str, ObjectKey, PortName]:
        """Who keeps a frontend that two claim: the older Service, then the one whose name sorts first."""
        return (self.created, self.service, self.port)


@dataclass(frozen=True, slots=True)
class KernelState:
    """What the maps held when they were read.

    Frontends by key, every segment that one leads to by base (its slots end to end, and whether it is silent), the
    keys of source ranges, and by base the numbers of the tables that headers name.
    """

    frontends: dict[bytes, Frontend]
    segments: dict[int, tuple[bytes, bool]]
    source_ranges: frozenset[bytes] = frozenset()
    tables: dict[int, int] = field(default_factory=dict)


def split_slots(slots: bytes) -> list[bytes]:
    """Cut slots that stand end to end."""
    return [slots[i : i + SLOT.size] for i in range(0, len(slots), SLOT.size)]
