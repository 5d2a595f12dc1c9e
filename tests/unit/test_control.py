"""The unix socket: questions are answered; who only looks, or goes away, costs no line in the log."""

from __future__ import annotations

import contextlib
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import AgentUnreachable
from agent.observe.control import SOCKET, ControlServer, ask


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
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(str(server / SOCKET))
        client.sendall(question)
    may_answer.set()

    assert ask(server, "status") == {"is_settled": True}
    assert ask(server, "slow") == "late"
    until_threads_end()
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


def until_threads_end() -> None:
    """Wait for the server's threads of single connections."""
    for thread in threading.enumerate():
        if "process_request_thread" in thread.name:
            thread.join(10)
