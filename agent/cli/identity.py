"""`ebproxy identity list`: what policy can tell apart on this node."""

from __future__ import annotations

import argparse
from typing import Any

from agent.cli.output import print_json, print_table
from agent.observe.control import ask

HELP = (
    "list the identities: each a set of labels and blocks that policies look at, and the number the kernel has for it"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to do."""
    parser.add_argument("verb", choices=("list",), metavar="list", help="a line for each identity")


def run(args: argparse.Namespace) -> int:
    """Print identities. Raises: AgentUnreachable."""
    identities: list[dict[str, Any]] = ask(args.state_dir, "identities")
    if args.output == "json":
        print_json(identities)
    else:
        header = ("identity", "kind", "namespace", "labels", "namespace labels", "ports", "block", "addresses")
        print_table(header, [_row(identity) for identity in identities])
    return 0


def _row(identity: dict[str, Any]) -> tuple[object, ...]:
    labels, namespace_labels = (
        ",".join(f"{key}={value}" for key, value in identity[name].items()) or "-"
        for name in ("labels", "namespace_labels")
    )
    return (
        identity["identity"],
        identity["kind"],
        identity["namespace"] or "-",
        labels,
        namespace_labels,
        " ".join(identity["ports"]) or "-",
        identity["block"] or "-",
        identity["addresses"],
    )
