"""The policies in force, and what each subject may do with whom.

A *row* is what one direction of a subject comes to; subjects that the same policies concern share it. Its *columns*
are its peers: those whom a rule means. Everybody else is judged by the column of PEER_ANY.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from agent.core.abi import PEER_ANY, Direction, SubjectFlag
from agent.core.identities import Identities, Interest, Selection, interests_of
from agent.core.policy import (
    ADMIN,
    BASELINE,
    KIND_NAMES,
    NETWORK,
    Decision,
    Entries,
    RuleName,
    flatten,
    resolve_ports,
)
from agent.core.policy_model import PolicyName
from agent.core.policy_plan import Columns
from agent.core.policy_records import (
    Action,
    ClusterPolicyRecord,
    NamedPort,
    NetworkPolicyRecord,
    Prefix,
    Rule,
    Tier,
    TierRule,
)
from agent.core.records import ObjectKey
from agent.core.selectors import IdentityName, Matcher, matcher_of

Policy = NetworkPolicyRecord | ClusterPolicyRecord
_FLAGS = {Direction.INGRESS: SubjectFlag.INGRESS, Direction.EGRESS: SubjectFlag.EGRESS}


class RuleNumbers:
    """Which number each rule has, for as long as it exists; ``version`` moves when one comes or goes."""

    def __init__(self, restored: Mapping[int, RuleName], last: int) -> None:
        self.last = last
        self.version = 0
        self.names = dict(restored)
        self._numbers = {name: number for number, name in restored.items()}

    def number_of(self, name: RuleName) -> int:
        """Look up a rule's number; gives one out where it has none."""
        number = self._numbers.get(name)
        if number is None:
            self.last += 1
            self.version += 1
            number = self._numbers[name] = self.last
            self.names[number] = name
        return number

    def keep_only(self, numbers: set[int]) -> None:
        """Take back all others."""
        for number in self.names.keys() - numbers:
            del self._numbers[self.names.pop(number)]
            self.version += 1


class _Term:
    """One rule of a policy: whom it means, and what it decides."""

    __slots__ = ("_rule", "_stage_action", "decision", "is_everybody", "is_named", "number", "selections")

    def __init__(self, stage: int, tier_rule: TierRule, number: int, selections: Sequence[Selection]) -> None:
        rule = tier_rule.rule
        self.number = number
        self.is_everybody = rule.peers is None
        self.is_named = any(it.name for it in rule.ports or ())
        self.selections = tuple(selections)
        self._rule = rule
        self._stage_action = stage, tier_rule.action
        self.decision = Decision(stage, tier_rule.action, resolve_ports(rule.ports, ()), number)

    def decide(self, named: Sequence[NamedPort]) -> Decision:
        """Say what it decides where the destination has these ports."""
        if not self.is_named:
            return self.decision
        return Decision(*self._stage_action, resolve_ports(self._rule.ports, named), self.number)

    def means(self, peer: int) -> bool:
        """Tell whether a peer is meant."""
        return self.is_everybody or any(peer in selection.numbers for selection in self.selections)


class Enforced:
    """A policy in force."""

    __slots__ = ("interests", "name", "record", "stage", "subject", "terms")

    def __init__(self, record: Policy, identities: Identities, rules: RuleNumbers) -> None:
        self.name: PolicyName = (record.kind, record.key)
        self.record = record
        self.stage = stage_of(record)
        self.interests = policy_interests(record)
        self.subject = identities.select(subject_of(record))
        self.terms = {
            direction: tuple(
                _Term(
                    self.stage,
                    rule,
                    rules.number_of(RuleName(KIND_NAMES[self.stage], record.key, direction, index)),
                    [identities.select(matcher) for matcher in _matchers(rule.rule, record.key.namespace, direction)],
                )
                for index, rule in enumerate(rules_of(record, direction) or ())
            )
            for direction in Direction
        }

    def concerns(self, direction: Direction) -> bool:
        """Tell whether it has a say in a direction; a NetworkPolicy without a rule denies."""
        return rules_of(self.record, direction) is not None if self.stage == NETWORK else bool(self.terms[direction])

    @property
    def rank(self) -> tuple[int, int, ObjectKey]:
        """Say when it decides: the lesser first."""
        priority = self.record.priority if isinstance(self.record, ClusterPolicyRecord) else 0
        return self.stage, priority, self.record.key

    def selections(self) -> Iterator[Selection]:
        """List what it has selected."""
        yield self.subject
        for terms in self.terms.values():
            for term in terms:
                yield from term.selections


def stage_of(record: Policy) -> int:
    """Say in which stage a policy decides."""
    if isinstance(record, NetworkPolicyRecord):
        return NETWORK
    return ADMIN if record.tier is Tier.ADMIN else BASELINE


def subject_of(record: Policy) -> Matcher:
    """Say whom a policy is about."""
    if isinstance(record, NetworkPolicyRecord):
        return Matcher(namespace=record.key.namespace, pods=record.subject)
    return Matcher(namespaces=record.namespaces, pods=record.pods)


def rules_of(record: Policy, direction: Direction) -> Sequence[TierRule] | None:
    """List a policy's rules of a direction; None where a NetworkPolicy does not isolate it."""
    rules = record.ingress if direction is Direction.INGRESS else record.egress
    if rules is None:
        return None
    return [rule if isinstance(rule, TierRule) else TierRule(Action.ACCEPT, rule) for rule in rules]


def policy_interests(record: Policy) -> frozenset[Interest]:
    """List what has to be known of identities for a policy to be in force."""
    wanted = interests_of(subject_of(record))
    for direction in Direction:
        for rule in rules_of(record, direction) or ():
            wanted |= {("port", it.name) for it in rule.rule.ports or () if it.name}
            for matcher in _matchers(rule.rule, record.key.namespace, direction):
                wanted |= interests_of(matcher)
    return frozenset(wanted)


def _matchers(rule: Rule, namespace: str, direction: Direction) -> list[Matcher]:
    """List whom a rule means; where it means everybody, those of whom a port's name means more than of others."""
    if rule.peers is not None:
        return [matcher_of(peer, namespace) for peer in rule.peers]
    if direction is Direction.INGRESS:
        return []
    return [Matcher(port=name) for name in sorted({it.name for it in rule.ports or () if it.name})]


class SharedRow:
    """What one direction comes to for all subjects that the same policies concern."""

    __slots__ = ("_is_isolated", "_ports", "_terms", "columns")

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
        self.columns: Columns = self._all_columns(names)

    def column(self, peer: int, named: Sequence[NamedPort]) -> Entries | None:
        """Find the verdicts for a peer; None where they are everybody's."""
        entries = self._entries((index for index, term in enumerate(self._terms) if term.means(peer)), named)
        return None if entries == self.columns[PEER_ANY] else entries

    def _all_columns(self, names: Mapping[int, IdentityName]) -> Columns:
        everybody = tuple(index for index, term in enumerate(self._terms) if term.is_everybody)
        columns = {PEER_ANY: self._entries(everybody, ())}
        meant: dict[int, set[int]] = {}
        for index, term in enumerate(self._terms):
            for selection in term.selections:
                for peer in selection.numbers:
                    meant.setdefault(peer, set(everybody)).add(index)
        known: dict[tuple[frozenset[int], tuple[NamedPort, ...]], Entries] = {}
        is_named = self._ports is None and any(term.is_named for term in self._terms)
        for peer, indexes in meant.items():
            named = names[peer].ports if is_named else ()
            alike = frozenset(indexes), named
            entries = known.get(alike)
            if entries is None:
                entries = known[alike] = self._entries(sorted(indexes), named)
            if entries != columns[PEER_ANY]:
                columns[peer] = entries
        return columns

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
        names = self._identities.names
        for row in self._shared.values():
            columns = {number: row.column(number, names[number].ports) for number in numbers}
            if found := {number: entries for number, entries in columns.items() if entries is not None}:
                row.columns = {**row.columns, **found}

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
