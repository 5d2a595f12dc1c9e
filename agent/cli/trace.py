"""`ebproxy trace`: what would happen to a new connection, from the maps the kernel is using."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

from agent.cli.decision import Client, Maps, Outcome
from agent.cli.node_network import local_addresses
from agent.cli.output import print_json, print_table
from agent.cli.policy_trace import PolicyTrace, address_of_pod
from agent.cli.view import open_store
from agent.core.abi import (
    ADDRESS_RANGE,
    DEVICE,
    DEVICE_PODS,
    POD_RANGE_PODS,
    POD_RANGE_UNKNOWN,
    U32,
    FrontendKey,
    unpack_backend,
)
from agent.core.addresses import family_of, parse_address
from agent.core.plan import split_slots
from agent.core.records import Family, Protocol
from agent.errors import ConfigError
from agent.kernel.maps import MapStore
from agent.observe.facts import Facts, read_facts
from agent.observe.names import read_names

HELP = "say what would happen to a new connection, from the maps the kernel is using"
_WHOLE = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add both ends and the protocol."""
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="ADDRESS|NAMESPACE/POD|host",
        help="where it starts; without policy a pod's name is not looked up and stands for any pod of this node",
    )
    parser.add_argument("--to", dest="target", required=True, metavar="ADDRESS:PORT", help="[v6]:PORT for IPv6")
    parser.add_argument("--proto", choices=[p.name.lower() for p in Protocol], default="tcp", help="default tcp")


def run(args: argparse.Namespace) -> int:
    """Print the trace. Raises: ConfigError for ends that cannot be read."""
    target = parse_target(args.target, Protocol[args.proto.upper()])
    facts = read_facts(args.state_dir)
    with closing(open_store(args.bpffs)) as store:
        client = _client(args, store, facts, is_ipv4=family_of(target.address) is Family.IPV4)
        outcome = Maps(store, read_names(args.state_dir), facts.socket_lb).decide(target, client)
        judged = PolicyTrace(store, args.state_dir, facts).judge(outcome, target, client)
    document = _document(judged.outcome, client) | {"policy": judged.policy}
    if args.output == "json":
        print_json(document)
    else:
        _print(document)
    return 0


def _document(outcome: Outcome, client: Client) -> dict[str, Any]:
    return {
        "frontend": outcome.frontend,
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "backends": list(outcome.backends),
        "source_nat": outcome.source_nat,
        "origin": client.origin,
    }


def parse_target(text: str, protocol: Protocol) -> FrontendKey:
    """Read ``a.b.c.d:port`` or ``[v6]:port``. Raises: ConfigError."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        raise ConfigError([f"--to {text!r}: the port is missing; write ADDRESS:PORT, with [] around an IPv6 address"])
    try:
        address = parse_address(host.strip("[]"))
    except ValueError as error:
        raise ConfigError([f"--to {text!r}: {error}; write ADDRESS:PORT, with [] around an IPv6 address"]) from error
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError([f"--to {text!r}: the port is a number from 1 to 65535"])
    return FrontendKey(address, int(port), protocol)


def _client(args: argparse.Namespace, store: MapStore, facts: Facts, *, is_ipv4: bool) -> Client:
    if args.source == "host":
        return Client("host", None)
    try:
        address = parse_address(args.source)
    except ValueError as error:
        if "/" in args.source:
            return Client("pod", address_of_pod(args.state_dir, args.source, facts, is_ipv4=is_ipv4))
        raise ConfigError([f"--from {args.source!r}: not an address, NAMESPACE/POD or `host`"]) from error
    return Client(_origin(address, store, facts), address)


def _origin(address: bytes, store: MapStore, facts: Facts) -> str:
    """Tell where an address is, as the packet path does; a pod known as a backend is one to the socket hooks too."""
    if store.maps["node_addresses"].lookup(address) is not None or address in local_addresses():
        return "host"
    value = store.maps["pod_ranges"].lookup(ADDRESS_RANGE.packer.pack(_WHOLE, address))
    flags = U32.packer.unpack(value)[0] if value else 0
    if flags & POD_RANGE_PODS:
        return "pod"
    sees_devices = any(DEVICE.packer.unpack(value)[2] & DEVICE_PODS for _, value in store.maps["devices"].items())
    if (facts.socket_lb == "all" or sees_devices) and _is_backend(address, store):
        return "pod"
    return "unknown" if flags & POD_RANGE_UNKNOWN else "outside"


def _is_backend(address: bytes, store: MapStore) -> bool:
    segments = store.read_state().segments.values()
    return any(unpack_backend(slot)[0] == address for slots, _ in segments for slot in split_slots(slots))


def _print(document: dict[str, Any]) -> None:
    frontend = document["frontend"]
    rows = [
        ("origin", document["origin"]),
        ("frontend", f"{frontend['service']} port {frontend['port'] or '-'} ({frontend['kind']})" if frontend else "-"),
        ("verdict", document["verdict"]),
        ("reason", document["reason"]),
        ("source NAT", "the backend sees an address of this node" if document["source_nat"] else "no"),
        *(("backend", backend) for backend in document["backends"]),
        *((f"policy {side}", f"{p['verdict']} ({p['by']})") for side, p in document["policy"].items()),
    ]
    print_table(("what", "value"), rows)
