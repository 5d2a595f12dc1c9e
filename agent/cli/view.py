"""What the pinned maps say, with names: the services, frontends and backends that the kernel uses now.

Reads bpffs and the state directory only, so it works whether an agent runs or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.core.abi import BASE_DROP, Frontend, FrontendKey, unpack_backend
from agent.core.addresses import format_endpoint
from agent.core.plan import split_slots
from agent.errors import DataplaneError
from agent.kernel.dataplane import active_layout
from agent.kernel.maps import MapStore
from agent.observe.names import Name, read_names


@dataclass(frozen=True, slots=True)
class ServicePortView:
    """A service port of one family as the kernel has it. ``is_silent``: without backends, clients hear nothing."""

    id: int
    name: Name
    frontends: tuple[str, ...]
    backends: tuple[str, ...]
    is_silent: bool

    @property
    def verdict(self) -> str:
        """What becomes of a new connection: forward, reject or drop."""
        if self.backends:
            return "forward"
        return "drop" if self.is_silent else "reject"


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
    by_id: dict[int, list[tuple[bytes, Frontend]]] = {}
    for key, frontend in state.frontends.items():
        by_id.setdefault(frontend.service, []).append((key, frontend))
    views = []
    for ident, frontends in by_id.items():
        base = frontends[0][1].inside
        slots, is_silent = state.segments.get(base, (b"", base == BASE_DROP))
        views.append(
            ServicePortView(
                ident,
                names.get(ident, Name(f"id:{ident}", "", "", "")),
                tuple(sorted(format_frontend(key) for key, _ in frontends)),
                format_backends(slots),
                is_silent,
            )
        )
    return sorted(views, key=lambda view: (view.name, view.frontends))


def format_frontend(key: bytes) -> str:
    """Write a packed frontend key as ``address:port/PROTOCOL``."""
    frontend = FrontendKey.unpack(key)
    return f"{format_endpoint(frontend.address, frontend.port)}/{frontend.protocol_name}"


def format_backends(slots: bytes) -> tuple[str, ...]:
    """Write slots that stand end to end as ``address:port``, sorted."""
    return tuple(sorted(format_endpoint(*unpack_backend(slot)) for slot in split_slots(slots)))
