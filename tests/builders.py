"""Builders of records for tests: name what matters, leave the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agent.core.abi import FrontendKey, pack_backends
from agent.core.addresses import family_of, format_endpoint, parse_address
from agent.core.plan import KernelState
from agent.core.planner import Planner
from agent.core.records import (
    Family,
    ObjectKey,
    Protocol,
    ServicePort,
    ServiceRecord,
    SlicePort,
    SliceRecord,
    Traits,
)
from agent.core.services import Backends, DesiredPort, PortName

READY = Traits()
HTTP = ("http", 80)
Port = tuple[str, int] | tuple[str, int, Protocol]


def key(name: str, namespace: str = "ns") -> ObjectKey:
    """An object's key; ``name`` may be ``namespace/name``."""
    before, slash, after = name.partition("/")
    return ObjectKey(before, after) if slash else ObjectKey(namespace, name)


def addresses(*texts: str) -> bytes:
    """Addresses, 16 bytes each, end to end."""
    return b"".join(map(parse_address, texts))


def service(
    name: str = "web",
    *ips: str,
    ports: Sequence[Port] = (HTTP,),
    local: bool = False,
    created: str = "",
) -> ServiceRecord:
    """A Service at 10.0.0.1 unless told."""
    service_ports = tuple(ServicePort(port[0], _protocol(port), port[1]) for port in ports)
    return ServiceRecord(key(name), tuple(map(parse_address, ips or ("10.0.0.1",))), service_ports, local, created)


def piece(
    name: str,
    *runs: tuple[Traits, Sequence[str]],
    of: str = "web",
    ports: Sequence[Port] = (("http", 8080),),
    family: Family = Family.IPV4,
) -> SliceRecord:
    """An EndpointSlice of runs of addresses."""
    slice_ports = tuple(SlicePort(port[0], _protocol(port), port[1]) for port in ports)
    packed = tuple((traits, addresses(*texts)) for traits, texts in runs)
    return SliceRecord(key(name), key(of), family, slice_ports, packed)


def _protocol(port: Port) -> Protocol:
    return port[2] if len(port) == 3 else Protocol.TCP


def slots(*texts: str, port: int = 8080) -> tuple[bytes, ...]:
    """Backends as ``struct slot`` each."""
    return tuple(pack_backends(addresses(*texts), port))


def pods(count: int, start: int = 1) -> tuple[bytes, ...]:
    """So many backends, 10.1.x.y:8080."""
    return slots(*(f"10.1.{number // 250}.{1 + number % 250}" for number in range(start, start + count)))


def frontend(text: str = "10.0.0.1", port: int = 80, protocol: Protocol = Protocol.TCP) -> bytes:
    """A packed frontend key."""
    return FrontendKey(parse_address(text), port, protocol).pack()


def want(
    backends: Iterable[bytes] = (),
    *,
    silent: bool = False,
    at: bytes | Sequence[bytes] | None = None,
    name: str = "http",
) -> DesiredPort:
    """A desired service port at 10.0.0.1:80 unless told."""
    frontends = (at,) if isinstance(at, bytes) else tuple(at) if at is not None else (frontend(),)
    family = family_of(frontends[0][:16]) if frontends else Family.IPV4
    return DesiredPort(PortName(name, Protocol.TCP, family), frontends, Backends(tuple(backends), silent))


def empty_state() -> KernelState:
    """Maps as they are after creation."""
    return KernelState({}, {})


def new_planner(segment_slots: int = 64, frontend_limit: int = 16, state: KernelState | None = None) -> Planner:
    """A planner for small maps."""
    return Planner(segment_slots, frontend_limit, state or empty_state())


def endpoint_text(slot: bytes) -> str:
    """A backend as ``address:port``."""
    return format_endpoint(slot[:16], int.from_bytes(slot[16:18], "big"))
