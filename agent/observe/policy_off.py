"""What commands that ask about policy get where it is off; apart, so that nothing of policy is held there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from agent.errors import EbproxyError
from agent.observe.control import Answer

QUESTIONS = ("policies", "identities", "endpoints", "pod_addresses", "explain", "flows")
OFF = (
    "policy is not enforced on this node, so there is nothing to tell; "
    "set networkPolicy: standard (or strict) in the agent's configuration and start it again"
)


def answers_without_policy() -> Mapping[str, Answer]:
    """Say of each question what to do."""
    return dict.fromkeys(QUESTIONS, _refuse)


def _refuse(**_: Any) -> NoReturn:
    raise EbproxyError(OFF)
