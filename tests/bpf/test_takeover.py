"""What former maps of state hold goes on in maps of another size: the younger of both, as far as there is room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.abi import U64, map_specs
from agent.kernel import bpf
from agent.kernel.maps import MapStore
from agent.kernel.takeover import Takeover
from tests.bpf.conftest import SIZES

STATEFUL = pytest.mark.parametrize("name", ["peer_origins", "conntrack", "connections"])
ENTRIES = 24


def entry(opened: bpf.Map, number: int, value: int = 1) -> tuple[bytes, bytes]:
    return bytes([number]) * opened.info.key_size, bytes([value]) * opened.info.value_size


def read(opened: bpf.Map) -> dict[int, int]:
    return {key[0]: value[0] for key, value in opened.items()}


@contextmanager
def both(bpffs: Path, name: str, size: int) -> Iterator[tuple[bpf.Map, bpf.Map, Takeover]]:
    """A former map of 64 entries, 24 of which are taken; ours of another size; and the way from one to the other."""
    formers = (bpffs / "former",)
    specs = map_specs(replace(SIZES, **{name: size}))
    with (
        closing(MapStore.open(formers[0], map_specs(replace(SIZES, **{name: 64})))) as former,
        closing(MapStore.open(bpffs / "ours", specs, former=formers)) as ours,
    ):
        for number in range(ENTRIES):
            former.maps[name].update(*entry(former.maps[name], number))
        with closing(Takeover(ours.maps, specs, formers)) as takeover:
            yield former.maps[name], ours.maps[name], takeover


@STATEFUL
@pytest.mark.parametrize("size", [pytest.param(128, id="more"), pytest.param(32, id="less")])
def test_everything_is_copied(bpffs, name, size):
    with both(bpffs, name, size) as (_, ours, takeover):
        takeover.copy(is_older=True)

        assert read(ours) == dict.fromkeys(range(ENTRIES), 1)
        assert takeover.carries(bpffs / "former", name)


@STATEFUL
@pytest.mark.parametrize("size", [pytest.param(16, id="some"), pytest.param(1, id="one")])
def test_what_has_no_room_is_left_and_not_known(bpffs, name, size):
    with both(bpffs, name, size) as (_, ours, takeover):
        takeover.copy(is_older=True)

        assert 0 < len(read(ours)) <= size
        assert not takeover.carries(bpffs / "former", name)


@STATEFUL
def test_the_former_is_younger_until_the_hooks_turn_and_ours_afterwards(bpffs, name):
    with both(bpffs, name, 32) as (former, ours, takeover):
        takeover.copy(is_older=True)
        former.update(*entry(former, 3, 2))
        takeover.copy(is_older=True)
        assert read(ours)[3] == 2, "the agent was killed in between, and the former went on"

        ours.update(*entry(ours, 4, 3))
        former.update(*entry(former, 99, 2))
        takeover.copy(is_older=False)
        assert (read(ours)[4], read(ours)[99]) == (3, 2)


@STATEFUL
def test_what_ours_hold_does_not_make_room(bpffs, name):
    with both(bpffs, name, 16) as (_, ours, takeover):
        mine = range(100, 112)
        for number in mine:
            ours.update(*entry(ours, number))
        takeover.copy(is_older=False)

        assert set(mine) <= read(ours).keys()


@STATEFUL
def test_nothing_is_copied_any_more_once_it_is_closed(bpffs, name):
    with both(bpffs, name, 32) as (_, ours, takeover):
        takeover.close()
        takeover.copy(is_older=True)

        assert not read(ours)


@STATEFUL
def test_what_cannot_be_copied_is_told(bpffs, name, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with both(bpffs, name, 32) as (_, _, takeover):
        monkeypatch.setattr(bpf.Map, "update_batch", refuse)
        takeover.copy(is_older=True)

    assert f"not everything that {name} held is taken over" in caplog.text


def test_what_is_alike_is_shared_and_carried(bpffs):
    formers = (bpffs / "former",)
    with closing(MapStore.open(formers[0], map_specs(SIZES))):
        specs = map_specs(replace(SIZES, segments=512))
        with closing(MapStore.open(bpffs / "ours", specs, former=formers)) as ours:
            takeover = Takeover(ours.maps, specs, formers)

            assert takeover.carries(formers[0], "connections", "conntrack", "policy_states")
            assert not takeover.carries(bpffs / "another", "connections")


def test_what_means_something_else_is_not(bpffs):
    formers = (bpffs / "former",)
    with closing(MapStore.open(formers[0], map_specs(SIZES))) as former:
        former.maps["connections"].update(*entry(former.maps["connections"], 1))
        specs = tuple(replace(it, value=U64) if it.name == "connections" else it for it in map_specs(SIZES))
        with closing(MapStore.open(bpffs / "ours", specs, former=formers)) as ours:
            takeover = Takeover(ours.maps, specs, formers)
            takeover.copy(is_older=True)

            assert not takeover.carries(formers[0], "connections")
            assert not read(ours.maps["connections"])
