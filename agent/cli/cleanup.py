"""`ebproxy cleanup`: take everything away that ebproxy put on this node."""

from __future__ import annotations

import argparse
import shutil

from agent.app import only_agent
from agent.cli.output import print_json, print_table
from agent.kernel.dataplane import remove

HELP = "remove every program, link, map, pin and file of ebproxy from this node; services stop answering"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing."""


def run(args: argparse.Namespace) -> int:
    """Remove everything. Raises: EbproxyError while an agent runs."""
    with only_agent(args.state_dir):
        removed = remove(args.bpffs)
        shutil.rmtree(args.state_dir, ignore_errors=True)
    removed.append(f"removed {args.state_dir}")
    if args.output == "json":
        print_json({"removed": removed})
    else:
        print_table(("removed",), [(line,) for line in removed])
    return 0
