"""Cgroup links: attach the socket hooks at the node's cgroup root, replace them atomically, verify, detach.

Links are pinned at ``<bpffs>/ebproxy/links/<hook>``, outside any layout: they outlive both agents and layouts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from agent.errors import DataplaneError
from agent.kernel import bpf

_HOOKS = {hook.name.lower() for hook in bpf.AttachType}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def attach(directory: Path, cgroup: Path, programs: dict[bpf.AttachType, int]) -> int:
    """Make every hook of a cgroup run its program, without a moment in which a hook that ran one runs none.

    Returns how many hooks were changed. Raises: DataplaneError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with _opened(cgroup) as cgroup_fd:
            changed = sum(_attach_one(directory, cgroup_fd, hook, fd) for hook, fd in programs.items())
            _verify(cgroup, cgroup_fd, programs)
    except OSError as error:
        message = f"attaching to cgroup {cgroup}: {error}"
        raise DataplaneError(message) from error
    return changed


def _attach_one(directory: Path, cgroup_fd: int, hook: bpf.AttachType, program: int) -> bool:
    pin = directory / hook.name.lower()
    with contextlib.suppress(FileNotFoundError), closing(bpf.obj_get(pin)) as link:
        info = bpf.link_info(link)
        if info.cgroup_id == os.fstat(cgroup_fd).st_ino:
            if info.prog_id == bpf.prog_info(program).id:
                return False
            bpf.link_update(link, program)
            return True
    with closing(bpf.link_create(program, cgroup_fd, hook)) as link:
        pin.unlink(missing_ok=True)  # of a cgroup that is gone, or of another root
        bpf.obj_pin(link, pin)
    return True


def _verify(cgroup: Path, cgroup_fd: int, programs: dict[bpf.AttachType, int]) -> None:
    for hook, program in programs.items():
        if bpf.prog_info(program).id not in bpf.prog_query(cgroup_fd, hook):
            message = f"the kernel does not list our program at {hook.name.lower()} of cgroup {cgroup}"
            raise DataplaneError(message)


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """Close a descriptor at the end."""
    try:
        yield fd
    finally:
        os.close(fd)


def attached_programs(directory: Path) -> dict[str, bpf.ProgInfo]:
    """Read which programs pinned links run, by hook; a link whose cgroup is gone runs none.

    They are told by their pins beside ``directory``: to open a program by its id takes CAP_SYS_ADMIN, which an agent in
    a pod does not have. One that is pinned nowhere, and may not be opened, is given without its maps.
    """
    attached = {}
    for pin in sorted(path for path in directory.glob("*") if path.name in _HOOKS):
        with closing(bpf.obj_get(pin)) as link:
            info = bpf.link_info(link)
        if info.cgroup_id:
            attached[pin.name] = info.prog_id
    found = {info.id: info for info in programs_by_id(directory.parent, attached.values())}
    return {hook: found[ident] for hook, ident in attached.items() if ident in found}


def programs_by_id(root: Path, idents: Iterable[int]) -> list[bpf.ProgInfo]:
    """Tell programs by their pins below ``root``, else by their ids; those that are gone are left out."""
    pinned = _pinned_programs(root)
    programs = []
    for ident in set(idents):
        with contextlib.suppress(FileNotFoundError):
            programs.append(pinned.get(ident) or _program_by_id(ident))
    return programs


def _pinned_programs(root: Path) -> dict[int, bpf.ProgInfo]:
    programs = {}
    for pin in root.glob("*/programs_*/*"):
        with contextlib.suppress(FileNotFoundError), closing(bpf.obj_get(pin)) as program:
            info = bpf.prog_info(program)
            programs[info.id] = info
    return programs


def _program_by_id(ident: int) -> bpf.ProgInfo:
    try:
        with closing(bpf.prog_fd_by_id(ident)) as program:
            return bpf.prog_info(program)
    except PermissionError:
        return bpf.ProgInfo(0, ident, "", ())


def detach(directory: Path, but: Container[bpf.AttachType] = ()) -> int:
    """Detach every link, ``but`` those of some hooks, and remove its pin; returns how many there were."""
    kept = {hook.name.lower() for hook in bpf.AttachType if hook in but}
    pins = [pin for pin in sorted(directory.glob("*")) if pin.name in _HOOKS - kept]
    for pin in pins:
        with contextlib.suppress(OSError), closing(bpf.obj_get(pin)) as link:  # of what is no link, only the pin goes
            bpf.link_detach(link)
        pin.unlink()
    return len(pins)
