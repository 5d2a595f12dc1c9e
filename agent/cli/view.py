"""What the pinned maps say, with names: the services, frontends and backends that the kernel uses now.

Reads bpffs and the state directory only, so it works whether an agent runs or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.core.abi import (
    BASE_DROP,
    Frontend,
    FrontendFlag,
    FrontendKey,
    FrontendKind,
    unpack_backend,
    unpack_source_range,
)
from agent.core.addresses import AddressRange, format_endpoint
from agent.core.plan import KernelState, split_slots
from agent.errors import DataplaneError, EbproxyError
from agent.kernel.dataplane import active_layout
from agent.kernel.maps import MapStore
from agent.observe.names import Name, read_names

_KINDS = {
    FrontendKind.CLUSTER_IP: "ClusterIP",
    FrontendKind.NODE_PORT: "NodePort",
    FrontendKind.EXTERNAL_IP: "ExternalIP",
    FrontendKind.LOAD_BALANCER: "LoadBalancer",
}


@dataclass(frozen=True, slots=True)
class SegmentView:
    """What a client gets: one of ``backends`` (sorted), or where there are none silence or a refusal."""

    backends: tuple[str, ...]
    is_silent: bool

    @property
    def verdict(self) -> str:
        """What becomes of a new connection: forward, reject or drop."""
        if self.backends:
            return "forward"
        return "drop" if self.is_silent else "reject"


@dataclass(frozen=True, slots=True)
class FrontendView:
    """A frontend as ``address:port/PROTOCOL``, and what clients inside and outside the cluster get of it."""

    text: str
    kind: str
    flags: tuple[str, ...]
    inside: SegmentView
    outside: SegmentView


@dataclass(frozen=True, slots=True)
class ServicePortView:
    """A service port of one family as the kernel has it, its cluster IP first; reserved frontends left out."""

    id: int
    name: Name
    frontends: tuple[FrontendView, ...]
    affinity_s: int
    source_ranges: tuple[str, ...]

    @property
    def backends(self) -> tuple[str, ...]:
        """All that some client gets, sorted."""
        segments = (segment for it in self.frontends for segment in (it.inside, it.outside))
        return tuple(sorted({backend for segment in segments for backend in segment.backends}))

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its frontends are."""
        return tuple(dict.fromkeys(it.kind for it in self.frontends))

    @property
    def verdict(self) -> str:
        """What becomes of a new connection of a pod."""
        return self.frontends[0].inside.verdict


def open_store(bpffs: Path) -> MapStore:
    """Open the maps of the layout in use. Raises: DataplaneError saying what to do."""
    try:
        directory = active_layout(bpffs)
        if directory is not None:
            return MapStore.open_existing(directory)
    except PermissionError as error:
        message = f"cannot read {bpffs}: {error}; run as root"
        raise DataplaneError(message) from error
    message = f"nothing is programmed under {bpffs}/ebproxy; start the agent: ebproxy run"
    raise DataplaneError(message)


def read_services(store: MapStore, state_dir: Path) -> list[ServicePortView]:
    """Read every service port, sorted by name."""
    names = read_names(state_dir)
    state = store.read_state()
    by_id: dict[int, dict[bytes, Frontend]] = {}
    for key, frontend in state.frontends.items():
        if frontend.kind is not FrontendKind.RESERVED:
            by_id.setdefault(frontend.service, {})[key] = frontend
    ranges = _ranges(state)
    views = [
        ServicePortView(
            ident,
            name_of(names, ident),
            tuple(sorted((_frontend(key, it, state) for key, it in frontends.items()), key=_order)),
            max(it.affinity_timeout for it in frontends.values()),
            tuple(sorted(ranges.get(ident, ()))),
        )
        for ident, frontends in by_id.items()
    ]
    return sorted(views, key=lambda view: (view.name, view.id))


def absent(service: str) -> EbproxyError:
    """Say that a Service is not in the maps, and where to look."""
    return EbproxyError(f"service {service} is not in the maps; `ebproxy service list` shows what is")


def name_of(names: Mapping[int, Name], ident: int) -> Name:
    """Name a service id, as well as is known."""
    return names.get(ident, Name(f"id:{ident}", "", "", ""))


def kind_of(frontend: Frontend) -> str:
    """Name what a frontend is, as Kubernetes does."""
    return _KINDS.get(frontend.kind, "-") if frontend.kind else "-"


def _ranges(state: KernelState) -> dict[int, list[str]]:
    ranges: dict[int, list[str]] = {}
    for key in state.source_ranges:
        service, address, prefix_bits = unpack_source_range(key)
        ranges.setdefault(service, []).append(str(AddressRange(address, prefix_bits)))
    return ranges


def _frontend(key: bytes, frontend: Frontend, state: KernelState) -> FrontendView:
    return FrontendView(
        format_frontend(key),
        kind_of(frontend),
        tuple(str(flag.name) for flag in FrontendFlag if frontend.flags & flag),
        _segment(frontend.inside, state),
        _segment(frontend.outside, state),
    )


def _order(view: FrontendView) -> tuple[int, str]:
    kinds = list(_KINDS.values())
    return (kinds.index(view.kind) if view.kind in kinds else len(kinds), view.text)


def _segment(base: int, state: KernelState) -> SegmentView:
    slots, is_silent = state.segments.get(base, (b"", base == BASE_DROP))
    return SegmentView(format_backends(slots), is_silent)


def format_frontend(key: bytes) -> str:
    """Write a packed frontend key as ``address:port/PROTOCOL``."""
    frontend = FrontendKey.unpack(key)
    return f"{format_endpoint(frontend.address, frontend.port)}/{frontend.protocol_name}"


def format_backends(slots: bytes) -> tuple[str, ...]:
    """Write slots that stand end to end as ``address:port``, sorted."""
    return tuple(sorted(format_endpoint(*unpack_backend(slot)) for slot in split_slots(slots)))
