"""What policy does with a new connection: the programs' own steps, through the maps that the kernel is using."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from agent.core.abi import (
    ADDRESS_RANGE,
    PEER_ANY,
    PEER_WORLD,
    POD_RANGE_OWN,
    POLICY_ENTRY,
    POLICY_KEY,
    POLICY_PORT_BITS,
    POLICY_STATE,
    SUBJECT,
    U32,
    Direction,
    SubjectFlag,
    port_bytes,
)
from agent.errors import AgentUnreachable
from agent.kernel.maps import MapStore
from agent.observe.control import ask
from agent.observe.numbers import read_numbers
from agent.observe.policy_text import rule_text

ALLOW, DENY, UNKNOWN = "allow", "deny", "unknown"
_WHOLE = 128
_FLAGS = {Direction.INGRESS: SubjectFlag.INGRESS, Direction.EGRESS: SubjectFlag.EGRESS}


class Answer(NamedTuple):
    """A verdict, and who gave it in words."""

    verdict: str
    by: str


NOT_ENFORCED = Answer(ALLOW, "NetworkPolicy is not enforced")
_NO_POD = Answer(ALLOW, "no pod: policy is not asked")
_ELSEWHERE = Answer(UNKNOWN, "a pod of another node, which decides by itself: trace there")
_ITSELF = Answer(ALLOW, "a pod may always reach itself")
_OWN_NODE = Answer(ALLOW, "from the pod's own node, which may always")
HELD = Answer(DENY, "held: the pod is no subject yet (networkPolicy: strict), or has no room (mapSizes.subjects)")
"""Dropped for what it is, before policy is asked: nobody is told, whatever ``policyAnswer`` is."""


@dataclass(frozen=True, slots=True)
class Connection:
    """Between whom, behind translation: 16-byte addresses, and the port and protocol of who is asked.

    ``client`` of None is the node itself.
    """

    client: bytes | None
    backend: bytes
    protocol: int
    port: int


class PolicyMaps:
    """The maps of policy, as the programs ask them. ``explain`` names a rule, or who isolates."""

    def __init__(self, store: MapStore, explain: Callable[[int, Direction, int], str]) -> None:
        self._maps = store.maps
        self._explain = explain

    @property
    def refuses(self) -> bool:
        """Whether a pod is told what policy denies it, rather than left waiting."""
        value = self._maps["policy_states"].lookup(bytes(4))
        return bool(value and POLICY_STATE.packer.unpack(value)[3])

    def judge(self, connection: Connection, direction: Direction) -> Answer:
        """Give the verdict for one end of a new connection: egress of the client, ingress of the backend."""
        own, peer = connection.client, connection.backend
        if direction is Direction.INGRESS:
            own, peer = peer, own
        value = self._maps["subjects"].lookup(own) if own else None
        if own is None or value is None:
            return self._not_subject(own)
        number, flags, *_ = SUBJECT.packer.unpack(value)
        if not flags & _FLAGS[direction]:
            return Answer(ALLOW, f"no policy is about the pod's {direction.name.lower()}")
        if own == peer:
            return _ITSELF
        if peer is None or (direction is Direction.INGRESS and self._is_own(peer)):
            return _OWN_NODE
        if flags & (SubjectFlag.FAIL_CLOSED | SubjectFlag.FAIL_OPEN):
            verdict = DENY if flags & SubjectFlag.FAIL_CLOSED else ALLOW
            return Answer(verdict, "the pod's policy does not fit in the map (policyOverflow)")
        return self._ask(number, self._identity(peer), direction, connection)

    def _not_subject(self, address: bytes | None) -> Answer:
        if address is None or self._is_own(address):
            return _NO_POD
        if self._is_strict and self._is_of_this_node(address):
            return HELD
        return _ELSEWHERE if self._maps["identities"].lookup(address) is not None else _NO_POD

    def _ask(self, subject: int, peer: int, direction: Direction, connection: Connection) -> Answer:
        for number in (peer, PEER_ANY):
            where = direction, connection.protocol, port_bytes(connection.port)
            value = self._maps["policy"].lookup(POLICY_KEY.packer.pack(POLICY_PORT_BITS, subject, number, *where))
            if value is not None:
                rule, allowed = POLICY_ENTRY.packer.unpack(value)
                break
        else:
            rule, allowed = 0, 0
        if allowed and not rule:
            return Answer(ALLOW, f"no rule decides, and no NetworkPolicy isolates the pod's {direction.name.lower()}")
        return Answer(ALLOW if allowed else DENY, self._explain(subject, direction, rule))

    def _identity(self, address: bytes) -> int:
        value = self._maps["identities"].lookup(address)
        if value is None:
            value = self._maps["blocks"].lookup(ADDRESS_RANGE.packer.pack(_WHOLE, address))
        return int(U32.packer.unpack(value)[0]) if value else PEER_WORLD

    def _is_own(self, address: bytes) -> bool:
        return self._maps["node_addresses"].lookup(address) is not None

    @property
    def _is_strict(self) -> bool:
        value = self._maps["policy_states"].lookup(bytes(4))
        return bool(value and POLICY_STATE.packer.unpack(value)[2])

    def _is_of_this_node(self, address: bytes) -> bool:
        value = self._maps["pod_ranges"].lookup(ADDRESS_RANGE.packer.pack(_WHOLE, address))
        return bool(value and U32.packer.unpack(value)[0] & POD_RANGE_OWN)


def explainer(state_dir: Path) -> Callable[[int, Direction, int], str]:
    """Name rules by what the agent knows; by what it wrote down, where none answers: rules, but not who isolates."""

    def explain(subject: int, direction: Direction, rule: int) -> str:
        try:
            said = ask(state_dir, "explain", subject=subject, direction=direction.name.lower(), rule=rule)
        except AgentUnreachable:
            said = ""
            if rule and (name := read_numbers(state_dir).rules.get(rule)):
                said = rule_text(name)
        if said:
            return str(said)
        return (
            f"rule {rule}, which nobody can name"
            if rule
            else "no rule allows it; which policies isolate, only the agent knows"
        )

    return explain
