"""A flow of a client outside, for tests of what becomes of flows."""

from __future__ import annotations

import pytest
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from agent.core.abi import FlowFlag, FrontendKind
from tests.bpf import packet_path as at
from tests.bpf.harness import Ran
from tests.bpf.packet_path import FlowEntry, PacketPath, Segment, to
from tests.bpf.packets import End, packet, reply_to

TARGET = 8080
NUMBERS = [pytest.param(0, id="IPv4"), pytest.param(1, id="IPv6")]
"""Which of a pair of addresses."""


class Talk:
    """A flow of a client outside, through a NodePort, to a pod of another node."""

    def __init__(self, path: PacketPath, protocol: str, number: int, port: int = 4000, **service: object) -> None:
        self.path = path
        self.protocol = protocol
        self.client = End(at.OUTSIDE[number], port)
        self.frontend = End(at.NODE[number], 30080)
        self.backend = End(at.REMOTE_POD[number], TARGET)
        if not any(path.store.maps["frontends"].items()):
            self.service = self.serve(to(self.backend), **service)
        self.first: Packet | None = None

    def serve(self, segment: Segment, **service: object) -> int:
        kind = {"kind": FrontendKind.NODE_PORT}
        return self.path.serve(self.protocol, self.frontend, inside=segment, **(kind | service))

    def ask(self, flags: str = "S", payload: bytes = b"question", **context: int) -> Ran:
        sent = packet(self.protocol, self.client, self.frontend, flags=flags, payload=payload)
        ran = self.path.ingress("eth0", sent, **context)
        self.first = Ether(ran.packet)
        return ran

    def answer(self, flags: str = "SA") -> Ran:
        assert self.first
        return self.path.ingress("eth0", reply_to(self.first, flags=flags))

    @property
    def source(self) -> End:
        """How the backend sees the client."""
        assert self.first
        return End(self.first[1].src, self.first[2].sport)

    def entry(self, *, reply: bool = False) -> FlowEntry:
        return next(flow for flow in self.path.flows() if bool(flow.flags & FlowFlag.REPLY) == reply)

    def state(self) -> FlowFlag:
        return self.entry().flags & ~FlowFlag.MASQUERADED
