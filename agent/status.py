"""The answer to ``ebproxy status``."""

from __future__ import annotations

from typing import Any

import agent
from agent.config import Config
from agent.reconciler import Reconciler


def read_status(config: Config, reconciler: Reconciler, source: dict[str, Any]) -> dict[str, Any]:
    """Gather it on the reconciler's thread, so that it is of one moment."""
    return reconciler.ask(lambda: _status(config, reconciler, source))


def _status(config: Config, reconciler: Reconciler, source: dict[str, Any]) -> dict[str, Any]:
    model, planner, dataplane = reconciler.model, reconciler.planner, reconciler.dataplane
    placements = [placement for ports in planner.placements.values() for placement in ports]
    sizes = config.map_sizes
    return {
        "version": agent.__version__,
        "node": config.node_name,
        "node_exists": model.node_exists,
        "is_settled": reconciler.is_settled.is_set() and not planner.degraded and not model.incomplete,
        "not_listed": sorted(kind.value for kind in model.unsynced | model.incomplete),
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
            for (kind, key), fault in sorted(model.malformed.items())
        ],
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
    }
