"""Policy in the maps of a bench's dataplane: the real planner's plans, carried out without an agent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from agent.core.abi import U32, MapSizes
from agent.core.addresses import parse_address
from agent.core.policy_model import PolicyModel
from agent.core.policy_plan import Numbers, PolicySizes
from agent.core.policy_planner import PolicyPlanner
from agent.kernel.dataplane import Dataplane
from agent.kernel.node_maps import NodeMaps
from agent.kernel.pod_devices import pack_pod_device
from agent.kernel.policy_maps import PolicyMaps, PolicySwitches
from tests.bench.errors import BenchError
from tests.bench.policy_population import PolicyPopulation
from tests.bench.population import NODE

_SIZES = PolicySizes()
_CONNECTIONS = 65_536
_EVENTS = 262_144


def with_policy(sizes: MapSizes) -> MapSizes:
    """The same sizes, and an agent's own defaults for the maps of policy."""
    return dataclasses.replace(
        sizes,
        identities=_SIZES.identities,
        blocks=_SIZES.blocks,
        policy=_SIZES.policy,
        subjects=_SIZES.subjects,
        connections=_CONNECTIONS,
        events=_EVENTS,
    )


def fill_policy(dataplane: Dataplane, population: PolicyPopulation, places: Mapping[int, int]) -> None:
    """Put everything in force; ``places``: behind which devices pods are, by their numbers. Raises: BenchError."""
    model = PolicyModel(NODE)
    for event in population.events():
        model.apply(event)
    maps = PolicyMaps(dataplane.store)
    maps.open(PolicySwitches())
    planner = PolicyPlanner(model, _SIZES, maps.read(), Numbers())
    while plan := planner.plan():
        maps.apply(plan)
    addresses = {device: parse_address(population.address(number)) for number, device in places.items()}
    devices = {U32.packer.pack(device): pack_pod_device([address]) for device, address in addresses.items()}
    NodeMaps(dataplane.store).write("pod_devices", devices)
    maps.apply(planner.place({address: device for device, address in addresses.items()}))
    found = planner.entry_counts
    if planner.degraded or found["policy"] != population.entries:
        raise BenchError(f"policy does not fit: {found}, not {population.entries} entries; {planner.degraded}")
