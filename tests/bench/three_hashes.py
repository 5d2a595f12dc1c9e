"""Load, fill and attach the connect hook of usual shape (three_hashes.c), to compare ours with."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from pathlib import Path

from agent.core.addresses import parse_address
from agent.kernel import bpf
from agent.kernel.attach import closing
from agent.kernel.bpffs import ensure_mounted
from agent.kernel.loader import Program, Request
from agent.kernel.programs import BPF_SOURCES, run_loader
from tests.bench.population import POD_PORT, SERVICE_PORT, Population
from tests.bench.stage import Stage

_SOURCE = Path(__file__).with_name("three_hashes.c")
_SERVICE_KEY = struct.Struct("=4s2sH")
_SERVICE = struct.Struct("=II")
_BACKEND = struct.Struct("=4s2sH")
_REVERSES = 65_536


def open_hook(stage: Stage, cgroup: Path, population: Population, ends: contextlib.ExitStack) -> int:
    """Attach the hook to a cgroup, over the Services of a population; returns the program's descriptor."""
    pins = stage.bpffs("three-hashes", ends)
    ensure_mounted(pins)
    ends.callback(_unpin, pins)
    backends = population.services * population.endpoints
    sizes = {
        "services": (bpf.MapType.HASH, _SERVICE_KEY.size, _SERVICE.size, 2 * (population.services + backends)),
        "backends": (bpf.MapType.HASH, 4, _BACKEND.size, 2 * backends),
        "reverses": (bpf.MapType.LRU_HASH, 16, 8, _REVERSES),
    }
    maps = {name: _make_map(pins / name, name, *size) for name, size in sizes.items()}
    _fill(maps, population)
    for opened in maps.values():
        opened.close()
    program = _load(stage, pins, tuple(sizes))
    ends.callback(os.close, program)
    with closing(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)) as directory:
        ends.callback(os.close, bpf.link_create(program, directory, bpf.AttachType.CONNECT4))
    return program


def _unpin(pins: Path) -> None:
    for pin in pins.iterdir():
        if "." not in pin.name:  # the kernel's own files
            pin.unlink()


def _make_map(pin: Path, name: str, kind: bpf.MapType, key_size: int, value_size: int, entries: int) -> bpf.Map:
    flags = bpf.NO_PREALLOC if kind is bpf.MapType.HASH else 0
    created = bpf.Map(bpf.map_create(kind, key_size, value_size, entries, flags, name))
    bpf.obj_pin(created.fd, pin)
    return created


def _fill(maps: dict[str, bpf.Map], population: Population) -> None:
    services: dict[bytes, bytes] = {}
    backends: dict[bytes, bytes] = {}
    port, pod_port = SERVICE_PORT.to_bytes(2, "big"), POD_PORT.to_bytes(2, "big")
    for number in range(population.services):
        vip = parse_address(population.cluster_ip(number))[12:]
        services[_SERVICE_KEY.pack(vip, port, 0)] = _SERVICE.pack(population.endpoints, 0)
        for index, address in enumerate(population.addresses(number)):
            ident = len(backends) + 1
            services[_SERVICE_KEY.pack(vip, port, 1 + index)] = _SERVICE.pack(0, ident)
            backends[struct.pack("=I", ident)] = _BACKEND.pack(parse_address(address)[12:], pod_port, 0)
    for name, entries in (("services", services), ("backends", backends)):
        maps[name].update_batch(b"".join(entries), b"".join(entries.values()), len(entries))


def _load(stage: Stage, pins: Path, maps: tuple[str, ...]) -> int:
    """Compile and load; the loader wants the header tree beside the source."""
    directory = stage.directory / "three-hashes-source"
    shutil.copytree(BPF_SOURCES / "include", directory / "include")
    source = directory / _SOURCE.name
    shutil.copy(_SOURCE, source)
    hook = bpf.AttachType.CONNECT4
    pin = pins / "connect4"
    programs = (Program("connect4", bpf.PROG_TYPE_CGROUP_SOCK_ADDR, hook.value, str(pin)),)
    own_maps = {name: str(pins / name) for name in maps}
    run_loader(Request(str(source), {}, own_maps, programs, os.getpid()))
    return bpf.obj_get(pin)
