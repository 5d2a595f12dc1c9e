"""`ebproxy service list` and `service show`: the services in the kernel's maps."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

from agent.cli.output import print_json, print_table
from agent.cli.view import FrontendView, SegmentView, ServicePortView, absent, open_store, read_services
from agent.errors import ConfigError

HELP = "list the services in the kernel's maps, or show one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to do."""
    verbs = ("list", "show")
    parser.add_argument(
        "verb", choices=verbs, metavar="list|show", help="a line for each service port, or one with its backends"
    )
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
            raise absent(args.name)
    if args.output == "json":
        print_json([_document(view) for view in views])
    elif args.verb == "list":
        header = ("service", "port", "kind", "frontends", "backends", "new connections")
        print_table(header, [_row(view) for view in views])
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
        "kind": ",".join(view.kinds),
        "frontends": [frontend.text for frontend in view.frontends],
        "backends": list(view.backends),
        "verdict": view.verdict,
        "affinity_s": view.affinity_s,
        "source_ranges": list(view.source_ranges),
        "details": [_details(frontend) for frontend in view.frontends],
    }


def _details(frontend: FrontendView) -> dict[str, Any]:
    return {
        "frontend": frontend.text,
        "kind": frontend.kind,
        "flags": list(frontend.flags),
        "inside": {"verdict": frontend.inside.verdict, "backends": list(frontend.inside.backends)},
        "outside": {"verdict": frontend.outside.verdict, "backends": list(frontend.outside.backends)},
    }


def _row(view: ServicePortView) -> tuple[object, ...]:
    frontends = " ".join(frontend.text for frontend in view.frontends)
    return (view.name.service, view.name.port or "-", ",".join(view.kinds), frontends, len(view.backends), view.verdict)


def _print_backends(views: list[ServicePortView]) -> None:
    """Print a line for each frontend and what a client gets of it, and what else limits or binds clients."""
    rows = [
        (view.name.port or "-", frontend.text, frontend.kind, clients, backend)
        for view in views
        for frontend in view.frontends
        for clients, segment in _sides(frontend)
        for backend in segment.backends or (segment.verdict,)
    ]
    print_table(("port", "frontend", "kind", "clients", "backend"), rows)
    limits = [
        (view.name.port or "-", view.name.family, f"{view.affinity_s} s" if view.affinity_s else "-", _ranges(view))
        for view in views
        if view.affinity_s or view.source_ranges
    ]
    if limits:
        print_table(("port", "family", "affinity", "load balancer's source ranges"), limits)


def _ranges(view: ServicePortView) -> str:
    return " ".join(view.source_ranges) or "-"


def _sides(frontend: FrontendView) -> list[tuple[str, SegmentView]]:
    if frontend.inside == frontend.outside:
        return [("all", frontend.inside)]
    return [("in the cluster", frontend.inside), ("outside", frontend.outside)]
