"""What a node does for packets that pass through it: datagrams there and back (G5), and as many as go (G6).

Every variant is a line of its own (lines.py), and all take turns as in connect.py. What is counted is what arrives at
the backends, and how long the node's CPU was busy with it: the kernel thread that takes packets in at the node's uplink
carries them all the way into the backends' queue.
"""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from agent.kernel.dataplane import Dataplane
from agent.kernel.programs import PacketProgram
from tests.bench import lines, node_ports
from tests.bench.agents import fdinfo
from tests.bench.connect import OURS, Blocks, Cast, Variant
from tests.bench.errors import BenchError
from tests.bench.flood import FIRST_PORT, FLOWS, Flood
from tests.bench.hook import statistics
from tests.bench.lines import Line
from tests.bench.nodes import open_node
from tests.bench.peers import iptables_name
from tests.bench.polling import until
from tests.bench.population import NODE_PORT, POD_PORT, SERVICE_PORT, Population
from tests.bench.result import Result
from tests.bench.scale import Scale
from tests.bench.stage import Stage, command
from tests.bench.statistics import Estimate, Values, estimate, median, ratio
from tests.bench.worker import Target, Worker
from tests.lab import netns

Address = tuple[str, int]
OFF = "ebproxy, socketLB off"
BARE, BARE_AGAIN = "direct", "direct again"
_FORWARDING = (BARE, BARE_AGAIN, OURS, *node_ports.PEERS)
_NODE_PORT = (lines.NODE, NODE_PORT)
_PATIENCE_S = 5.0
_DRAIN_LIMIT_S = 10.0
_COUNTED_BLOCKS = 5


@dataclass(slots=True)
class Nodes:
    """The lines by variant, and what runs on them."""

    lines: dict[str, Line] = field(default_factory=dict)
    dataplanes: dict[str, Dataplane] = field(default_factory=dict)
    cast: Cast = field(default_factory=Cast)


def assemble(stage: Stage, scale: Scale, ends: contextlib.ExitStack) -> Nodes:
    """Make every variant: the same Services on each node, and nothing on those that are asked directly."""
    nodes = Nodes()
    population = Population(scale.services, scale.endpoints, node_port=NODE_PORT)
    endpoint = Target(population.endpoint(population.middle, 0), POD_PORT)
    vip = Target(population.cluster_ip(population.middle), SERVICE_PORT)
    for name in (BARE, BARE_AGAIN, OURS, OFF, *node_ports.PEERS):
        place = name.replace(",", "").replace(" ", "-")
        line = nodes.lines[name] = Line(stage, f"at-{place}", ends)
        worker = Worker(stage, line.name, ends, line)
        nodes.cast.variants[name] = Variant(worker, endpoint if name in (BARE, BARE_AGAIN) else vip)
        if name in (OURS, OFF):
            nodes.dataplanes[name] = open_node(stage, line, worker.cgroup, population, ends, socket_lb=name == OURS)
        elif name in node_ports.PEERS:
            node_ports.PEERS[name](population, line.node, lines.NODE)
    return nodes


def datagrams(measured: dict[str, Blocks]) -> list[Result]:
    """G5 by way of a node: with the socket hooks, and with the packet path alone."""
    base, again, nft = (measured[name].p50_us for name in (BARE, BARE_AGAIN, "nft"))
    figures = {f"{name}, x direct": round(ratio(blocks.p50_us, base), 4) for name, blocks in measured.items()}
    title = "UDP request and response by way of a node"

    def held(name: str, words: str, variant: str, beside: Values, goal: float, unit: str) -> Result:
        value = estimate(ratio, measured[variant].p50_us, beside)
        shown = figures | {"direct us": round(median(base), 2)} if name == "G5 node" else {}
        return Result(name, f"{title}, {words}", value, goal, unit, estimate(ratio, again, base), shown)

    return [
        held("G5 node", "Service / direct", OURS, base, 1.05, "x"),
        held("G5 off", "socketLB off / direct", OFF, base, 1.05, "x"),
        held("G5 off nft", "socketLB off / nft", OFF, nft, 1.0, "x nft"),
    ]


class Block(NamedTuple):
    """Packets that arrived, CPU seconds of the node for them, and seconds on the clock."""

    packets: int
    cpu_s: float
    elapsed_s: float


class Forwarder:
    """Floods one line, after each flow of it had its answer: a flow that was not answered is a new one to netfilter."""

    def __init__(self, stage: Stage, name: str, line: Line, target: Address, ends: contextlib.ExitStack) -> None:
        self.name = name
        self._line = line
        _open_flows(line, target)
        self._count_arrivals(lines.CLIENT if name in (BARE, BARE_AGAIN) else lines.NODE_INSIDE)
        self._thread = line.thread()
        self._flood = Flood(stage, line, target, ends)
        self._arrived = 0

    def block(self, scale: Scale) -> Block:
        """Send so many, and wait until the node has done with them. Raises: BenchError."""
        received, busy = self._line.received(), _busy_s(self._thread)
        _, elapsed_s = self._flood.send(scale.flood, scale.flood_limit_ms)
        until(lambda: _is_asleep(self._thread), _DRAIN_LIMIT_S, f"{self.name}: the node has forwarded everything")
        packets = self._line.received() - received
        self._arrived += packets
        if not packets:
            raise BenchError(f"{self.name}: nothing is forwarded")
        return Block(packets, _busy_s(self._thread) - busy, elapsed_s)

    def check(self) -> None:
        """Make sure that what arrived was what was meant to. Raises: BenchError."""
        counters = json.loads(command("nft", "-j", "list", "counters", netns=self._line.backends))["nftables"]
        counts = {entry["counter"]["name"]: entry["counter"]["packets"] for entry in counters if "counter" in entry}
        if counts["strange"] or counts["forwarded"] < self._arrived * 0.99:
            raise BenchError(f"{self.name}: of {self._arrived} packets that arrived, {counts}")

    def _count_arrivals(self, source: str) -> None:
        """Count what arrives at the backends and let go of it: their stack is no part of this."""
        rules = f"""table netdev bench {{
            counter forwarded {{ }}
            counter strange {{ }}
            chain arrivals {{
                type filter hook ingress device "{lines.DEVICE}" priority 0;
                ip saddr {source} ip daddr 10.128.0.0/10 udp dport {POD_PORT} counter name forwarded drop
                ip protocol udp counter name strange drop
            }}
        }}"""
        command("nft", "-f", "-", netns=self._line.backends, text=rules)


def _open_flows(line: Line, target: Address) -> None:
    """Send a datagram of each flow and receive its answer, from whom was asked. Raises: BenchError."""
    for number in range(FLOWS):
        with netns.entered(line.client), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            opened.settimeout(_PATIENCE_S)
            opened.bind((lines.CLIENT, FIRST_PORT + number))
            opened.connect(target)
            opened.send(b"x")
            try:
                opened.recv(1)
            except OSError as error:
                raise BenchError(f"{line.name}: no answer from {target[0]}:{target[1]}: {error}") from error


def _busy_s(thread: int) -> float:
    return int(Path(f"/proc/{thread}/schedstat").read_text(encoding="ascii").split()[0]) / 1e9


def _is_asleep(thread: int) -> bool:
    return Path(f"/proc/{thread}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "R"


def forward(stage: Stage, nodes: Nodes, scale: Scale, ends: contextlib.ExitStack) -> list[Result]:
    """G6: flood a NodePort of each node, block by block in turns."""
    population = Population(scale.services, scale.endpoints)
    endpoint = (population.endpoint(population.middle, 0), POD_PORT)
    forwarders = [
        Forwarder(stage, name, nodes.lines[name], endpoint if name in (BARE, BARE_AGAIN) else _NODE_PORT, ends)
        for name in _FORWARDING
    ]
    taken: dict[str, list[Block]] = {name: [] for name in _FORWARDING}
    for number in range(scale.warm_up_rounds + scale.rounds):
        turn = number % len(forwarders)
        for forwarder in (*forwarders[turn:], *forwarders[:turn]):
            block = forwarder.block(scale)
            if number >= scale.warm_up_rounds:
                taken[forwarder.name].append(block)
    ours = forwarders[_FORWARDING.index(OURS)]
    cold_ns = _cold_ns(nodes.dataplanes[OURS], ours, scale)
    for forwarder in forwarders:
        forwarder.check()
    return _results(taken, cold_ns)


def _cold_ns(dataplane: Dataplane, forwarder: Forwarder, scale: Scale) -> float:
    """Nanoseconds of a run of the program at the uplink, by the kernel's clock, which is in it."""
    program = dataplane.programs.packets[PacketProgram.INGRESS]
    with statistics():
        time_ns, count = fdinfo(program, "run_time_ns"), fdinfo(program, "run_cnt")
        for _ in range(_COUNTED_BLOCKS):
            forwarder.block(scale)
        return (fdinfo(program, "run_time_ns") - time_ns) / (fdinfo(program, "run_cnt") - count)


def _results(taken: dict[str, list[Block]], cold_ns: float) -> list[Result]:
    rates = {name: np.array([block.packets / block.cpu_s for block in blocks]) for name, blocks in taken.items()}
    figures: dict[str, object] = {
        f"{name}, packets a second of CPU": round(median(values)) for name, values in rates.items()
    }
    figures |= {
        f"{name}, packets a second": round(median(np.array([block.packets / block.elapsed_s for block in blocks])))
        for name, blocks in taken.items()
    }
    figures |= {"ebproxy's program as it runs, its clock included, ns": round(cold_ns)}
    aa = estimate(ratio, rates[BARE_AGAIN], rates[BARE])

    def against(name: str, title: str, peer: str, goal: float) -> Result:
        value: Estimate = estimate(ratio, rates[OURS], rates[peer])
        peers = figures if name == "G6" else {}
        return Result(
            name, f"NodePort forwarding, packets per core, {title}", value, goal, "x", aa, peers, at_least=True
        )

    return [
        against("G6", "against nft", "nft", 2),
        against("G6 iptables", f"against {iptables_name()}", "iptables", 2),
        against("G6 direct", "against routing alone", BARE, 1),
    ]
