"""What happened to the objects that are watched, and to this node: what the sources hand to the models."""

from __future__ import annotations

import msgspec

from agent.core.policy_records import PolicyRecord
from agent.core.records import Fault, Kind, ObjectKey, Record

AnyRecord = Record | PolicyRecord


class ListStarted(msgspec.Struct, frozen=True, gc=False):
    """A full list of ``kind`` begins; until it has ended, what it does not mention stays."""

    kind: Kind


class ListEnded(msgspec.Struct, frozen=True, gc=False):
    """The list of ``kind`` has ended: what it did not mention is gone, if all of it could be read."""

    kind: Kind
    is_complete: bool = True


class Upsert(msgspec.Struct, frozen=True, gc=False):
    """An object exists and says this, but for what of it cannot be read, which is left out."""

    record: AnyRecord
    left_out: tuple[Fault, ...] = ()


class Delete(msgspec.Struct, frozen=True, gc=False):
    """An object is gone."""

    kind: Kind
    key: ObjectKey


class Malformed(msgspec.Struct, frozen=True, gc=False):
    """An object exists and cannot be read, or not all of it: what it said before stays."""

    kind: Kind
    key: ObjectKey
    field: str
    reason: str
    service: ObjectKey | None = None
    """Of an EndpointSlice, the Service it belongs to, where that can be read."""
    partial: AnyRecord | None = None
    """Of a policy, what can be read of it, which is in force where nothing that it said before is known."""


class AddressesChanged(msgspec.Struct, frozen=True, gc=False):
    """The addresses of this node are these, 16 bytes each: all of every device, and loopback's.

    ``primary`` are what the default routes leave from: primary, unless the Node object names others.
    """

    local: frozenset[bytes]
    primary: frozenset[bytes] = frozenset()


Event = ListStarted | ListEnded | Upsert | Delete | Malformed | AddressesChanged


def kind_of(event: object) -> Kind | None:
    """Say of what kind an event's object is; None of what is about no object."""
    if isinstance(event, Upsert):
        return event.record.kind
    return event.kind if isinstance(event, ListStarted | ListEnded | Delete | Malformed) else None
