"""How many endpoints of a Service this node has, as load balancers ask it."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Sequence

from agent.core.addresses import family_of
from agent.core.records import SliceRecord
from agent.core.topology import Run, local_ready, split


def count_local_ready(slices: Sequence[SliceRecord]) -> int:
    """Count distinct addresses of ready endpoints on this node; of a dual-stack Service, in the family with more.

    An endpoint that only serves while it terminates does not count. Source: KEP-1669, kube-proxy's healthcheck.
    """
    runs = [Run(traits, addresses, 0) for piece in slices for traits, addresses in piece.runs]
    found = {address for run in local_ready(runs) for address in split(run)}
    return max(Tally(map(family_of, found)).values(), default=0)
