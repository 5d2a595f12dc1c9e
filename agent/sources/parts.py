"""Read the parts of an object one by one, from builtin values, and note what is wrong with those that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from agent.core.records import Fault
from agent.sources.convert import fault
from agent.sources.reader import UNREADABLE, explain

_S = TypeVar("_S")
_T = TypeVar("_T")


class Parts:
    """Reads parts; ``faults``: what is wrong with those that were left out."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def part(self, read: Callable[..., _T], *said: Any) -> _T | None:
        """Read one part; None where it cannot be."""
        try:
            return read(*said)
        except UNREADABLE as error:
            self.faults.append(explain(error))
            return None


def mapping(value: object, field: str) -> Mapping[str, Any]:
    """Check an object. Raises: a fault of the field."""
    if not isinstance(value, dict):
        raise fault(field, "is no object")
    return value


def sequence(value: object, field: str) -> list[Any]:
    """Check a list; one that is absent is empty. Raises: a fault of the field."""
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise fault(field, "is no list")
    return list(value)


def read_as(value: object, shape: type[_S], read: Callable[[_S, str], _T], field: str) -> _T:
    """Convert a part to its shape on the wire, and that. Raises: one of UNREADABLE."""
    return read(shaped(value, shape, field), field)


def shaped(value: object, shape: Any, field: str) -> Any:
    """Convert a part to its shape on the wire. Raises: a fault of the field within the whole."""
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        found = explain(error)
        dot = "" if not found.field or found.field.startswith("[") else "."
        raise fault(f"{field}{dot}{found.field}", found.reason) from None
