"""The maps that hold policy: carry plans out, read back what is there.

The generation is odd while a plan that may change verdicts is being carried out, and even once it has been: connections
are judged again in between and afterwards, and whoever comes after an agent that was killed sees that it was.
"""

from __future__ import annotations

import contextlib
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.core.abi import POLICY_COUNTERS, POLICY_STATE, SUBJECT, U32
from agent.core.policy_plan import PolicyPlan, PolicyState
from agent.errors import DataplaneError
from agent.kernel import bpf
from agent.kernel.maps import MapStore
from agent.kernel.takeover import Takeover

log = logging.getLogger("ebproxy.policy")
TABLES = ("policy", "blocks", "identities", "subjects")
"""The maps of a plan, in the order they are written."""
_PLACES = "pod_devices"
_ONLY = U32.packer.pack(0)
_FIRST = 2
_IS_STRICT, _IS_FULL = 1, 2
"""Why pods of this node that are no subjects are held: so it was set, or there is no room for one of them."""
_ALL_BITS = (1 << 32) - 1


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
        """Whether the connections that a former layout's programs allowed are known to ours."""
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

    def adopt(self, formers: Iterable[Path], takeover: Takeover, now: int) -> bool:
        """Copy what a former layout's maps hold, so that its verdicts go on under the new programs.

        Only where there is nothing yet, and all of it fits; where pods are is copied for itself. ``now``: since when
        connections are known, in seconds, where those of before are not. Returns whether a former layout enforces what
        these maps lack. Raises: DataplaneError.
        """
        is_empty = self._is_empty("subjects")
        is_left = False
        for directory in formers:
            with contextlib.ExitStack() as stack:
                former = _open_all(directory, stack)
                entries = {name: list(opened.items()) for name, opened in former.items()}
                if not entries.get("subjects"):
                    continue
                is_known = takeover.carries(directory, "connections", "policy_states")
                self.knows_connections = is_known and (self.knows_connections or not is_left)
                is_left = True
                if not is_known:
                    entries["subjects"] = [(key, _known_since(value, now)) for key, value in entries["subjects"]]
                if self._is_empty(_PLACES) and self._takes(_PLACES, former, entries):
                    self._put(_PLACES, entries[_PLACES])
                if is_empty and all(self._takes(name, former, entries) for name in TABLES):
                    for name in TABLES:  # subjects last: what was cut short before them is begun anew
                        self._put(name, entries[name])
                    log.info("adopted policy of layout %s: %d entries", directory.name, sum(map(len, entries.values())))
                    return False
        return is_left

    def _is_empty(self, name: str) -> bool:
        return not next(self._store.maps[name].items(), None)

    def _takes(self, name: str, former: Mapping[str, bpf.Map], entries: Mapping[str, Sequence[object]]) -> bool:
        if name not in former:
            return False
        ours, theirs = self._store.maps[name].info, former[name].info
        is_alike = (ours.key_size, ours.value_size) == (theirs.key_size, theirs.value_size)
        return is_alike and len(entries[name]) <= ours.max_entries

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


def _known_since(subject: bytes, now: int) -> bytes:
    if len(subject) != SUBJECT.size:
        return subject  # another layout's, which is not adopted
    identity, flags, _, device = SUBJECT.packer.unpack(subject)
    return SUBJECT.packer.pack(identity, flags, now, device)


def _open_all(directory: Path, stack: contextlib.ExitStack) -> Mapping[str, bpf.Map]:
    """Open those maps of policy that a layout has."""
    opened = {}
    for name in (*TABLES, _PLACES):
        try:
            opened[name] = bpf.Map(bpf.obj_get(directory / name))
        except FileNotFoundError:
            continue
        stack.callback(opened[name].close)
    return opened
