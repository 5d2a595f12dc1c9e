"""The maps that hold policy: carry plans out, read back what is there.

The generation is odd while a plan that may change verdicts is being carried out, and even once it has been: connections
are judged again in between and afterwards, and whoever comes after an agent that was killed sees that it was.
"""

from __future__ import annotations

import contextlib
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.core.abi import POLICY_COUNTERS, POLICY_STATE, U32
from agent.core.policy_plan import PolicyPlan, PolicyState
from agent.errors import DataplaneError
from agent.kernel import bpf
from agent.kernel.maps import MapStore
from agent.kernel.takeover import Takeover

log = logging.getLogger("ebproxy.policy")
TABLES = ("policy", "blocks", "identities", "subjects")
"""The maps of a plan, in the order they are written."""
_PLACES = "pod_devices"
_STATE = ("connections", "policy_states")
"""Of which a layout has to hold all, for its connections to be known: entries, and what their generations count."""
_ONLY = U32.packer.pack(0)
_FIRST = 2
_IS_STRICT, _IS_FULL = 1, 2
"""Why pods of this node that are no subjects are held: so it was set, or there is no room for one of them."""
_ALL_BITS = (1 << 32) - 1
_Entries = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class PolicySwitches:
    """What the programs are told of policy as such, as in ``struct policy_state``."""

    sample: int = 0
    is_strict: bool = False
    is_answered: bool = False


class PolicyMaps:
    """Writes the maps of policy; ``generation`` is that of all verdicts."""

    def __init__(self, store: MapStore) -> None:
        self._store = store
        self.generation = 0
        self.knows_connections = False
        """Whether the connections that a former layout's programs allowed are known to ours, all of them."""
        self._switches = PolicySwitches()
        self._is_full = False

    def open(self, switches: PolicySwitches) -> None:
        """Take the generation up where it was left, and turn the switches. Raises: DataplaneError.

        Pods for which a former agent had no room are held until this one says otherwise.
        """
        with _writing("policy_states"):
            found = self._store.maps["policy_states"].lookup(_ONLY) or bytes(POLICY_STATE.size)
            generation, _, strictness, _ = POLICY_STATE.packer.unpack(found)
            self.generation = generation or _FIRST
            self._is_full = strictness == _IS_FULL
            self._switches = switches
            wanted = self._packed_state(self.generation)
            if found != wanted:
                self._write_state(wanted)

    @property
    def is_cut_short(self) -> bool:
        """Whether a plan was begun and not ended: verdicts may have been taken by half of it."""
        return bool(self.generation % 2)

    @property
    def revision(self) -> int:
        """How often verdicts have changed."""
        return self.generation // 2

    def settle(self) -> None:
        """Have everything judged by what the maps hold now, if a plan was cut short. Raises: DataplaneError."""
        if self.is_cut_short:
            self._raise()

    def hold(self, *, is_full: bool) -> None:
        """Say whether pods of this node are held that are no subjects, as there is no room. Raises: DataplaneError."""
        if is_full != self._is_full:
            self._is_full = is_full
            with _writing("policy_states"):
                self._write_state(self._packed_state(self.generation))

    def unsettle(self) -> None:
        """Have everything judged anew until ``settle``, and once more by what holds then. Raises: DataplaneError."""
        if not self.is_cut_short:
            self._raise()

    def apply(self, plan: PolicyPlan) -> None:
        """Carry a plan out in its order. Raises: DataplaneError; what was written before stays."""
        if plan.bumps_generation:
            self.unsettle()
        self._put("policy", plan.policy)
        for name, entries in (("blocks", plan.blocks), ("identities", plan.identities), ("subjects", plan.subjects)):
            self._put(name, list(entries.items()))
        for name, keys in (
            ("subjects", plan.removed_subjects),
            ("identities", plan.removed_identities),
            ("blocks", plan.removed_blocks),
            ("policy", plan.removed_policy),
        ):
            self._remove(name, keys)
        self.settle()

    def read(self) -> PolicyState:
        """Read back what the maps hold. Raises: OSError."""
        return PolicyState(**{name: dict(self._store.maps[name].items()) for name in TABLES})

    def read_counters(self) -> dict[int, int]:
        """Sum what the programs counted over CPUs, by index. Raises: OSError."""
        counters = self._store.maps["policy_counters"]
        raw = ((index, counters.lookup(U32.packer.pack(index))) for index in range(POLICY_COUNTERS))
        return {index: sum(array("Q", value or b"")) for index, value in raw}

    def adopt(self, former: Takeover) -> bool:
        """Copy what a former layout's maps hold, so that its verdicts go on under the new programs.

        Only where there is nothing yet, and all of it fits; where pods are is copied for itself. Returns whether a
        former layout enforces what these maps lack. Raises: DataplaneError, OSError.
        """
        read = {directory: _read_tables(directory) for directory in former.directories}
        enforcing = {directory: tables for directory, tables in read.items() if tables.get("subjects")}
        self.knows_connections = bool(enforcing) and all(former.carries(it, *_STATE) for it in enforcing)
        is_empty = self._is_empty("subjects")
        for directory, tables in enforcing.items():
            if self._is_empty(_PLACES) and self._takes(_PLACES, tables):
                self._put(_PLACES, tables[_PLACES])
            if is_empty and all(self._takes(name, tables) for name in TABLES):
                for name in TABLES:  # subjects last: what was cut short before them is begun anew
                    self._put(name, tables[name])
                log.info("adopted policy of layout %s: %d entries", directory.name, sum(map(len, tables.values())))
                return False
        return bool(enforcing)

    def _is_empty(self, name: str) -> bool:
        return not next(self._store.maps[name].items(), None)

    def _takes(self, name: str, tables: Mapping[str, _Entries]) -> bool:
        """Whether a former map is there, means the same by its sizes, and fits."""
        info = self._store.maps[name].info
        sizes = {(len(key), len(value)) for key, value in tables.get(name, ())}
        return name in tables and sizes <= {(info.key_size, info.value_size)} and len(tables[name]) <= info.max_entries

    def _put(self, name: str, entries: Sequence[tuple[bytes, bytes]]) -> None:
        if not entries:
            return
        opened = self._store.maps[name]
        with _writing(name):
            if len(entries) == 1:
                opened.update(*entries[0])
            else:
                keys, values = (b"".join(column) for column in zip(*entries, strict=True))
                opened.update_batch(keys, values, len(entries))
        self._store.writes[name] += len(entries)

    def _remove(self, name: str, keys: Sequence[bytes]) -> None:
        if keys:
            with _writing(name):
                self._store.writes[name] += self._store.maps[name].delete_present(keys)

    def _raise(self) -> None:
        generation = self.generation + 1 & _ALL_BITS or _FIRST
        with _writing("policy_states"):
            self._write_state(self._packed_state(generation))
        self.generation = generation

    def _write_state(self, state: bytes) -> None:
        self._store.maps["policy_states"].update(_ONLY, state)
        self._store.writes["policy_states"] += 1

    def _packed_state(self, generation: int) -> bytes:
        switches = self._switches
        strictness = _IS_STRICT if switches.is_strict else _IS_FULL if self._is_full else 0
        return POLICY_STATE.packer.pack(generation, switches.sample, strictness, int(switches.is_answered))


@contextlib.contextmanager
def _writing(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataplaneError(f"writing map {name}: {error}") from error


def _read_tables(directory: Path) -> dict[str, _Entries]:
    """Read those maps of policy that a layout has."""
    found = {}
    for name in (*TABLES, _PLACES):
        with (
            contextlib.suppress(FileNotFoundError),
            contextlib.closing(bpf.Map(bpf.obj_get(directory / name))) as opened,
        ):
            found[name] = [*opened.items()]
    return found
