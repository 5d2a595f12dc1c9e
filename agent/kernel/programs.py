"""The programs of a layout: open those that are pinned, or have the loader compile and pin them.

Programs are pinned at ``<bpffs>/ebproxy/<layout>/programs_<digest>/<hook>``, where the digest is of everything that
goes into them. An agent that starts again with the same sources finds them there and compiles nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

import agent
from agent.core.abi import Layout, MapSpec
from agent.errors import LoaderError
from agent.kernel import bpf
from agent.kernel.loader import Program, Report, Request, StructReport
from agent.kernel.maps import MapStore

BPF_SOURCES = Path(agent.__file__).resolve().parent.parent / "bpf"
COMPILE_LIMIT_S = 60

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
)


@dataclass(frozen=True, slots=True)
class ProgramOptions:
    """What is decided when the programs are compiled.

    ``host_netns``: translate only in the network namespace of this cookie; None = in all.
    """

    socket_origin_slots: int
    remember_peer: bool = True
    host_netns: int | None = None

    def defines(self) -> dict[str, str]:
        """As preprocessor definitions."""
        defines = {"SOCKET_ORIGIN_SLOTS": str(self.socket_origin_slots)}
        if self.remember_peer:
            defines["REMEMBER_PEER"] = "1"
        if self.host_netns is not None:
            defines["HOST_NETNS_COOKIE"] = f"{self.host_netns}ULL"
        return defines


def pins_of(directory: Path, options: ProgramOptions) -> Path:
    """Where a layout's programs are pinned: named after all that goes into them, sources, header tree and options."""
    source = BPF_SOURCES / "sock.c"
    state = hashlib.sha256(repr(sorted(options.defines().items())).encode())
    for path in [source, *sorted(source.parent.rglob("*.h"))]:
        state.update(path.relative_to(source.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return directory / f"programs_{state.hexdigest()[:12]}"


def open_or_load(
    directory: Path, store: MapStore, specs: tuple[MapSpec, ...], options: ProgramOptions
) -> dict[bpf.AttachType, int]:
    """Give a descriptor for the program of each socket hook. Raises: LoaderError."""
    pins = pins_of(directory, options)
    programs = _open(pins, store)
    if programs:
        return programs
    _load(pins, directory, specs, options)
    programs = _open(pins, store)
    if not programs:
        message = f"the loader left no usable programs in {pins}"
        raise LoaderError(message)
    return programs


def _open(pins: Path, store: MapStore) -> dict[bpf.AttachType, int] | None:
    """Open pinned programs; None unless all are there and use this store's maps, not predecessors of the same name."""
    ours = {opened.info.id for opened in store.maps.values()}
    programs: dict[bpf.AttachType, int] = {}
    try:
        for hook in SOCKET_HOOKS:
            programs[hook] = bpf.obj_get(pins / hook.name.lower())
        usable = all(ours.issuperset(bpf.prog_info(fd).map_ids) for fd in programs.values())
    except OSError:
        usable = False
    if usable:
        return programs
    for fd in programs.values():
        os.close(fd)
    return None


def _load(pins: Path, directory: Path, specs: tuple[MapSpec, ...], options: ProgramOptions) -> None:
    """Have the programs loaded and pinned. They take their place once their layouts are known to be the agent's."""
    fresh = pins.with_name(f"new_{pins.name}")
    for stale in filter(Path.exists, (fresh, pins)):
        shutil.rmtree(stale)
    fresh.mkdir()
    request = Request(
        source=str(BPF_SOURCES / "sock.c"),
        defines=options.defines(),
        maps={spec.name: str(directory / spec.name) for spec in specs},
        programs=tuple(
            Program(hook.name.lower(), _program_type(hook), hook.value, str(fresh / hook.name.lower()))
            for hook in SOCKET_HOOKS
        ),
    )
    try:
        _check_layouts(run_loader(request), specs)
        fresh.rename(pins)
    except LoaderError:
        shutil.rmtree(fresh)
        raise


def _program_type(hook: bpf.AttachType) -> int:
    is_release = hook is bpf.AttachType.SOCK_RELEASE
    return bpf.PROG_TYPE_CGROUP_SOCK if is_release else bpf.PROG_TYPE_CGROUP_SOCK_ADDR


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
