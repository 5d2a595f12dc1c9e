"""Where the parts of a packet stand, as bytes say it: a second, slower parser to judge the first one by.

And what may have become of a packet: nothing, a translation (of addresses, ports, hops and sums alone), or an answer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tests.bpf.harness import TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, Ran

_L3 = 14
_TCP, _UDP, _SCTP, _ICMP, _ICMPV6 = 6, 17, 132, 1, 58
_EXTENSIONS = {0, 43, 60, 44}
_FRAGMENT = 44
# Of each transport: the smallest header, and where its sum is, first byte and size.
_TRANSPORTS = {_TCP: (20, 16, 2), _UDP: (8, 6, 2), _SCTP: (12, 8, 4)}


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Offsets of an IP packet that holds together; ``l4`` is that of the payload of a later fragment."""

    l3: int
    l4: int
    end: int
    protocol: int
    is_ipv6: bool
    is_later: bool = False

    @property
    def mutable(self) -> set[int]:
        """The bytes that a translation may change."""
        if self.is_ipv6:
            changed = {self.l3 + 7, *range(self.l3 + 8, self.l3 + 40)}
        else:
            changed = {self.l3 + 8, *range(self.l3 + 10, self.l3 + 20)}
        if self.is_later:
            return changed
        _, at, size = _TRANSPORTS[self.protocol]
        return changed | {*range(self.l4, self.l4 + 4), *range(self.l4 + at, self.l4 + at + size)}


def dissect(raw: bytes, l3: int = _L3, *, is_quoted: bool = False) -> Anatomy | None:
    """Find the parts of a frame; None = it contradicts itself, or is not TCP, UDP, SCTP, nor an ICMP error about these.

    ``is_quoted``: of a packet that an ICMP error quotes, the ports are enough, and its lengths mean nothing.
    """
    found = dissect_ip(raw, l3, is_quoted=is_quoted)
    if found is None or found.is_later:
        return found
    return found if _has_transport(raw, found, is_quoted) else None


def dissect_ip(raw: bytes, l3: int = _L3, *, is_quoted: bool = False) -> Anatomy | None:
    """Find the parts of a frame, whatever its IP packet carries; None = it contradicts itself, or is no IP."""
    kind = raw[l3] >> 4 if len(raw) > l3 else 0
    if not is_quoted and raw[12:14] != {4: b"\x08\x00", 6: b"\x86\xdd"}.get(kind):
        return None
    return {4: _dissect_ipv4, 6: _dissect_ipv6}.get(kind, lambda *_: None)(raw, l3, is_quoted)


def _dissect_ipv4(raw: bytes, l3: int, is_quoted: bool) -> Anatomy | None:
    if len(raw) < l3 + 20:
        return None
    size, total = (raw[l3] & 15) * 4, int.from_bytes(raw[l3 + 2 : l3 + 4], "big")
    if size < 20 or len(raw) < l3 + size or (not is_quoted and not l3 + size <= l3 + total <= len(raw)):
        return None
    offset = int.from_bytes(raw[l3 + 6 : l3 + 8], "big") & 0x1FFF
    end = len(raw) if is_quoted else l3 + total
    return Anatomy(l3, l3 + size, end, raw[l3 + 9], is_ipv6=False, is_later=bool(offset))


def _dissect_ipv6(raw: bytes, l3: int, is_quoted: bool) -> Anatomy | None:
    if len(raw) < l3 + 40:
        return None
    payload = int.from_bytes(raw[l3 + 4 : l3 + 6], "big")
    end = l3 + 40 + payload if payload and not is_quoted else len(raw)
    if end > len(raw):
        return None
    offset, header, is_later = l3 + 40, raw[l3 + 6], False
    while header in _EXTENSIONS and not is_later:
        if len(raw) < offset + 8:
            return None
        if header == _FRAGMENT:
            is_later = bool(int.from_bytes(raw[offset + 2 : offset + 4], "big") & 0xFFF8)
            size = 8
        else:
            size = (raw[offset + 1] + 1) * 8
        header, offset = raw[offset], offset + size
    if offset > end:
        return None
    return Anatomy(l3, offset, end, header, is_ipv6=True, is_later=is_later)


def _has_transport(raw: bytes, found: Anatomy, is_quoted: bool) -> bool:
    room = found.end - found.l4
    if found.protocol in _TRANSPORTS:
        return room >= (4 if is_quoted else _TRANSPORTS[found.protocol][0])
    if is_quoted or found.protocol != (_ICMPV6 if found.is_ipv6 else _ICMP) or room < 8:
        return False
    return quoted_by(raw, found) is not None


def quoted_by(raw: bytes, outer: Anatomy) -> Anatomy | None:
    """Find the parts of the packet that an ICMP error is about."""
    kinds = range(1, 5) if outer.is_ipv6 else (3, 11, 12)
    if raw[outer.l4] not in kinds:
        return None
    inner = dissect(raw[: outer.end], outer.l4 + 8, is_quoted=True)
    return inner if inner and inner.is_ipv6 == outer.is_ipv6 and not inner.is_later else None


def judge(before: bytes, ran: Ran, held: set[bytes]) -> str:
    """Say what is wrong with what became of a packet; empty = nothing. ``held``: fragments that wait to be sent on."""
    if ran.verdict not in (TC_ACT_UNSPEC, TC_ACT_REDIRECT, TC_ACT_SHOT):
        return f"verdict {ran.verdict}"
    if ran.verdict == TC_ACT_SHOT or ran.packet in held:
        return ""
    if ran.packet == before:
        return "" if ran.verdict == TC_ACT_UNSPEC else "redirected as it was"
    if _is_translation(before, ran.packet):
        return _judge_translation(before, ran.packet)
    if ran.verdict == TC_ACT_UNSPEC:
        return "passed, but changed beyond a translation"
    return _judge_answer(before, ran.packet)


def _is_translation(before: bytes, after: bytes) -> bool:
    found = dissect(before)
    if found is None or len(before) != len(after):
        return False
    mutable = set(range(12)) | _mutable(before, found)  # MAC addresses: what is handed to the node has lo's
    return all(mine == theirs or at in mutable for at, (mine, theirs) in enumerate(zip(before, after, strict=True)))


def _mutable(raw: bytes, found: Anatomy) -> set[int]:
    if found.is_later or found.protocol in _TRANSPORTS:
        return found.mutable
    inner = quoted_by(raw, found)
    assert inner
    outer = Anatomy(found.l3, found.l4, found.end, 0, found.is_ipv6, is_later=True).mutable
    quoted = Anatomy(inner.l3, inner.l4, inner.end, 0, inner.is_ipv6, is_later=True).mutable
    return outer | quoted | {found.l4 + 2, found.l4 + 3, *range(inner.l4, inner.l4 + 4)}


def _judge_translation(before: bytes, after: bytes) -> str:
    """A sum is right after exactly if it was right before: what it lacks stays the same."""
    found = dissect(before)
    assert found
    if not found.is_ipv6 and _excess(before[14 : found.l4]) != _excess(after[14 : found.l4]):
        return "the sum of the IPv4 header"
    if found.is_later or found.protocol == _SCTP:
        return ""
    if found.protocol == _UDP and before[found.l4 + 6 : found.l4 + 8] == b"\0\0":
        return "" if after[found.l4 + 6 : found.l4 + 8] == b"\0\0" else "a checksum where there was none"
    return "" if _transport_excess(before, found) == _transport_excess(after, found) else "the transport's sum"


def _transport_excess(raw: bytes, found: Anatomy) -> int:
    if found.protocol == _ICMP:
        return _excess(raw[found.l4 : found.end])
    addresses = raw[found.l3 + 8 : found.l3 + 40] if found.is_ipv6 else raw[found.l3 + 12 : found.l3 + 20]
    return _excess(addresses + raw[found.l4 : found.end])


def _excess(raw: bytes) -> int:
    """What a sum over bytes lacks to zero, in one's complement."""
    padded = raw + bytes(len(raw) % 2)
    return sum(struct.unpack(f"!{len(padded) // 2}H", padded)) % 0xFFFF


def _judge_answer(before: bytes, after: bytes) -> str:
    """An answer goes back to whom the packet came from, and all of its lengths and sums are right."""
    if after[:6] != before[6:12] or after[6:12] != before[:6]:
        return "redirected, but neither a translation nor back to its sender"
    is_ipv6 = after[12:14] == b"\x86\xdd"
    size, at = (16, 22) if is_ipv6 else (4, 26)
    sender, receiver = before[at : at + size], before[at + size : at + 2 * size]
    if after[at : at + 2 * size] != receiver + sender:
        return "an answer to somebody else"
    l4 = 54 if is_ipv6 else 34
    if before[20 if is_ipv6 else 23] in (_ICMP, _ICMPV6) and before[l4] in (8, 128) and before[14:at] == after[14:at]:
        return _judge_echo(before, after, l4)
    if int.from_bytes(after[18:20] if is_ipv6 else after[16:18], "big") != len(after) - (54 if is_ipv6 else 14):
        return "an answer with a wrong length"
    if not is_ipv6 and _excess(after[14:34]):
        return "an answer with a wrong sum of the header"
    protocol = after[20 if is_ipv6 else 23]
    pseudo = b"" if protocol == _ICMP else after[at : at + 2 * size] + struct.pack("!HH", protocol, len(after) - l4)
    return "an answer with a wrong sum" if _excess(pseudo + after[l4:]) else ""


def _judge_echo(before: bytes, after: bytes, l4: int) -> str:
    """A ping comes back as it was: its sum is as right as it was before."""
    found = dissect_ip(before)
    if found is None:
        return "an answer to a ping that contradicts itself"
    return "" if _excess(before[l4:]) == _excess(after[l4:]) else "an answer to a ping with another sum"
