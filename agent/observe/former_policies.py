"""The policies in force, in a file of the state directory, for the agent that comes next.

A policy may be unreadable when an agent starts, for it says something that is newer than the agent, or a list may lack
a part. What the former agent knew of it is in force then, as it would have been without the restart.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from agent.core.policy_records import ClusterPolicyRecord, NetworkPolicyRecord
from agent.observe.numbers import replace_file

log = logging.getLogger("ebproxy.policy")
FILE = "policies.json"


class _Policies(msgspec.Struct):
    network: list[NetworkPolicyRecord] = []
    cluster: list[ClusterPolicyRecord] = []


def write_policies(state_dir: Path, policies: Iterable[NetworkPolicyRecord | ClusterPolicyRecord]) -> None:
    """Write them all, in place of those before. Raises: OSError."""
    said = _Policies()
    for policy in policies:
        if isinstance(policy, NetworkPolicyRecord):
            said.network.append(policy)
        else:
            said.cluster.append(policy)
    replace_file(state_dir / FILE, msgspec.json.encode(said))


def read_policies(state_dir: Path) -> list[NetworkPolicyRecord | ClusterPolicyRecord]:
    """Read them; none where there is no file, or one that cannot be read."""
    try:
        said = msgspec.json.decode((state_dir / FILE).read_bytes(), type=_Policies)
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s: %s; what cannot be read now is as if it had never been", state_dir / FILE, error)
        return []
    return [*said.network, *said.cluster]


def remove_policies(state_dir: Path) -> None:
    """Remove the file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        (state_dir / FILE).unlink()
