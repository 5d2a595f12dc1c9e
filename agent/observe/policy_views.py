"""What the agent answers about policy: policies, identities, and this node's pods as policy sees them.

To be called on the thread that owns model and planner.
"""

from __future__ import annotations

from collections import Counter as Tally
from typing import Any

from agent.core.abi import FIRST_IDENTITY, Direction
from agent.core.addresses import format_address
from agent.core.enforced import Policy, rules_of, stage_of, subject_of
from agent.core.events import Malformed
from agent.core.policy import KIND_NAMES, NETWORK, RuleName
from agent.core.policy_model import PolicyModel, PolicyName, Standing
from agent.core.policy_planner import PolicyPlanner
from agent.core.policy_records import ClusterPolicyRecord, NetworkPolicyRecord, TierRule
from agent.core.records import Fault, ObjectKey
from agent.core.selectors import IdentityName
from agent.observe.policy_text import (
    action_text,
    identity_document,
    isolated_text,
    peers_text,
    ports_text,
    rule_text,
    selector_text,
)


class PolicyViews:
    """Reads one model and planner."""

    def __init__(self, model: PolicyModel, planner: PolicyPlanner) -> None:
        self._model = model
        self._planner = planner

    def policies(self) -> list[dict[str, Any]]:
        """List every policy, those that decide first in front; one that cannot be read stands with its fault."""
        subjects, degraded = self._subjects(), self._planner.degraded
        pods = self._planner.subject_pods().values()
        records = sorted(self._model.policies.values(), key=_rank)
        documents = []
        for record in records:
            name = record.kind, record.key
            meant = sorted({key for key, number in pods if name in subjects.get(number, ())})
            documents.append(
                {
                    **_policy(record, [str(key) for key in meant]),
                    "fault": _fault(self._model.malformed.get(name)),
                    "in_force": self._model.in_force(name).value,
                    "not_understood": _left_out(self._model.left_out.get(name, ())),
                    "not_enforced": [f"pod {key}: {degraded[key]}" for key in meant if key in degraded],
                }
            )
        unread = self._model.unread_policies
        unknown = sorted(unread.keys() - self._model.policies.keys())
        return documents + [_unread(name, unread[name]) for name in unknown]

    def identities(self) -> list[dict[str, Any]]:
        """List every identity with what it stands for, and how many addresses of pods have it."""
        planner = self._planner
        used = Tally(planner.identity_of(address) for address in self._model.pods_by_address)
        names = {number: planner.identity_name(number) for number in (*planner.numbers.identities, *used)}
        return [
            {"identity": number, "addresses": used[number], **identity_document(name)}
            for number, name in sorted(names.items())
            if name is not None and number >= FIRST_IDENTITY
        ]

    def endpoints(self) -> list[dict[str, Any]]:
        """List the addresses of this node's pods, which policies concern them, and whether those are in force."""
        subjects, degraded = self._subjects(), self._planner.degraded
        return [
            {
                "pod": str(key),
                "address": format_address(address),
                "identity": number,
                "state": "degraded" if key in degraded else "enforced",
                "reason": degraded.get(key, ""),
                **{
                    direction.name.lower(): {
                        "isolated_by": [str(it) for it in self._planner.isolating(number, direction)],
                        "policies": [_title(name) for name, where in subjects[number].items() if direction in where],
                    }
                    for direction in Direction
                },
            }
            for address, (key, number) in sorted(self._planner.subject_pods().items(), key=lambda it: (it[1][0], it[0]))
        ]

    def pod_addresses(self, pod: str) -> list[str] | None:
        """List the addresses of a pod of any node (``namespace/name``); None where no such pod is known."""
        namespace, _, name = pod.partition("/")
        found = self._model.pod(ObjectKey(namespace, name))
        return [format_address(address) for address in found.addresses] if found else None

    def explain(self, subject: int, direction: str, rule: int) -> str:
        """Say in words which rule it was, or who isolates; empty where nobody knows any more."""
        where = Direction[direction.upper()]
        if rule:
            name: RuleName | None = self._planner.rule_name(rule)
            return rule_text(name) if name else ""
        policies = self._planner.isolating(subject, where)
        return isolated_text(policies) if policies else ""

    def _subjects(self) -> dict[int, dict[PolicyName, frozenset[Direction]]]:
        """Find, for each identity of this node's pods, which policies concern it, where, in the order they decide."""
        numbers = {number for _, number in self._planner.subject_pods().values()}
        names = {number: self._planner.identity_name(number) for number in numbers}
        records = sorted(self._model.policies.values(), key=_rank)
        return {number: _concerning(name, records) if name else {} for number, name in names.items()}


def _concerning(name: IdentityName, records: list[Policy]) -> dict[PolicyName, frozenset[Direction]]:
    return {
        (record.kind, record.key): directions
        for record in records
        if subject_of(record).matches(name) and (directions := _directions(record))
    }


def _directions(record: Policy) -> frozenset[Direction]:
    """Say where a policy has a say: a NetworkPolicy also where it has no rule, as it denies."""
    rules = {direction: rules_of(record, direction) for direction in Direction}
    is_network = stage_of(record) == NETWORK
    return frozenset(it for it, found in rules.items() if (found is not None if is_network else found))


def _rank(record: Policy) -> tuple[int, int, ObjectKey]:
    priority = record.priority if isinstance(record, ClusterPolicyRecord) else 0
    return stage_of(record), priority, record.key


def _title(name: PolicyName) -> str:
    return f"{name[0]} {name[1]}"


def _rule(rule: TierRule) -> dict[str, Any]:
    """Describe a rule; of a closed one the action as it is written, and what it comes to in place of what it says."""
    is_closed = rule.written is not None
    return {
        "name": rule.name,
        "action": rule.written if is_closed else action_text(rule.action),
        "peers": [] if is_closed else peers_text(rule.rule),
        "ports": [] if is_closed else ports_text(rule.rule),
        "closed": is_closed,
        "not_understood": rule.unknown,
        "comes_to": rule.comes_to,
    }


def _policy(record: Policy, pods: list[str]) -> dict[str, Any]:
    return {
        "kind": record.kind.value,
        "namespace": record.key.namespace,
        "name": record.key.name,
        "tier": record.tier.value if isinstance(record, ClusterPolicyRecord) else "",
        "priority": record.priority if isinstance(record, ClusterPolicyRecord) else None,
        "subject": _subject(record),
        "directions": sorted(direction.name.lower() for direction in _directions(record)),
        "pods": pods,
        "rules": [
            {
                "rule": rule_text(RuleName(KIND_NAMES[stage_of(record)], record.key, direction, index)),
                "direction": direction.name.lower(),
                "index": index,
                **_rule(rule),
            }
            for direction in Direction
            for index, rule in enumerate(rules_of(record, direction) or ())
        ],
    }


def _subject(record: Policy) -> str:
    if isinstance(record, NetworkPolicyRecord):
        return selector_text(record.subject, "all pods")
    pods, namespaces = selector_text(record.pods, "all pods"), selector_text(record.namespaces, "all namespaces")
    return f"{pods} of {namespaces}"


def _unread(name: PolicyName, fault: Malformed) -> dict[str, Any]:
    kind, key = name
    return {
        "kind": kind.value,
        "namespace": key.namespace,
        "name": key.name,
        "tier": "",
        "priority": None,
        "subject": "",
        "directions": [],
        "pods": [],
        "rules": [],
        "fault": _fault(fault),
        "in_force": Standing.NONE.value,
        "not_understood": [],
        "not_enforced": [],
    }


def _left_out(faults: tuple[Fault, ...]) -> list[str]:
    return [f"{fault.field}: {fault.reason}" for fault in faults]


def _fault(fault: Malformed | None) -> str:
    return f"{fault.field}: {fault.reason}" if fault else ""
