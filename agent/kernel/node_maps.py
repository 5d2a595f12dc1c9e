"""The maps that say where this node is: its addresses, devices, and ranges of pods. Only differences are written."""

from __future__ import annotations

from agent.core.network import Entries
from agent.errors import DataplaneError
from agent.kernel.maps import MapStore


class NodeMaps:
    """Writes whole maps; what it does not know it has written it reads back first."""

    def __init__(self, store: MapStore) -> None:
        self._store = store
        self._written: dict[str, dict[bytes, bytes]] = {}

    def forget(self) -> None:
        """Read back what is there before anything is written again."""
        self._written.clear()

    def write(self, name: str, entries: Entries) -> int:
        """Make a map hold these entries and no others; returns how many differed. Raises: DataplaneError."""
        opened = self._store.maps[name]
        try:
            written = self._written.pop(name, None)
            if written is None:
                written = dict(opened.items())
            changed = {key: value for key, value in entries.items() if written.get(key) != value}
            gone = written.keys() - entries.keys()
            for key in gone:  # first, as the map may have no room for both
                opened.delete(key)
            for key, value in changed.items():
                opened.update(key, value)
        except OSError as error:
            raise DataplaneError(f"writing map {name}: {error}") from error
        self._written[name] = dict(entries)
        self._store.writes[name] += len(changed) + len(gone)
        return len(changed) + len(gone)
