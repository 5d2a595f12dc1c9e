"""The pods of this node, by address: whose each address is, what it is called, and what the map says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agent.core.abi import SUBJECT
from agent.core.policy_plan import PolicyPlan
from agent.core.records import ObjectKey


class Subjects:
    """``pods``: whose each address is, and its identity; ``entries``: the map once every plan so far is carried out."""

    def __init__(self, found: Mapping[bytes, bytes], limit: int, first_since: int) -> None:
        """``first_since``: since when those are subjects that are there at first and were not found."""
        self.pods: dict[bytes, tuple[ObjectKey, int]] = {}
        self.entries = dict(found)
        self._limit = limit
        self._first_since = first_since
        fields = {address: SUBJECT.packer.unpack(value) for address, value in found.items()}
        self._since = {address: since for address, (_, _, since, _) in fields.items()}
        self._places = {address: device for address, (*_, device) in fields.items()}

    def numbers(self) -> set[int]:
        """List the identities there are."""
        return {number for _, number in self.pods.values()}

    def settle(self, address: bytes, key: ObjectKey | None, number: int, *, is_first: bool) -> int | None:
        """Note whose an address is; returns what it was called before."""
        before = self.pods.pop(address, None)
        if key is not None:
            self.pods[address] = key, number
            if is_first:
                self._since.setdefault(address, self._first_since)
        if before is None:
            return None
        if before[0] != key:
            self._since.pop(address, None)
            self._places.pop(address, None)
        return before[1]

    def plan(self, flags: Callable[[int], int], plan: PolicyPlan) -> None:
        """Plan the entries; ``flags`` says what those of an identity are to have."""
        for address in sorted(self.entries.keys() - self.pods.keys()):
            plan.removed_subjects.append(address)
            plan.bumps_generation = True  # connections of the address are nobody's, whoever has it next
            del self.entries[address]
            self._since.pop(address, None)
            self._places.pop(address, None)
        without_room = self._without_room(flags, len(plan.removed_subjects))
        for address, (_, number) in sorted(self.pods.items()):
            if address in without_room:
                continue
            fields = number, flags(number), self._since.get(address, 0), self._places.get(address, 0)
            value, before = SUBJECT.packer.pack(*fields), self.entries.get(address)
            if value == before:
                continue
            self.entries[address] = plan.subjects[address] = value
            is_other = before is not None and SUBJECT.packer.unpack(before)[:-1] != fields[:-1]
            plan.bumps_generation = plan.bumps_generation or is_other

    def _without_room(self, flags: Callable[[int], int], leaving: int) -> set[bytes]:
        """Choose who stays out: a pod's addresses come in together, and first those that a policy isolates."""
        coming: dict[ObjectKey, list[bytes]] = {}
        isolated: set[ObjectKey] = set()
        for address, (key, number) in sorted(self.unplaced().items()):
            coming.setdefault(key, []).append(address)
            if flags(number):
                isolated.add(key)
        free = self._limit - len(self.entries) - leaving
        without: set[bytes] = set()
        for key in sorted(coming, key=lambda key: key not in isolated):
            if len(coming[key]) <= free:
                free -= len(coming[key])
            else:
                without.update(coming[key])
        return without

    def unplaced(self) -> dict[bytes, tuple[ObjectKey, int]]:
        """List the pods by address that have no entry."""
        return {address: self.pods[address] for address in self.pods.keys() - self.entries.keys()}

    def begin(self, now: int) -> PolicyPlan:
        """Plan to have connections be known since now, in seconds; no verdict changes by it."""
        self._first_since = now
        self._since = dict.fromkeys(self._since.keys() | self.entries.keys(), now)
        plan = PolicyPlan()
        for address, value in self.entries.items():
            identity, flags, _, device = SUBJECT.packer.unpack(value)
            plan.subjects[address] = SUBJECT.packer.pack(identity, flags, now, device)
        self.entries |= plan.subjects
        return plan

    def place(self, devices: Mapping[bytes, int]) -> PolicyPlan:
        """Plan what they are to say of the devices that their pods are behind; no verdict changes by it."""
        self._places = dict(devices)
        plan = PolicyPlan()
        for address, value in self.entries.items():
            *fields, before = SUBJECT.packer.unpack(value)
            device = devices.get(address, 0)
            if device != before:
                plan.subjects[address] = SUBJECT.packer.pack(*fields, device)
        self.entries |= plan.subjects
        return plan
