"""Run the demo: build the cluster, show the steps, take everything down, verify that nothing is left.

Exit status 0 when every step showed what it should and nothing is left, 1 when not, 128 + n after signal n.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from tests.demo.cluster import build
from tests.demo.screen import Screen, check
from tests.demo.steps import STEPS
from tests.lab import leftovers
from tests.lab.lab import Lab

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal came; ``number`` says which."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def _interrupt(number: int, _: FrameType | None) -> None:
    for every in _SIGNALS:
        signal.signal(every, signal.SIG_IGN)  # once is enough: what follows takes down
    raise Interrupted(number)


def _show(screen: Screen, lab: Lab) -> None:
    with screen.step("Two nodes and their pods, as network namespaces and cgroups") as outcome:
        cluster = build(lab)
        rows = [(n.name, ", ".join(n.addresses), ", ".join(n.pods)) for n in lab.nodes]
        screen.table(("node", "addresses", "pods"), rows)
        outcome.said = f"{len(lab.nodes)} nodes, {sum(len(node.pods) for node in lab.nodes)} pods with real servers"
    for title, step in STEPS:
        if any(outcome.error for outcome in screen.outcomes[:2]):
            return  # without a cluster or agents there is nothing to show
        with screen.step(title) as outcome:
            outcome.said = step(screen, cluster)


def main() -> int:
    """Run; returns the exit status."""
    if os.geteuid() != 0:
        print("the demo makes network namespaces and loads BPF programs: run it as root", file=sys.stderr)
        return 1
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    screen, directory, status, started = Screen(), None, 0, time.monotonic()
    leftovers.sweep()
    try:
        with Lab(nodes=2) as lab:
            directory = lab.directory
            _show(screen, lab)
    except Interrupted as interruption:
        screen.say(f"\n   {interruption}: taking everything down")
        status = 128 + interruption.number
    is_good = _verify(screen, directory) and status == 0
    screen.say(f"{time.monotonic() - started:.0f} s in all")
    return status or (0 if is_good else 1)


def _verify(screen: Screen, directory: Path | None) -> bool:
    with screen.step("Nothing is left") as outcome:
        left = leftovers.find(directory) if directory else []
        check(not left, "; ".join(left))
        outcome.said = "no namespace, cgroup, process, mount or file"
    return screen.summary()


if __name__ == "__main__":
    sys.exit(main())
