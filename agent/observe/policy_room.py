"""What of policies is not in force because a map is full, beyond the pods that the planner calls degraded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agent.core.abi import Direction
from agent.core.enforced import Policy, rules_of
from agent.core.policy_model import PolicyModel
from agent.core.policy_planner import PolicyPlanner
from agent.core.policy_records import Peer
from agent.core.records import ObjectKey
from agent.core.selectors import IdentityName, matcher_of
from agent.observe.policy_text import prefix_text


class Missing:
    """Whom policies mean and the maps do not know, of one moment: blocks, and pods as peers."""

    def __init__(self, model: PolicyModel, planner: PolicyPlanner) -> None:
        degraded = planner.degraded
        self._blocks = {key.name: reason for key, reason in degraded.items() if model.pod(key) is None}
        self._pods = _without_identity(model, planner, degraded) if degraded else {}

    def of(self, policy: Policy) -> list[str]:
        """Say what a policy means that the maps have no room for, and which map that is."""
        return list(dict.fromkeys(self._of(policy))) if self._blocks or self._pods else []

    def _of(self, policy: Policy) -> Iterator[str]:
        for direction in Direction:
            for rule in rules_of(policy, direction) or ():
                for peer in rule.rule.peers or ():
                    yield from self._of_block(peer) if peer.block else self._of_pods(peer, policy.key.namespace)

    def _of_block(self, peer: Peer) -> Iterator[str]:
        assert peer.block is not None  # noqa: S101 - the caller asks of those alone
        for text in map(prefix_text, (peer.block.prefix, *peer.block.excepts)):
            if text in self._blocks:
                yield f"block {text}: {self._blocks[text]}"

    def _of_pods(self, peer: Peer, namespace: str) -> Iterator[str]:
        matcher = matcher_of(peer, namespace)
        if found := next((it for name, it in self._pods.items() if matcher.matches(name)), None):
            key, reason = found
            yield f"pod {key}, perhaps others: {reason}"


def _without_identity(
    model: PolicyModel, planner: PolicyPlanner, degraded: Mapping[ObjectKey, str]
) -> dict[IdentityName, tuple[ObjectKey, str]]:
    """Find the pods that are taken for the world, one of each that selectors may tell apart."""
    known = planner.desired().identities
    found: dict[IdentityName, tuple[ObjectKey, str]] = {}
    for key, reason in sorted(degraded.items()):
        pod = model.pod(key)
        if pod is not None and not known.keys() >= set(pod.addresses):
            labels = model.namespace_labels(key.namespace)
            name = IdentityName(namespace=key.namespace, namespace_labels=labels, labels=pod.labels, ports=pod.ports)
            found.setdefault(name, (key, reason))
    return found
