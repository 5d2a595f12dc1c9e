"""One endpoint changes: how long until the kernel knows (G9); many do: how many a second (G10)."""

from __future__ import annotations

import ipaddress
import sys
import time

import numpy as np

from agent.core.abi import Frontend, FrontendKey, pack_backends
from agent.core.addresses import parse_address
from agent.core.records import Protocol
from tests.bench.agents import Agent
from tests.bench.errors import BenchError
from tests.bench.feed import Feed
from tests.bench.population import POD_PORT, SERVICE_PORT, Population
from tests.bench.result import Result
from tests.bench.scale import Scale
from tests.bench.statistics import Values, estimate, median, percentile

_LIMIT_S = 20.0
_PAUSE_S = 0.005
_STRIDE = 7919  # a prime: consecutive changes are of Services far apart
_PROBES = 2000


class Changes:
    """Changes endpoints on the server and watches for them in the maps."""

    def __init__(self, agent: Agent, feed: Feed, population: Population) -> None:
        self._feed = feed
        self._population = population
        self._frontends = agent.open_map("frontends")
        self._segments = agent.open_map("segments")
        self._count = 0

    def close(self) -> None:
        """Close the maps, and have the server list what it has told."""
        self._feed.settle()
        self._frontends.close()
        self._segments.close()

    def one(self) -> float:
        """Change one endpoint; returns seconds from the write on the socket to the value in the map."""
        number, source, address = self._next()
        slot, wanted = self._slot_of_last(number), _packed(address)
        begun = self._feed.change_slice(number, source)
        deadline = begun + _LIMIT_S
        while self._segments.lookup(slot) != wanted:
            if time.monotonic() > deadline:
                raise BenchError(f"a changed endpoint is not in the map after {_LIMIT_S} s")
        return time.monotonic() - begun

    def many(self, count: int) -> float:
        """Change ``count`` endpoints at once; returns seconds until all are in the map."""
        sources, expected = {}, {}
        for _ in range(count):
            number, source, address = self._next()
            sources[number] = source
            expected[number] = (self._slot_of_last(number), _packed(address))
        begun = self._feed.change_slices(sources)
        for slot, wanted in expected.values():
            while self._segments.lookup(slot) != wanted:
                if time.monotonic() > begun + _LIMIT_S:
                    raise BenchError(f"{count} changed endpoints are not in the map after {_LIMIT_S} s")
                time.sleep(0.001)
        return time.monotonic() - begun

    def probe_cost_s(self) -> float:
        """What one look into the map costs."""
        slot = self._slot_of_last(0)
        begun = time.monotonic()
        for _ in range(_PROBES):
            self._segments.lookup(slot)
        return (time.monotonic() - begun) / _PROBES

    def _next(self) -> tuple[int, bytes, str]:
        """The next Service to change: its number, its slice as it is to be, and the address that is new in it."""
        number = self._count * _STRIDE % self._population.services
        generation = 1 + self._count // self._population.services
        self._count += 1
        fresh = str(ipaddress.IPv4Address(f"10.{200 + generation % 50}.0.0") + number)
        addresses = [*self._population.addresses(number)[:-1], fresh]
        return number, self._population.slice(number, self._feed.next_version, addresses), fresh

    def _slot_of_last(self, number: int) -> bytes:
        """The key of the slot that holds the endpoint which is not like the Service's first ones."""
        vip = FrontendKey(parse_address(self._population.cluster_ip(number)), SERVICE_PORT, Protocol.TCP)
        found = self._frontends.lookup(vip.pack())
        if found is None:
            raise BenchError(f"service {number} is not in the map")
        base = Frontend.unpack(found).inside
        staying = {_packed(address) for address in self._population.addresses(number)[:-1]}
        keys = [(base + 1 + index).to_bytes(4, sys.byteorder) for index in range(self._population.endpoints)]
        return next(key for key in keys if self._segments.lookup(key) not in staying)


def _packed(address: str) -> bytes:
    return pack_backends(parse_address(address), POD_PORT)[0]


def one_change(changes: Changes, scale: Scale, population: Population) -> tuple[list[Result], Values]:
    """G9; returns all the times too, in milliseconds."""
    taken = []
    for _ in range(scale.changes):
        taken.append(changes.one())
        time.sleep(_PAUSE_S)
    times_ms = np.array(taken) * 1000
    at = f"one endpoint change at {population.services} services, event to map"
    probe_ms = round(changes.probe_cost_s() * 1000, 4)
    return [
        Result(
            "G9", f"{at}, p50", estimate(percentile(50), times_ms), 1, "ms", peers={"one look at the map ms": probe_ms}
        ),
        Result("G9 p99", f"{at}, p99", estimate(percentile(99), times_ms), 5, "ms"),
    ], times_ms


def churn(changes: Changes, agent: Agent, scale: Scale, population: Population) -> Result:
    """G10: changes a second until the last of a burst is programmed."""
    burst = min(scale.churned, population.services)
    rates, busy = [], []
    for _ in range(max(1, scale.churned // burst)):
        before = agent.cpu_s()
        taken_s = changes.many(burst)
        rates.append(burst / taken_s)
        busy.append((agent.cpu_s() - before) / taken_s)
    return Result(
        "G10",
        f"changes a second, in bursts of {burst}",
        estimate(median, np.array(rates)),
        10_000,
        "/s",
        peers={"CPUs the agent keeps busy meanwhile": round(median(np.array(busy)), 2)},
        at_least=True,
    )
