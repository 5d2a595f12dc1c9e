"""`ebproxy endpoint list`: this node's pods as policy sees them."""

from __future__ import annotations

import argparse
from typing import Any

from agent.cli.output import print_json, print_table
from agent.observe.control import ask

HELP = "list the addresses of this node's pods, their identities, and the policies that concern them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to do."""
    parser.add_argument("verb", choices=("list",), metavar="list", help="a line for each address")


def run(args: argparse.Namespace) -> int:
    """Print endpoints. Raises: AgentUnreachable."""
    endpoints: list[dict[str, Any]] = ask(args.state_dir, "endpoints")
    if args.output == "json":
        print_json(endpoints)
    else:
        header = ("pod", "address", "identity", "state", "ingress", "egress")
        print_table(header, [_row(endpoint) for endpoint in endpoints])
    return 0


def _row(endpoint: dict[str, Any]) -> tuple[object, ...]:
    state = f"degraded: {endpoint['reason']}" if endpoint["reason"] else endpoint["state"]
    sides = (", ".join(endpoint[side]["policies"]) or "open" for side in ("ingress", "egress"))
    return (endpoint["pod"], endpoint["address"], endpoint["identity"], state, *sides)
