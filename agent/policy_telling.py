"""What the agent tells of policy: flows, as the programs tell them, and answers; imported only where policy is on."""

from __future__ import annotations

import threading

from agent.kernel.events import EventReader
from agent.kernel.maps import MapStore
from agent.observe.flow_log import FlowLog
from agent.observe.flows import FlowNamer, PolicyNames
from agent.observe.policy_answers import policy_answers
from agent.observe.policy_views import PolicyViews
from agent.policy_sync import PolicySync
from agent.reconciler import Reconciler


class PolicyTelling:
    """Reads events and answers questions. ``answers`` are for the control socket."""

    def __init__(self, policy: PolicySync, reconciler: Reconciler, store: MapStore, can_name: threading.Event) -> None:
        """``can_name``: set once identities and rules have names. Raises: DataplaneError."""
        namer = FlowNamer(PolicyNames(policy.model, lambda: policy.planner))
        self._flows = FlowLog(namer, has_begun=can_name.is_set)
        self._reader = EventReader(store.maps["events"], store.maps["policy_counters"], self._flows.take, can_name)
        self.answers = policy_answers(lambda: PolicyViews(policy.model, policy.planner), reconciler.ask, self._flows)

    def start(self) -> None:
        """Start to read."""
        self._reader.start()

    def stop(self) -> None:
        """Stop, and let go who follows."""
        self._reader.stop()
        self._flows.close()
