"""`ebproxy run`: the agent."""

from __future__ import annotations

import argparse

from agent import app
from agent.cli.flags import add_flags, overrides_from
from agent.config import load
from agent.observe import logs

HELP = "run the agent of this node until it is told to stop; what it programmed stays"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that set the configuration."""
    add_flags(parser)
    parser.add_argument("-o", dest="log_format", choices=("json", "text"), help="the same as --log-format")


def run(args: argparse.Namespace) -> int:
    """Run the agent."""
    config = load(args.config, overrides_from(args))
    logs.configure(config.log_format, config.log_level)
    return app.run(config)
