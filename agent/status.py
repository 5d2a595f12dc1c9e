"""The answer to ``ebproxy status``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import agent
from agent.config import Config
from agent.core.abi import Direction
from agent.core.records import Kind
from agent.reconciler import Reconciler

if TYPE_CHECKING:
    from agent.core.policy_model import PolicyModel
    from agent.policy_sync import PolicySync


def read_status(config: Config, reconciler: Reconciler, source: dict[str, Any]) -> dict[str, Any]:
    """Gather it on the reconciler's thread, so that it is of one moment."""
    return reconciler.ask(lambda: _status(config, reconciler, source))


def _status(config: Config, reconciler: Reconciler, source: dict[str, Any]) -> dict[str, Any]:
    model, planner, dataplane = reconciler.model, reconciler.planner, reconciler.dataplane
    placements = [placement for ports in planner.placements.values() for placement in ports]
    sizes, policy = config.map_sizes, reconciler.policy
    models = (model, policy.model) if policy is not None else (model,)
    return {
        "version": agent.__version__,
        "node": config.node_name,
        "node_exists": model.node_exists,
        "is_settled": is_as_desired(reconciler),
        "not_listed": sorted(kind.value for it in models for kind in it.unsynced),
        "pod_cidrs": list(model.node.pod_cidrs),
        "services": len(model.services),
        "service_ports": len(placements),
        "backends": sum(placement.count for placement in placements),
        "degraded": [
            {"service": str(service), "port": str(port), "reason": reason}
            for (service, port), reason in sorted(planner.degraded.items())
        ],
        "malformed": [
            {"kind": kind.value, "name": str(key), "field": fault.field, "reason": fault.reason}
            for it in models
            for (kind, key), fault in sorted(it.malformed.items())
        ]
        + (_left_out(policy.model) if policy is not None else []),
        "socket_lb": config.socket_lb,
        "cgroup": str(dataplane.options.cgroup or ""),
        "layout": dataplane.layout,
        "source": source,
        "maps": {
            "frontends": {"entries": planner.frontend_count, "capacity": sizes.frontends},
            "segments": {"entries": planner.allocator.used, "capacity": sizes.segments},
            "maglev_tables": {"entries": planner.tables.used, "capacity": sizes.maglev_tables},
        },
        "map_writes": dict(dataplane.store.writes),
        **({"policy": _policy(config, policy)} if policy is not None else {}),
    }


def is_as_desired(reconciler: Reconciler) -> bool:
    """Tell whether everything listed is programmed, and fits.

    What cannot be read is told beside it, and changes nothing: nobody could wait for it, and a node is ready without.
    """
    policy = reconciler.policy
    is_degraded = reconciler.planner.degraded or (policy is not None and policy.degraded)
    return reconciler.is_settled.is_set() and not is_degraded


def _left_out(model: PolicyModel) -> list[dict[str, str]]:
    """Say what of policies that are in force is not understood, a line for each field."""
    return [
        {"kind": kind.value, "name": str(key), "field": fault.field, "reason": fault.reason}
        for (kind, key), faults in sorted(model.left_out.items())
        for fault in faults
    ]


def _policy(config: Config, policy: PolicySync) -> dict[str, Any]:
    facts, counts, sizes = policy.facts(), policy.planner.entry_counts, config.map_sizes
    subjects, model = policy.planner.subject_pods().values(), policy.model
    unread = model.unread_policies
    isolated = {key for key, number in subjects if any(policy.planner.isolating(number, it) for it in Direction)}
    return {
        "mode": config.network_policy.value,
        "is_settled": facts.is_settled,
        "revision": facts.revision,
        "identities": facts.identities,
        "policies": len(model.policies.keys() | unread.keys()),
        "unread": len(unread),
        "not_understood": sum(kind is not Kind.POD for kind, _ in model.left_out),
        "rules": facts.rules,
        "pods": model.pod_count,
        "local_pods": len({key for key, _ in subjects}),
        "isolated_pods": len(isolated),
        "subjects": facts.subjects,
        "unplaced_pods": facts.unplaced,
        "degraded": [{"pod": str(key), "reason": reason} for key, reason in sorted(policy.degraded.items())],
        "maps": {name: {"entries": count, "capacity": getattr(sizes, name)} for name, count in counts.items()},
    }
