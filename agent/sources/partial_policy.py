"""Read what can be read of a policy that as a whole cannot be: one bad rule is not to open the pods that it is about.

What cannot be read of a NetworkPolicy's rule is left out, a peer or a port by itself, so that the rule allows less and
the pods are isolated all the same. A ClusterNetworkPolicy's rule is closed as a whole, as is one that is not
understood: it accepts nobody, or denies everybody. Whom a policy is about, in which directions, and when it decides has
to be read, else there is nothing to be in force: a direction that is not known to be isolated would be open unsaid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from agent.core.policy_records import ClusterPolicyRecord, NetworkPolicyRecord, Rule, Tier, TierRule
from agent.core.records import Fault, ObjectKey
from agent.sources import convert_policy as convert
from agent.sources import convert_tiers as tiers
from agent.sources.parts import Parts, mapping, read_as, sequence, shaped
from agent.sources.reader import UNREADABLE, explain
from agent.sources.wire_policy import (
    LabelSelector,
    PolicyPeer,
    PolicyPort,
    PolicyType,
    Priority,
    TierSubject,
)

_S = TypeVar("_S")
_T = TypeVar("_T")


def network_policy(key: ObjectKey, value: object) -> tuple[NetworkPolicyRecord, list[Fault]]:
    """Read a NetworkPolicy from builtin values, and say what of it cannot be read. Raises: one of UNREADABLE."""
    spec, parts = _spec(value), _Parts()
    selector = shaped(spec.get("podSelector"), LabelSelector | None, "spec.podSelector")
    has_ingress, has_egress = parts.directions(spec)
    record = NetworkPolicyRecord(
        key,
        convert.selector(selector, "spec.podSelector"),
        parts.rules(spec.get("ingress"), "spec.ingress", "from") if has_ingress else None,
        parts.rules(spec.get("egress"), "spec.egress", "to") if has_egress else None,
        is_partial=True,
    )
    return record, parts.faults


def cluster_policy(key: ObjectKey, value: object) -> tuple[ClusterPolicyRecord, list[Fault]]:
    """Read a ClusterNetworkPolicy likewise. Raises: one of UNREADABLE."""
    spec, parts = _spec(value), _Parts()
    record = ClusterPolicyRecord(
        key,
        shaped(spec.get("tier"), Tier, "spec.tier"),
        shaped(spec.get("priority"), Priority, "spec.priority"),
        *tiers.subject(shaped(spec.get("subject"), TierSubject, "spec.subject"), "spec.subject"),
        parts.tier_rules(spec.get("ingress"), "spec.ingress", "from"),
        parts.tier_rules(spec.get("egress"), "spec.egress", "to"),
        is_partial=True,
    )
    return record, parts.faults


class _Parts(Parts):
    """Reads the parts of policies."""

    def directions(self, spec: Mapping[str, Any]) -> tuple[bool, bool]:
        """Tell whether a NetworkPolicy isolates ingress, and egress. Raises: one of UNREADABLE."""
        said = sequence(spec.get("policyTypes"), "spec.policyTypes")
        if not said:
            return True, spec.get("egress") not in (None, [])
        types = [shaped(it, PolicyType, f"spec.policyTypes[{index}]") for index, it in enumerate(said)]
        return "Ingress" in types, "Egress" in types

    def rules(self, said: object, field: str, peers: str) -> tuple[Rule, ...]:
        """Read the rules of one direction of a NetworkPolicy."""
        found = self.part(sequence, said, field) or []
        return tuple([self._rule(it, f"{field}[{index}]", peers) for index, it in enumerate(found)])

    def _rule(self, said: object, field: str, peers: str) -> Rule:
        rule = self.part(mapping, said, field)
        if rule is None:
            return Rule(peers=())
        return Rule(
            self._each(rule.get(peers), f"{field}.{peers}", PolicyPeer, convert.policy_peer),
            self._each(rule.get("ports"), f"{field}.ports", PolicyPort, convert.policy_port),
        )

    def _each(
        self, said: object, field: str, shape: type[_S], read: Callable[[_S, str], _T | None]
    ) -> tuple[_T, ...] | None:
        """Read those of a list that can be; None, which is all there are, only where none is said."""
        if said is None or said == []:
            return None
        found: dict[_T, None] = {}
        for index, it in enumerate(self.part(sequence, said, field) or []):
            part = self.part(read_as, it, shape, read, f"{field}[{index}]")
            if part is not None:
                found[part] = None
        return tuple(found)

    def tier_rules(self, said: object, field: str, peers: str) -> tuple[TierRule, ...]:
        """Read the rules of one direction of a ClusterNetworkPolicy."""
        found = self.part(sequence, said, field)
        if found is None:
            return (tiers.closed(None),)
        return tuple([self._tier_rule(it, f"{field}[{index}]", peers) for index, it in enumerate(found)])

    def _tier_rule(self, said: object, field: str, peers: str) -> TierRule:
        """Read one rule; of one that is closed, all fields at fault are told, and not the first alone."""
        try:
            return tiers.tier_rule(said, field, peers)
        except UNREADABLE as error:
            first = explain(error)
        parts = Parts()
        for name, shape in tiers.rule_fields(peers):
            if isinstance(said, Mapping) and name in said:
                parts.part(shaped, said[name], shape, f"{field}.{name}")
        self.faults += dict.fromkeys([first, *parts.faults])
        return tiers.closed(said)


def _spec(value: object) -> Mapping[str, Any]:
    return mapping(mapping(value, "").get("spec"), "spec")
