"""The command ``ebproxy``: parse the arguments, call the command, return its exit status.

Exit status: 0 done, 1 not as it should be, 2 the command line or the configuration is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import signal
import sys
from pathlib import Path
from typing import NoReturn, TextIO, cast

import agent
from agent.cli.standard_output import StandardOutput
from agent.errors import ConfigError, EbproxyError

COMMANDS = (
    *("run", "status", "service", "trace", "ct", "policy", "identity", "endpoint", "flows"),
    *("maps", "doctor", "cleanup"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse a command line; where a value was taken for a flag, say how values of it are written."""
        for action in self._actions if message.endswith(": expected one argument") else ():
            if message.startswith(f"argument {'/'.join(action.option_strings)}:"):
                message += f", none that begins with '-'{f'; {action.help}' if action.help else ''}"
        super().error(message)

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Refuse arguments that nobody takes, in a line: the usage of ``run`` alone would fill a screen."""
        near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        words = f"unrecognized arguments: {' '.join(unknown)}; {hint}`{self.prog} --help` lists what there is"
        self.exit(2, f"{self.prog}: error: {words}\n")


def _parser() -> _Parser:
    parser = _Parser(prog="ebproxy", description="A Kubernetes Service dataplane in eBPF.")
    parser.add_argument("--version", action="version", version=f"ebproxy {agent.__version__}")
    return parser


def _absolute(text: str) -> Path:
    return Path(text).absolute()


def _common() -> _Parser:
    """Build the flags that every command but ``run``, which configures more, has."""
    parser = _Parser(add_help=False)
    parser.add_argument(
        "--state-dir", metavar="DIR", type=_absolute, default=Path("/run/ebproxy"), help="default /run/ebproxy"
    )
    parser.add_argument(
        "--bpffs", metavar="DIR", type=_absolute, default=Path("/sys/fs/bpf"), help="default /sys/fs/bpf"
    )
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command, that of the process if none is given; returns the exit status."""
    if argv is None:
        argv = sys.argv[1:]
        if argv[:1] != ["run"]:  # an agent outlives who reads from it; of a command, nobody is left to write to
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    output = StandardOutput(sys.stdout)
    try:
        with contextlib.redirect_stdout(cast("TextIO", output)):
            try:
                return _run(argv)
            finally:
                output.flush()
    except ConfigError as error:
        for fault in error.faults:
            print(f"ebproxy: {fault}", file=sys.stderr)
        return 2
    except EbproxyError as error:
        print(f"ebproxy: {error}", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    parser = _parser()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    # The agent stays small: only the command that is asked for is imported.
    for name in argv[:1] if set(argv[:1]) <= set(COMMANDS) and argv else COMMANDS:
        module = importlib.import_module(f"agent.cli.{name}")
        parents: list[_Parser] = [] if name == "run" else [_common()]
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, parents=parents)
        module.add_arguments(command)
        command.set_defaults(module=module)
        parsers[name] = command
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parsers[args.command].refuse(unknown)
    status: int = args.module.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
