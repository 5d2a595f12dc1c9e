"""The policies in force, in a file of the state directory, for the agent that comes next.

A policy may be unreadable when an agent starts, for it says something that is newer than the agent, or a list may lack
a part. What the former agent knew of it is in force then, as it would have been without the restart.

A line for each change is appended, and the file written anew before it is twice as long as it has to be.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from agent.core.policy_model import PolicyName
from agent.core.policy_records import ClusterPolicyRecord, NetworkPolicyRecord
from agent.core.records import Kind, ObjectKey
from agent.observe.numbers import replace_file

log = logging.getLogger("ebproxy.policy")
FILE = "policies.json"
_SLACK = 64
_Policy = NetworkPolicyRecord | ClusterPolicyRecord
_SHAPES: dict[Kind, type[_Policy]] = {it.kind: it for it in (NetworkPolicyRecord, ClusterPolicyRecord)}


class _Line(msgspec.Struct):
    """A policy as it came to be in force; ``record`` is null of one that no longer is."""

    kind: Kind
    key: ObjectKey
    record: msgspec.Raw


class PolicyFile:
    """Keeps the file."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE
        self._lines: int | None = None
        """How many there are; None = the file is to be written anew."""

    def write(self, policies: Mapping[PolicyName, _Policy], changed: Iterable[PolicyName]) -> None:
        """Write which of the policies in force changed. Raises: OSError."""
        lines = [_line(name, policies.get(name)) for name in changed]
        before, self._lines = self._lines, None
        if before is None or before + len(lines) > 2 * len(policies) + _SLACK:
            lines = [_line(*it) for it in policies.items()]
            replace_file(self._path, b"".join(lines))
            before = 0
        else:
            with self._path.open("ab") as file:
                file.write(b"".join(lines))
        self._lines = before + len(lines)


def _line(name: PolicyName, record: _Policy | None) -> bytes:
    return msgspec.json.encode(_Line(*name, msgspec.Raw(msgspec.json.encode(record)))) + b"\n"


def read_policies(state_dir: Path) -> list[_Policy]:
    """Read them; a line that is damaged, or was cut short by a crash, is as none."""
    try:
        lines = (state_dir / FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("%s: %s; policies that cannot be read are as if they had never been", state_dir / FILE, error)
        return []
    found: dict[PolicyName, _Policy] = {}
    damaged = 0
    for line in lines:
        try:
            said = msgspec.json.decode(line, type=_Line)
            record = msgspec.json.decode(said.record, type=_SHAPES[said.kind] | None)
        except (msgspec.DecodeError, KeyError):
            damaged += 1
            continue
        found.pop((said.kind, said.key), None)
        if record is not None:
            found[said.kind, said.key] = record
    if damaged:
        log.warning("%s: %d lines are damaged, and left out", state_dir / FILE, damaged)
    return list(found.values())


def remove_policies(state_dir: Path) -> None:
    """Remove the file, if it is there; that what it says is no longer enforced deserves a warning."""
    if count := len(read_policies(state_dir)):
        log.warning("networkPolicy is off: policies that a former agent enforced and this one does not: %d", count)
    with contextlib.suppress(FileNotFoundError):
        (state_dir / FILE).unlink()
