"""Tracked flows: what their entries say, which are over, and which UDP ones lead to a backend that is gone.

A flow is a pair of entries, one for each way (``struct flow``). A pair lives by its younger side and by what both sides
say of its state; an entry whose pair was evicted lives by itself.
Source: nf_conntrack's states and kube-proxy's defaults for them; the programs judge alike (``bpf/conntrack.h``).
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from agent.core.abi import FLOW, TUPLE, FlowFlag
from agent.core.plan import Placement
from agent.core.records import ObjectKey, Protocol

_FLAGS = range(2 * max(FlowFlag))
_FLAGS_MASK = len(_FLAGS) - 1
_ENDS = FlowFlag.FIN | FlowFlag.PEER_FIN
ELSEWHERE = 0
"""The service id of flows that another node translated (DSR): that node knows what is gone."""
_UDP, _REPLY = int(Protocol.UDP), int(FlowFlag.REPLY)
_PROTOCOL = TUPLE.offset("protocol")
# A flow has members of 32 bits, or that can be walked over as such.
_WORDS, _SEEN, _FLOW_FLAGS = FLOW.size // 4, FLOW.offset("seen") // 4, FLOW.offset("flags") // 4


class State(enum.StrEnum):
    """How far a flow has come."""

    UNREPLIED = "unreplied"
    """Nobody has answered, or (TCP) the client has not answered the answer."""
    ESTABLISHED = "established"
    HALF_CLOSED = "half-closed"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds without a packet after which a flow is over. SCTP is as TCP."""

    tcp_established_s: int = 86_400
    tcp_close_wait_s: int = 3_600
    tcp_unreplied_s: int = 60
    tcp_closed_s: int = 10
    udp_s: int = 30
    udp_stream_s: int = 120

    def of(self, protocol: int, state: State) -> int:
        """Choose the one for a flow."""
        if protocol == Protocol.UDP:
            return self.udp_s if state is State.UNREPLIED else self.udp_stream_s
        match state:
            case State.UNREPLIED:
                return self.tcp_unreplied_s
            case State.ESTABLISHED:
                return self.tcp_established_s
            case State.HALF_CLOSED:
                return self.tcp_close_wait_s
            case State.CLOSED:
                return self.tcp_closed_s


def state_of(protocol: int, flags: int) -> State:
    """Read the state off an entry's flags, or off both sides' (``merged``)."""
    if protocol != Protocol.UDP:
        if flags & FlowFlag.CLOSED or flags & _ENDS == _ENDS:
            return State.CLOSED
        if flags & _ENDS:
            return State.HALF_CLOSED
    # SCTP has no packet that every established flow begins with; with DSR, that the client acknowledged has to do.
    has_handshake = protocol == Protocol.TCP and not flags & FlowFlag.DSR
    enough = FlowFlag.ESTABLISHED if has_handshake else FlowFlag.REPLIED
    return State.ESTABLISHED if flags & enough else State.UNREPLIED


def merged(flags: int, pair: int) -> int:
    """Join what the two sides of a flow say of it, as seen from the first."""
    flags |= pair & ~(_ENDS | FlowFlag.REPLY)
    if pair & FlowFlag.FIN:
        flags |= FlowFlag.PEER_FIN
    if pair & FlowFlag.PEER_FIN:
        flags |= FlowFlag.FIN
    return flags


class Flow(NamedTuple):
    """An entry: packets of ``source`` to ``destination`` become those of ``new_source`` to ``new_destination``.

    Ends are an address and a port, 18 bytes in network order.
    """

    key: bytes
    protocol: int
    source: bytes
    destination: bytes
    new_source: bytes
    new_destination: bytes
    service: int
    seen: int
    device: int
    flags: int

    @classmethod
    def unpack(cls, key: bytes, value: bytes) -> Flow:
        """Read a ``struct tuple`` and its ``struct flow``."""
        source, destination, source_port, destination_port, protocol, _ = TUPLE.packer.unpack(key)
        new_source, new_destination, new_source_port, new_destination_port, *rest = FLOW.packer.unpack(value)
        return cls(
            key,
            protocol,
            source + source_port,
            destination + destination_port,
            new_source + new_source_port,
            new_destination + new_destination_port,
            *rest,
        )

    @property
    def is_reply(self) -> bool:
        """Whether this is the way back."""
        return bool(self.flags & FlowFlag.REPLY)

    @property
    def client(self) -> bytes:
        """Who began it."""
        return self.new_destination if self.is_reply else self.source

    @property
    def frontend(self) -> bytes:
        """What the client asked for."""
        return self.new_source if self.is_reply else self.destination

    @property
    def backend(self) -> bytes:
        """What it got."""
        return self.source if self.is_reply else self.new_destination

    @property
    def backend_sees(self) -> bytes:
        """Who the backend takes for the client."""
        return self.destination if self.is_reply else self.new_source

    @property
    def pair_key(self) -> bytes:
        """The tuple of the other way."""
        source, destination = self.new_destination, self.new_source
        return b"".join((source[:16], destination[:16], source[16:], destination[16:], self.key[_PROTOCOL:]))

    def is_pair_of(self, other: Flow) -> bool:
        """Whether both are one flow; a tuple may have been taken by another since."""
        return self.pair_key == other.key and other.pair_key == self.key


Losses = Mapping[bytes, frozenset[bytes] | None]
"""By frontend (18 bytes), the backends that it no longer has; None = any that it ever had."""


@dataclass(slots=True)
class UdpServices:
    """The serving backends of every UDP frontend, all of them ends of 18 bytes. Few are UDP, so this is small."""

    serving_at: dict[bytes, frozenset[bytes]] = field(default_factory=dict)
    _of: dict[ObjectKey, dict[bytes, frozenset[bytes]]] = field(default_factory=dict)
    """The same, by Service."""

    def note(self, key: ObjectKey, placements: Iterable[Placement]) -> dict[bytes, frozenset[bytes]]:
        """Take in what one Service has now; returns what its frontends lost, whatever their ports are called."""
        now = {end: serving for ends, serving in _udp_ports(placements) for end in ends}
        before = self._of.get(key, {})
        if now == before:
            return {}
        lost = {end: serving - now.get(end, frozenset()) for end, serving in before.items()}
        for end, serving in before.items():
            if self.serving_at.get(end) is serving:  # another Service may have it by now
                del self.serving_at[end]
        self.serving_at.update(now)
        if now:
            self._of[key] = now
        else:
            del self._of[key]
        return {end: gone for end, gone in lost.items() if gone}

    def missing(self, keys: Container[ObjectKey]) -> list[ObjectKey]:
        """List the Services noted that are not among these."""
        return [key for key in self._of if key not in keys]


def _udp_ports(placements: Iterable[Placement]) -> Iterator[tuple[frozenset[bytes], frozenset[bytes]]]:
    for placement in placements:
        if placement.port.protocol is Protocol.UDP and placement.serving is not None:
            yield udp_ends(placement.frontends), placement.serving


def udp_ends(frontends: Iterable[bytes]) -> frozenset[bytes]:
    """Take address and port of those packed frontend keys that are UDP's."""
    return frozenset(key[:18] for key in frontends if key[18] == Protocol.UDP)


@lru_cache(2)
def _limits(timeouts: Timeouts) -> dict[int, list[int]]:
    """Tabulate, by protocol and flags, how long an entry may be silent; what is no protocol goes as TCP does."""
    known = {int(p): [timeouts.of(p, state_of(p, flags)) for flags in _FLAGS] for p in Protocol}
    return dict.fromkeys(range(256), known[Protocol.TCP]) | known


class Sweep:
    """Which entries are over at one moment, ``now`` in seconds of the monotonic clock.

    With ``services``, also which UDP entries lead to a backend that does not serve their frontend, or come through one
    that no Service has any longer. ``spared``: ids of services of whose frontends nothing is known for certain.
    """

    def __init__(
        self, timeouts: Timeouts, now: int, services: UdpServices | None = None, spared: Container[int] = ()
    ) -> None:
        self._limits = _limits(timeouts)
        self._now = now
        self._services = services
        self._spared = spared
        tables = {int(protocol): [now - limit for limit in self._limits[protocol]] for protocol in Protocol}
        self._cutoffs = dict.fromkeys(range(256), tables[Protocol.TCP]) | tables

    def suspects(self, keys: bytes, values: bytes, count: int) -> list[bytes]:
        """Choose the entries of a batch that are over, judged by themselves, by key; ``is_over`` decides.

        The batch is never unpacked, only columns of it are walked: about 80 ns an entry, 800 ns one of UDP.
        """
        protocols = keys[_PROTOCOL : count * TUPLE.size : TUPLE.size]
        words = memoryview(values)[: count * FLOW.size].cast("I")
        columns = enumerate(zip(protocols, words[_SEEN::_WORDS], words[_FLOW_FLAGS::_WORDS], strict=True))
        cutoffs = self._cutoffs
        # Seen before the cutoff of its protocol and state.
        chosen = [i for i, (protocol, seen, flags) in columns if seen < cutoffs[protocol][flags & _FLAGS_MASK]]
        if self._services is not None:
            there = [
                i
                for i, (protocol, flags) in enumerate(zip(protocols, words[_FLOW_FLAGS::_WORDS], strict=True))
                if protocol == _UDP and not flags & _REPLY
            ]
            chosen += self._sticking(keys, values, there) - set(chosen)
        return [keys[i * TUPLE.size : (i + 1) * TUPLE.size] for i in chosen]

    def _sticking(self, keys: bytes, values: bytes, indexes: Iterable[int]) -> set[int]:
        """Choose those of some UDP entries of the way there that ``is_stale``, without unpacking any."""
        sticking = set()
        for i in indexes:
            k, v = i * TUPLE.size, i * FLOW.size
            service = int.from_bytes(values[v + 36 : v + 40], sys.byteorder)
            backend = values[v + 16 : v + 32] + values[v + 34 : v + 36]
            if self._has_lost(service, backend, keys[k + 16 : k + 32] + keys[k + 34 : k + 36]):
                sticking.add(i)
        return sticking

    def is_over(self, flow: Flow, pair: Flow | None) -> bool:
        """Decide, with the other side at hand; None = there is none."""
        if pair is None:
            return self._is_silent(flow.protocol, flow.seen, flow.flags) or self.is_stale(flow)
        flags, seen = merged(flow.flags, pair.flags), max(flow.seen, pair.seen)
        return self._is_silent(flow.protocol, seen, flags) or self.is_stale(flow) or self.is_stale(pair)

    def _is_silent(self, protocol: int, seen: int, flags: int) -> bool:
        return self._now - seen > self._limits[protocol][flags & _FLAGS_MASK]

    def is_stale(self, flow: Flow) -> bool:
        """Tell whether a UDP flow sticks to what is gone; ready or not, what is serving keeps its flows."""
        if self._services is None or flow.protocol != Protocol.UDP:
            return False
        return self._has_lost(flow.service, flow.backend, flow.frontend)

    def _has_lost(self, service: int, backend: bytes, frontend: bytes) -> bool:
        """Judge by the frontend, as kube-proxy does: with another name or id, a service port is the same to clients.

        Source: kube-proxy's pkg/proxy/conntrack, CleanStaleEntries.
        """
        assert self._services is not None  # noqa: S101 - who calls has looked
        if service == ELSEWHERE:
            return False
        serving = self._services.serving_at.get(frontend)
        return service not in self._spared if serving is None else backend not in serving
