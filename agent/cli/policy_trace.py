"""What policy makes of a traced connection: the verdict for both of its ends, whichever backend it goes to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from agent.cli.decision import Client, Outcome
from agent.cli.policy_decision import DENY, HELD, NOT_ENFORCED, Answer, Connection, PolicyMaps, explainer
from agent.core.abi import Direction, FrontendKey
from agent.core.addresses import format_endpoint, parse_address
from agent.errors import AgentUnreachable, EbproxyError
from agent.kernel.maps import MapStore
from agent.observe.control import ask
from agent.observe.facts import Facts

VARIES = "varies"
_NOWHERE = Answer("allow", "not asked: the connection goes to no backend")
_BOTH = (Direction.EGRESS, Direction.INGRESS)


class Judged(NamedTuple):
    """What became of an outcome, and policy's verdicts by direction, as they are printed."""

    outcome: Outcome
    policy: dict[str, dict[str, str]]


class PolicyTrace:
    """Judges connections of one node."""

    def __init__(self, store: MapStore, state_dir: Path, facts: Facts) -> None:
        self._maps = PolicyMaps(store, explainer(state_dir))
        self._is_on = is_enforced(facts)

    def judge(self, outcome: Outcome, target: FrontendKey, client: Client) -> Judged:
        """Judge every candidate; what policy keeps from all of them goes nowhere."""
        if not self._is_on:
            return _judged(outcome, dict.fromkeys(_BOTH, NOT_ENFORCED))
        if outcome.verdict not in ("forward", "pass"):
            return _judged(outcome, dict.fromkeys(_BOTH, _NOWHERE))
        ends = outcome.backends or (format_endpoint(target.address, target.port),)
        answers = {end: self._both(_parse(end), target.protocol, client) for end in ends}
        verdicts = {side: _combined({end: found[side] for end, found in answers.items()}) for side in _BOTH}
        denied = {end for end, found in answers.items() if DENY in {answer.verdict for answer in found.values()}}
        if len(denied) == len(ends):
            outcome = self._denied(outcome, verdicts)
        elif denied:
            outcome = replace(outcome, reason=f"{outcome.reason}; policy denies {len(denied)} of {len(ends)}")
        return _judged(outcome, verdicts)

    def _both(self, backend: tuple[bytes, int], protocol: int, client: Client) -> dict[Direction, Answer]:
        address, port = backend
        return {side: self._maps.judge(Connection(client.address, address, protocol, port), side) for side in _BOTH}

    def _denied(self, outcome: Outcome, verdicts: dict[Direction, Answer]) -> Outcome:
        side = next((side for side in _BOTH if verdicts[side].verdict == DENY), None)
        if side is None:  # some by the one, the others by the other
            return replace(outcome, verdict="drop", reason="policy denies every backend", source_nat=False)
        is_told = side is Direction.EGRESS and verdicts[side] != HELD and self._maps.refuses
        reason = f"policy denies the {side.name.lower()}: {verdicts[side].by}"
        return replace(outcome, verdict="reject" if is_told else "drop", reason=reason, source_nat=False)


def is_enforced(facts: Facts) -> bool:
    """Tell whether policy is on, of the agent that runs or ran last."""
    return facts.network_policy != "off"


def address_of_pod(state_dir: Path, pod: str, facts: Facts, *, is_ipv4: bool) -> bytes | None:
    """Ask the agent for a pod's address of a family; None where there is no need to.

    Raises: AgentUnreachable; EbproxyError, where there is no such pod, or it has no such address.
    """
    if not is_enforced(facts):
        return None
    try:
        found: list[str] | None = ask(state_dir, "pod_addresses", pod=pod)
    except AgentUnreachable as error:
        remedy = "give its address, `--from ADDRESS`, or start the agent (`ebproxy run`)"
        raise AgentUnreachable(f"pod {pod} is not looked up, because no agent answers: {remedy}") from error
    if found is None:
        message = f"pod {pod} is not known; `ebproxy endpoint list` shows those of this node"
        raise EbproxyError(message)
    addresses = [parse_address(text) for text in found if (":" not in text) == is_ipv4]
    if not addresses:
        reason = "it has none yet, has ended, or uses its node's network (then `--from host` on that node)"
        raise EbproxyError(f"pod {pod} has no IPv{4 if is_ipv4 else 6} address: {reason}")
    return addresses[0]


def _combined(answers: dict[str, Answer]) -> Answer:
    """Make one answer of those for every backend."""
    first, *others = dict.fromkeys(answers.values())
    if not others:
        return first
    verdicts = {answer.verdict for answer in answers.values()}
    by = "; ".join(f"{end}: {answer.verdict}: {answer.by}" for end, answer in answers.items())
    return Answer(verdicts.pop() if len(verdicts) == 1 else VARIES, by)


def _judged(outcome: Outcome, verdicts: dict[Direction, Answer]) -> Judged:
    return Judged(outcome, {side.name.lower(): verdicts[side]._asdict() for side in _BOTH})


def _parse(end: str) -> tuple[bytes, int]:
    host, _, port = end.rpartition(":")
    return parse_address(host.strip("[]")), int(port)
