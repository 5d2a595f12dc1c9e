"""A node for policy's programs: what the agent would have written of pods, identities and rules, a test writes.

The pod ``one`` is the subject: identity ONE, both directions isolated, nothing allowed, unless a test says otherwise.
"""

from __future__ import annotations

import contextlib
import ipaddress
import mmap
import struct
from array import array
from collections import Counter as Tally
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scapy.packet import Packet

from agent.core.abi import (
    ADDRESS_RANGE,
    CONNECTION,
    CONNECTION_TURNED,
    FLOW_EVENT,
    PEER_ANY,
    POD_DEVICE,
    POD_RANGE_OWN,
    POLICY_BASE_BITS,
    POLICY_COUNTERS,
    POLICY_ENTRY,
    POLICY_KEY,
    POLICY_PORT_BITS,
    POLICY_PROTOCOL_BITS,
    POLICY_STATE,
    QUESTION,
    SUBJECT,
    TUPLE,
    VERDICT,
    Direction,
    FlowFlag,
    MapSpec,
    Reason,
    SubjectFlag,
)
from agent.core.addresses import format_address, parse_address
from agent.kernel.maps import MapStore
from agent.kernel.programs import PacketProgram, ProgramOptions, fill_stages, open_or_load
from tests.bpf import packet_path as at
from tests.bpf.harness import TC_ACT_SHOT, TC_ACT_UNSPEC, Ran
from tests.bpf.packet_path import PacketPath
from tests.bpf.packets import End, difference
from tests.lab.lab import Node

ONE, TWO, REMOTE, BLOCK = 100, 200, 300, 400
"""Identities: of the pods of this node, of one of another node, of a block of addresses."""
ISOLATED = SubjectFlag.INGRESS | SubjectFlag.EGRESS
NUMBERS = {"icmp": 1, "tcp": 6, "udp": 17, "gre": 47, "icmpv6": 58, "sctp": 132}
_LINE = 8  # bytes that a record of the ring is led by, and a multiple of which it takes
_BUSY, _DISCARDED = 1 << 31, 1 << 30
_CLEARED = ("identities", "blocks", "policy", "subjects", "pod_devices", "connections")


class Told(NamedTuple):
    """An event."""

    source: End
    destination: End
    protocol: int
    subject: int
    peer: int
    rule: int
    device: int
    allowed: bool
    direction: Direction
    reason: Reason
    flags: int
    time: int


class Known(NamedTuple):
    """An entry of connections: the end that began it, the other; generations of its verdicts by direction."""

    began: End
    other: End
    protocol: int
    ingress: int
    egress: int
    flags: FlowFlag
    seen: int


class Events:
    """What the ring buffer has to tell."""

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self._size = size
        self._consumer = mmap.mmap(fd, page)
        self._producer = mmap.mmap(fd, page + 2 * size, prot=mmap.PROT_READ, offset=page)
        self._data = page

    def read(self) -> list[Told]:
        """Take what was told since it was last read."""
        at_, end = (int.from_bytes(page[:8], "little") for page in (self._consumer, self._producer))
        told = []
        while at_ < end:
            start = self._data + at_ % self._size
            (length,) = struct.unpack_from("=I", self._producer, start)
            assert not length & _BUSY
            size = length & ~_DISCARDED
            if size == length:
                told.append(_told(self._producer[start + _LINE : start + _LINE + size]))
            at_ += _LINE + (size + _LINE - 1) // _LINE * _LINE
        self._consumer[:8] = at_.to_bytes(8, "little")
        return told

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()


class PolicyPath(PacketPath):
    """The programs of pods' devices, with all that policy asks."""

    def __init__(self, node: Node, store: MapStore, programs: dict[PacketProgram, int]) -> None:
        self.events = Events(store.maps["events"].fd, store.maps["events"].info.max_entries)
        self._totals: Tally[tuple[Direction, Reason, bool]] = Tally()
        self.generation = 0
        super().__init__(node, store, programs)

    def clear(self) -> None:
        """Begin anew: the pod ``one`` isolated, nothing allowed, no connection known."""
        super().clear()
        for name in _CLEARED:
            for key in [key for key, _ in self.store.maps[name].items()]:
                self.store.maps[name].delete(key)
        self.generation += 2  # nothing counts that was answered before
        self.set_state()
        self.subject(at.POD_ONE, ONE, device="one")
        for address, number in zip(at.POD_TWO + at.REMOTE_POD, (TWO, TWO, REMOTE, REMOTE), strict=True):
            self.identify(address, number)
        for direction in Direction:
            self.rule(direction, PEER_ANY, allowed=False, number=0)
        for number in (0, 1):
            network = ipaddress.ip_network(f"{at.POD_ONE[number]}/{(24, 64)[number]}", strict=False)
            bits = network.prefixlen + (96 if network.version == 4 else 0)
            key = ADDRESS_RANGE.packer.pack(bits, parse_address(str(network.network_address)))
            self.store.maps["pod_ranges"].update(key, at._u32(1 | POD_RANGE_OWN))
        self.device("one", at.POD_ONE)
        self.events.read()
        self._totals = self._read_totals()

    def set_state(self, *, sample: int = 1, is_strict: bool = False, is_answered: bool = False) -> None:
        """Say how policy is to be; every connection that begins is told."""
        self._settings = (sample, is_strict, is_answered)
        value = POLICY_STATE.packer.pack(self.generation, sample, is_strict, is_answered)
        self.store.maps["policy_states"].update(bytes(4), value)

    def raise_generation(self, by: int = 2) -> None:
        """Have every verdict taken again; while it is odd the maps are being written."""
        self.generation += by
        sample, is_strict, is_answered = self._settings
        self.set_state(sample=sample, is_strict=is_strict, is_answered=is_answered)

    def subject(
        self,
        addresses: tuple[str, ...],
        identity: int,
        flags: SubjectFlag = ISOLATED,
        since: int = 0,
        *,
        device: str = "",
    ) -> None:
        """Say who is subject to policy, and behind which device, if that is known; it is a peer by the same number."""
        value = SUBJECT.packer.pack(identity, flags, since, self.ifindex[device] if device else 0)
        for address in addresses:
            self.store.maps["subjects"].update(parse_address(address), value)
            self.identify(address, identity)

    def release(self, addresses: tuple[str, ...]) -> None:
        """Say that addresses are nobody's."""
        for address in addresses:
            self.store.maps["subjects"].delete(parse_address(address))

    def identify(self, address: str, number: int) -> None:
        """Say whose an address is."""
        self.store.maps["identities"].update(parse_address(address), at._u32(number))
        self.raise_generation()

    def block(self, network: str, number: int) -> None:
        """Say which identity addresses of a prefix have that are no pod's."""
        bits, address = at._prefix(network)
        self.store.maps["blocks"].update(ADDRESS_RANGE.packer.pack(bits, address), at._u32(number))
        self.raise_generation()

    def device(self, name: str, addresses: tuple[str, str] | None) -> None:
        """Say which pod is behind a device; None = nobody knows."""
        key = at._u32(self.ifindex[name])
        if addresses is None:
            self.store.maps["pod_devices"].delete(key)
            return
        packed = [parse_address(address) if address else bytes(16) for address in addresses]
        self.store.maps["pod_devices"].update(key, POD_DEVICE.packer.pack(*packed))

    def rule(
        self,
        direction: Direction,
        peer: int,
        protocol: str = "",
        port: int = 0,
        bits: int = 16,
        *,
        subject: int = ONE,
        allowed: bool = True,
        number: int = 7,
        moves: bool = True,
    ) -> None:
        """Write an entry of policy: for a port prefix of ``bits``, or with ``bits`` 0 a protocol, or for everything.

        With ``moves`` the generation moves, too. A subject and peer that have nothing for everything yet get a denial.
        """
        entries = self.store.maps["policy"]
        base = POLICY_KEY.packer.pack(POLICY_BASE_BITS, subject, peer, direction, 0, bytes(2))
        key = base
        if protocol:
            prefix = POLICY_PROTOCOL_BITS + bits
            assert prefix <= POLICY_PORT_BITS
            key = POLICY_KEY.packer.pack(prefix, subject, peer, direction, NUMBERS[protocol], port.to_bytes(2, "big"))
            if not any(found == base for found, _ in entries.items()):
                entries.update(base, POLICY_ENTRY.packer.pack(0, 0))
        entries.update(key, POLICY_ENTRY.packer.pack(number, allowed))
        if moves:
            self.raise_generation()

    def chain(self) -> None:
        """Say where programs go on, as opening them does."""
        fill_stages(self._programs, self.store)

    def from_pod(self, sent: Packet | bytes, device: str = "one", **context: int) -> Ran:
        """Let a pod send a packet."""
        return self._run(PacketProgram.FROM_POD, self.ifindex[device], sent, context)

    def to_pod(self, sent: Packet | bytes, device: str = "one", **context: int) -> Ran:
        """Let a packet go to a pod."""
        return self._run(PacketProgram.TO_POD, self.ifindex[device], sent, context)

    def connections(self) -> list[Known]:
        """Read what is known of connections."""
        return sorted(_known(key, value) for key, value in self.store.maps["connections"].items())

    def forget_connections(self) -> None:
        """Have no connection be known."""
        connections = self.store.maps["connections"]
        for key in [key for key, _ in connections.items()]:
            connections.delete(key)

    def age(self, seconds: int) -> None:
        """Let what is known of connections be older."""
        connections = self.store.maps["connections"]
        for key, value in [*connections.items()]:
            seen = int.from_bytes(value[:4], "little") - seconds
            connections.update(key, (seen % (1 << 32)).to_bytes(4, "little") + value[4:])

    def answered(self) -> set[int]:
        """Say where answers of this generation are kept, on whatever CPU."""
        kept = ((key, array("I", value)) for key, value in self.store.maps["verdicts"].items())
        return {
            int.from_bytes(key, "little")
            for key, words in kept
            if self.generation in words[QUESTION.size // 4 :: VERDICT.size // 4]
        }

    def told(self) -> list[Told]:
        """Say what was told since this was last asked."""
        return self.events.read()

    def judged(self) -> dict[tuple[Direction, Reason, bool], int]:
        """Say what was counted since the test began, or this was last asked; without zeros."""
        now = self._read_totals()
        new, self._totals = now - self._totals, now
        return dict(new)

    def lost(self) -> int:
        """Say how many events were ever lost."""
        return self._total(POLICY_COUNTERS - 1)

    def _read_totals(self) -> Tally[tuple[Direction, Reason, bool]]:
        return Tally(
            {
                (direction, reason, bool(allowed)): self._total((direction * len(Reason) + reason) * 2 + allowed)
                for direction in Direction
                for reason in Reason
                for allowed in (0, 1)
            }
        )

    def _total(self, index: int) -> int:
        raw = self.store.maps["policy_counters"].lookup(at._u32(index)) or b""
        return sum(struct.unpack(f"={len(raw) // 8}Q", raw))


@contextlib.contextmanager
def opened(node: Node, directory: Path, specs: tuple[MapSpec, ...], options: ProgramOptions) -> Iterator[PolicyPath]:
    """Make maps and programs with policy, for a node that was furnished."""
    store = MapStore.open(directory, specs)
    with contextlib.closing(store):
        programs = open_or_load(directory, store, specs, options)
        with contextlib.closing(programs):
            path = PolicyPath(node, store, programs.packets)
            with contextlib.closing(path.events):
                yield path


def fault_of_pass(ran: Ran, expected: Packet) -> str:
    """Say how what became of a packet differs from its having been let pass, as what is expected; empty: in nothing."""
    if ran.verdict != TC_ACT_UNSPEC:
        return f"verdict {ran.verdict}"
    return difference(ran.packet, expected)


def is_dropped(ran: Ran) -> bool:
    """Whether a packet was dropped."""
    return ran.verdict == TC_ACT_SHOT


def _told(raw: bytes) -> Told:
    time, key, subject, peer, rule, device, allowed, direction, reason, flags, _ = FLOW_EVENT.packer.unpack(raw)
    source, destination, protocol = _ends(key)
    return Told(
        *(source, destination, protocol, subject, peer, rule, device),
        *(bool(allowed), Direction(direction), Reason(reason), flags, time),
    )


def _ends(key: bytes) -> tuple[End, End, int]:
    source, destination, source_port, destination_port, protocol, _ = TUPLE.packer.unpack(key)
    return _end(source, source_port), _end(destination, destination_port), protocol


def _end(address: bytes, port: bytes) -> End:
    return End(format_address(address), int.from_bytes(port, "big"))


def _order(port: bytes, address: bytes) -> tuple[int, ...]:
    """Rank an end as the programs do, by numbers of the machine's."""
    return struct.unpack("=H4I", port + address)


def _known(key: bytes, value: bytes) -> Known:
    lesser, greater, protocol = _ends(key)
    assert _order(key[32:34], key[:16]) <= _order(key[34:36], key[16:32]), "the lesser end comes first"
    seen, flags, generations, _ = CONNECTION.packer.unpack(value)
    ingress, egress = struct.unpack("=II", generations)
    ends = (greater, lesser) if flags & CONNECTION_TURNED else (lesser, greater)
    return Known(*ends, protocol, ingress, egress, FlowFlag(flags & ~CONNECTION_TURNED), seen)
