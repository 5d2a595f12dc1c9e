"""The layout shared with the BPF programs: structs by field, maps by kind.

``bpf/types.h`` is the truth; the loader reports what the compiler made of it and the agent compares the two before
it runs. Addresses and ports are kept in network byte order, everything else in the host's.
"""

from __future__ import annotations

import enum
import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agent.core.records import Protocol


class MapKind(enum.StrEnum):
    """The kinds of map, by the field's usual names."""

    HASH = "hash"
    ARRAY = "array"
    PERCPU_ARRAY = "percpu_array"
    LRU_HASH = "lru_hash"
    LPM_TRIE = "lpm_trie"
    RINGBUF = "ringbuf"
    PROG_ARRAY = "prog_array"


class Field(NamedTuple):
    """A struct member: size and offset in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A struct: its members in order, its size in bytes, and its packer."""

    name: str
    fields: tuple[Field, ...]
    packer: struct.Struct

    @property
    def size(self) -> int:
        """Bytes."""
        return self.packer.size

    def offset(self, name: str) -> int:
        """Find a member, in bytes from the beginning."""
        return next(member.offset for member in self.fields if member.name == name)


def _layout(name: str, **formats: str) -> Layout:
    fields: list[Field] = []
    offset = 0
    for field, form in formats.items():
        size = struct.calcsize("=" + form)
        fields.append(Field(field, offset, size))
        offset += size
    return Layout(name, tuple(fields), struct.Struct("=" + "".join(formats.values())))


# Ports are packed as two bytes already in network order (see port_bytes).
FRONTEND_KEY = _layout("frontend_key", address="16s", port="2s", protocol="B", pad="B")
FRONTEND = _layout("frontend", service="I", inside="I", outside="I", flags="I")
SLOT = _layout("slot", address="16s", port="2s", flags="H", count="I")
MAGLEV_SIZE = 16_381
"""Entries of a Maglev table; a prime, so that every walk comes by every entry."""
MAGLEV_BACKENDS = 1_024
"""How many backends a table is built for at most."""
MAGLEV_FREE = b"\xff\xff"
MAGLEV_TABLE = _layout("maglev_table", entries="32768s")
MAGLEV_WALK = _layout("maglev_walk", entry="Q", step="q", place="I", next="I")
MAGLEV_BUILD = _layout(
    "maglev_build",
    turn="I",
    filled="I",
    walks=f"{MAGLEV_BACKENDS * MAGLEV_WALK.size}s",
    table=f"{MAGLEV_TABLE.size}s",
)
ORIGIN = _layout("origin", cookie="Q", address="16s", port="2s", backend_port="2s", backend_word="4s")
PEER_KEY = _layout("peer_key", cookie="Q", address="16s", port="2s", pad="H", pad2="I")
PEER_ORIGIN = _layout("peer_origin", address="16s", port="2s", pad="H")
TUPLE = _layout(
    "tuple", source="16s", destination="16s", source_port="2s", destination_port="2s", protocol="B", pad="3s"
)
FLOW = _layout(
    "flow",
    source="16s",
    destination="16s",
    source_port="2s",
    destination_port="2s",
    service="I",
    seen="I",
    device="I",
    flags="I",
)
AFFINITY_KEY = _layout("affinity_key", client="16s", service="I")
AFFINITY = _layout("affinity", address="16s", port="2s", pad="H", slot="I", seen="I")
SOURCE_RANGE = _layout("source_range", prefix_bits="I", service="I", client="16s")
ADDRESS_RANGE = _layout("address_range", prefix_bits="I", address="16s")
ADDRESS = _layout("address", word="16s")
DEVICE = _layout("device", ipv4="16s", ipv6="16s", flags="I")
FRAGMENT_KEY = _layout("fragment_key", source="16s", destination="16s", id="I", protocol="B", place="B", pad="2s")
FRAGMENT = _layout("fragment", ports="4s", seen="I")
HELD = _layout("held", seen="I", size="I", is_taken="I", pad="I", frame="1536s")
SUBJECT = _layout("subject", identity="I", flags="I", since="I", device="I")
POLICY_KEY = _layout("policy_key", prefix_bits="I", subject="I", peer="I", direction="B", protocol="B", port="2s")
POLICY_ENTRY = _layout("policy_entry", rule="I", allowed="I")
POLICY_STATE = _layout("policy_state", generation="I", sample="I", is_strict="I", is_answered="I")
PASSAGE = _layout("passage", from_pod="I", to_pod="I")
QUESTION = _layout("question", subject="I", peer="16s", direction="B", protocol="B", port="2s")
VERDICT = _layout("verdict", question=f"{QUESTION.size}s", generation="I", peer="I", rule="I", allowed="I")
CONNECTION = _layout("connection", seen="I", flags="I", generation="8s", plain=f"{2 * PASSAGE.size}s")
POD_DEVICE = _layout("pod_device", ipv4="16s", ipv6="16s")
FLOW_EVENT = _layout(
    "flow_event",
    time="Q",
    tuple=f"{TUPLE.size}s",
    subject="I",
    peer="I",
    rule="I",
    device="I",
    allowed="B",
    direction="B",
    reason="B",
    flags="B",
    pad="I",
)
PACKET_SIZE = 76
WORK = _layout(
    "work",
    jiffies="Q",
    now="I",
    is_plain="I",
    packet=f"{PACKET_SIZE}s",
    has_back="I",
    event=f"{FLOW_EVENT.size}s",
    received=f"{FLOW_EVENT.size}s",
    subject=f"{SUBJECT.size}s",
    generation="I",
    has_flow="I",
    is_read="I",
    flow=f"{FLOW.size}s",
    reply=f"{FLOW.size}s",
    affinity=f"{AFFINITY.size}s",
    held=f"{HELD.size}s",
)
NOTHING = _layout("nothing")
"""The key and value of a ring buffer."""
U32 = _layout("u32", value="I")
U64 = _layout("u64", value="Q")

PEER_ANY = 0
"""In policy: whoever has no entries of its own there."""
PEER_WORLD = 1
"""No pod, and in no block that a policy names."""
FIRST_IDENTITY = 16
"""The least number that is given out."""
VERDICT_BITS = 10
"""How many answers of policy each CPU keeps, as a power of two; 40 bytes each."""
POLICY_BASE_BITS = 72
POLICY_PROTOCOL_BITS = 80
POLICY_PORT_BITS = 96
CONNECTION_TURNED = 0x1000
"""The greater end of a connection began it."""
SEGMENT_DROP = 1
DEVICE_PODS = 1
"""What comes in by a device comes from the cluster's pods."""
DEVICE_PORT = 2
"""It is a port of a bridge: what it takes in may be for the bridge."""
BASE_REJECT = 0
BASE_DROP = 1
FIRST_FREE_SLOT = 2
HELD_FRAGMENTS = 64
"""How many fragments wait at most for the first of their packet; 1.5 KiB each."""
POD_RANGE_PODS = 1
"""What comes from a range comes from the cluster's pods."""
POD_RANGE_OWN = 2
"""It is this node's pods that a range is of."""
POD_RANGE_UNKNOWN = 4
"""A whole family, where nobody says which of its addresses are the pods'."""
POD_RANGES = 64
"""How many ranges of pods a cluster may have, and a node."""
_WHOLE_FAMILIES = 2
"""Room in ``pod_ranges`` for an entry that stands for a whole family."""


class FrontendKind(enum.IntEnum):
    """What a frontend is of its Service (``enum frontend_kind``)."""

    CLUSTER_IP = 1
    NODE_PORT = 2
    EXTERNAL_IP = 3
    LOAD_BALANCER = 4
    RESERVED = 5
    """A ClusterIP itself (port 0, protocol 0) or a NodePort itself (address zero): refused, never forwarded."""


class FrontendFlag(enum.IntFlag):
    """``FRONTEND_*``, above the bits of the kind."""

    EXTERNAL_LOCAL = 0x008
    SOURCE_RANGES = 0x010
    MASQUERADE = 0x020
    DSR = 0x040
    MAGLEV = 0x080


FRONTEND_KIND_MASK = 0x007
FRONTEND_TIMEOUT_SHIFT = 12
"""Above the flags there is the timeout of affinity."""
BACKEND_END_SIZE = 18
"""What of a backend's slot is its address and port."""


class FlowFlag(enum.IntFlag):
    """``FLOW_*``: the state of one way of a tracked flow."""

    REPLY = 0x001
    AT_EGRESS = 0x002
    MASQUERADED = 0x004
    REPLIED = 0x008
    ESTABLISHED = 0x010
    FIN = 0x020
    PEER_FIN = 0x040
    CLOSED = 0x080
    DSR = 0x100


class SubjectFlag(enum.IntFlag):
    """``SUBJECT_*``."""

    INGRESS = 1
    EGRESS = 2
    FAIL_CLOSED = 4
    FAIL_OPEN = 8


class Direction(enum.IntEnum):
    """Seen from the subject (``enum direction``)."""

    INGRESS = 0
    EGRESS = 1


class Reason(enum.IntEnum):
    """Why a packet was dropped, or a connection allowed (``enum verdict_reason``)."""

    POLICY = 0
    SPOOFED = 1
    HELD = 2
    OVERFLOW = 3
    UNREADABLE = 4
    UNTRACKED = 5


POLICY_COUNTERS = len(Direction) * len(Reason) * 2 + 1
"""Indexes are (direction * reasons + reason) * 2 + allowed; the last counts events that were lost."""


class Stage(enum.IntEnum):
    """Indexes of ``stages`` (``enum stage``)."""

    FROM_POD = 0
    TO_POD = 1


class Counter(enum.IntEnum):
    """Indexes of the ``counters`` map (``enum counter``)."""

    REJECTED = 0
    DROPPED = 1
    ORIGIN_SPILLED = 2
    ORIGIN_LOST = 3
    UNDEFINED_PORT = 4
    SOURCE_RANGE = 5
    NODE_PORT_TAKEN = 6
    FRAGMENT_LOST = 7
    SOURCE_NAT_EXHAUSTED = 8
    CONNTRACK_FULL = 9
    NO_ROUTE = 10
    TOO_BIG = 11
    TTL_EXCEEDED = 12
    WRITE_FAILED = 13
    FLOWS = 14
    STAGE_MISSED = 15


@dataclass(frozen=True, slots=True)
class MapSpec:
    """A map: its kind, layouts and capacity. ``carries_over``: what sockets and connections have is kept."""

    name: str
    kind: MapKind
    key: Layout
    value: Layout
    max_entries: int
    carries_over: bool = False


@dataclass(frozen=True, slots=True)
class MapSizes:
    """Capacities, in entries; by default those of a node with two CPUs. ``socket_origins`` is a power of two."""

    frontends: int = 32_768
    segments: int = 131_072
    socket_origins: int = 16_384
    peer_origins: int = 4_096
    conntrack: int = 98_304
    affinity: int = 4_096
    source_ranges: int = 16_384
    fragments: int = 1_024
    node_addresses: int = 1_024
    devices: int = 1_024
    maglev_tables: int = 4
    """Of 32 KiB each; 0 = none."""
    identities: int = 1
    """This and what follows: one entry each, where there is no policy."""
    blocks: int = 1
    policy: int = 1
    subjects: int = 1
    connections: int = 1
    events: int = 4_096
    """Bytes, a power of two and of whole pages."""


def map_specs(sizes: MapSizes) -> tuple[MapSpec, ...]:
    """Every map of ``bpf/maps.h``, at these sizes."""
    return (
        MapSpec("frontends", MapKind.HASH, FRONTEND_KEY, FRONTEND, sizes.frontends),
        MapSpec("segments", MapKind.ARRAY, U32, SLOT, sizes.segments),
        MapSpec("socket_origins", MapKind.ARRAY, U32, ORIGIN, sizes.socket_origins, carries_over=True),
        MapSpec("peer_origins", MapKind.LRU_HASH, PEER_KEY, PEER_ORIGIN, sizes.peer_origins, carries_over=True),
        MapSpec("conntrack", MapKind.LRU_HASH, TUPLE, FLOW, sizes.conntrack, carries_over=True),
        MapSpec("affinity", MapKind.LRU_HASH, AFFINITY_KEY, AFFINITY, sizes.affinity),
        MapSpec("source_ranges", MapKind.LPM_TRIE, SOURCE_RANGE, U32, sizes.source_ranges),
        MapSpec("pod_ranges", MapKind.LPM_TRIE, ADDRESS_RANGE, U32, 2 * POD_RANGES + _WHOLE_FAMILIES),
        MapSpec("node_addresses", MapKind.HASH, ADDRESS, U32, sizes.node_addresses),
        MapSpec("devices", MapKind.HASH, U32, DEVICE, sizes.devices),
        MapSpec("fragments", MapKind.LRU_HASH, FRAGMENT_KEY, FRAGMENT, sizes.fragments),
        MapSpec("held_fragments", MapKind.LRU_HASH, FRAGMENT_KEY, HELD, HELD_FRAGMENTS),
        MapSpec("maglev_tables", MapKind.ARRAY, U32, MAGLEV_TABLE, max(sizes.maglev_tables, 1)),
        MapSpec("maglev_builds", MapKind.ARRAY, U32, MAGLEV_BUILD, 1),
        MapSpec("identities", MapKind.HASH, ADDRESS, U32, sizes.identities),
        MapSpec("blocks", MapKind.LPM_TRIE, ADDRESS_RANGE, U32, sizes.blocks),
        MapSpec("policy", MapKind.LPM_TRIE, POLICY_KEY, POLICY_ENTRY, sizes.policy),
        MapSpec("verdicts", MapKind.PERCPU_ARRAY, U32, VERDICT, 1 << VERDICT_BITS if sizes.policy > 1 else 1),
        MapSpec("subjects", MapKind.HASH, ADDRESS, SUBJECT, sizes.subjects),
        MapSpec("pod_devices", MapKind.HASH, U32, POD_DEVICE, sizes.subjects),
        MapSpec("policy_states", MapKind.ARRAY, U32, POLICY_STATE, 1, carries_over=True),
        MapSpec("connections", MapKind.LRU_HASH, TUPLE, CONNECTION, sizes.connections, carries_over=True),
        MapSpec("policy_counters", MapKind.PERCPU_ARRAY, U32, U64, POLICY_COUNTERS, carries_over=True),
        MapSpec("events", MapKind.RINGBUF, NOTHING, NOTHING, sizes.events),
        MapSpec("stages", MapKind.PROG_ARRAY, U32, U32, len(Stage)),
        MapSpec("works", MapKind.PERCPU_ARRAY, U32, WORK, 1),
        MapSpec("counters", MapKind.PERCPU_ARRAY, U32, U64, len(Counter), carries_over=True),
    )


def layout_id(specs: tuple[MapSpec, ...]) -> str:
    """Name a set of maps by what it looks like: any change of layout or size changes it. 12 hexadecimal digits."""
    description = repr([(s.name, s.kind.value, s.key.fields, s.value.fields, s.max_entries) for s in specs])
    return hashlib.sha256(description.encode()).hexdigest()[:12]


def port_bytes(port: int) -> bytes:
    """Write a port in network byte order."""
    return port.to_bytes(2, "big")


def pack_frontend_key(address: bytes, port: int, protocol: int) -> bytes:
    """Lay out as ``struct frontend_key``."""
    return FRONTEND_KEY.packer.pack(address, port_bytes(port), protocol, 0)


def pack_reserved_key(address: bytes) -> bytes:
    """Lay out as ``struct frontend_key`` what stands for an address itself, whatever the port and protocol."""
    return address + _NO_PORT


_NO_PORT = bytes(FRONTEND_KEY.size - 16)
_PROTOCOL_NAMES = {int(protocol): protocol.name for protocol in Protocol}


class FrontendKey(NamedTuple):
    """What a client asks for; ``address`` is 16 bytes, ``protocol`` a Protocol, or 0 of a ClusterIP itself."""

    address: bytes
    port: int
    protocol: int

    @property
    def protocol_name(self) -> str:
        """The protocol as Kubernetes writes it; a number where it has no name there."""
        return _PROTOCOL_NAMES.get(self.protocol, str(self.protocol))

    def pack(self) -> bytes:
        """Lay out as ``struct frontend_key``."""
        return pack_frontend_key(*self)

    @classmethod
    def unpack(cls, raw: bytes) -> FrontendKey:
        """Read a ``struct frontend_key``."""
        address, port, protocol, _ = FRONTEND_KEY.packer.unpack(raw)
        return cls(address, int.from_bytes(port, "big"), protocol)


_KINDS = {int(kind): kind for kind in FrontendKind}
_FRONTEND_FLAGS = (1 << FRONTEND_TIMEOUT_SHIFT) - 1


def pack_frontend(service: int, inside: int, outside: int, affinity_timeout: int = 0, flags: int = 0) -> bytes:
    """Lay out as ``struct frontend``. ``affinity_timeout`` in seconds, 0 = none."""
    return FRONTEND.packer.pack(service, inside, outside, affinity_timeout << FRONTEND_TIMEOUT_SHIFT | flags)


class Frontend(NamedTuple):
    """What a frontend leads to."""

    service: int
    inside: int
    outside: int
    affinity_timeout: int = 0
    flags: int = 0

    @property
    def kind(self) -> FrontendKind | None:
        """What it is of its Service; None = nothing that an agent writes."""
        return _KINDS.get(self.flags & FRONTEND_KIND_MASK)

    def pack(self) -> bytes:
        """Lay out as ``struct frontend``."""
        return pack_frontend(*self)

    @classmethod
    def unpack(cls, raw: bytes) -> Frontend:
        """Read a ``struct frontend``."""
        service, inside, outside, word = FRONTEND.packer.unpack(raw)
        return cls(service, inside, outside, word >> FRONTEND_TIMEOUT_SHIFT, word & _FRONTEND_FLAGS)


SERVICE_BITS = 32
"""What of a key of ``source_ranges`` is the service."""


def pack_source_range(service: int, address: bytes, prefix_bits: int) -> bytes:
    """Lay out as ``struct source_range``; ``prefix_bits`` of the address's 128."""
    return SOURCE_RANGE.packer.pack(SERVICE_BITS + prefix_bits, service, address)


def unpack_source_range(raw: bytes) -> tuple[int, bytes, int]:
    """Read a ``struct source_range``: the service, the address and how many of its bits count."""
    bits, service, address = SOURCE_RANGE.packer.unpack(raw)
    return service, address, bits - SERVICE_BITS


def pack_backends(addresses: bytes, port: int) -> list[bytes]:
    """Lay out endpoints (16-byte addresses, end to end) that share a port as one ``struct slot`` each."""
    tail = port_bytes(port) + bytes(6)
    return [addresses[i : i + 16] + tail for i in range(0, len(addresses), 16)]


def unpack_backend(raw: bytes) -> tuple[bytes, int]:
    """Read a backend's 16-byte address and port."""
    return raw[:16], int.from_bytes(raw[16:18], "big")


class Header(NamedTuple):
    """What a segment begins with: how many backends it has, and whether it is silent where it has none.

    ``table``: the number of its Maglev table; 0 = none.
    """

    backends: int
    drop: bool
    table: int = 0


def pack_header(count: int, *, drop: bool, table: int = 0) -> bytes:
    """Lay out the header of a segment."""
    number = table.to_bytes(2, sys.byteorder)
    return SLOT.packer.pack(bytes(16), number, SEGMENT_DROP if drop else 0, count)


def unpack_header(raw: bytes) -> Header:
    """Read a header."""
    _, number, flags, count = SLOT.packer.unpack(raw)
    return Header(count, bool(flags & SEGMENT_DROP), int.from_bytes(number, sys.byteorder))


class Walk(NamedTuple):
    """A backend's way through a Maglev table: where it begins, by what steps; and its place in the segment."""

    offset: int
    skip: int
    place: int


def pack_maglev_build(walks: Sequence[Walk]) -> bytes:
    """Lay out a table that is to be built; at least one walk, at most MAGLEV_BACKENDS."""
    fields: list[int] = []
    for turn, walk in enumerate(walks, start=1):
        fields += (walk.offset, walk.skip - MAGLEV_SIZE, walk.place, turn % len(walks))
    ways = struct.pack("=" + "QqII" * len(walks), *fields)
    return MAGLEV_BUILD.packer.pack(0, 0, ways, MAGLEV_FREE * (MAGLEV_TABLE.size // 2))


def maglev_table_of(build: bytes) -> bytes:
    """Cut the table out of what was built."""
    return build[-MAGLEV_TABLE.size :]


def unpack_maglev_table(raw: bytes) -> array[int]:
    """Read a table: for each entry a place in the segment."""
    return array("H", raw[: 2 * MAGLEV_SIZE])
