"""`ebproxy status`: whether the node is programmed, and what is not as desired."""

from __future__ import annotations

import argparse
import time
from typing import Any

from agent.cli.output import print_json, print_table
from agent.errors import AgentUnreachable
from agent.observe.control import ask

HELP = (
    "say whether everything listed that can be read is programmed, and name what is not or cannot; "
    "exit status 1 when something is not"
)
_POLL_S = 0.05
_NODE = {True: "exists", False: "not found: no Node has the name below (`--node-name`)", None: "not listed yet"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--wait``."""
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=_seconds,
        default=0,
        help="wait up to SECONDS until everything listed is programmed",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        message = f"{text!r} is not a number of seconds"
        raise argparse.ArgumentTypeError(message)
    return seconds


def run(args: argparse.Namespace) -> int:
    """Print the status; 0 = everything listed is programmed. Raises: EbproxyError."""
    status = _settled_status(args)
    if args.output == "json":
        print_json(status)
    else:
        _print(status)
    return 0 if status["is_settled"] else 1


def _settled_status(args: argparse.Namespace) -> dict[str, Any]:
    deadline = time.monotonic() + args.wait
    while True:
        try:
            status: dict[str, Any] = ask(args.state_dir, "status")
            if status["is_settled"] or time.monotonic() >= deadline:
                return status
        except AgentUnreachable:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_S)


def _print(status: dict[str, Any]) -> None:
    waiting = ", ".join(status["not_listed"])
    state = "programmed" if status["is_settled"] else f"waiting for {waiting}" if waiting else "not as desired"
    if unread := len(status["malformed"]) + len(status["source"].get("faults", ())):
        state += f", but {unread} cannot be read"
    rows: list[tuple[str, object]] = [("state", state), ("node object", _NODE[status["node_exists"]])]
    rows += [(key, status[key]) for key in ("node", "version", "services", "service_ports", "backends")]
    rows += [("socketLB", status["socket_lb"]), ("cgroup", status["cgroup"]), ("layout", status["layout"])]
    faults = status["source"].pop("faults", [])
    rows += _policy_rows(status.get("policy"))
    rows += [("source", " ".join(f"{key}={value}" for key, value in status["source"].items()))]
    rows += [("fault", fault) for fault in faults]
    if faults:
        rows += [("remedy", "mend the file or remove it: it is read again as soon as it changes")]
    rows += [(f"map {name}", f"{m['entries']} of {m['capacity']}") for name, m in status["maps"].items()]
    print_table(("what", "value"), rows)
    if status["degraded"]:
        print_table(("degraded", "port", "reason"), [tuple(entry.values()) for entry in status["degraded"]])
    if degraded := status.get("policy", {}).get("degraded"):
        print_table(("degraded policy of", "reason"), [tuple(entry.values()) for entry in degraded])
    if status["malformed"]:
        print_table(("malformed", "name", "field", "reason"), [tuple(e.values()) for e in status["malformed"]])


def _policy_rows(policy: dict[str, Any] | None) -> list[tuple[str, object]]:
    """Say how policy stands; a word where it is off."""
    if policy is None:
        return [("policy", "off")]
    in_force = "in force" if policy["is_settled"] else "not in force yet"
    maps = policy["maps"].items()
    return [
        ("policy", f"{policy['mode']}, {in_force}, revision {policy['revision']}"),
        ("policies", _counted(policy, "policies", ("unread", "cannot be read"), ("not_understood", "not understood"))),
        ("subjects", _subjects(policy)),
        ("identities", policy["identities"]),
        *((f"map {name}", f"{m['entries']} of {m['capacity']}") for name, m in maps),
    ]


def _subjects(policy: dict[str, Any]) -> str:
    """Say what there is of this node's pods, and what does not fit."""
    said = ("isolated_pods", "isolated"), ("unplaced_pods", "behind unknown devices")
    counted = _counted(policy, "local_pods", *said)
    return counted + (f"; not fitting: {len(policy['degraded'])}" if policy["degraded"] else "")


def _counted(counts: dict[str, Any], whole: str, *parts: tuple[str, str]) -> str:
    """Write a count, and which of it deserve a word; those of which there is none do not."""
    return ", ".join([str(counts[whole]), *(f"{counts[key]} {text}" for key, text in parts if counts[key])])
