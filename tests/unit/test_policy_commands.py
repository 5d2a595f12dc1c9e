"""What the commands that ask about policy print, of what an agent answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from agent.__main__ import main
from agent.observe.control import SOCKET, Answer, ControlServer
from agent.observe.flow_log import FlowFilter, FlowLog
from agent.observe.flows import FlowNamer, PolicyNames
from agent.observe.policy_off import OFF, answers_without_policy
from tests.policy_builders import PolicyNode

Command = Callable[..., int]


@pytest.fixture
def answers() -> dict[str, Answer]:
    """What the agent answers; a test may change it."""
    return {"flows": lambda **_: iter([]), "policies": list}


@pytest.fixture
def command(tmp_path: Path, answers: Mapping[str, Answer]) -> Iterator[Command]:
    """Run a command beside an agent."""
    server = ControlServer(tmp_path, answers)
    server.start()
    yield lambda *arguments: main([*arguments, "--state-dir", str(tmp_path)])
    server.stop()


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


@pytest.mark.parametrize("follow", [True, False], ids=["following", "not following"])
def test_nothing_is_printed_of_a_stream_that_is_not_opened(
    command: Command, answers: dict[str, Answer], *, follow: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.update(answers_without_policy())

    assert command("flows", *(["--follow"] if follow else [])) == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"ebproxy: {OFF}\n")


def test_the_header_is_there_before_the_first_flow(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("flows", "--follow") == 1  # it ends where the agent does

    assert capsys.readouterr().out.startswith("TIME ")


@pytest.mark.parametrize(
    "asked", ["policy list", "policy show a/b", "identity list", "endpoint list", "flows", "flows -f"]
)
def test_without_an_agent_every_command_says_what_to_do(
    asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked.split(), "--state-dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert (
        f"no agent answers at {tmp_path / SOCKET}: [Errno 2] No such file or directory; start it: `ebproxy run`"
        in said.err
    )


@pytest.mark.parametrize(
    ("addresses", "words"),
    [(None, "pod shop/web is not known here; `ebproxy endpoint list` shows those of this node\n"), ([], "")],
    ids=["nobody's", "a pod's"],
)
def test_a_pod_that_nobody_knows_is_told(
    command: Command,
    answers: dict[str, Answer],
    addresses: list[str] | None,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers["pod_addresses"] = lambda pod: addresses if pod == "shop/web" else [pod]

    assert command("flows", "--pod", "shop/web") == 0
    assert capsys.readouterr().err == words


@pytest.mark.parametrize("has_begun", [False, True], ids=["not yet", "since"])
def test_that_no_event_is_read_yet_is_told_beside_the_flows(
    command: Command, answers: dict[str, Answer], *, has_begun: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = PolicyNode().model
    log = FlowLog(FlowNamer(PolicyNames(model, lambda: PolicyNode().planner)), has_begun=lambda: has_begun)
    answers["flows"] = lambda follow, history, **_: log.read(FlowFilter(), follow=follow, history=history)

    assert command("flows", "-o", "json") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("the agent has not programmed everything yet") is not has_begun
