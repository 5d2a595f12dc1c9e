"""Maglev tables in the kernel: built there by a program of ours, since the agent has nothing as fast.

    walks (agent/core/maglev.py) -> maglev_builds -> bpf/maglev.c -> maglev_builds -> maglev_tables[number - 1]

A table is built aside and written into its place in one go, so that clients meanwhile choose by what it held before.
The program is compiled when a Service first asks for a table, in a thread, as that takes a second.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

from agent.core.abi import MapSpec, maglev_table_of, pack_maglev_build
from agent.core.maglev import walks
from agent.core.plan import split_slots
from agent.errors import LoaderError
from agent.kernel import bpf, programs
from agent.kernel.maps import MAGLEV_NOWHERE, MapStore
from agent.kernel.programs import ProgramOptions

log = logging.getLogger("ebproxy.maglev")
_FIRST = bytes(4)
_RUNS = 512  # of 512 steps: more than a table takes, and a run that finds it full costs next to nothing
_TRIES = 64  # a signal may end any of them


class MaglevTables:
    """Builds the tables of one layout. ``on_ready`` is called, in another thread, when the program was compiled.

    What cannot be built yet leads nowhere. ``check`` builds it later, and what somebody has written over.
    """

    def __init__(
        self,
        store: MapStore,
        directory: Path,
        specs: tuple[MapSpec, ...],
        options: ProgramOptions,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.on_ready = on_ready
        self.fault = ""
        """Why tables cannot be built; it is tried again at the next check."""
        self._store = store
        self._place = (directory, store, specs, options)
        self._program: int | None = None
        self._compiling: threading.Thread | None = None
        self._wanted: dict[int, tuple[bytes, int]] = {}
        """By number, the backends a table is for (slots end to end), and its checksum; 0 = it is still to be built."""

    def build(self, number: int, backends: bytes) -> None:
        """Build a table for a segment's backends, at least one. Raises: OSError, when it cannot be written."""
        table = self._compute(backends)
        self._wanted[number] = (backends, zlib.crc32(table) if table else 0)
        self._store.write_table(number, table or MAGLEV_NOWHERE)

    def check(self) -> int:
        """Build what could not be built or is not as it was; returns how many tables. Raises: OSError."""
        if self._compiling and self._compiling.is_alive():
            return 0
        self._compiling = None
        self.fault = ""
        differing = [
            (number, backends)
            for number, (backends, checksum) in self._wanted.items()
            if not checksum or zlib.crc32(self._store.read_table(number)) != checksum
        ]
        for number, backends in differing:
            self.build(number, backends)
        return len(differing)

    def close(self) -> None:
        """Close the program; its pin keeps it."""
        if self._program is not None:
            os.close(self._program)

    def _compute(self, backends: bytes) -> bytes:
        """Have the kernel build a table; empty = it cannot, now."""
        program = self._find_program()
        if program is None:
            return b""
        build = self._store.maps["maglev_builds"]
        try:
            build.update(_FIRST, pack_maglev_build(walks(split_slots(backends))))
            _run_to_the_end(program)
            return maglev_table_of(build.lookup(_FIRST) or b"")
        except OSError as error:
            self._fail(error)
            return b""

    def _find_program(self) -> int | None:
        if self._program is None and self._compiling is None:
            self._program = programs.open_builder(*self._place)
            if self._program is None:
                self._compiling = threading.Thread(target=self._compile, name="maglev", daemon=True)
                self._compiling.start()
        return self._program

    def _compile(self) -> None:
        try:
            self._program = programs.load_builder(*self._place)
        except (LoaderError, OSError) as error:
            self._fail(error)
        else:
            self.on_ready()

    def _fail(self, error: Exception) -> None:
        self.fault = f"Maglev tables cannot be built, backends are chosen at random: {error}"
        log.error("%s", self.fault)


def _run_to_the_end(program: int) -> None:
    """Run the builder until the table is full. Raises: OSError."""
    for _ in range(_TRIES):
        try:
            if bpf.run_repeatedly(program, _RUNS):
                return
        except InterruptedError:
            continue  # it goes on where it was
    raise OSError(errno.EIO, "the program does not fill the table")
