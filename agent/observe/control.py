"""The unix socket that commands ask: one question a connection, a name and what goes with it as JSON.

The answer is one JSON document, or where it is a stream, one on each line for as long as who asked stays; the first is
null, and says that it is open.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import select
import socket
import socketserver
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.errors import AgentUnreachable, EbproxyError
from agent.observe.serving import ServingThread

SOCKET = "agent.sock"
_LIMIT_S = 10.0
_WITHOUT_AGENT = (
    "start it: `ebproxy run`; if it was just started, it may still compile its programs: `ebproxy status --wait 60`. "
    "`ebproxy service list` and `ebproxy trace` answer without it"
)
Answer = Callable[..., Any]
"""Given what goes with the question by name. An iterator is a stream; of a None in it, nothing is sent."""


class _Handler(socketserver.StreamRequestHandler):
    timeout = _LIMIT_S
    answers: Mapping[str, Answer]

    def handle(self) -> None:
        question = self.rfile.readline(4096).decode("utf-8", "replace").strip()
        if not question:
            return  # doctor only looks whether an agent is there
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked does not wait any more
            try:
                answer = self._answer(*question.partition(" "))
            except EbproxyError as error:
                self._send({"error": str(error)})
                return
            if isinstance(answer, Iterator):
                self._stream(answer)
            else:
                self._send({"answer": answer})

    def _answer(self, name: str, _: str, arguments: str) -> Any:
        answer = self.answers.get(name)
        if answer is None:
            message = f"no such question: {name}"
            raise EbproxyError(message)
        try:
            given = json.loads(arguments or "{}")
            inspect.signature(answer).bind(**given)
        except (TypeError, ValueError) as error:
            message = f"question {name} {arguments}: {error}"
            raise EbproxyError(message) from error
        return answer(**given)

    def _stream(self, answer: Iterator[Any]) -> None:
        """Send a stream; one that reads it slowly holds up nobody else."""
        self.connection.settimeout(None)
        self._send({"answer": None})
        poll = select.poll()
        poll.register(self.connection, 0)  # hanging up is told unasked
        for part in answer:
            if part is not None:
                self._send({"answer": part})
            elif poll.poll(0):
                return

    def _send(self, body: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(body).encode() + b"\n")


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class ControlServer(ServingThread):
    """Answers named questions on a unix socket that only root may open."""

    def __init__(self, state_dir: Path, answers: Mapping[str, Answer]) -> None:
        self._path = state_dir / SOCKET
        self._path.unlink(missing_ok=True)
        handler = type("Handler", (_Handler,), {"answers": answers})
        mask = os.umask(0o177)
        try:
            server = _Server(str(self._path), handler)
        finally:
            os.umask(mask)
        super().__init__(server, "control")

    def stop(self) -> None:
        """Stop answering and remove the socket."""
        super().stop()
        self._path.unlink(missing_ok=True)


def ask(state_dir: Path, question: str, **arguments: Any) -> Any:
    """Ask the agent of a state directory. Raises: AgentUnreachable, or EbproxyError to who may not."""
    path = state_dir / SOCKET
    try:
        with contextlib.closing(_connect(path, question, arguments)) as client, client.makefile("rb") as stream:
            reply = json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise _unanswered(path, error) from error
    return _read(reply)


def ask_stream(state_dir: Path, question: str, **arguments: Any) -> Iterator[Any]:
    """Open a stream, which ends when the agent ends it, or goes away. Raises: as ``ask``, here and where it is read."""
    path = state_dir / SOCKET
    try:
        client = _connect(path, question, arguments)
    except OSError as error:
        raise _unanswered(path, error) from error
    parts = _read_stream(client, path)
    next(parts, None)
    return parts


def _read_stream(client: socket.socket, path: Path) -> Iterator[Any]:
    with contextlib.closing(client), client.makefile("rb") as stream:
        while True:
            try:
                line = stream.readline()
                reply = json.loads(line) if line else None
            except (OSError, ValueError) as error:
                message = f"the agent at {path} broke off: {error}"
                raise AgentUnreachable(message) from error
            if reply is None:
                return
            yield _read(reply)
            client.settimeout(None)  # that it is open is said at once; what comes, when it comes


def _unanswered(path: Path, error: Exception) -> EbproxyError:
    """Say that nobody answers, or not to who asks, and what to do."""
    if isinstance(error, PermissionError):
        return EbproxyError(f"{path} may not be asked: {error.strerror}; run as root")
    return AgentUnreachable(f"no agent answers at {path}: {error}; {_WITHOUT_AGENT}")


def _connect(path: Path, question: str, arguments: dict[str, Any]) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.settimeout(_LIMIT_S)
        client.connect(str(path))
        client.sendall(f"{question} {json.dumps(arguments) if arguments else ''}".encode() + b"\n")
        client.shutdown(socket.SHUT_WR)
    except OSError:
        client.close()
        raise
    return client


def _read(reply: dict[str, Any]) -> Any:
    if "error" in reply:
        raise AgentUnreachable(reply["error"])
    return reply["answer"]
