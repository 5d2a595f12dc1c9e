"""Two pods of one node that speak with each other, in the second for which what is found out about packets holds."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from agent.core.abi import PEER_ANY, Direction
from tests.bpf import packet_path as at
from tests.bpf.packets import End
from tests.bpf.policy_path import ONE, TWO, PolicyPath, fault_of_pass

TRIES = 20
A_TICK_S = 0.02  # the programs' clock is behind by one at most


def in_one_second(policy: PolicyPath, scene: Callable[[], None]) -> None:
    """Play a scene in which a new second would change what is known; again, if one began."""
    for _ in range(TRIES):
        policy.clear()
        began = time.monotonic()
        failed = None
        try:
            scene()
        except AssertionError as error:
            failed = error
        if int(time.monotonic()) == int(began - A_TICK_S):
            if failed:
                raise failed
            return
    pytest.fail("each time another second began")


def both_pods(policy: PolicyPath) -> None:
    """Make subjects of both pods of the node, each of which may speak with the other."""
    policy.subject(at.POD_TWO, TWO, device="two")
    policy.device("two", at.POD_TWO)
    for subject in (ONE, TWO):
        for direction in Direction:
            policy.rule(direction, PEER_ANY, subject=subject)


def ends(family: int) -> tuple[End, End]:
    return End(at.POD_ONE[family], 40_000), End(at.POD_TWO[family], 8080)


def passes(policy: PolicyPath, sent, names: tuple[str, str] = ("one", "two")) -> bool:
    """Whether a packet leaves the first pod and enters the second as it was sent."""
    out, into = names
    return not (fault_of_pass(policy.from_pod(sent, out), sent) or fault_of_pass(policy.to_pod(sent, into), sent))
