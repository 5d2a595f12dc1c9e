"""`ebproxy service list` and `service show`: the services in the kernel's maps."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

from agent.cli.output import print_json, print_table
from agent.cli.view import ServicePortView, open_store, read_services
from agent.errors import ConfigError, EbproxyError

HELP = "list the services in the kernel's maps, or show one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to do."""
    parser.add_argument("verb", choices=("list", "show"), help="a line for each service port, or one with its backends")
    parser.add_argument("name", nargs="?", metavar="NAMESPACE/NAME", help="the service to show")


def run(args: argparse.Namespace) -> int:
    """Print services. Raises: EbproxyError when the one asked for is not there."""
    if args.verb == "show" and not args.name:
        raise ConfigError(["service show: say which: NAMESPACE/NAME"])
    if args.verb == "list" and args.name:
        raise ConfigError([f"service list: takes no name; `ebproxy service show {args.name}` shows one"])
    with closing(open_store(args.bpffs)) as store:
        views = read_services(store, args.state_dir)
    if args.verb == "show":
        views = [view for view in views if view.name.service == args.name]
        if not views:
            message = f"service {args.name} is not in the maps; `ebproxy service list` shows what is"
            raise EbproxyError(message)
    if args.output == "json":
        print_json([_document(view) for view in views])
    elif args.verb == "list":
        print_table(("service", "port", "frontends", "backends", "new connections"), [_row(view) for view in views])
    else:
        _print_backends(views)
    return 0


def _document(view: ServicePortView) -> dict[str, Any]:
    return {
        "service": view.name.service,
        "port": view.name.port,
        "protocol": view.name.protocol,
        "family": view.name.family,
        "id": view.id,
        "kind": "ClusterIP",
        "frontends": list(view.frontends),
        "backends": list(view.backends),
        "verdict": view.verdict,
    }


def _row(view: ServicePortView) -> tuple[object, ...]:
    return (view.name.service, view.name.port or "-", " ".join(view.frontends), len(view.backends), view.verdict)


def _print_backends(views: list[ServicePortView]) -> None:
    rows = [
        (view.name.port or "-", " ".join(view.frontends), backend)
        for view in views
        for backend in view.backends or (view.verdict,)
    ]
    print_table(("port", "frontends", "backend"), rows)
