"""What the programs do with a new connection: their own steps, through the maps that the kernel is using."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from agent.cli.view import format_backends, kind_of, name_of
from agent.core.abi import (
    AFFINITY,
    AFFINITY_KEY,
    BASE_DROP,
    DEVICE,
    Frontend,
    FrontendFlag,
    FrontendKey,
    FrontendKind,
    pack_frontend_key,
    pack_source_range,
    unpack_backend,
)
from agent.core.addresses import IPV4_PREFIX, family_of, format_address
from agent.core.plan import split_slots
from agent.core.records import Family, Protocol
from agent.errors import ConfigError
from agent.kernel.maps import MapStore
from agent.observe.names import Name

_NODE_DEVICE = bytes(4)
_WHOLE = 128


class Client(NamedTuple):
    """Who begins it: ``address`` has 16 bytes, None = not known.

    ``origin`` is pod, host or outside; or unknown, which is outside where nobody says what addresses pods have.
    """

    origin: str
    address: bytes | None

    @property
    def is_outside(self) -> bool:
        """Whether it is served as clients outside are."""
        return self.origin in ("outside", "unknown")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of a connection: the verdict, why, and the candidates."""

    verdict: str
    reason: str
    frontend: dict[str, str] | None = None
    backends: tuple[str, ...] = ()
    source_nat: bool = False


class Maps:
    """The maps, as the programs ask them. ``socket_lb``: whose sockets are translated at connect."""

    def __init__(self, store: MapStore, names: Mapping[int, Name], socket_lb: str) -> None:
        self._store = store
        self._names = names
        self._socket_lb = socket_lb

    def decide(self, target: FrontendKey, client: Client) -> Outcome:
        """Follow a connection to its verdict."""
        value = self._store.maps["frontends"].lookup(target.pack())
        if value is None:
            return self._decline(target)
        frontend = Frontend.unpack(value)
        if frontend.kind is FrontendKind.RESERVED:
            return Outcome("pass", "the address zero belongs to no service")
        client = self._with_address(client, target)
        described = self._describe(frontend, kind_of(frontend))
        outcome = self._choose(frontend, target, client, described)
        is_limited = frontend.flags & FrontendFlag.SOURCE_RANGES and outcome.verdict != "reject"
        if is_limited and not self._is_in_range(frontend, client):
            return Outcome("drop", "the client is not in loadBalancerSourceRanges", described)
        return outcome

    def _decline(self, target: FrontendKey) -> Outcome:
        itself = self._store.maps["frontends"].lookup(pack_frontend_key(target.address, 0, 0))
        if itself is None:
            return Outcome("pass", "no service has this address, port and protocol: left alone")
        described = self._describe(Frontend.unpack(itself), "ClusterIP") | {"port": ""}
        return Outcome("reject", "a ClusterIP without such a port and protocol: the client is refused", described)

    def _describe(self, frontend: Frontend, kind: str) -> dict[str, str]:
        name = name_of(self._names, frontend.service)
        return {"service": name.service, "port": name.port, "kind": kind}

    def _with_address(self, client: Client, target: FrontendKey) -> Client:
        """Find the address that the host itself speaks from, where none is named."""
        if client.address is not None or client.origin != "host":
            return client
        is_ipv4 = target.address.startswith(IPV4_PREFIX)
        if _is_loopback(target.address):
            return client._replace(address=target.address)
        value = self._store.maps["devices"].lookup(_NODE_DEVICE)
        address = (DEVICE.packer.unpack(value)[0 if is_ipv4 else 1]) if value else None
        return client._replace(address=address if address and any(address) else None)

    def _is_in_range(self, frontend: Frontend, client: Client) -> bool:
        if client.address is None:
            raise ConfigError(["--from: this frontend has source ranges; name the client by its address"])
        key = pack_source_range(frontend.service, client.address, _WHOLE)
        return self._store.maps["source_ranges"].lookup(key) is not None

    def _choose(self, frontend: Frontend, target: FrontendKey, client: Client, described: dict[str, str]) -> Outcome:
        base = frontend.outside if client.is_outside else frontend.inside
        slots, is_silent = self._store.read_segments({base}).get(base, (b"", base == BASE_DROP))
        if not slots and is_silent:
            policy = "internal" if frontend.kind is FrontendKind.CLUSTER_IP else "external"
            return Outcome("drop", f"{policy}TrafficPolicy is Local and no endpoint is on this node", described)
        if not slots:
            return Outcome("reject", "no usable endpoint: the client is refused", described)
        return self._forward(frontend, target, client, described, slots)

    def _forward(
        self, frontend: Frontend, target: FrontendKey, client: Client, described: dict[str, str], slots: bytes
    ) -> Outcome:
        if self._is_translated_at_socket(frontend, target, client):
            backends = format_backends(slots)
            return Outcome("forward", f"connect() goes to {_among(backends, 'at random')}", described, backends)
        sticky = self._sticky(frontend, client, slots)
        chosen = sticky or slots
        backends = format_backends(chosen)
        had = "the one that the client had before (session affinity)"
        reason = f"its packets go to {had if sticky else _among(backends, _how(frontend, client))}"
        addresses = {unpack_backend(slot)[0] for slot in split_slots(chosen)}
        others = addresses - {client.address} or addresses
        is_hidden = any(self._is_masqueraded(frontend, client, address) for address in others)
        return Outcome("forward", reason, described, backends, is_hidden)

    def _is_translated_at_socket(self, frontend: Frontend, target: FrontendKey, client: Client) -> bool:
        """Whether the socket hooks do it; the rest is left to the packet path."""
        covered = {"all": ("pod", "host"), "host": ("host",)}.get(self._socket_lb, ())
        return (
            client.origin in covered
            and target.protocol in (Protocol.TCP, Protocol.UDP)
            and not frontend.affinity_timeout
            and not frontend.flags & FrontendFlag.SOURCE_RANGES
        )

    def _sticky(self, frontend: Frontend, client: Client, slots: bytes) -> bytes:
        """Find the slot of the backend that the client had; empty = none."""
        if not frontend.affinity_timeout or client.address is None:
            return b""
        value = self._store.maps["affinity"].lookup(AFFINITY_KEY.packer.pack(client.address, frontend.service))
        if value is None:
            return b""
        address, port, _, _, seen = AFFINITY.packer.unpack(value)
        if int(time.monotonic()) - seen > frontend.affinity_timeout:
            return b""
        return next((slot for slot in split_slots(slots) if slot.startswith(address + port)), b"")

    def _is_masqueraded(self, frontend: Frontend, client: Client, backend: bytes) -> bool:
        """Whether a backend sees an address of this node (the table of origins and frontends)."""
        if self._store.maps["node_addresses"].lookup(backend) is not None:
            return False
        if backend == client.address:
            return True
        if client.origin == "host":
            return client.address is not None and _is_loopback(client.address)
        if frontend.kind is FrontendKind.CLUSTER_IP:
            return client.origin == "outside" or bool(frontend.flags & FrontendFlag.MASQUERADE)
        if client.is_outside and frontend.flags & FrontendFlag.DSR:
            return False
        return not frontend.flags & FrontendFlag.EXTERNAL_LOCAL


def _among(backends: tuple[str, ...], how: str) -> str:
    return "the only one" if len(backends) == 1 else f"one of {len(backends)}, {how}"


def _how(frontend: Frontend, client: Client) -> str:
    is_hashed = client.is_outside and frontend.flags & FrontendFlag.MAGLEV
    return "by consistent hashing" if is_hashed else "at random"


def _is_loopback(address: bytes) -> bool:
    if family_of(address) is Family.IPV4:
        return address[12] == 127
    return format_address(address) == "::1"
