"""Builders of records for tests: name what matters, leave the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from agent.core.abi import FrontendFlag, FrontendKey, FrontendKind, pack_backends
from agent.core.addresses import AddressRange, family_of, format_endpoint, parse_address
from agent.core.frontends import Role, Which
from agent.core.plan import KernelState
from agent.core.planner import Planner
from agent.core.records import (
    External,
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
Port = tuple[str, int] | tuple[str, int, Protocol] | tuple[str, int, Protocol, int]
CLUSTER_IP = Role(FrontendKind.CLUSTER_IP, Which.CLUSTER, Which.CLUSTER)
LOCAL_CLUSTER_IP = Role(FrontendKind.CLUSTER_IP, Which.LOCAL, Which.LOCAL)
NODE_PORT = Role(FrontendKind.NODE_PORT, Which.CLUSTER, Which.CLUSTER)
LOCAL_NODE_PORT = Role(FrontendKind.NODE_PORT | FrontendFlag.EXTERNAL_LOCAL, Which.CLUSTER, Which.LOCAL)
LOAD_BALANCER = Role(FrontendKind.LOAD_BALANCER, Which.CLUSTER, Which.CLUSTER)
LIMITED = Role(FrontendKind.LOAD_BALANCER | FrontendFlag.SOURCE_RANGES, Which.CLUSTER, Which.CLUSTER)


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
    affinity_s: int = 0,
    reached: External | None = None,
) -> ServiceRecord:
    """A Service at 10.0.0.1 unless told; ports are name, number, protocol and node port."""
    service_ports = tuple(ServicePort(port[0], _protocol(port), port[1], *port[3:]) for port in ports)
    addresses = tuple(map(parse_address, ips or ("10.0.0.1",)))
    return ServiceRecord(key(name), addresses, service_ports, local, created, affinity_s, reached)


def external(
    *external_ips: str,
    load_balancer: Sequence[str] = (),
    ranges: Sequence[str] = (),
    local: bool = False,
    **tweaks: Any,
) -> External:
    """How a Service is reached from outside; ``tweaks`` are fields of External."""
    return External(
        tuple(map(parse_address, external_ips)),
        tuple(map(parse_address, load_balancer)),
        tuple(map(AddressRange.parse, ranges)),
        local,
        **tweaks,
    )


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
    return port[2] if len(port) > 2 else Protocol.TCP


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
    roles: Role | Sequence[Role] = CLUSTER_IP,
    local: Iterable[bytes] = (),
    name: str = "http",
    affinity_s: int = 0,
    ranges: Sequence[str] = (),
) -> DesiredPort:
    """A desired service port at 10.0.0.1:80 unless told; one role is that of every frontend.

    ``silent`` is what an empty segment of the local ones is too.
    """
    frontends = (at,) if isinstance(at, bytes) else tuple(at) if at is not None else (frontend(),)
    each = (roles,) * len(frontends) if isinstance(roles, Role) else tuple(roles)
    used = {which for role in each for which in (role.inside, role.outside)}
    slots, local_slots = tuple(backends), tuple(local)
    return DesiredPort(
        PortName(name, Protocol.TCP, family_of(frontends[0][:16]) if frontends else Family.IPV4),
        frontends,
        each,
        Backends(slots, silent) if Which.CLUSTER in used else None,
        Backends(local_slots, silent and not local_slots) if Which.LOCAL in used else None,
        affinity_s,
        tuple(map(AddressRange.parse, ranges)),
    )


def empty_state() -> KernelState:
    """Maps as they are after creation."""
    return KernelState({}, {})


def new_planner(segment_slots: int = 64, frontend_limit: int = 16, state: KernelState | None = None) -> Planner:
    """A planner for small maps."""
    return Planner(segment_slots, frontend_limit, state or empty_state())


def endpoint_text(slot: bytes) -> str:
    """A backend as ``address:port``."""
    return format_endpoint(slot[:16], int.from_bytes(slot[16:18], "big"))
