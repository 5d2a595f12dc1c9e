"""What commands need to know of an agent's node besides the maps, in a file of the state directory."""

from __future__ import annotations

from pathlib import Path

import msgspec

FILE = "agent.json"


class Facts(msgspec.Struct, frozen=True):
    """Written by the agent when it starts; it stays when the agent is gone, as the maps do."""

    node: str = ""
    pid: int = 0
    socket_lb: str = "all"
    cluster_cidrs: tuple[str, ...] = ()
    cgroup: str = ""
    network_policy: str = "off"
    """``off``, ``standard`` or ``strict``."""
    loopback: tuple[str, ...] = ()
    """Settings of lo that were changed, for `ebproxy cleanup` to undo."""


def write_facts(state_dir: Path, facts: Facts) -> None:
    """Write by a rename, so that readers see the old facts or the new."""
    beside = state_dir / (FILE + ".new")
    beside.write_bytes(msgspec.json.encode(facts))
    beside.rename(state_dir / FILE)


def read_facts(state_dir: Path) -> Facts:
    """Read the facts; defaults where there are none."""
    try:
        return msgspec.json.decode((state_dir / FILE).read_bytes(), type=Facts)
    except (FileNotFoundError, msgspec.DecodeError):
        return Facts()
