"""Which connections of subjects are over: those silent for longer than their state allows.

Their flags are those of flows. Streams (TCP, SCTP) live as TCP does, everything else as UDP. The programs judge alike
(``policy_is_over`` in ``bpf/policy_connection.h``).
"""

from __future__ import annotations

from agent.core.abi import CONNECTION, TUPLE, FlowFlag
from agent.core.flows import Timeouts, state_of
from agent.core.records import Protocol

_FLAGS = range(2 * max(FlowFlag))
_FLAGS_MASK = len(_FLAGS) - 1
_PROTOCOL = TUPLE.offset("protocol")
_WORDS = CONNECTION.size // 4
_STREAMS = frozenset({Protocol.TCP, Protocol.SCTP})


class Expiry:
    """Tells, at one moment, what is over; ``now`` in seconds of the monotonic clock."""

    def __init__(self, timeouts: Timeouts, now: int) -> None:
        streams, others = (
            [now - timeouts.of(protocol, state_of(protocol, flags)) for flags in _FLAGS]
            for protocol in (Protocol.TCP, Protocol.UDP)
        )
        self._cutoffs = [streams if protocol in _STREAMS else others for protocol in range(256)]

    def suspects(self, keys: bytes, values: bytes, count: int) -> list[bytes]:
        """Choose what is over of a batch, by key; only columns of it are walked."""
        protocols = keys[_PROTOCOL : count * TUPLE.size : TUPLE.size]
        words = memoryview(values)[: count * CONNECTION.size].cast("I")
        columns = enumerate(zip(protocols, words[0::_WORDS], words[1::_WORDS], strict=True))
        return [
            keys[i * TUPLE.size : (i + 1) * TUPLE.size]
            for i, (protocol, seen, flags) in columns
            if seen < self._cutoffs[protocol][flags & _FLAGS_MASK]
        ]

    def is_over(self, key: bytes, value: bytes) -> bool:
        """Tell whether one is over."""
        seen, flags, *_ = CONNECTION.packer.unpack(value)
        return bool(seen < self._cutoffs[key[_PROTOCOL]][flags & _FLAGS_MASK])
