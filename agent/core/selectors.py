"""Who is meant: label selectors, blocks of addresses, and the identities they are matched against.

Source: meta/v1 LabelSelector; networking.k8s.io/v1 NetworkPolicyPeer, IPBlock.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from agent.core.addresses import AddressRange
from agent.core.policy_records import (
    EVERYTHING,
    IpBlock,
    Labels,
    NamedPort,
    Operator,
    Peer,
    Prefix,
    Requirement,
    Selector,
)

Token = tuple[str, ...]
"""Something that an identity has, by which the selectors that may match it are found, and it by them."""


class IdentityName(msgspec.Struct, frozen=True, cache_hash=True, gc=False):
    """What makes an identity, of all that a pod or an address has only what some policy looks at.

    ``namespace`` is empty where no policy lives in the pod's; ``block`` is the longest that holds the address. What is
    no pod has its block alone.
    """

    is_pod: bool = True
    namespace: str = ""
    namespace_labels: Labels = ()
    labels: Labels = ()
    ports: tuple[NamedPort, ...] = ()
    block: Prefix | None = None


WORLD = IdentityName(is_pod=False)


class Matcher(msgspec.Struct, frozen=True, cache_hash=True, gc=False):
    """Whom a peer or the subject of a policy means; each condition that is None holds of everybody.

    ``namespace`` is that of the policy itself. ``port``: only pods that have a port of this name.
    """

    namespace: str | None = None
    namespaces: Selector | None = None
    pods: Selector | None = None
    block: IpBlock | None = None
    port: str = ""

    def matches(self, name: IdentityName) -> bool:
        """Tell whether an identity is meant; a block means pods as well."""
        if self.block is not None:
            return name.block is not None and in_block(name.block, self.block)
        if not name.is_pod or (self.port and all(self.port != port.name for port in name.ports)):
            return False
        if self.namespace is not None and (not self.namespace or self.namespace != name.namespace):
            return False
        return selects(self.namespaces, name.namespace_labels) and selects(self.pods, name.labels)

    def tokens(self) -> tuple[Token, ...]:
        """Choose tokens of which every identity that is meant has one; the fewer have them, the better."""
        if self.block is not None:
            return (("block",),)
        best = min(_alternatives("label", self.pods), key=len, default=None)
        if best is None and self.namespace is not None:
            best = (("namespace", self.namespace),)
        if best is None:
            best = min(_alternatives("namespace label", self.namespaces), key=len, default=None)
        return (("pod",),) if best is None else best


def tokens_of(name: IdentityName) -> list[Token]:
    """List the tokens that an identity has."""
    tokens: list[Token] = []
    if name.block is not None:
        tokens.append(("block",))
    if name.is_pod:
        tokens += [("pod",), ("namespace", name.namespace)]
        tokens += [("label", *label) for label in name.labels]
        tokens += [("namespace label", *label) for label in name.namespace_labels]
    return tokens


def _alternatives(scope: str, selector: Selector | None) -> list[tuple[Token, ...]]:
    requirements = selector.requirements if selector else ()
    return [
        tuple((scope, requirement.key, value) for value in sorted(requirement.values))
        for requirement in requirements
        if requirement.operator is Operator.IN
    ]


def matcher_of(peer: Peer, namespace: str) -> Matcher:
    """Say whom a peer of a policy means, that lives in a namespace; a cluster's lives in none."""
    if peer.block is not None:
        return Matcher(block=peer.block)
    own = namespace if peer.namespaces is None else None
    return Matcher(own, _unless_everything(peer.namespaces), _unless_everything(peer.pods))


def _unless_everything(selector: Selector | None) -> Selector | None:
    return None if selector == EVERYTHING else selector


def selects(selector: Selector | None, labels: Labels) -> bool:
    """Tell whether labels meet all conditions."""
    if selector is None or not selector.requirements:
        return True
    by_key = dict(labels)
    return all(holds(requirement, by_key) for requirement in selector.requirements)


def holds(requirement: Requirement, labels: Mapping[str, str]) -> bool:
    """Tell whether labels meet a condition; without the label, NOT_IN holds and IN does not."""
    value = labels.get(requirement.key)
    match requirement.operator:
        case Operator.IN:
            return value is not None and value in requirement.values
        case Operator.NOT_IN:
            return value is None or value not in requirement.values
        case Operator.EXISTS:
            return value is not None
        case Operator.DOES_NOT_EXIST:
            return value is None


def is_within(inner: Prefix, outer: Prefix) -> bool:
    """Tell whether a range of addresses lies within another of its family."""
    return inner.bits >= outer.bits and AddressRange(*outer).contains(inner.address)


def in_block(prefix: Prefix, block: IpBlock) -> bool:
    """Tell whether a range is in a block; it lies within each of the block's ranges, or outside."""
    return is_within(prefix, block.prefix) and not any(is_within(prefix, hole) for hole in block.excepts)
