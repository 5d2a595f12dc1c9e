"""What policy did with a connection, with names: a programs' event becomes a flow.

Events carry numbers and addresses, which mean something else tomorrow: they are named when they come in.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from agent.core.abi import FLOW_EVENT, TUPLE, Direction, Reason
from agent.core.addresses import format_address
from agent.core.enforced import rules_of, stage_of
from agent.core.policy import KIND_NAMES, RuleName
from agent.core.policy_model import PolicyModel
from agent.core.policy_planner import PolicyPlanner
from agent.core.records import Kind, ObjectKey, Protocol
from agent.core.selectors import IdentityName
from agent.observe.policy_text import identity_document, isolated_text, rule_text

DROPPED, FORWARDED = "dropped", "forwarded"
VERDICTS = (DROPPED, FORWARDED)
_SECOND_NS = 1_000_000_000
_TCP_FLAGS = {0x01: "FIN", 0x02: "SYN", 0x04: "RST", 0x10: "ACK"}
_PROTOCOLS = {1: "ICMP", 58: "ICMPv6", **{int(protocol): protocol.name for protocol in Protocol}}
_WHY = {
    Reason.SPOOFED: "the source is not an address of the pod behind this device",
    Reason.HELD: "the pod's policy has not been applied yet, or there is no room for the pod",
    Reason.OVERFLOW: "the pod's policy does not fit in the map",
    Reason.UNREADABLE: "its headers contradict themselves",
    Reason.UNTRACKED: "the connection could not be entered in the connections map",
}


class FlowEvent(NamedTuple):
    """A ``struct flow_event``. ``time_ns`` is of the monotonic clock."""

    time_ns: int
    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    protocol: int
    subject: int
    peer: int
    rule: int
    device: int
    is_allowed: bool
    direction: Direction
    reason: Reason
    flags: int

    @classmethod
    def unpack(cls, raw: bytes) -> FlowEvent:
        """Read it. Raises: ValueError, struct.error where no program of this layout wrote it."""
        at, ends, subject, peer, rule, device, allowed, direction, reason, flags, _ = FLOW_EVENT.packer.unpack(raw)
        source, destination, source_port, destination_port, protocol, _ = TUPLE.packer.unpack(ends)
        ports = int.from_bytes(source_port, "big"), int.from_bytes(destination_port, "big")
        who = subject, peer, rule, device
        return cls(
            at, source, destination, *ports, protocol, *who, bool(allowed), Direction(direction), Reason(reason), flags
        )


class End(msgspec.Struct, frozen=True, gc=False):
    """One end of a flow; ``pod`` and ``name`` are None where it is no pod that is known, or the number no longer."""

    address: bytes
    port: int
    identity: int = 0
    pod: ObjectKey | None = None
    name: IdentityName | None = None


class Flow(msgspec.Struct, frozen=True, gc=False):
    """What was told. ``time_ns`` is since 1970; ``isolated_by`` only of what no rule allows.

    ``rule`` is None where none decided, or the one that did (``rule_number``) is no more. ``device`` is empty unless
    it is what tells who sent it.
    """

    time_ns: int
    source: End
    destination: End
    protocol: int
    flags: int
    direction: Direction
    is_allowed: bool
    reason: Reason
    rule_number: int = 0
    rule: RuleName | None = None
    rule_name: str = ""
    """What the rule is called in its policy; empty where it has no name of its own."""
    isolated_by: tuple[ObjectKey, ...] = ()
    device: str = ""

    @property
    def verdict(self) -> str:
        """Name it as filters do."""
        return FORWARDED if self.is_allowed else DROPPED

    @property
    def why(self) -> str:
        """Say what decided."""
        if self.reason is not Reason.POLICY:
            return _WHY[self.reason]
        if self.rule is not None:
            return rule_text(self.rule, self.rule_name)
        if self.rule_number:
            return "a rule that is no more"
        return "no policy is against it" if self.is_allowed else isolated_text(self.isolated_by)


class PolicyNames:
    """Names what the dataplane numbers.

    Asked from other threads than the one that owns model and planner: each answer is a few lookups in dictionaries,
    and may be of a moment before or after a change, as the event is.
    """

    def __init__(self, model: PolicyModel, planner: Callable[[], PolicyPlanner]) -> None:
        """``planner``: the one in use; another takes its place when a write has failed."""
        self._model = model
        self._planner = planner

    def end(self, address: bytes, port: int, identity: int = 0) -> End:
        """Name one end; ``identity`` 0: by what the address has now."""
        planner = self._planner()
        pod = self._model.owner(address)
        number = identity or planner.identity_of(address)
        return End(address, port, number, pod.key if pod else None, planner.identity_name(number))

    def is_known_as(self, address: bytes, identity: int) -> bool:
        """Tell whether an address has an identity."""
        return self._planner().identity_of(address) == identity

    def rule(self, number: int) -> RuleName | None:
        """Name a rule."""
        return self._planner().rule_name(number) if number else None

    def own_name(self, rule: RuleName | None) -> str:
        """Look up what a rule is called in its policy; empty where that has no name for it."""
        # A NetworkPolicy's rules have none.
        record = self._model.policies.get((Kind.CLUSTER_NETWORK_POLICY, rule.policy)) if rule else None
        if rule is None or record is None or KIND_NAMES[stage_of(record)] != rule.kind:
            return ""
        rules = rules_of(record, rule.direction) or ()
        return rules[rule.index].name if rule.index < len(rules) else ""

    def isolating(self, subject: int, direction: Direction) -> tuple[ObjectKey, ...]:
        """Name the NetworkPolicies that isolate a subject."""
        return self._planner().isolating(subject, direction)


class FlowNamer:
    """Makes flows of events. ``clock`` and ``monotonic`` in nanoseconds."""

    def __init__(
        self,
        names: PolicyNames,
        clock: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._names = names
        self._clock = clock
        self._monotonic = monotonic

    def name(self, event: FlowEvent) -> Flow:
        """Name both ends and what decided."""
        subject_sent = self._subject_sent(event)
        numbers = (event.subject, event.peer) if subject_sent else (event.peer, event.subject)
        rule = self._names.rule(event.rule)
        is_denied = not event.is_allowed and event.reason is Reason.POLICY and not event.rule
        return Flow(
            time_ns=self._clock() - self._monotonic() + event.time_ns,
            source=self._names.end(event.source, event.source_port, numbers[0]),
            destination=self._names.end(event.destination, event.destination_port, numbers[1]),
            protocol=event.protocol,
            flags=event.flags,
            direction=event.direction,
            is_allowed=event.is_allowed,
            reason=event.reason,
            rule_number=event.rule,
            rule=rule,
            rule_name=self._names.own_name(rule),
            isolated_by=self._names.isolating(event.subject, event.direction) if is_denied else (),
            device=_device(event.device) if event.reason in (Reason.SPOOFED, Reason.HELD, Reason.UNREADABLE) else "",
        )

    def _subject_sent(self, event: FlowEvent) -> bool:
        """Tell whether the packet was the subject's: what goes out by its direction, unless it was an answer."""
        outward = event.direction is Direction.EGRESS
        own, other = (event.source, event.destination) if outward else (event.destination, event.source)
        is_answer = not self._names.is_known_as(own, event.subject) and self._names.is_known_as(other, event.subject)
        return outward != (bool(event.subject) and is_answer)


def _device(ifindex: int) -> str:
    with contextlib.suppress(OSError):
        return socket.if_indextoname(ifindex)
    return str(ifindex)  # it went away since


def time_text(time_ns: int) -> str:
    """Write a time as RFC 3339 does, to the microsecond."""
    seconds, rest_ns = divmod(time_ns, _SECOND_NS)
    at = dt.datetime.fromtimestamp(seconds, dt.UTC).replace(microsecond=rest_ns // 1000)
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def flow_document(flow: Flow) -> dict[str, Any]:
    """Write a flow for ``-o json``."""
    rule = flow.rule
    return {
        "time": time_text(flow.time_ns),
        "verdict": flow.verdict,
        "direction": flow.direction.name.lower(),
        "protocol": _PROTOCOLS.get(flow.protocol, str(flow.protocol)),
        "source": _end_document(flow.source),
        "destination": _end_document(flow.destination),
        "tcp_flags": [name for bit, name in _TCP_FLAGS.items() if flow.flags & bit],
        "reason": flow.reason.name.lower(),
        "why": flow.why,
        "policy": rule
        and {
            "kind": rule.kind,
            "namespace": rule.policy.namespace,
            "name": rule.policy.name,
            "rule": rule.index,
            "rule_name": flow.rule_name,
        },
        "isolated_by": [str(policy) for policy in flow.isolated_by],
        "device": flow.device,
    }


def _end_document(end: End) -> dict[str, Any]:
    return {
        "address": format_address(end.address),
        "port": end.port,
        "namespace": end.pod.namespace if end.pod else "",
        "pod": end.pod.name if end.pod else "",
        "identity": end.identity,
        "labels": identity_document(end.name) if end.name else None,
    }
