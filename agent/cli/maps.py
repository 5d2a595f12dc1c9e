"""`ebproxy maps`: each pinned map, how full it is, and what memory it takes."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from agent.cli.output import print_json, print_table
from agent.cli.view import open_store
from agent.core.abi import FIRST_FREE_SLOT, Stage
from agent.core.plan import split_slots
from agent.core.segments import block_size
from agent.kernel import bpf
from agent.kernel.maps import MapStore

HELP = "show the pinned maps: kind, sizes, entries, memory; and what the programs counted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing."""


def run(args: argparse.Namespace) -> int:
    """Print the maps."""
    with closing(open_store(args.bpffs)) as store:
        maps = [_document(name, opened, store) for name, opened in sorted(store.maps.items())]
        counters = {counter.name.lower(): value for counter, value in store.read_counters().items()}
    if args.output == "json":
        print_json({"maps": maps, "counters": counters})
        return 0
    columns = ("name", "kind", "key", "value", "entries", "capacity", "memory", "id")
    print_table(columns, [tuple(entry[column] for column in columns) for entry in maps])
    print_table(("counted by the programs", "times"), list(counters.items()))
    return 0


def _document(name: str, opened: bpf.Map, store: MapStore) -> dict[str, Any]:
    info = opened.info
    return {
        "name": name,
        "kind": bpf.MapType(info.type).name.lower(),
        "key": info.key_size,
        "value": info.value_size,
        "entries": _count(name, opened, store),
        "capacity": info.max_entries,
        "memory": _memory(opened.fd),
        "id": info.id,
    }


def _count(name: str, opened: bpf.Map, store: MapStore) -> int:
    """Count entries in use.

    Of segments the slots of their blocks, of tables those that a header names, of other arrays those that hold
    something. A ring buffer has none.
    """
    if opened.info.type == bpf.MapType.RINGBUF:
        return 0
    if opened.info.type == bpf.MapType.PROG_ARRAY:
        return sum(opened.lookup(stage.to_bytes(4, sys.byteorder)) is not None for stage in Stage)
    if name == "segments":
        segments = store.read_state().segments.values()
        return FIRST_FREE_SLOT + sum(block_size(1 + len(split_slots(slots))) for slots, _ in segments)
    if name == "maglev_tables":
        return len(store.read_state().tables)
    if opened.info.type in {bpf.MapType.ARRAY, bpf.MapType.PERCPU_ARRAY}:
        return sum(any(value) for _, value in opened.items())
    return sum(1 for _ in opened.items())


def _memory(fd: int) -> int:
    """Bytes of kernel memory, as the kernel accounts for them."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("memlock:"))
