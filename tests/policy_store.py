"""The kernel's maps of policy in memory, one write at a time.

A verified fake: ``tests/bpf/test_policy_maps.py`` carries the same plans out on these maps and on the kernel's.
"""

from __future__ import annotations

import errno
import os
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

from agent.core.abi import POLICY_STATE, U32, MapKind, MapSizes, MapSpec, map_specs

ONLY = U32.packer.pack(0)


class FakeMap:
    """One map, as ``bpf.Map`` is used; every write is noted in its store."""

    def __init__(self, store: FakeStore, spec: MapSpec) -> None:
        self.entries: dict[bytes, bytes] = {}
        self.info = SimpleNamespace(
            key_size=spec.key.size, value_size=spec.value.size, max_entries=spec.max_entries, id=0
        )
        self._name = spec.name
        self._store = store
        if spec.kind in {MapKind.ARRAY, MapKind.PERCPU_ARRAY}:
            self.entries = {U32.packer.pack(i): bytes(spec.value.size) for i in range(min(spec.max_entries, 64))}

    def lookup(self, key: bytes) -> bytes | None:
        return self.entries.get(key)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        yield from list(self.entries.items())

    def batches(self, size: int = 4096) -> Iterator[tuple[bytes, bytes, int]]:
        found = list(self.entries.items())
        for start in range(0, len(found), size) or (0,):
            part = found[start : start + size]
            yield b"".join(key for key, _ in part), b"".join(value for _, value in part), len(part)

    def update(self, key: bytes, value: bytes) -> None:
        if key not in self.entries and len(self.entries) >= self.info.max_entries:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        self._store.note(self._name, key, value)
        self.entries[key] = value

    def update_batch(self, keys: bytes, values: bytes, count: int) -> None:
        k, v = self.info.key_size, self.info.value_size
        assert (len(keys), len(values)) == (k * count, v * count)
        for i in range(count):
            self.update(keys[i * k : (i + 1) * k], values[i * v : (i + 1) * v])

    def delete(self, key: bytes) -> bool:
        if key not in self.entries:
            return False
        self._store.note(self._name, key, None)
        del self.entries[key]
        return True

    def delete_present(self, keys: Sequence[bytes]) -> int:
        return sum(map(self.delete, keys))


class FakeStore:
    """What ``MapStore`` is to policy. ``log``: every write, as map, key and value (None = removed).

    ``fail_after``: so many more writes succeed, and the next one is refused; None = all succeed.
    """

    def __init__(self, sizes: MapSizes | None = None) -> None:
        self.log: list[tuple[str, bytes, bytes | None]] = []
        self.fail_after: int | None = None
        self.writes: Tally[str] = Tally()
        sizes = sizes or MapSizes(identities=64, blocks=64, policy=512, subjects=16, connections=64)
        self.maps = {spec.name: FakeMap(self, spec) for spec in map_specs(sizes)}

    def note(self, name: str, key: bytes, value: bytes | None) -> None:
        """Take note of a write, or refuse it."""
        if self.fail_after is not None:
            if self.fail_after == 0:
                self.fail_after = None
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            self.fail_after -= 1
        self.log.append((name, key, value))

    @property
    def generation(self) -> int:
        """The generation that the programs see."""
        return int(POLICY_STATE.packer.unpack(self.maps["policy_states"].entries[ONLY])[0])
