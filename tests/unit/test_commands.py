"""What commands say to who got something wrong, or came too early."""

from __future__ import annotations

import argparse
import re
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from agent.__main__ import main
from agent.cli import status
from agent.cli.trace import parse_target
from agent.config import load
from agent.core.records import Protocol
from agent.errors import ConfigError, EbproxyError
from agent.observe.control import SOCKET, ControlServer
from agent.observe.health import Health, Vitals
from agent.observe.metrics import Metrics
from agent.servers import open_servers

SETTLED = {"is_settled": True}
NOT_SETTLED = {"is_settled": False}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(
            ["run", "--kubeconfg=/x"],
            "ebproxy run: error: unrecognized arguments: --kubeconfg=/x; did you mean --kubeconfig? `ebproxy run",
            id="a misspelt flag",
        ),
        pytest.param(
            ["run", "--zzz"],
            "ebproxy run: error: unrecognized arguments: --zzz; `ebproxy run --help` lists",
            id="like no flag",
        ),
        pytest.param(["status", "--nosuch"], "ebproxy status: error: unrecognized", id="another command's"),
        pytest.param(["service"], "required: list|show", id="service without a verb"),
        pytest.param(["ct"], "required: list", id="ct without a verb"),
        pytest.param(["policy"], "required: list|show", id="policy without a verb"),
        pytest.param(["identity"], "required: list", id="identity without a verb"),
        pytest.param(["endpoint"], "required: list", id="endpoint without a verb"),
        pytest.param(
            ["flows", "--since", "-5m"],
            "argument --since: expected one argument, none that begins with '-'; from then on: so long ago (d, h, m",
            id="a value like a flag",
        ),
        pytest.param(["ct", "drop"], "choose from 'list'", id="no such verb"),
        pytest.param(["status", "--wait", "soon"], "'soon' is not a number of seconds", id="no number"),
        pytest.param(["status", "--wait", "-1"], "'-1' is not a number of seconds", id="less than nothing"),
    ],
)
def test_a_wrong_command_line_is_told_what_is_right(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10.96.0.80", "the port is missing"),
        ("[fd00::80]", "the port is missing"),
        ("10.96.0.80:", "the port is a number"),
        ("10.96.0.80:http", "the port is a number"),
        ("web:80", "write ADDRESS:PORT"),
    ],
)
def test_a_target_that_cannot_be_read_is_told_why(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"^--to ") as refused:
        parse_target(text, Protocol.TCP)

    assert words in str(refused.value)


def arguments(state_dir: Path, wait_s: float) -> argparse.Namespace:
    return argparse.Namespace(state_dir=state_dir, wait=wait_s, output="json")


POLICY = {
    "mode": "strict",
    "is_settled": True,
    "revision": 7,
    "identities": 12,
    "policies": 3,
    "unread": 0,
    "not_understood": 0,
    "local_pods": 5,
    "isolated_pods": 2,
    "unplaced_pods": 0,
    "degraded": [],
    "maps": {"policy": {"entries": 4, "capacity": 9}},
}
WRONG = {"unread": 1, "not_understood": 2, "unplaced_pods": 1, "degraded": [{"pod": "a/b", "reason": "full"}]}


@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        pytest.param(None, {"policy": "off"}, id="off"),
        pytest.param(
            POLICY,
            {
                "policy": "strict, in force, revision 7",
                "policies": "3",
                "identities": "12",
                "subjects": "5, 2 isolated",
                "map policy": "4 of 9",
            },
            id="all is well",
        ),
        pytest.param(
            POLICY | WRONG | {"is_settled": False},
            {
                "policy": "strict, not in force yet, revision 7",
                "policies": "3, 1 cannot be read, 2 not understood",
                "subjects": "5, 2 isolated, 1 behind unknown devices; not fitting: 1",
                "a/b": "full",
            },
            id="all is not",
        ),
    ],
)
def test_the_status_says_how_policy_stands(
    policy: dict[str, Any] | None, rows: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shown(tmp_path, {} if policy is None else {"policy": policy}, capsys)

    assert {name: found.get(name) for name in rows} == rows


def test_the_status_names_the_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(tmp_path, {"source": {"kind": "manifests", "faults": ["/m/a.yaml: line 1"]}}, capsys)

    assert (found["state"], found["fault"]) == ("programmed, but 1 cannot be read", "/m/a.yaml: line 1")
    assert found["remedy"].startswith("mend the file or remove it")


def shown(state_dir: Path, told: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Read what the status is shown as, row by row."""
    told = {
        **dict.fromkeys(("node", "version", "services", "service_ports", "backends", "socket_lb", "cgroup", "layout")),
        "is_settled": True,
        "node_exists": True,
        "not_listed": [],
        "malformed": [],
        "degraded": [],
        "source": {},
        "maps": {},
        **told,
    }
    server = ControlServer(state_dir, {"status": lambda: told})
    server.start()
    try:
        assert status.run(argparse.Namespace(state_dir=state_dir, wait=0, output="table")) == 0
    finally:
        server.stop()
    lines = [re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[-1].strip() for line in lines}


def test_status_waits_for_an_agent_that_is_not_there_yet(tmp_path: Path) -> None:
    """First no directory, then no socket, then an agent that has not programmed everything yet."""
    answers: list[dict[str, Any]] = [SETTLED, NOT_SETTLED, NOT_SETTLED]
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(status.run(arguments(tmp_path / "state", 60))))
    waiting.start()
    (tmp_path / "state").mkdir()
    server = ControlServer(tmp_path / "state", {"status": answers.pop})
    server.start()
    try:
        waiting.join(30)
    finally:
        server.stop()

    assert (codes, answers) == ([0], [])


def test_status_without_an_agent_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EbproxyError) as failed:
        status.run(arguments(tmp_path, 0))

    assert f"no agent answers at {tmp_path / SOCKET}" in str(failed.value)
    assert all(f"`ebproxy {it}`" in str(failed.value) for it in ("run", "status --wait 60", "service list", "trace"))


def test_status_does_not_wait_where_it_may_not_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)

    with pytest.raises(EbproxyError, match="Permission denied; run as root"):
        status.run(arguments(tmp_path, 600))


def test_whoever_has_the_health_port_is_guessed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        overrides: dict[str, object] = {
            "healthzBindAddress": address,
            "metricsBindAddress": "",
            "bindAddressHardFail": True,
        }
        config = load(None, overrides, environment={"NODE_NAME": "node-7"})
        health = Health(lambda: Vitals(None, is_eligible=True, has_failed=False), 30)

        with pytest.raises(EbproxyError) as failed:
            list(open_servers(config, Metrics(), health, threading.Event()))

    assert f"cannot serve health at {address}" in str(failed.value)
    assert "kube-proxy has it most likely: stop it, or set healthzBindAddress" in str(failed.value)
