"""A planner and the maps it plans for, whose every plan is applied under the invariant's eye."""

from __future__ import annotations

from collections.abc import Sequence

from agent.core.abi import Frontend
from agent.core.plan import Plan
from agent.core.planner import Planner
from agent.core.segments import REST_S
from agent.core.services import DesiredPort
from tests.builders import endpoint_text, frontend, key, pods
from tests.property.fake_maps import REFUSED, SILENT, FakeMaps, apply_watched

WEB, API = "web", "api"
A, B, C, D, E = pods(5)
F80, F81 = frontend(port=80), frontend(port=81)
OLD, NEW = "2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z"
Setting = tuple[str, Sequence[DesiredPort]] | tuple[str, Sequence[DesiredPort], str]


class Node:
    """A planner and the maps it plans for."""

    def __init__(
        self, segment_slots: int = 64, frontend_limit: int = 16, source_range_limit: int = 16, table_limit: int = 4
    ) -> None:
        self.table_limit = table_limit
        self.maps = FakeMaps(segment_slots, frontend_limit, source_range_limit)
        self.now = 0.0
        self.restart()

    def restart(self) -> None:
        """Start a new planner from what the maps hold."""
        self.planner = Planner(
            len(self.maps.segments),
            self.maps.frontend_limit,
            self.maps.read_state(),
            source_range_limit=self.maps.source_range_limit,
            table_limit=self.table_limit,
        )

    def plan(self, *settings: Setting, leftovers: bool = False) -> Plan:
        """Plan Services in the order given, then those whose turn has come; (name, ports, created)."""
        plan = Plan()
        for name, wants, *created in settings:
            self.planner.plan_service(key(name), "".join(created), wants, plan)
        if leftovers:
            self.planner.plan_leftovers(plan)
        return plan

    def apply(self, plan: Plan) -> Plan:
        apply_watched(self.maps, plan)
        for base, size in plan.freed:
            self.planner.allocator.rest(base, size, self.now)
        for number in plan.freed_tables:
            self.planner.tables.rest(number, self.now)
        return plan

    def set(self, *settings: Setting, leftovers: bool = False) -> Plan:
        """Plan and apply."""
        return self.apply(self.plan(*settings, leftovers=leftovers))

    def rest(self) -> None:
        """Let freed segments and tables rest until they can be used again."""
        self.now += REST_S
        self.planner.wake(self.now)

    def backends(self, at: bytes = F80) -> str:
        """What clients of a frontend get."""
        answer = self.maps.answer(at)
        names = {None: "PASS", REFUSED: "REFUSED", SILENT: "SILENT"}
        return names.get(answer) or " ".join(sorted(endpoint_text(slot) for slot in answer.backends))

    def degraded(self) -> list[str]:
        return sorted(service.name for service, _ in self.planner.degraded)

    def base(self, at: bytes = F80) -> int:
        return Frontend.unpack(self.maps.frontends[at]).inside

    def ident(self, at: bytes = F80) -> int:
        return Frontend.unpack(self.maps.frontends[at]).service


def shown(*backends: bytes) -> str:
    return " ".join(sorted(map(endpoint_text, backends)))


def written(plan: Plan) -> tuple[int, int, int, int]:
    """Slots of backends, headers, frontends written and frontends removed."""
    return (
        sum(len(slots) // 24 for _, slots in plan.backends),
        len(plan.headers),
        len(plan.frontends),
        len(plan.removed_frontends),
    )
