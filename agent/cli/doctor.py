"""`ebproxy doctor`: say what on this node would stop ebproxy or fight it, each with its remedy."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from agent.cli.checks import Finding, Level, Place, examine
from agent.cli.output import print_json, print_table

HELP = (
    "say what on this node would stop ebproxy or fight it, and what to do; exit status 1 when something would stop it"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--cgroup-root``."""
    parser.add_argument("--cgroup-root", metavar="DIR", type=Path, help="the node's cgroup v2 root (default: found)")


def run(args: argparse.Namespace) -> int:
    """Look and print; 0 = nothing would stop the agent."""
    findings = examine(Place(args.state_dir, args.bpffs, args.cgroup_root))
    if args.output == "json":
        print_json(document(findings))
    else:
        columns = [field.name for field in dataclasses.fields(Finding)]
        print_table(columns, [(finding.id, finding.level, finding.seen, finding.remedy) for finding in findings])
    return int(any(finding.level is Level.FAIL for finding in findings))


def document(findings: Sequence[Finding]) -> dict[str, object]:
    """Write findings as what ``-o json`` prints: the worst level, and every finding."""
    worst = max((finding.level for finding in findings), key=list(Level).index, default=Level.OK)
    return {"worst": worst, "findings": [dataclasses.asdict(finding) for finding in findings]}
