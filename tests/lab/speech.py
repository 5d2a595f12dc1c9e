"""What clients and servers of the lab say to each other, over TCP, UDP and SCTP alike.

    ? [ANSWER_SIZE BODY_SIZE]\\n  and so many bytes of body
    NAME OWN_PORT CLIENT CLIENT_PORT CHECKSUM [FILLER]\\n

CHECKSUM is of the body as the server got it; the answer has ANSWER_SIZE bytes, or more if it does not fit.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

_PATTERN = bytes(range(ord("0"), ord("z"))) * 16  # its period is no power of two


def fill(size: int) -> bytes:
    """Give so many bytes that are the same each time, no space or newline among them."""
    return (_PATTERN * (size // len(_PATTERN) + 1))[: max(size, 0)]


def question(answer_size: int = 0, body_size: int = 0) -> bytes:
    """Write a question."""
    return (b"?\n" if not answer_size else f"? {answer_size} {body_size}\n".encode()) + fill(body_size)


def sized_question(size: int) -> bytes:
    """Write a question of ``size`` bytes in all, whose answer has as many."""
    head = len(question(size, size)) - size
    return question(size, size - head)


class Question(NamedTuple):
    """A question that has fully arrived; ``length``: its bytes."""

    answer_size: int
    body: bytes
    length: int


def read_question(received: bytes | bytearray) -> Question | None:
    """Read a question; None = not all of it is there."""
    end = received.find(b"\n")
    if end < 0:
        return None
    numbers = [int(word) for word in bytes(received[1:end]).split()]
    answer_size, body_size = numbers or (0, 0)
    length = end + 1 + body_size
    if len(received) < length:
        return None
    return Question(answer_size, bytes(received[end + 1 : length]), length)


def answer(asked: Question, name: str, port: int, client: tuple[str, int]) -> bytes:
    """Write the answer to a question."""
    said = f"{name} {port} {client[0]} {client[1]} {zlib.crc32(asked.body)}".encode()
    missing = asked.answer_size - len(said) - 2
    return said + (b" " + fill(missing) if missing > 0 else b"") + b"\n"


class Reply(NamedTuple):
    """What a client was told."""

    name: str
    port: int
    client: str
    client_port: int
    size: int


def read_reply(asked: bytes, received: bytes) -> Reply:
    """Read an answer. Raises: ValueError if the question arrived otherwise than it was sent, or the answer did."""
    name, port, client, client_port, checksum, *filler = received.decode().split()
    sent = read_question(asked)
    if sent is None or int(checksum) != zlib.crc32(sent.body):
        raise ValueError("the body arrived otherwise than it was sent")
    if any(text.encode() != fill(len(text)) for text in filler) or len(received) < sent.answer_size:
        raise ValueError("the answer arrived otherwise than it was sent")
    return Reply(name, int(port), client, int(client_port), len(received))
