"""The loader: compile the C programs with BCC, point them at the agent's maps, load, pin, report, and exit.

Runs as a child (``python -m agent.kernel.loader``) because BCC and LLVM hold 60 MiB once imported, change the working
directory, and end the process on a compiler back-end error. It is the only importer of ``bcc``.

Standard input carries one ``Request`` as JSON, standard output one ``Report``. Exit status 1 with the compiler's or
verifier's words on standard error when anything fails.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import msgspec

from agent.kernel import bpf

_PR_SET_PDEATHSIG = 1
_LD_IMM64 = 0x18
_PSEUDO_MAP_FD = 1
_INSTRUCTION = struct.Struct("=BBhi")
_INCLUDE = re.compile(r'^#include "(?P<name>[^"]+)"\s*$')


class Program(msgspec.Struct, frozen=True):
    """A program to load: its function in the source, its types, and where to pin it."""

    name: str
    prog_type: int
    attach_type: int
    pin: str


class Request(msgspec.Struct, frozen=True):
    """What to compile and load.

    ``maps`` gives, for each map the source declares, the pin of the real one. ``agent_pid`` is who asks,
    filled in by ``run_loader``: nobody else is served.
    """

    source: str
    defines: dict[str, str]
    maps: dict[str, str]
    programs: tuple[Program, ...]
    agent_pid: int = 0


class StructReport(msgspec.Struct, frozen=True):
    """A struct as compiled: (field, offset, size) in bytes, and its size."""

    fields: tuple[tuple[str, int, int], ...]
    size: int


class Report(msgspec.Struct, frozen=True):
    """For each map, the layout of its key and of its value."""

    layouts: dict[str, tuple[StructReport, StructReport]]


def flatten(path: Path) -> str:
    """Write a C file and its local includes as one text.

    BCC rewrites map accesses in the main file only, so there must be just one; ``#line`` keeps clang's messages
    pointing at the real files.
    """
    seen: set[Path] = set()

    def lines(file: Path) -> list[str]:
        seen.add(file)
        result = [f'#line 1 "{file}"']
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            match = _INCLUDE.match(line)
            if not match:
                result.append(line)
                continue
            included = file.parent / match["name"]
            if included not in seen:
                result += lines(included)
            result.append(f'#line {number + 1} "{file}"')
        return result

    return "\n".join(lines(path)) + "\n"


def _compile(request: Request) -> Any:
    source = Path(request.source)
    os.environ["BCC_KERNEL_SOURCE"] = str(source.parent)
    from bcc import BPF  # noqa: PLC0415 - after the environment says where the headers are

    defines = [f"-D{name}={value}" for name, value in sorted(request.defines.items())]
    return BPF(text=flatten(source), cflags=["-Wall", "-Werror", "-Wno-unused-function", *defines])


def _struct_report(kind: Any, size: int) -> StructReport:
    """Report a key or value type of ``size`` bytes, a number the compiler gave; a ring buffer has none of either."""
    if not issubclass(kind, ctypes.Structure):
        return StructReport((("value", 0, size),) if size else (), size)
    members: list[tuple[Any, ...]] = list(getattr(kind, "_fields_", ()))
    return StructReport(
        tuple((name, getattr(kind, name).offset, getattr(kind, name).size) for name, *_ in members), size
    )


def _swap_maps(module: Any, function: str, real: dict[int, int]) -> None:
    """Replace, in a function's bytecode, the descriptors of BCC's maps by those of the real ones.

    In place, so that line information and relocations stay valid; must happen before the function is loaded.
    """
    from bcc import lib  # noqa: PLC0415

    start = lib.bpf_function_start(module.module, function.encode())
    size = lib.bpf_function_size(module.module, function.encode())
    code = (ctypes.c_char * size).from_address(start)
    for offset in range(0, size, _INSTRUCTION.size):
        opcode, registers, off, immediate = _INSTRUCTION.unpack_from(code, offset)
        if opcode == _LD_IMM64 and registers >> 4 == _PSEUDO_MAP_FD:
            _INSTRUCTION.pack_into(code, offset, opcode, registers, off, real[immediate])


def _report(module: Any, name: str) -> tuple[StructReport, StructReport]:
    from bcc import lib  # noqa: PLC0415

    table = module[name]
    leaf = getattr(table, "sLeaf", table.Leaf)  # of a per-CPU map, Leaf is the values of all CPUs
    return (
        _struct_report(table.Key, lib.bpf_table_key_size(module.module, name.encode())),
        _struct_report(leaf, lib.bpf_table_leaf_size(module.module, name.encode())),
    )


def load(request: Request) -> Report:
    """Compile, load and pin everything a request asks for."""
    module = _compile(request)
    layouts: dict[str, tuple[StructReport, StructReport]] = {}
    real: dict[int, int] = {}
    for name, pin in request.maps.items():
        table = module[name]
        layouts[name] = _report(module, name)
        real[table.get_fd()] = bpf.obj_get(Path(pin))
    for program in request.programs:
        _swap_maps(module, program.name, real)
        function = module.load_func(program.name, program.prog_type, attach_type=program.attach_type)
        bpf.obj_pin(function.fd, Path(program.pin))
    return Report(layouts)


def main() -> int:
    """Serve one request from standard input."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    # An orphan would go on pinning while the loader of its agent's successor does.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request.agent_pid:
        return 1
    # BCC prints to standard output as it likes: keep that channel for the report.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        report = load(request)
    except ImportError as error:
        print(f"cannot import bcc: {error}; install Debian's python3-bpfcc", file=sys.stderr)
        return 1
    except Exception as error:  # noqa: BLE001 - BCC raises plain Exception; the parent gets the words
        print(f"{error}", file=sys.stderr)
        return 1
    answer.write(msgspec.json.encode(report))
    answer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
