"""`ebproxy ct list`: the flows that the packet path follows, a line for both ways of each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from agent.cli.output import print_json, print_table
from agent.cli.view import absent, open_store, read_services
from agent.core.abi import FlowFlag
from agent.core.addresses import format_endpoint
from agent.core.flows import ELSEWHERE, Flow, merged, state_of
from agent.core.records import Protocol
from agent.errors import DataplaneError
from agent.kernel import bpf
from agent.observe.names import Name, read_names

HELP = "list the flows that the packet path follows (connections that sockets had translated are not among them)"
_COLUMNS = ("protocol", "client", "frontend", "source", "backend", "state", "idle", "service", "port")


@dataclass(frozen=True, slots=True)
class FlowView:
    """A flow. ``source``: who the backend takes for the client, where that is an address of this node.

    ``service`` is empty where another node chose the backend (DSR). ``is_whole``: both ways are there; one that was
    evicted comes back with the next packet.
    """

    protocol: str
    client: str
    frontend: str
    source: str | None
    backend: str
    state: str
    idle_s: int
    service: str
    port: str
    dsr: bool
    is_whole: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to do."""
    parser.add_argument("verb", choices=("list",), metavar="list", help="a line for each flow")
    parser.add_argument("--service", metavar="NAMESPACE/NAME", help="only this Service's")
    parser.add_argument(
        "--protocol", choices=[p.name.lower() for p in Protocol], help="only the flows of this protocol"
    )


def run(args: argparse.Namespace) -> int:
    """Print flows. Raises: EbproxyError, also when there are none of a Service that is not there."""
    protocol = args.protocol.upper() if args.protocol else None
    flows = [view for view in read_flows(args.bpffs, args.state_dir) if args.service in (None, view.service)]
    if args.service and not flows and not _is_there(args.service, args):
        raise absent(args.service)
    views = sorted(
        (view for view in flows if protocol in (None, view.protocol)),
        key=lambda view: (view.service, view.port, view.protocol, view.frontend, view.client),
    )
    if args.output == "json":
        print_json([asdict(view) for view in views])
    else:
        print_table(_COLUMNS, [_row(view) for view in views])
    return 0


def _is_there(service: str, args: argparse.Namespace) -> bool:
    with closing(open_store(args.bpffs)) as store:
        return any(view.name.service == service for view in read_services(store, args.state_dir))


def read_flows(bpffs: Path, state_dir: Path) -> Iterator[FlowView]:
    """Read every flow. Raises: DataplaneError."""
    names = read_names(state_dir)
    now = int(time.monotonic())
    with closing(open_store(bpffs)) as store:
        if "conntrack" not in store.maps:
            raise DataplaneError("the layout in use has no conntrack map; it is a former agent's")
        for flow, pair in _pairs(store.maps["conntrack"]):
            unknown = Name(f"id:{flow.service}" if flow.service != ELSEWHERE else "", "", "", "")
            yield _view(flow, pair, now, names.get(flow.service, unknown))


def _pairs(conntrack: bpf.Map) -> Iterator[tuple[Flow, Flow | None]]:
    """Read each flow once: by the way there if that is there, else by the way back."""
    for entry in conntrack.items():
        flow = Flow.unpack(*entry)
        if flow.service == ELSEWHERE:  # nothing changes on the way there; the way back says what was asked for
            if flow.is_reply:
                yield flow, None
            continue
        value = conntrack.lookup(flow.pair_key)
        pair = Flow.unpack(flow.pair_key, value) if value else None
        if pair is None or not pair.is_pair_of(flow):
            yield flow, None
        elif not flow.is_reply:
            yield flow, pair


def _view(flow: Flow, pair: Flow | None, now: int, name: Name) -> FlowView:
    flags = merged(flow.flags, pair.flags) if pair else flow.flags
    seen = max(flow.seen, pair.seen) if pair else flow.seen
    return FlowView(
        protocol=_protocol_name(flow.protocol),
        client=_format(flow.client),
        frontend=_format(flow.frontend),
        source=_format(flow.backend_sees) if flags & FlowFlag.MASQUERADED else None,
        backend=_format(flow.backend),
        state=state_of(flow.protocol, flags).value,
        idle_s=max(0, now - seen),
        service=name.service,
        port=name.port,
        dsr=bool(flags & FlowFlag.DSR),
        is_whole=pair is not None or flow.service == ELSEWHERE,
    )


def _protocol_name(number: int) -> str:
    return next((protocol.name for protocol in Protocol if protocol == number), str(number))


def _format(end: bytes) -> str:
    return format_endpoint(end[:16], int.from_bytes(end[16:], "big"))


def _row(view: FlowView) -> tuple[str, ...]:
    state = view.state if view.is_whole else f"{view.state}, one way"
    source = view.source or "-"
    idle = f"{view.idle_s}s"
    ends = (view.client, view.frontend, source, view.backend)
    return (view.protocol, *ends, f"{state}, dsr" if view.dsr else state, idle, view.service or "-", view.port or "-")
