"""`ebproxy cleanup`: take everything away that ebproxy put on this node."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

from agent.app import LOCK, only_agent
from agent.cli.output import print_json, print_table
from agent.kernel import netlink, selftest
from agent.kernel.dataplane import remove
from agent.observe import control, facts, former_policies, names, numbers

HELP = "remove every program, link, map, pin and file of ebproxy from this node; services stop answering"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing."""


def run(args: argparse.Namespace) -> int:
    """Remove everything. Raises: EbproxyError while an agent runs."""
    was_locked = os.access(args.state_dir / LOCK, os.F_OK)
    with only_agent(args.state_dir):
        known = facts.read_facts(args.state_dir)
        _remove_self_tests(known.cgroup)
        removed = [*remove(args.bpffs), *_close_loopback(known), *_remove_state(args.state_dir)]
        if was_locked:
            removed.append(f"removed {args.state_dir / LOCK}")
    removed = removed or ["nothing: there was nothing to remove"]
    if args.output == "json":
        print_json({"removed": removed})
    else:
        print_table(("removed",), [(line,) for line in removed])
    return 0


def _remove_self_tests(cgroup: str) -> None:
    """Remove the cgroup of a self-test that was killed."""
    if cgroup:
        for below in Path(cgroup).glob(f"{selftest.CGROUP_PREFIX}*"):
            with contextlib.suppress(OSError):
                below.rmdir()


def _close_loopback(known: facts.Facts) -> list[str]:
    """Undo what the agent changed of lo, once no packet is sent there any more."""
    netlink.close_loopback(known.loopback)
    return [f"reset {name} of lo" for name in known.loopback]


def _remove_state(state_dir: Path) -> list[str]:
    """Remove the agent's own files, and the directory if nothing else is in it."""
    removed = []
    files = (control.SOCKET, facts.FILE, names.FILE, numbers.FILE, former_policies.FILE)
    for name in (*files, *(f"{Path(file).stem}.new" for file in files), f"{facts.FILE}.new"):
        with contextlib.suppress(FileNotFoundError):
            (state_dir / name).unlink()
            removed.append(f"removed {state_dir / name}")
    (state_dir / LOCK).unlink()  # which cleanup itself holds
    with contextlib.suppress(OSError):
        state_dir.rmdir()
    return removed
