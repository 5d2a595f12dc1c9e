"""The unix socket that commands ask: one JSON question a connection, one JSON answer."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.errors import AgentUnreachable, EbproxyError
from agent.observe.serving import ServingThread

SOCKET = "agent.sock"
_LIMIT_S = 10.0


class _Handler(socketserver.StreamRequestHandler):
    timeout = _LIMIT_S
    answers: Mapping[str, Callable[[], Any]]

    def handle(self) -> None:
        question = self.rfile.readline(4096).decode("utf-8", "replace").strip()
        if not question:
            return  # doctor only looks whether an agent is there
        answer = self.answers.get(question)
        body = {"answer": answer()} if answer else {"error": f"no such question: {question}"}
        with contextlib.suppress(BrokenPipeError):  # who asked does not wait any more
            self.wfile.write(json.dumps(body).encode())


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class ControlServer(ServingThread):
    """Answers named questions on a unix socket that only root may open."""

    def __init__(self, state_dir: Path, answers: Mapping[str, Callable[[], Any]]) -> None:
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


def ask(state_dir: Path, question: str) -> Any:
    """Ask the agent of a state directory. Raises: AgentUnreachable, or EbproxyError to who may not."""
    path = state_dir / SOCKET
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as client:
            client.settimeout(_LIMIT_S)
            client.connect(str(path))
            client.sendall(question.encode() + b"\n")
            client.shutdown(socket.SHUT_WR)
            with client.makefile("rb") as stream:
                reply = json.loads(stream.read())
    except PermissionError as error:
        message = f"{path} may not be asked: {error.strerror}; run as root"
        raise EbproxyError(message) from error
    except (OSError, ValueError) as error:
        message = f"no agent answers at {path}: {error}"
        raise AgentUnreachable(message) from error
    if "error" in reply:
        raise AgentUnreachable(reply["error"])
    return reply["answer"]
