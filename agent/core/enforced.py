"""A policy in force: whom it is about, whom its rules mean, and what each decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from agent.core.abi import Direction
from agent.core.identities import Identities, Interest, Selection, interests_of
from agent.core.policy import ADMIN, BASELINE, KIND_NAMES, NETWORK, Decision, RuleName, resolve_ports
from agent.core.policy_model import PolicyName
from agent.core.policy_records import Action, ClusterPolicyRecord, NamedPort, NetworkPolicyRecord, Rule, Tier, TierRule
from agent.core.records import ObjectKey
from agent.core.selectors import Matcher, matcher_of

Policy = NetworkPolicyRecord | ClusterPolicyRecord


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


class Term:
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
                Term(
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
