"""One run of the bench: what has to be built for the goals that are asked for, and in which order."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from agent.errors import EbproxyError
from tests.bench import (
    change,
    connect,
    forwarding,
    hook,
    idle,
    maglev,
    packets,
    peers,
    plots,
    policy_change,
    policy_cost,
    restart,
    sync,
)
from tests.bench.agents import Agent
from tests.bench.errors import BenchError
from tests.bench.feed import Feed
from tests.bench.population import Population
from tests.bench.result import Result
from tests.bench.scale import Scale
from tests.bench.stage import Stage
from tests.bench.statistics import Values
from tests.bench.worker import Worker

_CONNECTING = frozenset({"G1", "G2", "G3", "G4", "G5"})
_FORWARDING = frozenset({"G5", "G6"})
_RUNNING = frozenset({"G8", "G9", "G10", "G11", "G12", "G13", "G16"})
_ENFORCING = frozenset({"G15", "G17", "G18"})
GOALS = _CONNECTING | _FORWARDING | _RUNNING | _ENFORCING | {"G7", "G14"}
_EXTERNAL_EVERY = 10  # Services that an agent is told of: every tenth is reached from outside
_TCP = ["direct", "direct again", connect.OURS, connect.BARE, connect.THREE_HASHES, "nft", "iptables"]
_UDP = ["direct", "direct again", connect.OURS, "nft"]


class Run:
    """Gathers results, goal after goal."""

    def __init__(self, stage: Stage, scale: Scale, goals: frozenset[str], output: Path, console: Console) -> None:
        self._stage = stage
        self._scale = scale
        self._goals = goals
        self._output = output
        self._console = console
        self._population = Population(scale.services, scale.endpoints)
        self.failures: list[str] = []
        self._results: list[Result] = []
        self._loads: dict[str, float] = {}
        self._changes: dict[str, list[float]] = {}

    def everything(self) -> list[Result]:
        """Measure what was asked for; what cannot be measured is in ``failures``, and costs nothing else."""
        if self._goals & _CONNECTING:
            self._play(self._connect)
        elif self._goals & {"G8", "G9"}:
            self._play(self._load_peers)
        if self._goals & _FORWARDING:
            self._play(self._forward)
        if self._goals & _RUNNING:
            self._play(self._run_agent)
        if "G14" in self._goals:
            self._play(self._build_tables)
        if "G7" in self._goals:
            self._play(self._isolate)
        if self._goals & _ENFORCING:
            self._play(self._enforce)
        return [result for result in self._results if result.name.split()[0] in self._goals]

    def _play(self, part: Callable[[contextlib.ExitStack], None]) -> None:
        try:
            with self._stage.scene() as ends:
                part(ends)
        except (BenchError, EbproxyError, OSError) as error:
            self.failures.append(str(error))
            self._say(f"failed: {error}")

    def _say(self, text: str) -> None:
        self._console.print(f"[dim]{text}[/dim]")

    def _connect(self, ends: contextlib.ExitStack) -> None:
        self._say("filling maps, loading nft and iptables")
        cast = connect.assemble(self._stage, self._scale, ends)
        self._loads, self._changes = cast.load_s, cast.change_s
        # What is not a client goes where no client is, this process too.
        home = os.sched_getaffinity(0)
        ends.callback(os.sched_setaffinity, 0, home)
        os.sched_setaffinity(0, {self._stage.cpus.server})
        self._say("connecting")
        if self._goals & {"G1", "G3"}:
            measured = connect.take_turns(cast, self._scale, "connect", list(cast.variants))
            self._results += connect.connect_overhead(measured, self._scale) + connect.flatness(measured, self._scale)
            plots.connect_times(measured, _TCP, self._output / "connect.png")
            plots.connect_overheads(measured, self._output / "connect-overhead.png")
        if "G2" in self._goals:
            self._results.append(connect.connection_rate(connect.take_turns(cast, self._scale, "crr", _TCP)))
        if "G5" in self._goals:
            self._results.append(connect.udp_exchange(connect.take_turns(cast, self._scale, "udp", _UDP)))
        if "G4" in self._goals:
            self._results.append(hook.hook_cost(cast, self._scale))

    def _forward(self, ends: contextlib.ExitStack) -> None:
        self._say("making nodes, loading nft and iptables")
        nodes = forwarding.assemble(self._stage, self._scale, ends)
        if "G5" in self._goals:
            self._say("asking by way of them")
            measured = connect.take_turns(nodes.cast, self._scale, "udp", list(nodes.cast.variants))
            self._results += forwarding.datagrams(measured)
        if "G6" in self._goals:
            self._say("flooding them")
            name = connect.OURS
            self._results.append(packets.program_cost(nodes.lines[name], nodes.dataplanes[name], self._scale))
            results = forwarding.forward(self._stage, nodes, self._scale, ends)
            self._results += results
            plots.rates(results[0].peers, self._output / "forwarding.png")

    def _load_peers(self, ends: contextlib.ExitStack) -> None:
        self._say("loading nft and iptables")
        self._loads, self._changes = {}, {}
        for name, load, replace in peers.PEERS:
            netns = self._stage.netns(name, ends).name
            self._loads[name] = load(self._population, netns)
            self._changes[name] = peers.repeat(replace, self._population, netns, self._scale.peer_changes)

    def _run_agent(self, ends: contextlib.ExitStack) -> None:
        self._say("starting an agent")
        population = dataclasses.replace(self._population, external_every=_EXTERNAL_EVERY)
        worker = Worker(self._stage, "churn", ends)
        feed = Feed(population, worker.netns.name)
        ends.callback(feed.stop)
        agent = Agent(self._stage, feed, population, worker, ends)
        if "G8" in self._goals:
            self._cold_sync(agent, feed, population)
        else:
            sync.sync_once(agent, feed, population)
        if "G11" in self._goals:
            self._results += sync.residency(agent, self._population)
        if "G12" in self._goals:
            self._results += sync.map_memory(agent)
        if "G13" in self._goals:
            self._say("watching it do nothing")
            self._results.append(idle.idle_cpu(agent, self._scale))
        if self._goals & {"G9", "G10"}:
            self._say("changing endpoints")
            self._change(agent, feed, population)
        if "G16" in self._goals:
            self._say("killing it")
            self._results += restart.kill_and_restart(agent, worker, self._population, self._scale)

    def _build_tables(self, ends: contextlib.ExitStack) -> None:
        self._say("building Maglev tables")
        self._results += maglev.tables(self._stage, self._scale, ends)

    def _isolate(self, ends: contextlib.ExitStack) -> None:
        self._say("isolating pods")
        isolated = policy_cost.assemble(self._stage, self._scale, ends)
        requests, connections = (
            connect.take_turns(isolated.cast, self._scale, verb, policy_cost.VARIANTS) for verb in ("rr", "crr")
        )
        self._results += policy_cost.policy_cost(isolated, requests, connections, self._scale)

    def _enforce(self, ends: contextlib.ExitStack) -> None:
        self._say("starting an agent that enforces policy")
        services, cluster = Population(min(self._scale.flat_services), self._scale.endpoints), self._scale.cluster
        worker = Worker(self._stage, "policy", ends)
        feed = Feed(services, worker.netns.name, cluster)
        ends.callback(feed.stop)
        agent = Agent(self._stage, feed, services, worker, ends, has_policy=True)
        if "G18" in self._goals:
            self._results.append(policy_change.cold_sync(agent, feed, self._scale))
        else:
            policy_change.sync_once(agent, feed, cluster)
        if "G17" in self._goals:
            self._results.append(policy_change.residency(agent, cluster))
        if "G15" in self._goals:
            self._say("changing policies")
            changes = policy_change.PolicyChanges(agent, feed, cluster)
            with contextlib.closing(changes):
                self._results += policy_change.one_change(changes, self._scale)

    def _cold_sync(self, agent: Agent, feed: Feed, population: Population) -> None:
        result = sync.cold_sync(agent, feed, population, self._scale)
        loads = {f"{name} load s": round(seconds, 3) for name, seconds in self._loads.items()}
        decoded = sync.client_decode(self._stage, feed)
        self._results.append(dataclasses.replace(result, peers=result.peers | loads | decoded))
        bars = {"ebproxy": result.estimate.value, **loads, "client's models": decoded[sync.CLIENT_S]}
        plots.seconds(bars, result.title, self._output / "sync.png")

    def _change(self, agent: Agent, feed: Feed, population: Population) -> None:
        changes = change.Changes(agent, feed, population)
        try:
            results, times_ms = change.one_change(changes, self._scale, population)
            self._results += [self._beside_peers(results[0]), *results[1:]]
            self._plot_changes(times_ms)
            if "G10" in self._goals:
                self._results.append(change.churn(changes, agent, self._scale, population))
        finally:
            changes.close()

    def _beside_peers(self, result: Result) -> Result:
        medians = {
            f"{name} one change ms": round(sorted(taken)[len(taken) // 2] * 1000, 1)
            for name, taken in self._changes.items()
        }
        return dataclasses.replace(result, peers=result.peers | medians)

    def _plot_changes(self, times_ms: Values) -> None:
        plots.change_times(times_ms, self._output / "change.png")
