"""The policy planner: knows what the maps hold, and plans the way to what the policies say.

A plan changes either what addresses are called or what the policies say, never both; that is how each verdict stays
the old or the new one while it is carried out. A policy that looks at something new takes up to three steps:

        1 identities are told apart by it, and still judged as before
        2 the policy is in force
        3 identities that nothing tells apart any more become one again
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from agent.core.abi import ADDRESS_RANGE, PEER_WORLD, POLICY_ENTRY, SUBJECT, U32, Direction, SubjectFlag
from agent.core.addresses import AddressRange
from agent.core.identities import ALL_IPV4, Identities, Interests
from agent.core.policy import NETWORK, RuleName
from agent.core.policy_model import PolicyModel, PolicyName
from agent.core.policy_plan import Columns, Numbers, PolicyPlan, PolicySizes, PolicyState, PolicyTable, Row
from agent.core.policy_records import PodRecord, Prefix
from agent.core.policy_rows import Rows, RuleNumbers, policy_interests
from agent.core.records import ObjectKey
from agent.core.selectors import WORLD, IdentityName
from agent.errors import CapacityError

__all__ = ["BLOCKS", "Numbers", "PolicyPlan", "PolicyPlanner", "PolicySizes", "PolicyState"]
BLOCKS = "IPBlock"
"""What stands in a namespace's place where it is a block that does not fit, and no pod."""


class PolicyPlanner:
    """Plans one step at a time; whoever asks carries each out and asks again until there is nothing to do.

    When a plan fails half-way, this object no longer knows what the maps hold: start anew with what is read back.
    """

    def __init__(
        self,
        model: PolicyModel,
        sizes: PolicySizes,
        found: PolicyState,
        numbers: Numbers,
        *,
        fails_open: bool = False,
        since: int = 0,
    ) -> None:
        """``since``: now, in seconds; pods that exist at the very first start may have connections from before."""
        self._model = model
        self._sizes = sizes
        self._overflow = SubjectFlag.FAIL_OPEN if fails_open else SubjectFlag.FAIL_CLOSED
        self._table = PolicyTable(sizes.policy, found.policy)
        self._addresses = _numbers(found.identities)
        self._blocks = _numbers(found.blocks)
        self._subjects = dict(found.subjects)
        subjects = {address: SUBJECT.packer.unpack(value) for address, value in found.subjects.items()}
        self._since = {address: since for address, (_, _, since, _) in subjects.items()}
        self._places = {address: device for address, (*_, device) in subjects.items()}
        self._first_since = 0 if found.subjects or found.policy else since
        rules = max((POLICY_ENTRY.packer.unpack(value)[0] for value in found.policy.values()), default=0)
        self._identities = Identities(numbers.identities, max(numbers.last_identity, self._highest()))
        self._rules = RuleNumbers(numbers.rules, max(numbers.last_rule, rules))
        self._rows = Rows(self._identities, self._rules)
        self._interests = Interests()
        self._local: dict[bytes, tuple[ObjectKey, int]] = {}
        self._dirty: set[bytes] = set()
        self._pending: set[PolicyName] = set()
        self._unplaced: set[bytes] = set()
        self._unplaced_blocks: set[bytes] = set()
        self._failing: set[int] = set()
        self._misled: set[int] = set()
        """Subjects with a policy about a block for which there is no room."""
        self._vacated: set[int] = set()
        self._is_first = True
        for number in (*self._addresses.values(), *self._blocks.values()):
            self._identities.hold(number)

    @property
    def numbers(self) -> Numbers:
        """What the numbers stand for; to be kept before the plan that uses them is carried out."""
        identities = self._identities
        return Numbers(identities.persistent(), dict(self._rules.names), identities.last, self._rules.last)

    @property
    def numbers_version(self) -> tuple[int, int]:
        """Tell one state of ``numbers`` from another."""
        return self._identities.version, self._rules.version

    @property
    def identity_count(self) -> int:
        """How many identities there are, of pods and of blocks."""
        return len(self._identities)

    @property
    def entry_counts(self) -> dict[str, int]:
        """How many entries each map holds once every plan so far is carried out, by the map's name."""
        return {
            "identities": len(self._addresses),
            "blocks": len(self._blocks),
            "policy": self._table.count,
            "subjects": len(self._subjects),
        }

    @property
    def degraded(self) -> dict[ObjectKey, str]:
        """Say which pods' policy, and which blocks, do not fit, and why."""
        found = {ObjectKey(BLOCKS, _block_text(it)): self._no_room("blocks") for it in self._unplaced_blocks}
        for address in self._unplaced:
            if pod := self._model.owner(address):
                found[pod.key] = self._no_room("identities")
        for address, (key, number) in self._local.items():
            if address not in self._subjects:
                found[key] = self._no_room("subjects")
            elif number in self._failing:
                found[key] = self._no_room("policy")
            elif number in self._misled:
                found[key] = self._no_room("blocks")
        return found

    @property
    def lacks_subjects(self) -> bool:
        """Whether there is a pod of this node for which ``subjects`` has no room."""
        return not self._local.keys() <= self._subjects.keys()

    def plan(self) -> PolicyPlan:
        """Plan the next step; nothing before every kind has been listed, and nothing once all is as it should be."""
        if not self._model.is_synced:
            return PolicyPlan()
        addresses, policies = self._model.take_dirty()
        self._dirty |= addresses
        self._pending |= policies
        if self._is_first:
            return self._begin()
        plan = self._rename()
        if not plan and self._pending:
            self._enforce()
            plan = self._settle()
        return plan or self._rename()

    def _begin(self) -> PolicyPlan:
        """Plan the way from what a former agent left, or this one before it failed."""
        self._pending |= self._model.policies.keys()
        self._enforce()
        plan = self._rename(before=self._table.rows)
        self._identities.forget_restored()
        self._is_first = False
        return plan

    def _enforce(self) -> None:
        for name in self._pending:
            self._rows.put(name, self._model.policies.get(name))
        self._pending.clear()
        self._rows.refresh()

    def _rename(self, before: Mapping[Row, Columns] | None = None) -> PolicyPlan:
        """Plan what addresses are to be called, by what the policies look at: those in force and those to come."""
        plan = PolicyPlan()
        wanted = self._rows.interests
        for policy in self._pending:
            if record := self._model.policies.get(policy):
                wanted |= policy_interests(record)
        if not self._is_first and wanted == self._interests.wanted and not self._is_behind:
            return plan
        was_called = dict(self._addresses) if before else {}
        if wanted != self._interests.wanted or self._is_first:
            self._interests = Interests(wanted)
            self._dirty |= self._addresses.keys() | self._model.pods_by_address.keys()
            self._rename_blocks(plan)
        elif self._unplaced_blocks:
            self._rename_blocks(plan)
        dirty, self._dirty = self._dirty | self._unplaced, set()
        self._unplaced.clear()
        for address in sorted(dirty):
            self._rename_address(address, plan)
        begun, self._identities.begun = self._identities.begun, []
        self._vacated.update(begun)
        self._rows.add_peers([number for number in begun if number in self._identities.names])
        self._rows.add_subjects({number for _, number in self._local.values()} - self._rows.subjects)
        return self._settle(plan, _called_anew(before, was_called, self._addresses) if before else None)

    @property
    def _is_behind(self) -> bool:
        """Whether addresses changed hands, or something may find the room now that it lacked."""
        return bool(self._dirty or self._unplaced or self._unplaced_blocks or self._failing or self.lacks_subjects)

    def _settle(self, plan: PolicyPlan | None = None, kept: Mapping[Row, Columns] | None = None) -> PolicyPlan:
        """Plan what the rows have come to; ``kept``: what else is needed until addresses have changed hands."""
        plan = plan or PolicyPlan()
        there = self._table.rows
        during = {row: columns for row, columns in self._rows.columns().items() if row in there}
        vacated = {number for number in self._vacated if not self._identities.is_held(number)}
        self._vacated.clear()
        self._rows.forget_subjects(self._rows.subjects - {number for _, number in self._local.values()})
        if vacated:
            self._rows.forget_peers(vacated)
        final = self._rows.columns()
        self._failing = self._table.plan({**(kept or {}), **final, **during}, final, plan)
        self._misled = self._rows.subjects_about(self._unplaced_prefixes())
        for number in vacated & self._identities.names.keys():
            self._identities.forget(number)
        self._plan_subjects(plan)
        plan.bumps_generation = plan.bumps_generation or bool(
            plan.policy or plan.removed_policy or plan.identities or plan.removed_identities
        )
        return plan

    def _rename_address(self, address: bytes, plan: PolicyPlan) -> None:
        pod, before = self._model.owner(address), self._addresses.get(address)
        taken = len(self._addresses) + len(plan.removed_identities)  # room that is let go is free behind the plan
        is_placed = pod is not None and (before is not None or taken < self._sizes.identities)
        if pod is not None and not is_placed:
            self._unplaced.add(address)
        number = self._number_of(pod, address) if pod is not None and (is_placed or pod.is_local) else None
        self._settle_local(address, pod.key if pod and pod.is_local else None, number or 0)
        if not is_placed:
            number = None
        if number == before:
            return
        if number is None:
            del self._addresses[address]
            plan.removed_identities.append(address)
        else:
            self._addresses[address] = number
            plan.identities[address] = U32.packer.pack(number)
            self._identities.hold(number)
        self._let_go(before)

    def _number_of(self, pod: PodRecord, address: bytes) -> int:
        labels = self._model.namespace_labels(pod.key.namespace)
        return self._identities.number_of(self._interests.name_of(pod, labels, address))

    def _settle_local(self, address: bytes, key: ObjectKey | None, number: int) -> None:
        """Note whose an address of this node's pods is."""
        before = self._local.pop(address, None)
        if key is not None:
            self._local[address] = key, number
            self._identities.hold(number)
            if self._is_first:
                self._since.setdefault(address, self._first_since)
        if before is not None:
            if before[0] != key:
                self._since.pop(address, None)
                self._places.pop(address, None)
            self._let_go(before[1])

    def _let_go(self, number: int | None) -> None:
        if number is not None and self._identities.release(number):
            self._vacated.add(number)

    def _rename_blocks(self, plan: PolicyPlan) -> None:
        """Plan the blocks, and what is called after them."""
        names = {_block_key(block): name for block, name in self._interests.block_names().items()}
        self._unplaced_blocks.clear()
        for block in sorted(self._blocks.keys() - names.keys(), key=_bits_of):
            self._let_go(self._blocks.pop(block))
            plan.removed_blocks.append(block)
        for block, name in sorted(names.items(), key=lambda it: _bits_of(it[0]), reverse=True):
            before = self._blocks.get(block)
            if before is None and len(self._blocks) + len(plan.removed_blocks) >= self._sizes.blocks:
                self._unplaced_blocks.add(block)
                continue
            number = self._identities.number_of(name)
            if number == before:
                continue
            self._blocks[block] = number
            plan.blocks[block] = U32.packer.pack(number)
            self._identities.hold(number)
            self._let_go(before)
        plan.bumps_generation = plan.bumps_generation or bool(plan.blocks or plan.removed_blocks)

    def _unplaced_prefixes(self) -> set[Prefix]:
        """List the blocks that policies look at for which there is no room."""
        unplaced = {Prefix(address, bits) for bits, address in map(_bits_of, self._unplaced_blocks)}
        if ALL_IPV4 in unplaced:  # it says where wider ranges end
            unplaced.update(block for block in self._interests.blocks if block.bits < ALL_IPV4.bits)
        return unplaced

    def _plan_subjects(self, plan: PolicyPlan) -> None:
        for address in sorted(self._subjects.keys() - self._local.keys()):
            plan.removed_subjects.append(address)
            del self._subjects[address]
            self._since.pop(address, None)
            self._places.pop(address, None)
        for address, (_, number) in sorted(self._local.items()):
            fails = number in self._failing or number in self._misled
            flags = self._rows.flags(number) | (self._overflow if fails else 0)
            fields = number, flags, self._since.get(address, 0), self._places.get(address, 0)
            value, before = SUBJECT.packer.pack(*fields), self._subjects.get(address)
            if value == before or (
                before is None and len(self._subjects) + len(plan.removed_subjects) >= self._sizes.subjects
            ):
                continue
            self._subjects[address] = plan.subjects[address] = value
            is_other = before is not None and SUBJECT.packer.unpack(before)[:-1] != fields[:-1]
            plan.bumps_generation = plan.bumps_generation or is_other

    def place(self, devices: Mapping[bytes, int]) -> PolicyPlan:
        """Plan what subjects are to say of the devices that their pods are behind; no verdict changes by it."""
        self._places = dict(devices)
        plan = PolicyPlan()
        for address, value in self._subjects.items():
            *fields, before = SUBJECT.packer.unpack(value)
            device = devices.get(address, 0)
            if device != before:
                plan.subjects[address] = SUBJECT.packer.pack(*fields, device)
        self._subjects |= plan.subjects
        return plan

    def differences(self, state: PolicyState) -> int:
        """Count the entries that are not in the maps as they were planned."""
        wanted = self.desired()
        pairs: Iterable[tuple[Mapping[bytes, bytes], Mapping[bytes, bytes]]] = (
            (wanted.policy, state.policy),
            (wanted.blocks, state.blocks),
            (wanted.identities, state.identities),
            (wanted.subjects, state.subjects),
        )
        return sum(sum(a.get(key) != b.get(key) for key in a.keys() | b.keys()) for a, b in pairs)

    def desired(self) -> PolicyState:
        """Lay out what the maps hold once every plan so far is carried out."""
        return PolicyState(
            dict(self._table.entries()), _packed(self._blocks), _packed(self._addresses), dict(self._subjects)
        )

    def identity_of(self, address: bytes) -> int:
        """Look up by which number an address is known."""
        number = self._addresses.get(address)
        if number is not None:
            return number
        block = self._interests.block_of(address)
        return PEER_WORLD if block is None else self._blocks.get(_block_key(block), PEER_WORLD)

    def identity_name(self, number: int) -> IdentityName | None:
        """Look up what a number stands for."""
        return WORLD if number == PEER_WORLD else self._identities.names.get(number)

    def rule_name(self, number: int) -> RuleName | None:
        """Look up which rule a number stands for."""
        return self._rules.names.get(number)

    def isolating(self, subject: int, direction: Direction) -> tuple[ObjectKey, ...]:
        """List the NetworkPolicies that isolate a subject in a direction."""
        concerning = self._rows.concerning(subject, direction)
        return tuple(policy.record.key for policy in concerning if policy.stage == NETWORK)

    def subject_pods(self) -> dict[bytes, tuple[ObjectKey, int]]:
        """List this node's pods by address, with their identities."""
        return dict(self._local)

    def _highest(self) -> int:
        """Find the highest identity that any map names."""
        subjects = (SUBJECT.packer.unpack(value)[0] for value in self._subjects.values())
        return max((*self._addresses.values(), *self._blocks.values(), *subjects, *self._table.numbers()), default=0)

    def _no_room(self, name: str) -> str:
        sizes = {"policy": self._sizes.policy, "blocks": self._sizes.blocks, "identities": self._sizes.identities}
        return str(CapacityError(name, 1, sizes.get(name, self._sizes.subjects)))


def _called_anew(
    rows: Mapping[Row, Columns], before: Mapping[bytes, int], after: Mapping[bytes, int]
) -> dict[Row, Columns]:
    """Extend what a former agent left: a peer is judged by its new number as it was by the one before."""
    renamed = {number: before[address] for address, number in after.items() if before.get(address, number) != number}
    return {
        row: {**{new: columns[old] for new, old in renamed.items() if old in columns and new not in columns}, **columns}
        for row, columns in rows.items()
    }


def _block_key(block: Prefix) -> bytes:
    return ADDRESS_RANGE.packer.pack(block.bits, block.address)


def _block_text(block: bytes) -> str:
    bits, address = _bits_of(block)
    return str(AddressRange(address, bits))


def _bits_of(block: bytes) -> tuple[int, bytes]:
    """Rank blocks: the longest is written first and removed last, so that none is judged as what it is cut from."""
    bits, address = ADDRESS_RANGE.packer.unpack(block)
    return bits, address


def _numbers(found: Mapping[bytes, bytes]) -> dict[bytes, int]:
    return {key: U32.packer.unpack(value)[0] for key, value in found.items()}


def _packed(numbers: Mapping[bytes, int]) -> dict[bytes, bytes]:
    return {key: U32.packer.pack(number) for key, number in numbers.items()}
