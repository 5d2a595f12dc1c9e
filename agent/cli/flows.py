"""`ebproxy flows`: what policy dropped and, where they are sampled, let pass: who, whither, and which rule decided."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agent.cli.output import print_table
from agent.core.abi import Reason
from agent.core.addresses import format_endpoint, parse_address
from agent.errors import AgentUnreachable, ConfigError
from agent.observe.control import ask, ask_stream
from agent.observe.flows import VERDICTS

HELP = "tell what policy dropped, and which policy it was; also what it let pass, where flowSample says so"
_COLUMNS = ("time", "verdict", "direction", "proto", "source", "destination", "why")
_NOT_BEGUN = "the agent has not programmed everything yet; drops are counted, and told from then on"
_WIDTHS = (27, 9, 9, 5, 40, 40, 0)
_UNITS_S = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[dhms]))+")
_TERM = re.compile(r"(\d+(?:\.\d+)?)(ms|[dhms])")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which flows, and whether to go on."""
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes; without --since only that")
    parser.add_argument("--verdict", choices=VERDICTS, default="", help="only these")
    parser.add_argument("--pod", metavar="NAMESPACE/NAME", default="", help="only those from or to this pod")
    parser.add_argument("--namespace", metavar="NAME", default="", help="only those from or to pods of this namespace")
    parser.add_argument(
        "--since",
        metavar="DURATION|TIME",
        help="from then on: so long ago (d, h, m, s, ms: 5m, 1h30m, 2d; without a sign), "
        "or a time: 2026-01-31T12:00:00Z, or 2026-01-31, its midnight in UTC",
    )


def run(args: argparse.Namespace) -> int:
    """Print flows. Raises: ConfigError, AgentUnreachable."""
    if args.pod and not all(args.pod.partition("/")):
        raise ConfigError([f"--pod {args.pod!r}: write NAMESPACE/NAME"])
    wanted = {
        "verdict": args.verdict,
        "pod": args.pod,
        "namespace": args.namespace,
        "since_ns": _since_ns(args.since),
    }
    is_new_only = args.follow and args.since is None
    parts = _flows(ask_stream(args.state_dir, "flows", follow=args.follow, history=not is_new_only, **wanted))
    if args.pod:
        _tell_unknown(args.state_dir, args.pod)
    try:
        if args.output == "json":
            _print_lines(parts)
        elif args.follow:
            _follow(parts)
        else:
            _print_all(parts)
    except KeyboardInterrupt:
        return 0
    if args.follow:
        message = "the agent has stopped; `ebproxy status --wait 60` says when there is one to follow again"
        raise AgentUnreachable(message)
    return 0


def _since_ns(text: str | None) -> int:
    """Read ``--since``, 0 without it; one that lies ahead is told."""
    if text is None:
        return 0
    now_ns = time.time_ns()
    found_ns = since_ns(text, now_ns)
    if found_ns > now_ns:
        print(f"--since {text} lies ahead: nothing that was told until now is from then on", file=sys.stderr)
    return found_ns


def since_ns(text: str, now_ns: int) -> int:
    """Read a duration before now, or a time; nanoseconds since 1970. Raises: ConfigError."""
    if _DURATION.fullmatch(text):
        before_s = sum(float(number) * _UNITS_S[unit] for number, unit in _TERM.findall(text))
        return max(0, now_ns - round(before_s * 1e9))
    written = f"{text}T00:00:00Z" if _DATE.fullmatch(text) else text.upper()
    try:
        at = dt.datetime.fromisoformat(written)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None or "T" not in written:
        accepted = "write how long ago, without a sign (5m, 1h30m, 2d), or a time as 2026-01-31T12:00:00Z or 2026-01-31"
        raise ConfigError([f"--since {text!r}: {accepted}"])
    return max(0, round(at.timestamp() * 1e9))


def _tell_unknown(state_dir: Path, pod: str) -> None:
    """Tell of a pod that nobody knows; flows of one that is gone may still be there."""
    with contextlib.suppress(AgentUnreachable):
        if ask(state_dir, "pod_addresses", pod=pod) is None:
            print(f"pod {pod} is not known here; `ebproxy endpoint list` shows those of this node", file=sys.stderr)


def _flows(parts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Give flows and losses; that none is read yet is told apart from them."""
    for part in parts:
        if "has_begun" in part:
            print(_NOT_BEGUN, file=sys.stderr)
        else:
            yield part


def _print_lines(parts: Iterable[dict[str, Any]]) -> None:
    """Print one JSON document a line: a flow, or ``{"lost": n}``."""
    for part in parts:
        print(json.dumps(part.get("flow", part)), flush=True)


def _print_all(parts: Iterable[dict[str, Any]]) -> None:
    lost = 0
    rows = []
    for part in parts:
        lost += part.get("lost", 0)
        if "flow" in part:
            rows.append(row(part["flow"]))
    print_table(_COLUMNS, rows)
    _tell_lost(lost)


def _follow(parts: Iterable[dict[str, Any]]) -> None:
    print(_line([column.upper() for column in _COLUMNS]), flush=True)
    for part in parts:
        if "flow" in part:
            print(_line(row(part["flow"])), flush=True)
        else:
            _tell_lost(part["lost"])


def _line(cells: Sequence[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def _tell_lost(count: int) -> None:
    if count:
        told = "1 event was" if count == 1 else f"{count} events were"
        print(f"{told} lost: more came than are told in a second, or than this reader took", file=sys.stderr)


def row(flow: dict[str, Any]) -> tuple[str, ...]:
    """Lay out a flow for the table."""
    ends = (_end(flow["source"]), _end(flow["destination"]))
    reason = "" if flow["reason"] == Reason.POLICY.name.lower() else f"{flow['reason']}: "
    device = f" ({flow['device']})" if flow["device"] else ""
    return (flow["time"], flow["verdict"], flow["direction"], flow["protocol"], *ends, f"{reason}{flow['why']}{device}")


def _end(end: dict[str, Any]) -> str:
    at = format_endpoint(parse_address(end["address"]), end["port"]) if end["port"] else end["address"]
    return " ".join(_names(end, at))


def _names(end: dict[str, Any], at: str) -> Iterator[str]:
    if end["pod"]:
        yield f"{end['namespace']}/{end['pod']}"
    yield at
    if not end["pod"] and end["labels"] and end["labels"]["block"]:
        yield f"(in {end['labels']['block']})"
