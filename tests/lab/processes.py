"""Processes of the lab: started in a network namespace and a cgroup, gone when whoever started them is."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.netns import RUN

REPOSITORY = Path(__file__).resolve().parents[2]
_LIMIT_S = 20
# Join the cgroup, then become the command: its process id is ours to know.
_JOIN = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process lives: the name of a network namespace and a cgroup's directory."""

    netns: str
    cgroup: Path

    def command(self, *command: str | Path) -> list[str]:
        """Write the command that runs another one here."""
        enter = ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net={RUN / self.netns}", *map(str, command)]
        return ["sh", "-c", _JOIN, str(self.cgroup / "cgroup.procs"), *enter]

    def start(self, *command: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a command here, in the repository's root."""
        # A session of its own: Ctrl-C is for whoever runs the lab, who then ends this.
        return subprocess.Popen(self.command(*command), cwd=REPOSITORY, text=True, start_new_session=True, **options)

    def run(self, *command: str | Path, timeout: float = _LIMIT_S) -> subprocess.CompletedProcess[str]:
        """Run a command here to its end."""
        with self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            finally:
                process.kill()
        return subprocess.CompletedProcess(command, process.returncode, output, errors)


def program(name: str) -> tuple[str, ...]:
    """Name the command of one of the lab's own programs, which need nothing but the standard library."""
    return (sys.executable, "-ESs", "-m", f"tests.lab.{name}")


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> int:
    """End a process, by force where it does not listen; returns its exit status."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        process.wait(_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    return process.wait(_LIMIT_S)
