"""The policies in force, and what each subject may do with whom.

A *row* is what one direction of a subject comes to; subjects that the same policies concern share it. Its *columns*
are its peers: those whom a rule means. Everybody else is judged by the column of PEER_ANY.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from agent.core.abi import PEER_ANY, Direction, SubjectFlag
from agent.core.enforced import Enforced, Policy, RuleNumbers
from agent.core.identities import Identities, Interest
from agent.core.policy import BASELINE, NETWORK, Entries, agree, flatten
from agent.core.policy_model import PolicyName
from agent.core.policy_plan import Columns
from agent.core.policy_records import NamedPort, Prefix
from agent.core.selectors import IdentityName

_FLAGS = {Direction.INGRESS: SubjectFlag.INGRESS, Direction.EGRESS: SubjectFlag.EGRESS}


class SharedRow:
    """What one direction comes to for all subjects that the same policies concern."""

    __slots__ = ("_everybody", "_for_everybody", "_is_isolated", "_ports", "_terms", "columns")

    def __init__(
        self,
        policies: Sequence[Enforced],
        direction: Direction,
        ports: tuple[NamedPort, ...],
        names: Mapping[int, IdentityName],
    ) -> None:
        """``ports``: the subject's own, where it is the destination. ``names``: of the peers there are."""
        self._is_isolated = any(policy.stage == NETWORK for policy in policies)
        said = (policy for policy in policies if not (self._is_isolated and policy.stage == BASELINE))
        self._terms = tuple(term for policy in said for term in policy.terms[direction])
        self._ports = ports if direction is Direction.INGRESS else None
        self._for_everybody = tuple(index for index, term in enumerate(self._terms) if term.is_everybody)
        self._everybody = self._entries(self._for_everybody, ())
        self.columns: Columns = {PEER_ANY: self._everybody, **self._columns_of(None, names)}

    def add(self, peers: AbstractSet[int], names: Mapping[int, IdentityName]) -> None:
        """Begin columns for identities that are new."""
        if found := self._columns_of(peers, names):
            self.columns = {**self.columns, **found}

    def tells_apart(self, peer: int, other: int) -> bool:
        """Tell whether the verdicts for one peer are not those for another."""
        columns = self.columns
        return not agree(columns.get(peer, self._everybody), columns.get(other, self._everybody))

    def _columns_of(self, among: AbstractSet[int] | None, names: Mapping[int, IdentityName]) -> dict[int, Entries]:
        """Find the verdicts for those whom a rule means, where they are not everybody's; ``among`` of None: all."""
        meant: dict[int, set[int]] = {}
        for index, term in enumerate(self._terms):
            for selection in term.selections:
                for peer in selection.numbers if among is None else selection.numbers & among:
                    meant.setdefault(peer, set(self._for_everybody)).add(index)
        known: dict[tuple[frozenset[int], tuple[NamedPort, ...]], Entries] = {}
        is_named = self._ports is None and any(term.is_named for term in self._terms)
        found: dict[int, Entries] = {}
        for peer, indexes in meant.items():
            named = names[peer].ports if is_named else ()
            alike = frozenset(indexes), named
            entries = known.get(alike)
            if entries is None:
                entries = known[alike] = self._entries(sorted(indexes), named)
            if entries != self._everybody:
                found[peer] = entries
        return found

    def _entries(self, indexes: Iterable[int], named: Sequence[NamedPort]) -> Entries:
        ports = named if self._ports is None else self._ports
        return flatten(tuple(self._terms[index].decide(ports) for index in indexes), is_isolated=self._is_isolated)


_RowKey = tuple[Direction, tuple[Enforced, ...], tuple[NamedPort, ...]]


class Rows:
    """The policies in force, and the rows of every subject."""

    def __init__(self, identities: Identities, rules: RuleNumbers) -> None:
        self.policies: dict[PolicyName, Enforced] = {}
        self.subjects: set[int] = set()
        self.interests: frozenset[Interest] = frozenset()
        """What the policies in force look at."""
        self._identities = identities
        self._rules = rules
        self._ordered: list[Enforced] = []
        self._shared: dict[_RowKey, SharedRow] = {}
        self._rows: dict[tuple[int, Direction], _RowKey] = {}

    def put(self, name: PolicyName, record: Policy | None) -> None:
        """Put a policy in force, or take it out; rows follow with ``refresh``."""
        before = self.policies.pop(name, None)
        if record is not None:
            self.policies[name] = Enforced(record, self._identities, self._rules)
        for selection in before.selections() if before else ():
            self._identities.drop(selection)

    def refresh(self) -> None:
        """Make the rows follow the policies."""
        self.interests = frozenset().union(*(policy.interests for policy in self.policies.values()))
        self._ordered = sorted(self.policies.values(), key=lambda policy: policy.rank)
        self._rules.keep_only({it.number for policy in self._ordered for them in policy.terms.values() for it in them})
        for subject in self.subjects:
            self._assign(subject)
        self._drop_unused()

    def add_subjects(self, numbers: Iterable[int]) -> None:
        """Begin rows for subjects."""
        for number in numbers:
            self.subjects.add(number)
            self._assign(number)

    def forget_subjects(self, numbers: set[int]) -> None:
        """Drop the rows of subjects that are no more."""
        self.subjects -= numbers
        self._rows = {row: key for row, key in self._rows.items() if row[0] not in numbers}
        self._drop_unused()

    def add_peers(self, numbers: Sequence[int]) -> None:
        """Begin columns for identities that are new."""
        peers = frozenset(numbers)
        for row in self._shared.values():
            row.add(peers, self._identities.names)

    def forget_peers(self, numbers: Iterable[int]) -> None:
        """Drop the columns of identities that are no more."""
        gone = frozenset(numbers)
        for row in self._shared.values():
            if not gone.isdisjoint(row.columns):
                row.columns = {peer: entries for peer, entries in row.columns.items() if peer not in gone}

    def columns(self) -> dict[tuple[int, Direction], Columns]:
        """List every row's columns."""
        return {row: self._shared[key].columns for row, key in self._rows.items()}

    def flags(self, subject: int) -> SubjectFlag:
        """Say about which directions of a subject policy is to be asked."""
        flags = SubjectFlag(0)
        for direction, flag in _FLAGS.items():
            if (subject, direction) in self._rows:
                flags |= flag
        return flags

    def subjects_about(self, blocks: AbstractSet[Prefix]) -> set[int]:
        """List the subjects with a policy that looks at one of these blocks."""
        if not blocks:
            return set()
        looking = (policy for policy in self._ordered if not policy.interests.isdisjoint(blocks))
        return self.subjects.intersection(itertools.chain.from_iterable(policy.subject.numbers for policy in looking))

    def subjects_telling_apart(self, pairs: AbstractSet[tuple[int, int]]) -> set[int]:
        """List the subjects of whose verdicts those for one peer of a pair are not those for the other."""
        telling = {key for key, row in self._shared.items() if any(row.tells_apart(*pair) for pair in pairs)}
        return {subject for (subject, _), key in self._rows.items() if key in telling} if telling else set()

    def concerning(self, subject: int, direction: Direction) -> tuple[Enforced, ...]:
        """List the policies that have a say, in the order they decide."""
        key = self._rows.get((subject, direction))
        return key[1] if key else ()

    def _assign(self, subject: int) -> None:
        selecting = [policy for policy in self._ordered if subject in policy.subject.numbers]
        for direction in Direction:
            policies = tuple(policy for policy in selecting if policy.concerns(direction))
            if not policies:
                self._rows.pop((subject, direction), None)
                continue
            ports = self._identities.names[subject].ports if direction is Direction.INGRESS else ()
            key = direction, policies, ports
            if key not in self._shared:
                names = self._identities.names
                self._shared[key] = SharedRow(policies, direction, ports, names)
            self._rows[subject, direction] = key

    def _drop_unused(self) -> None:
        used = set(self._rows.values())
        for key in self._shared.keys() - used:
            del self._shared[key]
