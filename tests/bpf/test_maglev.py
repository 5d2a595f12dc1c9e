"""Maglev tables in the kernel: built as the specification says, for any backends, and healed."""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.abi import MAGLEV_BACKENDS, MAGLEV_SIZE, unpack_maglev_table
from agent.core.maglev import build_table, walks
from agent.kernel import bpf, programs
from agent.kernel.maglev import MaglevTables
from agent.kernel.maps import MapStore
from agent.kernel.programs import TABLE_BUILDER, ProgramOptions, pins_of
from tests.bpf.conftest import SIZES, SPECS
from tests.builders import pods, slots
from tests.lab.polling import until

OPTIONS = ProgramOptions()
NOWHERE = array("H", [0xFFFF]) * MAGLEV_SIZE
COMPILE_LIMIT_S = 120


class Layout:
    """The maps of a layout, and tables that a new agent builds in them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = MapStore.open(directory, SPECS)
        self.ready = 0
        self.start()

    def start(self) -> None:
        """Begin as an agent that has just started."""
        self.tables = MaglevTables(self.store, self.directory, SPECS, OPTIONS, self._on_ready)

    def _on_ready(self) -> None:
        self.ready += 1

    @property
    def pin(self) -> Path:
        return pins_of(self.directory, OPTIONS) / TABLE_BUILDER

    def wait(self) -> None:
        """Wait until the program is compiled, or cannot be."""
        until(lambda: self.ready or self.tables.fault, "the builder compiled", COMPILE_LIMIT_S)

    def table(self, number: int = 1) -> array[int]:
        return unpack_maglev_table(self.store.read_table(number))

    def close(self) -> None:
        self.tables.close()
        self.store.close()


@pytest.fixture(scope="module")
def compiled(bpf_mount: Path) -> Iterator[Path]:
    """Give a layout whose builder is compiled."""
    directory = bpf_mount / "maglev"
    layout = Layout(directory)
    layout.tables.build(1, pods(1)[0])
    layout.wait()
    assert layout.tables.fault == ""
    layout.close()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def layout(compiled: Path) -> Iterator[Layout]:
    opened = Layout(compiled)
    yield opened
    opened.close()


@pytest.fixture
def empty(bpffs: Path) -> Iterator[Layout]:
    """Give a layout of which nothing is compiled yet."""
    opened = Layout(bpffs / "maps")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def shared(compiled: Path) -> Iterator[Layout]:
    """Give one layout to all examples of a property."""
    opened = Layout(compiled)
    yield opened
    opened.close()


_backends = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 65_535), st.booleans()), min_size=1, max_size=300, unique=True
)


def _slot(number: int, port: int, is_ipv6: bool) -> bytes:
    octets = number.to_bytes(4, "big")
    text = f"fd00::{octets[:2].hex()}:{octets[2:].hex()}" if is_ipv6 else ".".join(map(str, octets))
    return slots(text, port=port)[0]


@given(_backends)
@settings(deadline=None)
def test_the_kernel_builds_what_the_specification_says(shared, backends):
    segment = [_slot(*backend) for backend in backends]

    shared.tables.build(2, b"".join(segment))

    assert shared.table(2) == build_table(walks(segment))


@pytest.mark.parametrize("count", [1, 2, 3, 100, MAGLEV_BACKENDS])
def test_any_number_of_backends_is_built_for(layout, count):
    layout.tables.build(SIZES.maglev_tables, b"".join(pods(count)))

    assert layout.table(SIZES.maglev_tables) == build_table(walks(pods(count)))
    assert (layout.tables.fault, layout.ready) == ("", 0)


def test_tables_stand_beside_each_other(layout):
    layout.tables.build(1, b"".join(pods(3)))
    layout.tables.build(2, b"".join(pods(5)))

    assert layout.table(1) == build_table(walks(pods(3)))
    assert layout.table(2) == build_table(walks(pods(5)))


def test_what_somebody_wrote_over_is_built_again(layout):
    layout.tables.build(1, b"".join(pods(3)))
    layout.tables.build(2, b"".join(pods(4)))
    assert layout.tables.check() == 0
    layout.store.write_table(1, layout.store.read_table(2))

    assert layout.tables.check() == 1
    assert layout.table(1) == build_table(walks(pods(3)))


def test_a_signal_between_runs_costs_nothing(layout, monkeypatch):
    run, interrupted = bpf.run_repeatedly, []

    def interrupt(program: int, repeat: int) -> int:
        if len(interrupted) < 3:
            interrupted.append(run(program, 2))
            raise InterruptedError
        return run(program, repeat)

    monkeypatch.setattr(bpf, "run_repeatedly", interrupt)
    layout.tables.build(1, b"".join(pods(20)))

    assert (len(interrupted), layout.tables.fault) == (3, "")
    assert layout.table(1) == build_table(walks(pods(20)))


def test_a_program_that_never_ends_leaves_the_table_leading_nowhere(layout, monkeypatch):
    monkeypatch.setattr(bpf, "run_repeatedly", lambda *_: 0)

    layout.tables.build(1, b"".join(pods(3)))

    assert layout.table(1) == NOWHERE
    assert "the program does not fill the table" in layout.tables.fault
    monkeypatch.undo()
    assert layout.tables.check() == 1
    assert layout.tables.fault == ""
    assert layout.table(1) == build_table(walks(pods(3)))


def test_the_program_is_compiled_when_it_is_first_needed_and_tables_wait_for_it(empty):
    assert not empty.pin.exists()

    empty.tables.build(1, b"".join(pods(3)))
    empty.tables.build(2, b"".join(pods(4)))

    assert empty.table(1) == NOWHERE
    empty.wait()
    assert empty.pin.exists()
    assert empty.tables.check() == 2
    assert empty.table(1) == build_table(walks(pods(3)))
    assert empty.table(2) == build_table(walks(pods(4)))


def test_a_builder_over_other_maps_is_not_used(empty, compiled):
    """A layout's maps were made anew, and programs from before are still pinned."""
    other = bpf.obj_get(pins_of(compiled, OPTIONS) / TABLE_BUILDER)
    empty.pin.parent.mkdir()
    bpf.obj_pin(other, empty.pin)

    assert programs.open_builder(empty.directory, empty.store, SPECS, OPTIONS) is None


def test_a_builder_that_cannot_be_compiled_is_a_fault_and_is_tried_again(empty, tmp_path, monkeypatch):
    copy = tmp_path / "bpf"
    shutil.copytree(programs.BPF_SOURCES, copy)
    (copy / "maglev.c").write_text("this is not C\n")
    with monkeypatch.context() as patch:
        patch.setattr(programs, "BPF_SOURCES", copy)
        empty.tables.build(1, b"".join(pods(3)))
        empty.wait()
        empty.tables.build(1, b"".join(pods(4)))

    assert "Maglev tables cannot be built, backends are chosen at random: cannot load" in empty.tables.fault
    assert (empty.table(1), empty.ready) == (NOWHERE, 0)
    empty.tables._compiling.join()
    empty.tables.check()
    empty.wait()
    empty.tables.check()
    assert empty.table(1) == build_table(walks(pods(4)))
