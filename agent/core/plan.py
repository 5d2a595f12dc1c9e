"""Plans: the writes that take the kernel's maps from what they hold to what is desired, and what is kept of both.

The order of a plan's writes keeps one invariant: after every prefix of it, no frontend leads to a segment or backend
that is not there, and no connection of an untouched service notices.

    backends -> headers -> frontends -> removed frontends -> freed segments
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.core.abi import BASE_REJECT, FIRST_FREE_SLOT, SLOT, Frontend, pack_frontend
from agent.core.records import ObjectKey
from agent.core.services import PortName


@dataclass(slots=True)
class Plan:
    """Writes, by phase. ``backends`` are runs of slots: (first slot, slots end to end)."""

    backends: list[tuple[int, bytes]] = field(default_factory=list)
    headers: list[tuple[int, bytes]] = field(default_factory=list)
    frontends: dict[bytes, bytes] = field(default_factory=dict)
    removed_frontends: dict[bytes, None] = field(default_factory=dict)
    freed: list[tuple[int, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.backends or self.headers or self.frontends or self.removed_frontends or self.freed)

    def set_frontend(self, key: bytes, value: bytes) -> None:
        """Write a frontend; a removal planned before is taken back."""
        self.removed_frontends.pop(key, None)
        self.frontends[key] = value

    def remove_frontend(self, key: bytes) -> None:
        """Remove a frontend; a write planned before is taken back."""
        self.frontends.pop(key, None)
        self.removed_frontends[key] = None


@dataclass(slots=True)
class Placement:
    """Where one service port of one family is in the kernel.

    ``base`` is its segment, of ``1 << order`` slots, or a shared empty one (order 0, nothing owned). ``slots`` are
    its backends end to end, in the order of the array.
    """

    service: ObjectKey
    port: PortName
    service_id: int
    created: str
    base: int = BASE_REJECT
    order: int = 0
    slots: bytes = b""
    is_silent: bool = False
    frontends: tuple[bytes, ...] = ()
    serving: frozenset[bytes] | None = None
    """UDP: every serving endpoint of any node, as address and port (18 bytes); None = not UDP."""

    @property
    def owns_segment(self) -> bool:
        """Whether the segment is its own rather than a shared empty one."""
        return self.base >= FIRST_FREE_SLOT

    @property
    def count(self) -> int:
        """The number of backends."""
        return len(self.slots) // SLOT.size

    @property
    def value(self) -> bytes:
        """What its frontends hold."""
        return pack_frontend(self.service_id, self.base, self.base)

    @property
    def rank(self) -> tuple[str, ObjectKey, PortName]:
        """Who keeps a frontend that two claim: the older Service, then the one whose name sorts first."""
        return (self.created, self.service, self.port)


@dataclass(frozen=True, slots=True)
class KernelState:
    """What the maps held when they were read: frontends by key, and every segment that one leads to, by base."""

    frontends: dict[bytes, Frontend]
    segments: dict[int, tuple[bytes, bool]]


def split_slots(slots: bytes) -> list[bytes]:
    """Cut slots that stand end to end."""
    return [slots[i : i + SLOT.size] for i in range(0, len(slots), SLOT.size)]
