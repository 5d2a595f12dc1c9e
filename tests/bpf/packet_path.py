"""A node for the packet path's programs to be run on, packet by packet.

    far ── eth0 172.30.0.2 ┐                       ┌ v10 ── pod "one" 10.180.2.10
    far ── eth1 172.31.0.2 ┴ node (namespace, lo) ─┴ v11 ── pod "two" 10.180.2.11

The node is one of the lab, with real devices, addresses, routes and neighbours, which the programs look up; the packets
are the tests' own and go nowhere. What the agent would have written into the maps, a test writes.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
from collections import Counter as Tally
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scapy.packet import Packet

from agent.core.abi import (
    ADDRESS_RANGE,
    BASE_DROP,
    BASE_REJECT,
    DEVICE,
    FIRST_FREE_SLOT,
    FLOW,
    POD_RANGE_PODS,
    POD_RANGE_UNKNOWN,
    SOURCE_RANGE,
    TUPLE,
    Counter,
    FlowFlag,
    Frontend,
    FrontendFlag,
    FrontendKey,
    FrontendKind,
    MapSpec,
    pack_backends,
    pack_header,
)
from agent.core.addresses import format_address, parse_address
from agent.core.records import Protocol
from agent.kernel import bpf
from agent.kernel.maps import MapStore
from agent.kernel.programs import PacketProgram, ProgramOptions, open_or_load
from tests.bpf.harness import Context, Ran, run_program
from tests.bpf.packets import CLIENT_MAC, NODE_MAC, End
from tests.lab import netns
from tests.lab.lab import Node

SOURCE_PORTS = range(10_000, 30_000)
"""What masqueraded flows get, unless the agent is told otherwise."""
FRAGMENT_PLACES = 4
"""How many fragments of one packet wait for its first one."""
NODE = ("172.30.0.2", "fd00:172:30::2")
"""The node's addresses, at its first uplink."""
NODE_SECOND = ("172.31.0.2", "fd00:172:31::2")
OTHER_NODE = ("172.30.0.1", "fd00:172:30::1")
OUTSIDE = ("172.30.0.100", "fd00:172:30::100")
"""A client that is no node, at the first uplink."""
FAR = ("203.0.113.7", "2001:db8:7::7")
"""A client behind the gateway."""
POD_ONE = ("10.180.2.10", "fd00:10:180:2::10")
POD_TWO = ("10.180.2.11", "fd00:10:180:2::11")
REMOTE_POD = ("10.180.1.10", "fd00:10:180:1::10")
"""A pod of the other node, by way of the first uplink."""
SECOND_REMOTE_POD = ("10.180.3.10", "fd00:10:180:3::10")
"""A pod of a node at the second uplink."""
POD_RANGES = ("10.180.0.0/16", "fd00:10:180::/48")
GATEWAY = ("172.30.0.254", "fd00:172:30::254")
_SECOND_GATEWAY = ("172.31.0.3", "fd00:172:31::3")
_CLEARED = (
    *("frontends", "conntrack", "affinity", "source_ranges", "pod_ranges"),
    *("fragments", "held_fragments", "node_addresses", "devices"),
)


def furnish(node: Node) -> None:
    """Give a node of the lab a second uplink, and all the routes and neighbours the tests name."""
    netns.configure(node.netns, ["link add eth1 type veth peer name far1", "link set eth1 up", "link set far1 up"])
    devices = ("eth0", "eth1", *(f"v{pod.number}" for pod in node.pods.values()))
    netns.configure(node.netns, [f"link set {device} address {NODE_MAC}" for device in devices])
    lines = [f"addr add {NODE_SECOND[0]}/24 dev eth1", f"addr add {NODE_SECOND[1]}/64 dev eth1 nodad"]
    neighbours = [(address, "eth0") for pair in (OTHER_NODE, OUTSIDE, GATEWAY) for address in pair]
    neighbours += [(address, "eth1") for address in _SECOND_GATEWAY]
    for pod in node.pods.values():
        neighbours += [(address, f"v{pod.number}") for address in pod.addresses]
    lines += [f"neigh replace {a} lladdr {CLIENT_MAC} nud permanent dev {d}" for a, d in neighbours]
    bits = (24, 64)
    for pod, via in ((REMOTE_POD, OTHER_NODE), (SECOND_REMOTE_POD, _SECOND_GATEWAY)):
        networks = [ipaddress.ip_network(f"{a}/{n}", strict=False) for a, n in zip(pod, bits, strict=True)]
        lines += [f"route replace {network} via {gateway}" for network, gateway in zip(networks, via, strict=True)]
    lines += [f"route replace default via {gateway} dev eth0" for gateway in GATEWAY]
    netns.configure(node.netns, lines)


class Segment(NamedTuple):
    """Backends, or none and whether that is kept from the client."""

    backends: tuple[End, ...] = ()
    is_silent: bool = False


REFUSE = Segment()
SILENT = Segment(is_silent=True)


def to(*backends: End) -> Segment:
    """Write a segment."""
    return Segment(backends)


class FlowEntry(NamedTuple):
    """An entry of conntrack, both ends of both its tuples readable."""

    protocol: Protocol
    asked: tuple[End, End]
    becomes: tuple[End, End]
    service: int
    device: int
    flags: FlowFlag


class PacketPath:
    """The programs, their maps, and the devices of a node to run them at."""

    def __init__(self, node: Node, store: MapStore, programs: dict[PacketProgram, int]) -> None:
        self.node = node
        self.store = store
        self._programs = programs
        self._counted: Tally[Counter] = Tally()
        self._is_inside = False
        with netns.entered(node.netns):
            self.ifindex = {name: index for index, name in socket.if_nameindex()}
        self.ifindex |= {"one": self.ifindex["v10"], "two": self.ifindex["v11"]}
        self.clear()

    def clear(self) -> None:
        """Begin anew: no services, no flows, the node's own addresses and devices."""
        for name in _CLEARED:
            for key in list(_keys(self.store.maps[name])):
                self.store.maps[name].delete(key)
        self._next_slot = FIRST_FREE_SLOT
        self._next_service = 1
        self.own(*NODE, *NODE_SECOND, "127.0.0.1", "::1")
        self.pods_in(*POD_RANGES)
        self.masquerade(0, *NODE)
        self.masquerade(self.ifindex["eth0"], *NODE)
        self.masquerade(self.ifindex["eth1"], *NODE_SECOND)
        self._counted = Tally(self.store.read_counters())

    def own(self, *addresses: str) -> None:
        """Say which addresses are the node's."""
        for address in addresses:
            self.store.maps["node_addresses"].update(parse_address(address), _u32(1))

    def pods_in(self, *networks: str, flags: int = POD_RANGE_PODS) -> None:
        """Say where pods are."""
        for network in networks:
            bits, address = _prefix(network)
            self.store.maps["pod_ranges"].update(ADDRESS_RANGE.packer.pack(bits, address), _u32(flags))

    def unknown_pods(self) -> None:
        """Say that nobody knows where pods are."""
        self.no_pods()
        self.pods_in("0.0.0.0/0", "::/0", flags=POD_RANGE_UNKNOWN)

    def no_pods(self) -> None:
        """Forget where pods are."""
        for key in list(_keys(self.store.maps["pod_ranges"])):
            self.store.maps["pod_ranges"].delete(key)

    def masquerade(self, ifindex: int, ipv4: str = "", ipv6: str = "", flags: int = 0) -> None:
        """Say which addresses a device masquerades with, and whether pods are behind it (DEVICE_PODS)."""
        packed = [parse_address(address) if address else bytes(16) for address in (ipv4, ipv6)]
        self.store.maps["devices"].update(_u32(ifindex), DEVICE.packer.pack(*packed, flags))

    def serve(
        self,
        protocol: str,
        *frontends: End,
        inside: Segment,
        outside: Segment | None = None,
        kind: FrontendKind = FrontendKind.CLUSTER_IP,
        flags: FrontendFlag | int = 0,
        affinity_s: int = 0,
        ranges: tuple[str, ...] = (),
    ) -> int:
        """Write a service port with its frontends; returns its id. ``outside`` is as ``inside`` unless told."""
        service = self._next_service
        self._next_service += 1
        self.allow(service, *ranges)
        base = self._segment(inside)
        value = Frontend(
            service,
            base,
            base if outside is None else self._segment(outside),
            affinity_s,
            kind | flags | (FrontendFlag.SOURCE_RANGES if ranges else 0),
        )
        for end in frontends:
            key = FrontendKey(parse_address(end.address), end.port, Protocol[protocol.upper()])
            self.store.maps["frontends"].update(key.pack(), value.pack())
        return service

    def rewrite(self, frontend: End, protocol: str, segment: Segment) -> None:
        """Let a frontend lead to other backends, as an edit of its service's endpoints does."""
        key = FrontendKey(parse_address(frontend.address), frontend.port, Protocol[protocol.upper()]).pack()
        base = self._segment(segment)
        before = Frontend.unpack(self.store.maps["frontends"].lookup(key) or b"")
        self.store.maps["frontends"].update(key, before._replace(inside=base, outside=base).pack())

    def reserve(self, address: str, port: int = 0, protocol: str = "", flags: int = 0) -> None:
        """Say that an address is a ClusterIP, whose other ports are refused; or, of address zero, a port a NodePort."""
        number = Protocol[protocol.upper()] if protocol else 0
        key = parse_address(address) + port.to_bytes(2, "big") + bytes([number, 0])
        value = Frontend(self._next_service, BASE_REJECT, BASE_REJECT, 0, FrontendKind.RESERVED | flags)
        self.store.maps["frontends"].update(key, value.pack())

    def allow(self, service: int, *networks: str) -> None:
        """Write source ranges of a service."""
        for network in networks:
            bits, address = _prefix(network)
            key = SOURCE_RANGE.packer.pack(32 + bits, service, address)
            self.store.maps["source_ranges"].update(key, _u32(1))

    def _segment(self, segment: Segment) -> int:
        if not segment.backends:
            return BASE_DROP if segment.is_silent else BASE_REJECT
        base = self._next_slot
        self._next_slot += 1 + len(segment.backends)
        slots = self.store.maps["segments"]
        for number, backend in enumerate(segment.backends, start=1):
            slots.update(_u32(base + number), pack_backends(parse_address(backend.address), backend.port)[0])
        slots.update(_u32(base), pack_header(len(segment.backends), drop=False))
        return base

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Stay in the node's namespace, for many packets."""
        with netns.entered(self.node.netns):
            self._is_inside = True
            try:
                yield
            finally:
                self._is_inside = False

    def ingress(self, device: str, packet: Packet | bytes, **context: int) -> Ran:
        """Let a packet come in from a device: ``eth0``, ``eth1``, or the pod ``one`` or ``two``."""
        return self._run(PacketProgram.INGRESS, self.ifindex[device], packet, context)

    def egress(self, device: str, packet: Packet | bytes, **context: int) -> Ran:
        """Let a packet leave by a device."""
        return self._run(PacketProgram.EGRESS, self.ifindex[device], packet, context)

    def loopback(self, packet: Packet | bytes, **context: int) -> Ran:
        """Let the node send a packet to itself."""
        return self._run(PacketProgram.LOOPBACK, self.ifindex["lo"], packet, context)

    def _run(self, program: PacketProgram, ifindex: int, packet: Packet | bytes, context: dict[str, int]) -> Ran:
        repeat = context.pop("repeat", 1)
        with contextlib.nullcontext() if self._is_inside else netns.entered(self.node.netns):
            return run_program(self._programs[program], bytes(packet), Context(ifindex, **context), repeat)

    def flows(self) -> list[FlowEntry]:
        """Read conntrack."""
        return [read_flow(key, value) for key, value in self.store.maps["conntrack"].items()]

    def counted(self) -> dict[Counter, int]:
        """Say what was counted since the test began, or this was last asked; without zeros."""
        now = Tally(self.store.read_counters())
        new, self._counted = now - self._counted, now
        return dict(new)


@contextlib.contextmanager
def opened(
    node: Node, directory: Path, specs: tuple[MapSpec, ...], options: ProgramOptions | None = None
) -> Iterator[PacketPath]:
    """Make maps and programs in a directory of a bpffs, for a node that was furnished."""
    store = MapStore.open(directory, specs)
    try:
        programs = open_or_load(directory, store, specs, options or ProgramOptions())
        try:
            yield PacketPath(node, store, programs.packets)
        finally:
            programs.close()
    finally:
        store.close()


def read_flow(key: bytes, value: bytes) -> FlowEntry:
    """Read an entry of conntrack."""
    source, destination, source_port, destination_port, protocol, _ = TUPLE.packer.unpack(key)
    asked = _end(source, source_port), _end(destination, destination_port)
    source, destination, source_port, destination_port, service, _, device, flags = FLOW.packer.unpack(value)
    becomes = _end(source, source_port), _end(destination, destination_port)
    return FlowEntry(Protocol(protocol), asked, becomes, service, device, FlowFlag(flags))


def _end(address: bytes, port: bytes) -> End:
    return End(format_address(address), int.from_bytes(port, "big"))


def _keys(opened_map: bpf.Map) -> Iterator[bytes]:
    return (key for key, _ in opened_map.items())


def _prefix(network: str) -> tuple[int, bytes]:
    parsed = ipaddress.ip_network(network)
    return parsed.prefixlen + (96 if parsed.version == 4 else 0), parse_address(str(parsed.network_address))


def _u32(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)
