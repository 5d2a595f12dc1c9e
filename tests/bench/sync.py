"""A cold start against a full cluster: how long until it is programmed (G8), what it holds then (G11, G12)."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np

from agent.core.records import Kind
from agent.kernel import bpf
from tests.bench.agents import Agent, fdinfo
from tests.bench.errors import BenchError
from tests.bench.feed import Feed
from tests.bench.polling import until
from tests.bench.population import Population
from tests.bench.result import Result
from tests.bench.scale import Scale
from tests.bench.stage import Stage
from tests.bench.statistics import Estimate, estimate, median

_LIMIT_S = 60.0
_POLL_S = 0.001
_SETTLE_S = 3.0
_MIB = 1024
_MB = 1e6
_NODE_ADDRESSES = 2  # of a worker's namespace, over IPv4: loopback and its own
_OF_TRAFFIC = ("socket_origins", "peer_origins", "affinity", "fragments", "held_fragments")
CLIENT_S = "client's models, decode only s"
CLIENT_MIB = "client's models, decode only MiB"
# What the client library does with the same two lists; prints seconds and MiB.
_CLIENT_DECODE = """
import resource, sys, time
from kubernetes.client import ApiClient
api, begun = ApiClient(), time.monotonic()
for path, kind in zip(sys.argv[1:], ("V1ServiceList", "V1EndpointSliceList")):
    api.deserialize(open(path).read(), kind, "application/json")
print(time.monotonic() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def cold_sync(agent: Agent, feed: Feed, population: Population, scale: Scale) -> Result:
    """G8: from the first byte the server writes to the last map entry; leaves the last agent running."""
    taken, sent = [], []
    for turn in range(scale.syncs):
        if turn:
            agent.kill()
            agent.forget()
        taken.append(sync_once(agent, feed, population))
        sent.append(feed.last_byte_at - feed.first_byte_at)
    if agent.status()["backends"] != population.services * population.endpoints:
        raise BenchError(f"{agent.status()['backends']} backends are programmed")
    return Result(
        "G8",
        f"cold sync of {population.services} services, {population.services * population.endpoints} endpoints",
        estimate(median, np.array(taken)),
        0.4,
        "s",
        peers={"all s": [round(value, 3) for value in taken], "last byte taken in after s": round(np.median(sent), 3)},
        note=f"{feed.size / 1e6:.0f} MB of JSON",
    )


def sync_once(agent: Agent, feed: Feed, population: Population) -> float:
    """Start an agent on empty maps; returns seconds from the first byte to the last entry."""
    feed.rewind()
    agent.start()
    frontends = agent.open_map("frontends")
    wanted = population.frontends(_NODE_ADDRESSES)
    try:
        until(lambda: _count(frontends) >= wanted, _LIMIT_S, "every frontend is programmed", _POLL_S)
        done = time.monotonic()
    finally:
        frontends.close()
    agent.wait_settled()
    return done - feed.first_byte_at


def _count(opened: bpf.Map) -> int:
    """Count entries: a plan writes frontends last, so that all being there means that everything is."""
    return sum(count for _, _, count in opened.batches(16_384))


def client_decode(stage: Stage, feed: Feed) -> dict[str, float]:
    """Decode the same lists with the models of the `kubernetes` package, in a process of its own."""
    paths = []
    for kind in (Kind.SERVICE, Kind.ENDPOINT_SLICE):
        path = stage.directory / f"{kind}.json"
        path.write_bytes(feed.list_body(kind))
        paths.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", _CLIENT_DECODE, *paths], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        raise BenchError(f"decoding with the client's models: {done.stderr.strip()[-500:]}")
    seconds, mib = map(float, done.stdout.split())
    return {CLIENT_S: round(seconds, 2), CLIENT_MIB: round(mib)}


def residency(agent: Agent, population: Population) -> list[Result]:
    """G11: the agent's memory, a few seconds after it has settled."""
    time.sleep(_SETTLE_S)
    steady, peak = agent.memory_kib("VmRSS") / _MIB, agent.memory_kib("VmHWM") / _MIB
    at = f"at {population.services} services, {population.services * population.endpoints} endpoints"
    parts = {f"{field} MiB": round(agent.memory_kib(field) / _MIB, 1) for field in ("RssAnon", "RssFile")}
    return [
        Result("G11", f"agent RSS, steady, {at}", Estimate(steady, steady, steady), 64, "MiB", peers=parts),
        Result("G11 peak", f"agent RSS, peak, {at}", Estimate(peak, peak, peak), 100, "MiB"),
    ]


def map_memory(agent: Agent) -> list[Result]:
    """G12: what the kernel charges for the maps, in all and without the flows, with the sizes of a node of two CPUs."""
    sizes = {}
    for name in agent.map_names():
        opened = agent.open_map(name)
        sizes[name] = fdinfo(opened.fd, "memlock") / _MB
        opened.close()
    flows = sizes.pop("conntrack")
    others = sum(sizes.values())
    traffic = sum(sizes[name] for name in _OF_TRAFFIC)
    figures = {f"{name} MB": round(size, 2) for name, size in sorted(sizes.items(), key=lambda it: -it[1])}
    figures |= {
        "of these, for what traffic brings MB": round(traffic, 2),
        "for Services MB": round(others - traffic, 2),
    }

    def result(name: str, title: str, value: float, goal: float, peers: dict[str, float]) -> Result:
        return Result(name, title, Estimate(value, value, value), goal, "MB", peers=peers)

    return [
        result("G12", "memory of all maps, sized for 2 CPUs", others + flows, 32, {"conntrack MB": round(flows, 2)}),
        result("G12 without flows", "memory of all maps but conntrack, sized for 2 CPUs", others, 8, figures),
    ]
