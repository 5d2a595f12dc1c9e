"""The policy planner: knows what the maps hold, and plans the way to what the policies say.

A plan changes either what addresses are called or what the policies say, never both; that is how each verdict stays
the old or the new one while it is carried out. A policy that looks at something new takes up to three steps:

        1 identities are told apart by it, and still judged as before
        2 the policy is in force
        3 identities that nothing tells apart any more become one again
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from agent.core.abi import PEER_WORLD, POLICY_ENTRY, SUBJECT, U32, Direction, SubjectFlag
from agent.core.enforced import RuleNumbers, policy_interests
from agent.core.identities import Identities
from agent.core.naming import Naming, block_text
from agent.core.policy import NETWORK, RuleName
from agent.core.policy_model import PolicyModel, PolicyName
from agent.core.policy_plan import Columns, Numbers, PolicyPlan, PolicySizes, PolicyState, PolicyTable, Row
from agent.core.policy_rows import Rows
from agent.core.records import ObjectKey
from agent.core.selectors import WORLD, IdentityName
from agent.core.subjects import Subjects
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
        """``since``: since when connections are known, in seconds; 0 = pods have no older ones."""
        self._model = model
        self._sizes = sizes
        self._overflow = SubjectFlag.FAIL_OPEN if fails_open else SubjectFlag.FAIL_CLOSED
        self._table = PolicyTable(sizes.policy, found.policy)
        self._subjects = Subjects(found.subjects, sizes.subjects, 0 if found.subjects else since)
        self._identities = Identities(numbers.identities, max(numbers.last_identity, self._highest(found)))
        self._naming = Naming(model, sizes, found, self._identities, self._subjects)
        rules = max((POLICY_ENTRY.packer.unpack(value)[0] for value in found.policy.values()), default=0)
        self._rules = RuleNumbers(numbers.rules, max(numbers.last_rule, rules))
        self._rows = Rows(self._identities, self._rules)
        self._pending: set[PolicyName] = set()
        self._failing: dict[int, str] = {}
        """Subjects whose verdicts cannot be had, by the map that has no room."""

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
            "identities": len(self._naming.addresses),
            "blocks": len(self._naming.blocks),
            "policy": self._table.count,
            "subjects": len(self._subjects.entries),
        }

    @property
    def degraded(self) -> dict[ObjectKey, str]:
        """Say which pods' policy, and which blocks, do not fit, and why."""
        found = {ObjectKey(BLOCKS, block_text(it)): self._no_room("blocks") for it in self._naming.unplaced_blocks}
        for address in self._naming.unplaced:
            if pod := self._model.owner(address):
                found[pod.key] = self._no_room("identities")
        for address, (key, number) in self._subjects.pods.items():
            if address not in self._subjects.entries:
                found[key] = self._no_room("subjects")
            elif name := self._failing.get(number):
                found[key] = self._no_room(name)
        return found

    @property
    def lacks_subjects(self) -> bool:
        """Whether ``subjects`` has no room for a pod that a policy isolates: it passes what it may not."""
        return any(self._rows.flags(number) for _, number in self._subjects.unplaced().values())

    def plan(self) -> PolicyPlan:
        """Plan the next step; nothing before every kind has been listed, and nothing once all is as it should be."""
        if not self._model.is_synced:
            return PolicyPlan()
        addresses, policies = self._model.take_dirty()
        self._naming.dirty |= addresses
        self._pending |= policies
        if self._naming.is_first:
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
        self._naming.is_first = False
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
        if self._naming.looks_at(wanted) and not self._is_behind:
            return plan
        was_called = dict(self._naming.addresses) if before else {}
        self._rows.add_peers(self._naming.rename(wanted, plan))
        self._rows.add_subjects(self._subjects.numbers() - self._rows.subjects)
        return self._settle(plan, _called_anew(before, was_called, self._naming.addresses) if before else None)

    @property
    def _is_behind(self) -> bool:
        """Whether addresses changed hands, or something may find the room now that it lacked."""
        return bool(self._naming.is_behind or self._failing or self._subjects.unplaced())

    def _settle(self, plan: PolicyPlan | None = None, kept: Mapping[Row, Columns] | None = None) -> PolicyPlan:
        """Plan what the rows have come to; ``kept``: what else is needed until addresses have changed hands."""
        plan = plan or PolicyPlan()
        there = self._table.rows
        during = {row: columns for row, columns in self._rows.columns().items() if row in there}
        vacated = self._naming.take_vacated()
        self._rows.forget_subjects(self._rows.subjects - self._subjects.numbers())
        if vacated:
            self._rows.forget_peers(vacated)
        final = self._rows.columns()
        misled = self._misled()
        failing = self._table.plan({**(kept or {}), **final, **during}, final, plan, misled.keys())
        self._failing = {number: misled.get(number, "policy") for number in failing}
        for number in vacated & self._identities.names.keys():
            self._identities.forget(number)
        self._subjects.plan(self._flags, plan)
        plan.bumps_generation = plan.bumps_generation or bool(
            plan.policy or plan.removed_policy or plan.identities or plan.removed_identities
        )
        return plan

    def _misled(self) -> dict[int, str]:
        """Find the subjects that would judge a peer as what it is not, as there is no room for what it is.

        They fail, so that no entry of theirs is asked: in between some would be, without those that except from them.
        """
        peers = self._rows.subjects_telling_apart(self._naming.mistaken())
        blocks = self._rows.subjects_about(self._naming.unplaced_prefixes())
        return dict.fromkeys(peers, "identities") | dict.fromkeys(blocks, "blocks")

    def _flags(self, number: int) -> int:
        return self._rows.flags(number) | (self._overflow if number in self._failing else 0)

    def begin(self, now: int) -> PolicyPlan:
        """Plan to count from now, in seconds, how long pods may have connections that are not known."""
        return self._subjects.begin(now)

    def place(self, devices: Mapping[bytes, int]) -> PolicyPlan:
        """Plan what subjects are to say of the devices that their pods are behind; no verdict changes by it."""
        return self._subjects.place(devices)

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
            dict(self._table.entries()),
            _packed(self._naming.blocks),
            _packed(self._naming.addresses),
            dict(self._subjects.entries),
        )

    def identity_of(self, address: bytes) -> int:
        """Look up by which number an address is known."""
        return self._naming.identity_of(address)

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
        return dict(self._subjects.pods)

    def unplaced_subjects(self) -> frozenset[bytes]:
        """List the addresses of this node's pods that ``subjects`` has no room for."""
        return frozenset(self._subjects.unplaced())

    def _highest(self, found: PolicyState) -> int:
        """Find the highest identity that any map names."""
        subjects = (SUBJECT.packer.unpack(value)[0] for value in found.subjects.values())
        named = (U32.packer.unpack(value)[0] for it in (found.identities, found.blocks) for value in it.values())
        return max((*named, *subjects, *self._table.numbers()), default=0)

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


def _packed(numbers: Mapping[bytes, int]) -> dict[bytes, bytes]:
    return {key: U32.packer.pack(number) for key, number in numbers.items()}
