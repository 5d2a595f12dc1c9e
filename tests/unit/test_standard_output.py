"""What a command cannot write ends it in a line; a closed output is as one that nobody reads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.observe.control import ControlServer

POLICY = {"kind": "NetworkPolicy", "namespace": "shop", "name": "web"}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    flow = {"flow": {"verdict": "dropped"}}
    many = {"policies": lambda: [POLICY] * 10_000, "flows": lambda **_: iter([flow])}
    server = ControlServer(tmp_path, {**many, "endpoints": list})
    server.start()
    yield tmp_path
    server.stop()


def run(state: Path, *arguments: str, redirection: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "agent", *arguments]
    if arguments[0] != "--help":
        command += ["--state-dir", str(state)]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("policy", "list", "-o", "json"), id="more than is buffered"),
        pytest.param(("endpoint", "list"), id="a table"),
        pytest.param(("endpoint", "list", "-o", "json"), id="less than is buffered"),
        pytest.param(("flows", "-o", "json"), id="line by line"),
        pytest.param(("--help",), id="help"),
    ],
)
def test_what_cannot_be_written_is_told_in_a_line(state: Path, arguments: tuple[str, ...]) -> None:
    said = run(state, *arguments, redirection=">/dev/full")

    assert said == (1, ["ebproxy: cannot write: No space left on device"])


def test_a_closed_output_is_no_error(state: Path) -> None:
    assert run(state, "endpoint", "list", "-o", "json", redirection=">&-") == (0, [])
