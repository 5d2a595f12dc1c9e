"""Where segments lie: those that a former agent left, and how many fit."""

from __future__ import annotations

import random

import pytest

from agent.core.abi import MapSizes
from agent.core.plan import KernelState, Placement, Plan, Segment, split_slots
from agent.core.planner import Planner
from agent.core.segments import REST_S
from agent.core.services import DesiredPort
from tests.builders import frontend, key, pods, want
from tests.unit.planned_node import Node, shown

# Bases, and how many endpoints stand behind each.
FOUND = [
    pytest.param([2, 14, 26], [10, 10, 10], id="side-by-side"),
    pytest.param([16, 32, 48], [10, 10, 10], id="in-blocks-of-a-power-of-two"),
    pytest.param([16, 32, 40, 48], [11, 7, 5, 15], id="as-many-as-such-blocks-hold"),
    pytest.param([2, 14, 26], [7, 2, 4], id="some-have-gone"),
    pytest.param([3, 6, 19], [1, 10, 6], id="on-odd-slots"),
    pytest.param([52], [10], id="at-the-end"),
]


def service(number: int, endpoints: int) -> tuple[str, list[DesiredPort]]:
    """A Service with a port and endpoints of its own."""
    return f"s{number}", [want(pods(endpoints, start=1 + 100 * number), at=at(number))]


def at(number: int) -> bytes:
    return frontend(port=100 + number)


def leave(node: Node, base: int, number: int, endpoints: int) -> None:
    """Write what a former agent had planned for a Service."""
    name, (port,) = service(number, endpoints)
    segment = Segment(base, slots=b"".join(port.cluster.slots))
    placement = Placement(key(name), port.port, number + 1, "", segment, frontends=port.frontends, roles=port.roles)
    node.maps.frontends.update(placement.entries())
    node.maps.segments[base : base + 1 + endpoints] = [segment.header, *split_slots(segment.slots)]


@pytest.mark.parametrize(("bases", "endpoints"), FOUND)
def test_what_a_former_agent_left_is_adopted_where_it_is_and_nothing_else_is_put_there(bases, endpoints):
    """Also where that agent's blocks had other sizes, and where endpoints went after the block was taken."""
    node = Node(frontend_limit=64)
    services = {number: service(number, count) for number, count in enumerate(endpoints)}
    for number, base in enumerate(bases):
        leave(node, base, number, endpoints[number])
    node.restart()

    assert not node.plan(*services.values(), leftovers=True)
    late = len(bases)
    while not node.degraded():
        node.set(service(late, 1))
        late += 1
    assert [node.base(at(number)) for number in services] == bases
    for number, (_, (port,)) in services.items():
        assert node.backends(at(number)) == shown(*port.cluster.slots)


def test_the_default_has_room_for_every_service_to_be_rolled():
    """10,000 Services of 10 endpoints, each of which has 13 for a while, a few hundred at a time, in any order."""
    sizes = MapSizes()
    planner = Planner(sizes.segments, sizes.frontends, KernelState({}, {}))
    numbers = list(range(10_000))

    def settle(now: float, endpoints: int, some: list[int]) -> None:
        plan = Plan()
        for number in some:
            address = f"10.{number // 60_000}.{number // 250}.{number % 250}"
            planner.plan_service(key(f"s{number}"), "", [want(backends[endpoints], at=frontend(address))], plan)
        for base, size in plan.freed:
            planner.allocator.rest(base, size, now)
        assert not planner.degraded
        planner.wake(now + REST_S)

    backends = {count: pods(count) for count in (10, 13)}
    settle(0.0, 10, numbers)
    used = planner.allocator.used
    random.Random(7).shuffle(numbers)
    for index in range(0, len(numbers), 400):
        some = numbers[index : index + 400]
        settle(index, 13, some)
        settle(index + REST_S, 10, some)

    assert planner.allocator.used == used
