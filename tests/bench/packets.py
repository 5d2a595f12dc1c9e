"""What the packet path's program costs by itself, hot: BPF_PROG_TEST_RUN, again and again on one packet (G6 ns).

A packet of a known flow is translated in every run: two entries of conntrack lead to each other, so that the packet
that a run leaves is one of the other's flow. Each run counts down a hop, hence the few repetitions of a call. A flow
begins but once: such a run is timed alone, and beside it one that passes, which says what timing alone costs.
"""

from __future__ import annotations

import socket
import time
from typing import NamedTuple

import numpy as np
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from agent.core.abi import FLOW, TUPLE, FlowFlag, port_bytes
from agent.core.addresses import parse_address
from agent.core.records import Protocol
from agent.kernel.dataplane import Dataplane
from agent.kernel.programs import PacketProgram
from tests.bench import lines
from tests.bench.errors import BenchError
from tests.bench.lines import Line
from tests.bench.population import NODE_PORT
from tests.bench.result import Result
from tests.bench.scale import Scale
from tests.bench.statistics import Values, estimate, median
from tests.bpf.harness import TC_ACT_REDIRECT, TC_ACT_UNSPEC, Context, run_program
from tests.lab import netns

_REPEAT = 250  # fewer than the packet has hops
_HOPS = 255
_ARP = 0x0806
_UNREAD = Raw(bytes(46))  # nothing that the program would look at: what a run costs anyway
_PAYLOAD = Raw(bytes(18))


class _Way(NamedTuple):
    """Addresses and ports of a flow, in one place of the two it is seen at."""

    source: str
    source_port: int
    destination: str
    destination_port: int


_ASKED = {
    IP: _Way(lines.CLIENT, 39_999, lines.NODE, NODE_PORT),
    IPv6: _Way("fd00:172::2", 39_999, "fd00:172::1", NODE_PORT),
}
_BECOMES = {
    IP: _Way(lines.NODE_INSIDE, 9_999, "10.128.0.10", 8_080),
    IPv6: _Way("fd00:10:127::1", 9_999, "fd00:10:128::10", 8_080),
}


class Bare:
    """The program at a node's uplink, run without traffic."""

    def __init__(self, line: Line, dataplane: Dataplane) -> None:
        self._line = line
        self._program = dataplane.programs.packets[PacketProgram.INGRESS]
        self._conntrack = dataplane.store.maps["conntrack"]
        with netns.entered(line.node):
            self._uplink, self._downlink = (socket.if_nametoindex(device) for device in (line.uplink, line.downlink))

    def run(self, packet: Packet, repeat: int, verdict: int) -> int:
        """Run it; returns nanoseconds a run. Raises: BenchError, when it decides otherwise."""
        ran = run_program(self._program, self._ethernet(packet), Context(self._uplink), repeat)
        if ran.verdict != verdict:
            raise BenchError(f"the program decides {ran.verdict} on {packet.summary()}")
        return ran.duration_ns

    def _ethernet(self, packet: Packet) -> bytes:
        """Address a packet to the device that it is to come in by; one for another host would be left alone."""
        client, node = (mac.hex(":") for mac in self._line.macs())
        kind = {} if isinstance(packet, (IP, IPv6)) else {"type": _ARP}
        return bytes(Ether(src=client, dst=node, **kind) / packet)

    def know(self, protocol: Protocol, here: _Way, there: _Way) -> None:
        """Enter a flow from each to the other."""
        flags = FlowFlag.MASQUERADED | FlowFlag.REPLIED
        if protocol is Protocol.TCP:
            flags |= FlowFlag.ESTABLISHED
        for asked, becomes in ((here, there), (there, here)):
            key = TUPLE.packer.pack(*_packed(asked), protocol, bytes(3))
            value = FLOW.packer.pack(*_packed(becomes), 1, int(time.monotonic()), self._downlink, flags)
            self._conntrack.update(key, value)


def program_cost(line: Line, dataplane: Dataplane, scale: Scale) -> Result:
    """G6 ns: nanoseconds for a packet of a known flow, and for others."""
    bare = Bare(line, dataplane)
    with netns.entered(line.node):
        known = {
            f"{network.__name__} {protocol.name}": _known(bare, network, protocol, scale)
            for network in (IP, IPv6)
            for protocol in (Protocol.UDP, Protocol.TCP)
        }
        stranger = _frame(IP, Protocol.UDP, _ASKED[IP]._replace(destination="198.51.100.7"))
        passing = [bare.run(stranger, _REPEAT, TC_ACT_UNSPEC) for _ in range(scale.runs)]
        alone = [bare.run(stranger, 1, TC_ACT_UNSPEC) for _ in range(scale.runs)]
        nothing = [bare.run(_UNREAD, _REPEAT, TC_ACT_UNSPEC) for _ in range(scale.runs)]
        begun = [bare.run(_opening(number), 1, TC_ACT_REDIRECT) for number in range(scale.runs)]
    figures = {f"known flow, {name} ns": round(median(values), 1) for name, values in known.items()}
    figures |= {
        "nothing to read ns": round(median(np.array(nothing, float)), 1),
        "passes, belongs to no service ns": round(median(np.array(passing, float)), 1),
        "passes, timed alone ns": round(median(np.array(alone, float)), 1),
        "new flow, timed alone ns": round(median(np.array(begun, float)), 1),
    }
    title = "program of the packet path, a packet of a known NodePort flow, hot"
    return Result("G6 ns", title, estimate(median, known["IP UDP"]), 150, "ns", peers=figures)


def _known(bare: Bare, network: type[Packet], protocol: Protocol, scale: Scale) -> Values:
    bare.know(protocol, _ASKED[network], _BECOMES[network])
    frame = _frame(network, protocol, _ASKED[network])
    return np.array([bare.run(frame, _REPEAT, TC_ACT_REDIRECT) for _ in range(scale.runs)], float)


def _opening(number: int) -> Packet:
    """Build the first packet of a flow to the NodePort, another one for each number."""
    return _frame(IP, Protocol.UDP, _ASKED[IP]._replace(source_port=1_024 + number))


def _frame(network: type[Packet], protocol: Protocol, way: _Way) -> Packet:
    hops = {"ttl": _HOPS} if network is IP else {"hlim": _HOPS}
    ports = {"sport": way.source_port, "dport": way.destination_port}
    transport = TCP(**ports, flags="A") if protocol is Protocol.TCP else UDP(**ports)
    return network(src=way.source, dst=way.destination, **hops) / transport / _PAYLOAD


def _packed(way: _Way) -> tuple[bytes, bytes, bytes, bytes]:
    """In the order in which tuples and flows have them."""
    ends = parse_address(way.source), parse_address(way.destination)
    return *ends, port_bytes(way.source_port), port_bytes(way.destination_port)
