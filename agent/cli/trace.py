"""`ebproxy trace`: what would happen to a new connection, from the maps the kernel is using."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from agent.cli.output import print_json, print_table
from agent.cli.view import format_backends, open_store
from agent.core.abi import BASE_DROP, Frontend, FrontendKey, unpack_backend
from agent.core.addresses import format_address, parse_address
from agent.core.plan import split_slots
from agent.core.records import Protocol
from agent.errors import AgentUnreachable, ConfigError
from agent.kernel.maps import MapStore
from agent.kernel.netlink import local_addresses
from agent.observe.control import ask
from agent.observe.facts import Facts, read_facts
from agent.observe.names import Name, read_names

HELP = "say what would happen to a new connection, from the maps the kernel is using"
_POLICY = {"verdict": "allow", "by": "NetworkPolicy is not enforced"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add both ends and the protocol."""
    parser.add_argument(
        "--from", dest="source", required=True, metavar="ADDRESS|NAMESPACE/POD|host", help="where it starts"
    )
    parser.add_argument("--to", dest="target", required=True, metavar="ADDRESS:PORT", help="[v6]:PORT for IPv6")
    parser.add_argument("--proto", choices=[p.name.lower() for p in Protocol], default="tcp", help="default tcp")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of a connection: the verdict, why, and the candidates."""

    verdict: str
    reason: str
    frontend: dict[str, str] | None = None
    backends: tuple[str, ...] = ()


def run(args: argparse.Namespace) -> int:
    """Print the trace. Raises: ConfigError for ends that cannot be read."""
    target = parse_target(args.target, Protocol[args.proto.upper()])
    facts = read_facts(args.state_dir)
    with closing(open_store(args.bpffs)) as store:
        origin = _origin(args, store, facts)
        outcome = decide(store, read_names(args.state_dir), target, origin, facts.socket_lb)
    document: dict[str, Any] = {
        "frontend": outcome.frontend,
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "backends": list(outcome.backends),
        "source_nat": False,  # a translated socket speaks to its backend from its own address
        "origin": origin,
        "policy": {"egress": _POLICY, "ingress": _POLICY},
    }
    if args.output == "json":
        print_json(document)
    else:
        _print(document)
    return 0


def parse_target(text: str, protocol: Protocol) -> FrontendKey:
    """Read ``a.b.c.d:port`` or ``[v6]:port``. Raises: ConfigError."""
    host, _, port = text.rpartition(":")
    try:
        address = parse_address(host.strip("[]"))
    except ValueError as error:
        raise ConfigError([f"--to {text!r}: {error}; write ADDRESS:PORT, with [] around an IPv6 address"]) from error
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError([f"--to {text!r}: the port is a number from 1 to 65535"])
    return FrontendKey(address, int(port), protocol)


def decide(store: MapStore, names: dict[int, Name], target: FrontendKey, origin: str, socket_lb: str) -> Outcome:
    """Follow the programs' own steps through the maps."""
    value = store.maps["frontends"].lookup(target.pack())
    if value is None:
        sctp = ", and SCTP is not translated yet" if target.protocol is Protocol.SCTP else ""
        return Outcome("pass", f"no service has this address, port and protocol: left alone{sctp}")
    frontend = Frontend.unpack(value)
    name = names.get(frontend.service, Name(f"id:{frontend.service}", "", "", ""))
    described = {"service": name.service, "port": name.port, "kind": "ClusterIP"}
    bypass = _bypass(target, origin, socket_lb)
    if bypass:
        return Outcome("pass", bypass, described)
    slots, is_silent = store.read_segments({frontend.inside}).get(frontend.inside, (b"", frontend.inside == BASE_DROP))
    if slots:
        backends = format_backends(slots)
        return Outcome("forward", f"connect() goes to one of {len(backends)} at random", described, backends)
    if is_silent:
        return Outcome("drop", "internalTrafficPolicy is Local and no endpoint is on this node", described)
    return Outcome("reject", "no usable endpoint: connect() fails with ECONNREFUSED", described)


def _bypass(target: FrontendKey, origin: str, socket_lb: str) -> str:
    """Why the socket hooks do not see this connection; empty = they do."""
    if origin == "outside":
        return "it starts outside this node, where its socket hooks do not reach"
    if socket_lb == "off" or (socket_lb == "host" and origin == "pod"):
        return f"socketLB is {socket_lb}: sockets of this origin are left alone"
    if target.protocol is Protocol.SCTP:
        return "the socket hooks translate TCP and UDP"
    return ""


def _origin(args: argparse.Namespace, store: MapStore, facts: Facts) -> str:
    if args.source == "host":
        return "host"
    try:
        address = parse_address(args.source)
    except ValueError as error:
        if "/" in args.source:
            return "pod"
        raise ConfigError([f"--from {args.source!r}: not an address, NAMESPACE/POD or `host`"]) from error
    if address in local_addresses():
        return "host"
    return "pod" if _is_pod(address, args, store, facts) else "outside"


def _is_pod(address: bytes, args: argparse.Namespace, store: MapStore, facts: Facts) -> bool:
    """Whether an address is in a pod range of this node or cluster, or that of a known backend."""
    ip = ipaddress.ip_address(format_address(address))
    if any(ip in ipaddress.ip_network(cidr) for cidr in (*facts.cluster_cidrs, *_pod_cidrs(args))):
        return True
    segments = store.read_state().segments.values()
    return any(unpack_backend(slot)[0] == address for slots, _ in segments for slot in split_slots(slots))


def _pod_cidrs(args: argparse.Namespace) -> Iterable[str]:
    try:
        return tuple(ask(args.state_dir, "status")["pod_cidrs"])
    except AgentUnreachable:
        return ()


def _print(document: dict[str, Any]) -> None:
    frontend = document["frontend"]
    rows = [
        ("origin", document["origin"]),
        ("frontend", f"{frontend['service']} port {frontend['port'] or '-'} ({frontend['kind']})" if frontend else "-"),
        ("verdict", document["verdict"]),
        ("reason", document["reason"]),
        *(("backend", backend) for backend in document["backends"]),
        *((f"policy {side}", f"{p['verdict']} ({p['by']})") for side, p in document["policy"].items()),
    ]
    print_table(("what", "value"), rows)
