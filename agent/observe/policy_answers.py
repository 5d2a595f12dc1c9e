"""The questions about policy that commands ask the agent, and what they get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from agent.observe.control import Answer
from agent.observe.flow_log import FlowFilter, FlowLog
from agent.observe.policy_views import PolicyViews


def policy_answers(
    views: Callable[[], PolicyViews], ask_owner: Callable[[Callable[[], Any]], Any], flows: FlowLog
) -> Mapping[str, Answer]:
    """Answer from the model; ``ask_owner`` calls what it is given on the thread that owns that."""
    return {
        "policies": lambda: ask_owner(lambda: views().policies()),
        "identities": lambda: ask_owner(lambda: views().identities()),
        "endpoints": lambda: ask_owner(lambda: views().endpoints()),
        "pod_addresses": lambda pod: ask_owner(lambda: views().pod_addresses(pod)),
        "explain": lambda **which: ask_owner(lambda: views().explain(**which)),
        "flows": _flows_of(flows),
    }


def _flows_of(flows: FlowLog) -> Answer:
    def answer(*, follow: bool = False, history: bool = True, **wanted: Any) -> Iterator[dict[str, Any] | None]:
        return flows.read(FlowFilter(**wanted), follow=follow, history=history)

    return answer
