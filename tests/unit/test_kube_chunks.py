"""The chunked coding, however the network cuts it."""

from __future__ import annotations

from http.client import HTTPException

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sources.kube_chunks import ChunkedBody


def _coded(contents: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(content), content) for content in contents if content) + b"0\r\n\r\n"


@given(st.lists(st.binary(max_size=40)), st.lists(st.integers(1, 30), min_size=1))
def test_the_content_does_not_depend_on_how_it_arrives(contents: list[bytes], cuts: list[int]) -> None:
    coded, body, found, at, turn = _coded(contents), ChunkedBody(), b"", 0, 0
    while at < len(coded) and not body.is_complete:
        found += body.feed(coded[at : at + cuts[turn % len(cuts)]])
        at += cuts[turn % len(cuts)]
        turn += 1

    assert b"".join(contents) == found
    assert body.is_complete


@pytest.mark.parametrize(
    ("coded", "content"),
    [
        pytest.param(b"5;name=value\r\nhello\r\n0\r\n\r\n", b"hello", id="an extension"),
        pytest.param(b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2, id="either case"),
        pytest.param(b"2\r\n\r\n\r\n0\r\nTrailer: x\r\n\r\n", b"\r\n", id="a trailer"),
    ],
)
def test_what_the_standard_allows(coded: bytes, content: bytes) -> None:
    body = ChunkedBody()

    assert content == body.feed(coded)
    assert body.is_complete


@pytest.mark.parametrize(
    "coded",
    [
        pytest.param(b"<html>\r\n", id="not a size"),
        pytest.param(b"-5\r\nhello\r\n", id="negative"),
        pytest.param(b"5\r\nhello--5\r\nhello\r\n", id="a chunk longer than it said"),
        pytest.param(b"1" * 5000, id="a header without end"),
    ],
)
def test_what_it_forbids_is_a_failure(coded: bytes) -> None:
    with pytest.raises(HTTPException, match="not the size of a chunk"):
        ChunkedBody().feed(coded)


def test_an_unfinished_body_is_not_complete() -> None:
    body = ChunkedBody()

    assert body.feed(b"5\r\nhel") == b"hel"
    assert not body.is_complete
