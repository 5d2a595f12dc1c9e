"""What the commands that ask about policy print, of what an agent answers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from agent.__main__ import main
from agent.observe.control import Answer, ControlServer

Command = Callable[..., int]


@pytest.fixture
def answers() -> dict[str, Answer]:
    """What the agent answers; a test may change it."""
    return {"flows": lambda **_: iter([]), "policies": list}


@pytest.fixture
def command(tmp_path: Path, answers: Mapping[str, Answer]) -> Iterator[Command]:
    """Run a command beside an agent; it lets a broken pipe end its process, which here is the tests' own."""
    before = signal.getsignal(signal.SIGPIPE)
    server = ControlServer(tmp_path, answers)
    server.start()
    yield lambda *arguments: main([*arguments, "--state-dir", str(tmp_path)])
    server.stop()
    signal.signal(signal.SIGPIPE, before)


def test_since_nothing_is_refused(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("flows", "--since", "") == 2
    assert "--since '': write how long ago" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("since", "words"),
    [("5m", ""), ("2100-01-01", "--since 2100-01-01 lies ahead")],
    ids=["some time ago", "a time to come"],
)
def test_a_time_that_lies_ahead_is_told(
    command: Command, since: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("flows", "--since", since) == 0
    assert capsys.readouterr().err.partition(":")[0].strip() == words


@pytest.mark.parametrize(
    ("name", "is_explained"), [("web", True), ("shop/web", False)], ids=["a bare name", "of a namespace"]
)
def test_a_bare_name_is_a_policy_of_the_cluster(
    command: Command, name: str, *, is_explained: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("policy", "show", name) == 1
    said = capsys.readouterr().err
    assert f"policy {name} is not known" in said
    assert ("a NetworkPolicy is NAMESPACE/NAME" in said) is is_explained
