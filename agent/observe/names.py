"""The names of service ids, in a file of the state directory: what the maps, which hold numbers, cannot say.

Commands read it beside the pinned maps, so they answer with names also when no agent runs. One line a service port:
id, namespace/name, port name, protocol and family, separated by tabs. Lines are only appended; the last of an id
holds.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path
from typing import NamedTuple

from agent.core.plan import Placement

FILE = "names.tsv"


class Name(NamedTuple):
    """Who a service id is."""

    service: str
    port: str
    protocol: str
    family: str


class NameJournal:
    """Appends the names of new service ids. Keeps no names, only the hash of each line: there may be many."""

    def __init__(self, state_dir: Path, live: Container[int] | None = None) -> None:
        """Begin with the names that are there; of ids that are not ``live`` only the last, so that none comes again."""
        self._path = path = state_dir / FILE
        names = read_names(state_dir)
        last = max(names, default=0)
        lines = {
            ident: _line(ident, name) for ident, name in names.items() if live is None or ident in live or ident == last
        }
        self._known = {ident: hash(line) for ident, line in lines.items()}
        # Without the lines that later ones overrule; by a rename, so that readers see the old file or the new.
        beside = path.with_suffix(".new")
        beside.write_text("".join(lines.values()), encoding="utf-8")
        beside.rename(path)
        self._file = path.open("a", encoding="utf-8")

    @property
    def last_id(self) -> int:
        """The highest id that was ever named; 0 = none."""
        return max(self._known, default=0)

    def record(self, placements: Iterable[Placement]) -> None:
        """Append what is not known yet."""
        is_new = False
        for placement in placements:
            port = placement.port
            name = Name(str(placement.service), port.name, port.protocol.name, f"IPv{port.family.value}")
            line = _line(placement.service_id, name)
            if self._known.get(placement.service_id) != hash(line):
                self._known[placement.service_id] = hash(line)
                self._file.write(line)
                is_new = True
        if is_new:
            self._file.flush()

    def ids_of(self, services: Container[str]) -> set[int]:
        """Find the ids of Services (``namespace/name``), as the file has them."""
        return {ident for ident, name in read_names(self._path.parent).items() if name.service in services}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(ident: int, name: Name) -> str:
    return "\t".join((str(ident), *(" ".join(field.split()) for field in name))) + "\n"


def read_names(state_dir: Path) -> dict[int, Name]:
    """Read the names by id; empty where there is no file. A line cut short by a crash is left out."""
    try:
        text = (state_dir / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    names = {}
    for line in text.splitlines(keepends=True):
        ident, *rest = line.rstrip("\n").split("\t")
        if line.endswith("\n") and ident.isdigit() and len(rest) == len(Name._fields):
            names[int(ident)] = Name(*rest)
    return names
