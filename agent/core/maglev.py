"""Maglev: which backend each of a table's entries leads to, alike on every node, and alike for most after a change.

Every backend walks through the table by steps of its own. They take turns, in the order of their addresses, in claiming
the next entry on their way that is still free, until none is. ``bpf/maglev.c`` does this in the kernel; ``build_table``
says what is right.
Source: Eisenbud et al., Maglev: A Fast and Reliable Software Network Load Balancer, NSDI 2016, section 3.4.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

from agent.core.abi import BACKEND_END_SIZE, MAGLEV_SIZE, Walk

_PERSON = b"ebproxy.maglev.1"
"""What walks are derived from besides backends. Another one would turn every client to another backend."""
_HALVES = struct.Struct("<QQ")


@lru_cache(4096)
def _way(backend: bytes) -> tuple[int, int]:
    """Derive where a backend (address and port, 18 bytes) begins to walk, and by what steps."""
    offset, skip = _HALVES.unpack(blake2b(backend, digest_size=_HALVES.size, person=_PERSON).digest())
    return offset % MAGLEV_SIZE, skip % (MAGLEV_SIZE - 1) + 1


def walks(slots: Sequence[bytes]) -> list[Walk]:
    """Give the walks of a segment's backends (``struct slot`` each), in the order of their turns."""
    ends = sorted((slot[:BACKEND_END_SIZE], place) for place, slot in enumerate(slots))
    return [Walk(*_way(end), place) for end, place in ends]


def build_table(turns: Sequence[Walk]) -> array[int]:
    """Build a table; at least one walk. Each entry is a place in the segment."""
    free = len(turns)
    table = array("H", [free]) * MAGLEV_SIZE
    entries = [walk.offset for walk in turns]
    claimed = 0
    while True:
        for turn, (_, skip, place) in enumerate(turns):
            while table[entries[turn]] != free:
                entries[turn] = (entries[turn] + skip) % MAGLEV_SIZE
            table[entries[turn]] = place
            claimed += 1
            if claimed == MAGLEV_SIZE:
                return table
