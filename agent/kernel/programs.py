"""The programs of a layout: open those that are pinned, or have the loader compile and pin them.

Programs are pinned at ``<bpffs>/ebproxy/<layout>/programs_<digest>/<program>``, where the digest is of everything that
goes into them. An agent that starts again with the same sources finds them there and compiles nothing.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

import agent
from agent.core.abi import Layout, MapSpec, Stage
from agent.errors import LoaderError
from agent.kernel import bpf
from agent.kernel.loader import Program, Report, Request, StructReport
from agent.kernel.maps import MapStore

log = logging.getLogger("ebproxy.programs")
BPF_SOURCES = Path(agent.__file__).resolve().parent.parent / "bpf"
COMPILE_LIMIT_S = 60
_SO_NETNS_COOKIE = 71

# What keeps a NodePort's port free, whoever translates.
BIND_HOOKS = (bpf.AttachType.POST_BIND4, bpf.AttachType.POST_BIND6)
# The way back is attached before the way there, so that no socket is translated whose peer cannot be recalled.
SOCKET_HOOKS = (
    bpf.AttachType.SOCK_RELEASE,
    bpf.AttachType.GETPEERNAME4,
    bpf.AttachType.GETPEERNAME6,
    bpf.AttachType.RECVMSG4,
    bpf.AttachType.RECVMSG6,
    bpf.AttachType.SENDMSG4,
    bpf.AttachType.SENDMSG6,
    bpf.AttachType.CONNECT4,
    bpf.AttachType.CONNECT6,
    *BIND_HOOKS,
)


class PacketProgram(enum.StrEnum):
    """The programs of the packet path, as they are called in ``bpf/tc.c``; those of pods' devices are for policy."""

    INGRESS = "tc_ingress"
    EGRESS = "tc_egress"
    LOOPBACK = "tc_loopback"
    FROM_POD = "tc_from_pod"
    FROM_POD_STAGE = "tc_from_pod_stage"
    TO_POD = "tc_to_pod"


_STAGES = {Stage.FROM_POD: PacketProgram.FROM_POD_STAGE, Stage.TO_POD: PacketProgram.EGRESS}
"""Where programs go on."""
_OF_POLICY = frozenset({PacketProgram.FROM_POD, PacketProgram.FROM_POD_STAGE, PacketProgram.TO_POD})


TABLE_BUILDER = "maglev_run"
"""The program that builds Maglev tables, as it is called in ``bpf/maglev.c``."""


def netns_cookie() -> int:
    """Read the cookie of this thread's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)


@dataclass(frozen=True, slots=True)
class ProgramOptions:
    """What is decided when the programs are compiled.

    ``host_netns``: the cookie of the node's own network namespace; ``host_only``: translate the sockets of no other.
    ``source_ports``: first and last of what masqueraded flows get. Timeouts are of tracked flows. ``policy``: whether
    there is any; ``anti_spoofing``: then drop what a pod sends in the name of others.
    """

    remember_peer: bool = True
    host_only: bool = False
    host_netns: int = field(default_factory=netns_cookie)
    source_ports: tuple[int, int] = (10_000, 29_999)
    tcp_established_s: int = 86_400
    tcp_close_wait_s: int = 3_600
    udp_s: int = 30
    udp_stream_s: int = 120
    policy: bool = False
    anti_spoofing: bool = True

    @property
    def packet_programs(self) -> tuple[PacketProgram, ...]:
        """Which programs of the packet path there are."""
        return tuple(name for name in PacketProgram if self.policy or name not in _OF_POLICY)

    def defines(self) -> dict[str, str]:
        """As preprocessor definitions."""
        first, last = self.source_ports
        numbers = {
            "SOURCE_NAT_FIRST": first,
            "SOURCE_NAT_LAST": last,
            "TCP_ESTABLISHED_S": self.tcp_established_s,
            "TCP_CLOSE_WAIT_S": self.tcp_close_wait_s,
            "UDP_S": self.udp_s,
            "UDP_STREAM_S": self.udp_stream_s,
        }
        switches = {"REMEMBER_PEER": self.remember_peer, "HOST_ONLY": self.host_only}
        return {
            "HOST_NETNS_COOKIE": f"{self.host_netns}ULL",
            **{name: str(number) for name, number in numbers.items()},
            **{name: "1" for name, is_on in switches.items() if is_on},
            **({"POLICY": "1", "ANTI_SPOOFING": str(int(self.anti_spoofing))} if self.policy else {}),
        }


@dataclass(frozen=True, slots=True)
class Programs:
    """Descriptors of the programs: of each socket hook, and of the packet path."""

    sockets: dict[bpf.AttachType, int]
    packets: dict[PacketProgram, int]

    def close(self) -> None:
        """Close them; pins and links keep the programs."""
        for fd in self.descriptors():
            os.close(fd)

    def descriptors(self) -> Iterator[int]:
        """List them all."""
        yield from self.sockets.values()
        yield from self.packets.values()


def pins_of(directory: Path, options: ProgramOptions) -> Path:
    """Where a layout's programs are pinned: named after all that goes into them, sources, header tree and options."""
    state = hashlib.sha256(repr(sorted(options.defines().items())).encode())
    for path in sorted((*BPF_SOURCES.glob("*.c"), *BPF_SOURCES.rglob("*.h"))):
        state.update(path.relative_to(BPF_SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    return directory / f"programs_{state.hexdigest()[:12]}"


def open_or_load(directory: Path, store: MapStore, specs: tuple[MapSpec, ...], options: ProgramOptions) -> Programs:
    """Give the programs of every hook. Raises: LoaderError."""
    pins = pins_of(directory, options)
    programs = _open(pins, store, options)
    if not programs:
        _load(pins, directory, specs, options)
        programs = _open(pins, store, options)
    if not programs:
        message = f"the loader left no usable programs in {pins}"
        raise LoaderError(message)
    if options.policy:
        fill_stages(programs.packets, store)
    return programs


def fill_stages(packets: dict[PacketProgram, int], store: MapStore) -> None:
    """Say where programs go on, before any of them is attached. Raises: LoaderError."""
    try:
        for stage, name in _STAGES.items():
            key, descriptor = (number.to_bytes(4, sys.byteorder) for number in (stage, packets[name]))
            store.maps["stages"].update(key, descriptor)
    except OSError as error:
        message = f"cannot chain the programs: {error}"
        raise LoaderError(message) from error


def open_builder(directory: Path, store: MapStore, _specs: tuple[MapSpec, ...], options: ProgramOptions) -> int | None:
    """Give the program that builds Maglev tables; None where it is not there, or works on other maps than these."""
    try:
        fd = bpf.obj_get(pins_of(directory, options) / TABLE_BUILDER)
    except FileNotFoundError:
        return None
    if store.maps["maglev_builds"].info.id in bpf.prog_info(fd).map_ids:
        return fd
    os.close(fd)
    return None


def load_builder(directory: Path, store: MapStore, specs: tuple[MapSpec, ...], options: ProgramOptions) -> int:
    """Have the program that builds Maglev tables compiled and pinned. Raises: LoaderError."""
    pins = pins_of(directory, options)
    pins.mkdir(exist_ok=True)
    pin = pins / TABLE_BUILDER
    fresh = pin.with_name(f"new_{pin.name}")
    for stale in (pin, fresh):
        stale.unlink(missing_ok=True)
    maps = {spec.name: str(directory / spec.name) for spec in specs}
    wanted = (Program(TABLE_BUILDER, bpf.PROG_TYPE_SCHED_CLS, 0, str(fresh)),)
    _check_layouts(run_loader(Request(str(BPF_SOURCES / "maglev.c"), {}, maps, wanted)), specs)
    fresh.rename(pin)
    fd = open_builder(directory, store, specs, options)
    if fd is None:
        message = f"the loader left no usable program at {pin}"
        raise LoaderError(message)
    return fd


def _open(pins: Path, store: MapStore, options: ProgramOptions) -> Programs | None:
    """Open pinned programs; None unless all are there and use this store's maps, not predecessors of the same name."""
    ours = {opened.info.id for opened in store.maps.values()}
    programs = Programs({}, {})
    try:
        for hook in SOCKET_HOOKS:
            programs.sockets[hook] = bpf.obj_get(pins / hook.name.lower())
        for name in options.packet_programs:
            programs.packets[name] = bpf.obj_get(pins / name)
        usable = all(ours.issuperset(bpf.prog_info(fd).map_ids) for fd in programs.descriptors())
    except OSError:
        usable = False
    if usable:
        return programs
    programs.close()
    return None


def _load(pins: Path, directory: Path, specs: tuple[MapSpec, ...], options: ProgramOptions) -> None:
    """Have the programs loaded and pinned. They take their place once their layouts are known to be the agent's."""
    fresh = pins.with_name(f"new_{pins.name}")
    for stale in filter(Path.exists, (fresh, pins)):
        shutil.rmtree(stale)
    fresh.mkdir()
    log.info("compiling the programs: a first start, another version and changed options take 10 to 30 s for it")
    begun = time.monotonic()
    try:
        with ThreadPoolExecutor() as pool:  # a child for each source, side by side: compiling is what takes the time
            for report in pool.map(run_loader, requests(fresh, directory, specs, options)):
                _check_layouts(report, specs)
        fresh.rename(pins)
    except LoaderError:
        shutil.rmtree(fresh)
        raise
    log.info("compiled and loaded the programs in %.1f s", time.monotonic() - begun)


def requests(
    pins: Path, directory: Path, specs: tuple[MapSpec, ...], options: ProgramOptions
) -> tuple[Request, Request]:
    """Write what the loader is asked for: one request for each source."""
    sockets = {hook.name.lower(): (bpf.prog_type(hook), hook.value) for hook in SOCKET_HOOKS}
    packets = {name.value: (bpf.PROG_TYPE_SCHED_CLS, 0) for name in options.packet_programs}
    slots = next(spec.max_entries for spec in specs if spec.name == "socket_origins")
    defines = {"SOCKET_ORIGIN_SLOTS": str(slots), **options.defines()}
    maps = {spec.name: str(directory / spec.name) for spec in specs}

    def request(source: str, programs: dict[str, tuple[int, int]]) -> Request:
        wanted = tuple(Program(name, *types, str(pins / name)) for name, types in programs.items())
        return Request(str(BPF_SOURCES / source), defines, maps, wanted)

    return request("sock.c", sockets), request("tc.c", packets)


def run_loader(request: Request) -> Report:
    """Run the loader child. Raises: LoaderError with the compiler's or verifier's words."""
    try:
        child = subprocess.run(
            [sys.executable, "-m", "agent.kernel.loader"],
            input=msgspec.json.encode(msgspec.structs.replace(request, agent_pid=os.getpid())),
            capture_output=True,
            timeout=COMPILE_LIMIT_S,
            check=False,
            cwd=BPF_SOURCES.parent,
        )
    except subprocess.TimeoutExpired as error:
        message = f"compiling {request.source} took longer than {COMPILE_LIMIT_S} s"
        raise LoaderError(message) from error
    if child.returncode != 0:
        message = f"cannot load {request.source}: {child.stderr.decode(errors='replace').strip()}"
        raise LoaderError(message)
    return msgspec.json.decode(child.stdout, type=Report)


def _check_layouts(report: Report, specs: tuple[MapSpec, ...]) -> None:
    """Compare what was compiled with what the agent packs. Raises: LoaderError naming the first difference."""
    for spec in specs:
        for role, ours, theirs in zip(("key", "value"), (spec.key, spec.value), report.layouts[spec.name], strict=True):
            if not _agrees(ours, theirs):
                message = (
                    f"map {spec.name}: the {role} {ours.name} is {theirs} in bpf/types.h, {ours.fields} in the agent"
                )
                raise LoaderError(message)


def _agrees(ours: Layout, theirs: StructReport) -> bool:
    return (tuple(tuple(field) for field in ours.fields), ours.size) == (theirs.fields, theirs.size)
