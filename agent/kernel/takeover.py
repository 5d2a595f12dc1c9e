"""The state of sockets, flows and connections that a former layout's maps hold, and that goes on in ours.

A former map that is like ours is ours: both layouts share it. One of another size is copied: all of it while the hooks
write it yet, and once they have turned what ours lacks, as what both have is younger in ours then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, product
from pathlib import Path

from agent.core.abi import MapKind, MapSpec
from agent.kernel import bpf
from agent.kernel.maps import open_valid

log = logging.getLogger("ebproxy.dataplane")
_BATCH = 4096


class Takeover:
    """What goes on of former layouts, which have these ``directories``."""

    def __init__(self, maps: Mapping[str, bpf.Map], specs: Iterable[MapSpec], directories: Sequence[Path]) -> None:
        """Open what is to be copied. Raises: OSError."""
        self.directories = directories
        self._maps = maps
        self._outgrown: list[tuple[str, bpf.Map]] = []
        self._whole: set[tuple[str, Path]] = set()
        for spec, directory in product((it for it in specs if it.carries_over), directories):
            if former := open_valid(directory / spec.name, spec, of_any_size=True):
                self._find(spec, directory, former)

    def _find(self, spec: MapSpec, directory: Path, former: bpf.Map) -> None:
        ours = self._maps[spec.name]
        is_shared = former.info.id == ours.info.id
        is_copied = not is_shared and spec.kind is MapKind.LRU_HASH
        if is_shared or (is_copied and sum(count for *_, count in former.batches()) <= ours.info.max_entries):
            self._whole.add((spec.name, directory))
        if is_copied:
            self._outgrown.append((spec.name, former))
        else:
            former.close()

    def carries(self, directory: Path, *names: str) -> bool:
        """Whether all that these maps of a former layout hold goes on in ours."""
        return all((name, directory) in self._whole for name in names)

    def copy(self, *, is_older: bool) -> None:
        """Copy what former maps hold, as far as there is room; what fails is told, and forgotten with the former.

        ``is_older``: what ours hold is older, and is written again; else it stays.
        """
        for name, former in self._outgrown:
            try:
                count = _copy(former, self._maps[name], is_older=is_older)
            except OSError as error:
                log.warning("not everything that %s held is taken over: %s", name, error)
            else:
                log.debug("%d entries of %s are taken over", count, name)

    def close(self) -> None:
        """Close the former maps: nothing is taken over any more."""
        while self._outgrown:
            self._outgrown.pop()[1].close()


def _copy(former: bpf.Map, ours: bpf.Map, *, is_older: bool) -> int:
    there = set() if is_older else {key for key, _ in ours.items()}
    missing = islice((entry for entry in former.items() if entry[0] not in there), ours.info.max_entries - len(there))
    count = 0
    while entries := list(islice(missing, _BATCH)):
        keys, values = (b"".join(column) for column in zip(*entries, strict=True))
        ours.update_batch(keys, values, len(entries))
        count += len(entries)
    return count
