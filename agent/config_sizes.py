"""How large the maps are: as configured, else by default; what connections and sockets fill follows the node's CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.core.abi import MapSizes
from agent.core.options import NetworkPolicyMode

SIZES = {
    "mapSizes.frontends": "frontends",
    "mapSizes.segments": "segments",
    "mapSizes.socketOrigins": "socket_origins",
    "mapSizes.peerOrigins": "peer_origins",
    "mapSizes.conntrack": "conntrack",
    "mapSizes.affinity": "affinity",
    "mapSizes.sourceRanges": "source_ranges",
    "mapSizes.fragments": "fragments",
    "mapSizes.maglevTables": "maglev_tables",
}
_POLICY_SIZES = {
    "mapSizes.identities": 65_536,
    "mapSizes.blocks": 16_384,
    "mapSizes.policy": 131_072,
    "mapSizes.subjects": 1_024,
    "mapSizes.connections": 65_536,
    "mapSizes.events": 262_144,
}
"""Of maps that hold nothing where there is no policy, and are as small as can be then, whatever is configured."""
PER_CPU = {
    "mapSizes.socketOrigins": 8_192,
    "mapSizes.peerOrigins": 2_048,
    "mapSizes.conntrack": 4_096,
    "mapSizes.affinity": 2_048,
    "mapSizes.fragments": 512,
}
"""For each CPU, and never less than in MapSizes (decision 0015)."""
MOST_CPUS = 128
"""As many count at most: a bound for memory."""


def map_sizes(values: Mapping[str, object], cpus: int) -> MapSizes:
    """Choose every map's size on a node with so many CPUs."""
    chosen = _by_cpus(min(cpus, MOST_CPUS)) | {path: values[path] for path in SIZES if path in values}
    sizes: dict[str, Any] = {SIZES[path]: size for path, size in chosen.items()}
    if values.get("networkPolicy", NetworkPolicyMode.OFF) is not NetworkPolicyMode.OFF:
        sizes |= {_attribute(path): values.get(path, size) for path, size in _POLICY_SIZES.items()}
    return MapSizes(**sizes)


def _by_cpus(cpus: int) -> dict[str, object]:
    least = MapSizes()
    sizes = {path: max(getattr(least, SIZES[path]), each * cpus) for path, each in PER_CPU.items()}
    slots = sizes["mapSizes.socketOrigins"]
    return {**sizes, "mapSizes.socketOrigins": 1 << (slots - 1).bit_length()}


def describe_sizes(sizes: MapSizes, mode: NetworkPolicyMode) -> dict[str, int]:
    """Write sizes by the paths they have in a configuration; those of policy only where it is on."""
    flat = {path: getattr(sizes, attribute) for path, attribute in SIZES.items()}
    if mode is not NetworkPolicyMode.OFF:
        flat |= {path: getattr(sizes, _attribute(path)) for path in _POLICY_SIZES}
    return flat


def _attribute(path: str) -> str:
    return path.rpartition(".")[2]
