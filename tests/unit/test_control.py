"""The unix socket: questions are answered; who only looks, or goes away, costs no line in the log."""

from __future__ import annotations

import contextlib
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import AgentUnreachable, EbproxyError
from agent.observe.control import SOCKET, ControlServer, ask, ask_stream


@pytest.fixture
def may_answer() -> threading.Event:
    return threading.Event()


@pytest.fixture
def server(tmp_path: Path, may_answer: threading.Event) -> Iterator[Path]:
    def slowly() -> str:
        may_answer.wait(10)
        return "late"

    served = ControlServer(tmp_path, {"status": lambda: {"is_settled": True}, "slow": slowly})
    served.start()
    yield tmp_path
    served.stop()


def test_answers(server: Path) -> None:
    assert ask(server, "status") == {"is_settled": True}


def test_refuses_what_it_does_not_know(server: Path) -> None:
    with pytest.raises(AgentUnreachable, match="no such question: weather"):
        ask(server, "weather")


def test_says_when_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(AgentUnreachable, match="no agent answers"):
        ask(tmp_path, "status")


@pytest.mark.parametrize("question", [b"", b"slow\n"], ids=["looks", "goes away"])
def test_a_client_that_leaves_is_no_error(
    server: Path, may_answer: threading.Event, question: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    others = set(threading.enumerate())  # other tests' servers may have some that serve for ever
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(str(server / SOCKET))
        client.sendall(question)
    may_answer.set()

    assert ask(server, "status") == {"is_settled": True}
    assert ask(server, "slow") == "late"
    until_threads_end(others)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("said", [{"a": [1, None]}, [], "", None, "x" * 1_000_000], ids=lambda said: repr(said)[:9])
def test_an_answer_arrives_whole(tmp_path: Path, said: object) -> None:
    served = ControlServer(tmp_path, {"status": lambda: said})
    served.start()
    try:
        assert ask(tmp_path, "status") == said
    finally:
        served.stop()


def test_only_its_owner_may_ask(server: Path) -> None:
    assert stat.S_IMODE((server / SOCKET).stat().st_mode) == 0o600


def test_a_socket_left_by_a_killed_agent_is_replaced(tmp_path: Path) -> None:
    ControlServer(tmp_path, {})._server.server_close()
    with pytest.raises(AgentUnreachable):
        ask(tmp_path, "status")
    served = ControlServer(tmp_path, {"status": lambda: 1})
    served.start()

    assert ask(tmp_path, "status") == 1
    served.stop()
    assert not (tmp_path / SOCKET).exists()


@pytest.fixture
def talkative(tmp_path: Path) -> Iterator[Path]:
    """Give an agent that answers by what it is asked with."""

    def refuse() -> None:
        raise EbproxyError("policy is off")

    def count(until: int, *, follow: bool = False) -> Iterator[int | None]:
        yield from range(until)
        while follow:
            yield None
            threading.Event().wait(0.005)

    served = ControlServer(tmp_path, {"echo": lambda text: text, "refuse": refuse, "count": count})
    served.start()
    yield tmp_path
    served.stop()


@pytest.mark.parametrize("text", ["plain", "two words", 'a "quote"', "line\nbreak", "Zürich", {"a": [1]}], ids=repr)
def test_what_goes_with_a_question_arrives(talkative: Path, text: object) -> None:
    assert ask(talkative, "echo", text=text) == text


@pytest.mark.parametrize(
    ("question", "given", "said"),
    [
        ("refuse", {}, "policy is off"),
        ("echo", {}, "missing a required argument"),
        ("echo", {"text": 1, "more": 2}, "unexpected keyword argument"),
        ("echo {", {}, "question echo"),
    ],
    ids=["refused", "too little", "too much", "no JSON"],
)
def test_a_question_that_has_no_answer_is_told_why(talkative: Path, question: str, given: dict, said: str) -> None:
    with pytest.raises(AgentUnreachable, match=said):
        ask(talkative, question, **given)
    with pytest.raises(AgentUnreachable, match=said):
        ask_stream(talkative, question, **given)


def test_a_stream_is_open_before_anything_comes(talkative: Path) -> None:
    others = set(threading.enumerate())
    ask_stream(talkative, "count", until=0, follow=True).close()

    until_threads_end(others)
    assert set(threading.enumerate()) <= others


def test_a_stream_is_read_part_by_part(talkative: Path) -> None:
    assert list(ask_stream(talkative, "count", until=3)) == [0, 1, 2]


def test_who_leaves_a_stream_ends_it(talkative: Path, capfd: pytest.CaptureFixture[str]) -> None:
    others = set(threading.enumerate())
    stream = ask_stream(talkative, "count", until=2, follow=True)
    assert [next(stream), next(stream)] == [0, 1]
    stream.close()

    until_threads_end(others)
    assert set(threading.enumerate()) <= others
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("rest", [b'{"answer": 2', b"\xff\n"], ids=["in the middle", "with noise"])
def test_a_stream_that_breaks_off_says_so(tmp_path: Path, rest: bytes) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / SOCKET))
        listener.listen()

        def serve() -> None:
            served, _ = listener.accept()
            with served, served.makefile("rb") as asked:
                asked.readline()  # what is closed unread resets the connection
                served.sendall(b'{"answer": null}\n{"answer": 1}\n' + rest)

        thread = threading.Thread(target=serve)
        thread.start()
        stream = ask_stream(tmp_path, "count")
        assert next(stream) == 1
        with pytest.raises(AgentUnreachable, match="broke off"):
            next(stream)
        thread.join()


def test_a_stream_of_nobody_says_so(tmp_path: Path) -> None:
    with pytest.raises(AgentUnreachable, match="no agent answers"):
        ask_stream(tmp_path, "count")


def test_a_stream_is_not_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)

    with pytest.raises(EbproxyError, match="Permission denied; run as root"):
        ask_stream(tmp_path, "count")


def until_threads_end(others: set[threading.Thread]) -> None:
    """Wait for the threads that began since these were there."""
    for thread in set(threading.enumerate()) - others:
        thread.join(10)
