"""What the numbers of policy stand for, in a file of the state directory: the maps hold numbers alone.

An agent that starts gives identities and rules the numbers they had, and commands answer with names also when no agent
runs. The file is written whole, before the maps hold what it names; a damaged one is as none.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import msgspec

from agent.core.policy_plan import Numbers

log = logging.getLogger("ebproxy.policy")
FILE = "identities.json"


class NumberFile:
    """Keeps the file; ``numbers`` is what it said, or what was written last."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE
        self.numbers = read_numbers(state_dir)

    def write(self, numbers: Numbers) -> None:
        """Write them, in place of those before. Raises: OSError."""
        self.numbers = numbers
        replace_file(self._path, msgspec.json.encode(numbers))


def replace_file(path: Path, contents: bytes) -> None:
    """Write a file by a rename, so that readers see the old contents or the new. Raises: OSError."""
    beside = path.with_suffix(".new")
    beside.write_bytes(contents)
    beside.rename(path)


def read_numbers(state_dir: Path) -> Numbers:
    """Read the numbers; none where there is no file, or one that cannot be read."""
    try:
        return msgspec.json.decode((state_dir / FILE).read_bytes(), type=Numbers)
    except FileNotFoundError:
        return Numbers()
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s: %s; identities are numbered anew", state_dir / FILE, error)
        return Numbers()


def remove_numbers(state_dir: Path) -> None:
    """Remove the file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        (state_dir / FILE).unlink()
