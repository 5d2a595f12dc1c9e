"""The programs: they compile, verify and load in every variant, over our maps; what is wrong is said and refused."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from agent.core.abi import FRONTEND, FRONTEND_KEY, MapSpec, Stage, _layout
from agent.errors import LoaderError
from agent.kernel import bpf, programs
from agent.kernel.loader import Report
from agent.kernel.maps import MapStore
from agent.kernel.programs import SOCKET_HOOKS, ProgramOptions, open_or_load, run_loader
from tests.bpf.conftest import SPECS

OPTIONS = ProgramOptions(host_netns=2**63 + 5)
VARIANTS = [
    pytest.param(replace(OPTIONS, remember_peer=peer, host_only=host), id=f"{name}-{where}")
    for peer, name in ((True, "remember-peer"), (False, "forget-peer"))
    for host, where in ((False, "all"), (True, "host"))
]
VARIANTS += [
    pytest.param(replace(OPTIONS, policy=True, anti_spoofing=spoofing), id=name)
    for spoofing, name in ((True, "policy"), (False, "policy-without-anti-spoofing"))
]
OTHER_OPTIONS = {
    "host_netns": 7,
    "source_ports": (20_000, 20_001),
    "tcp_established_s": 1,
    "tcp_close_wait_s": 2,
    "udp_s": 3,
    "udp_stream_s": 4,
}
KEYS_OF_STAGES = [stage.to_bytes(4, sys.byteorder) for stage in Stage]
EVERY = [hook.name.lower() for hook in SOCKET_HOOKS] + list(OPTIONS.packet_programs)


def load(store: MapStore, directory: Path, options: ProgramOptions = OPTIONS, specs: tuple[MapSpec, ...] = SPECS):
    """Load, close the descriptors again, and return what the kernel says of each program, by its name."""
    opened = open_or_load(directory, store, specs, options)
    infos = {hook.name.lower(): bpf.prog_info(fd) for hook, fd in opened.sockets.items()}
    infos |= {str(name): bpf.prog_info(fd) for name, fd in opened.packets.items()}
    opened.close()
    return infos


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a copy of the C sources to spoil."""
    copy = tmp_path / "bpf"
    shutil.copytree(programs.BPF_SOURCES, copy)
    monkeypatch.setattr(programs, "BPF_SOURCES", copy)
    return copy


def spoil(path: Path, old: str, new: str) -> int:
    """Replace a piece of a source; returns the number of its line."""
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))
    return text[: text.index(old)].count("\n") + 1


@pytest.mark.parametrize("options", VARIANTS)
def test_every_variant_passes_the_verifier_over_our_maps(store, bpffs, options):
    infos = load(store, bpffs / "maps", options)

    assert list(infos) == [hook.name.lower() for hook in SOCKET_HOOKS] + list(options.packet_programs)
    ours = {opened.info.id for opened in store.maps.values()}
    types = {hook.name.lower(): bpf.PROG_TYPE_CGROUP_SOCK_ADDR for hook in SOCKET_HOOKS}
    types |= dict.fromkeys(("sock_release", "post_bind4", "post_bind6"), bpf.PROG_TYPE_CGROUP_SOCK)
    types |= dict.fromkeys(options.packet_programs, bpf.PROG_TYPE_SCHED_CLS)
    for name, info in infos.items():
        assert (info.type, info.name) == (types[name], name[:15])  # as much as the kernel keeps
        assert info.map_ids
        assert ours.issuperset(info.map_ids)
    assert store.maps["frontends"].info.id in infos["connect4"].map_ids
    for name in options.packet_programs:
        assert store.maps["works"].info.id in infos[name].map_ids
    assert "bcc" not in sys.modules


def test_programs_go_on_where_the_last_that_were_opened_do(store, bpffs, sources):
    """Whatever became of the array of programs meanwhile, it is filled before one of them is attached."""
    options = replace(OPTIONS, policy=True)

    def chained() -> list[int]:
        return [int.from_bytes(store.maps["stages"].lookup(key) or b"", sys.byteorder) for key in KEYS_OF_STAGES]

    def stages(infos: dict[str, bpf.ProgInfo]) -> list[int]:
        return [infos["tc_from_pod_stage"].id, infos["tc_egress"].id]

    first = load(store, bpffs / "maps", options)
    assert chained() == stages(first)

    store.maps["stages"].delete(KEYS_OF_STAGES[0])
    assert load(store, bpffs / "maps", options) == first
    assert chained() == stages(first)

    with (sources / "lb.h").open("a") as header:
        header.write("/* changed */\n")
    second = load(store, bpffs / "maps", options)
    assert chained() == stages(second) != stages(first)


def test_without_policy_no_program_goes_on_in_another(store, bpffs):
    load(store, bpffs / "maps")

    assert [store.maps["stages"].lookup(key) for key in KEYS_OF_STAGES] == [None, None]


def test_no_two_variants_share_their_pins():
    options = [*(param.values[0] for param in VARIANTS)]
    options += [replace(OPTIONS, **{name: value}) for name, value in OTHER_OPTIONS.items()]

    assert len({programs.pins_of(Path("/"), each) for each in options}) == len(VARIANTS) + len(OTHER_OPTIONS)


def test_every_option_reaches_the_compiler():
    """Each is told by a definition of its own."""
    before = OPTIONS.defines()

    for name, value in OTHER_OPTIONS.items():
        changed = replace(OPTIONS, **{name: value}).defines()
        assert len(before.items() ^ changed.items()) >= 2, name


def test_what_is_pinned_is_adopted(store, bpffs):
    first = load(store, bpffs / "maps")

    assert load(store, bpffs / "maps") == first


def test_that_it_compiles_is_said(store, bpffs, caplog):
    caplog.set_level("INFO", logger="ebproxy")
    load(store, bpffs / "maps")
    begun, done = caplog.messages
    caplog.clear()
    load(store, bpffs / "maps")

    assert begun.startswith("compiling the programs")
    assert re.fullmatch(r"compiled and loaded the programs in \d+\.\d s", done)
    assert caplog.messages == []


def test_other_sources_make_other_programs(store, bpffs, sources):
    first = load(store, bpffs / "maps")
    with (sources / "lb.h").open("a") as header:
        header.write("/* changed */\n")

    assert not {info.id for info in load(store, bpffs / "maps").values()} & {info.id for info in first.values()}


@pytest.mark.parametrize("lost", ["connect6", "tc_egress"])
def test_one_program_missing_loads_all_anew(store, bpffs, lost):
    load(store, bpffs / "maps")
    (programs.pins_of(bpffs / "maps", OPTIONS) / lost).unlink()

    assert list(load(store, bpffs / "maps")) == EVERY


def test_programs_over_maps_that_were_replaced_are_not_used_again(store, bpffs):
    first = load(store, bpffs / "maps")
    (bpffs / "maps" / "segments").unlink()
    replaced = MapStore.open(bpffs / "maps", SPECS)
    second = load(replaced, bpffs / "maps")

    for name in ("connect4", *OPTIONS.packet_programs):
        assert replaced.maps["segments"].info.id in second[name].map_ids
        assert store.maps["segments"].info.id not in second[name].map_ids
        assert second[name].id != first[name].id
    replaced.close()


def test_a_layout_that_is_not_the_programs_is_refused_each_time(store, bpffs):
    """Programs that were refused once must not be found pinned by the next agent."""
    wrong = _layout("frontend", service="I", inside="Q", outside="Q")
    specs = tuple(replace(spec, value=wrong) if spec.name == "frontends" else spec for spec in SPECS)

    for _ in range(2):
        with pytest.raises(LoaderError, match="map frontends: the value frontend is"):
            load(store, bpffs / "maps", specs=specs)
    assert not list((bpffs / "maps").glob("*programs*"))


@pytest.fixture(scope="module", params=["sock.c", "tc.c"])
def report(bpf_mount: Path, request: pytest.FixtureRequest) -> Iterator[Report]:
    """Give what the loader says of our layouts in each source."""
    directory = bpf_mount / f"report_{request.param[:-2]}"
    maps = MapStore.open(directory, SPECS)
    wanted = {Path(each.source).name: each for each in programs.requests(directory, directory, SPECS, OPTIONS)}
    yield run_loader(msgspec.structs.replace(wanted[request.param], programs=()))
    maps.close()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_compiler_lays_out_keys_and_values_as_the_agent_packs_them(report, spec):
    for ours, theirs in zip((spec.key, spec.value), report.layouts[spec.name], strict=True):
        assert [tuple(field) for field in ours.fields] == list(theirs.fields)
        assert ours.size == theirs.size


@pytest.mark.parametrize(
    ("map_name", "role", "layout"),
    [
        pytest.param("frontends", "value", replace(FRONTEND, fields=FRONTEND.fields[::-1]), id="order"),
        pytest.param("frontends", "key", replace(FRONTEND_KEY, packer=struct.Struct("=24x")), id="size"),
        pytest.param("segments", "key", _layout("u32", value="H"), id="scalar"),
        pytest.param("peer_origins", "value", _layout("peer_origin", address="16s", door="2s", pad="H"), id="name"),
    ],
)
def test_the_first_difference_of_layouts_is_named(report, map_name, role, layout):
    specs = tuple(replace(spec, **{role: layout}) if spec.name == map_name else spec for spec in SPECS)

    with pytest.raises(LoaderError, match=rf"map {map_name}: the {role} {layout.name} is"):
        programs._check_layouts(report, specs)


def test_a_struct_changed_in_c_alone_is_refused(store, bpffs, sources):
    spoil(sources / "types.h", "	u32 inside; ", "	u32 flags; ")
    spoil(sources / "types.h", "	u32 flags;   /* enum f", "	u32 inside;   /* enum f")

    with pytest.raises(LoaderError, match="map frontends: the value frontend"):
        load(store, bpffs / "maps")


@pytest.mark.parametrize(
    ("header", "old", "new", "words"),
    [
        pytest.param("lb.h", "	u32 index;\n", "	u32 index\n", "expected ';'", id="syntax"),
        pytest.param("origin.h", "slot->cookie = 0;", "slot->cookies = 0;", "no member named 'cookies'", id="name"),
        pytest.param("lb.h", "	u32 index;\n", "	u32 index, spare;\n", "unused variable 'spare'", id="warning"),
        pytest.param("sock.c", '#include "lb.h"', "#error stop here", "stop here", id="in-the-main-file"),
    ],
)
def test_what_the_compiler_refuses_is_said_with_file_and_line(store, bpffs, sources, header, old, new, words):
    line = spoil(sources / header, old, new)

    with pytest.raises(LoaderError, match=rf"{header}:{line}:\d+: .*{words}"):
        load(store, bpffs / "maps")


def test_what_the_verifier_refuses_is_said_with_file_and_line(store, bpffs, sources):
    spoil(sources / "lb.h", "	if (!slot)\n		return LB_REJECT;\n	if (!slot->count)", "	if (!slot->count)")

    with pytest.raises(LoaderError) as raised:
        load(store, bpffs / "maps")

    refused = re.search(r"; .* @ (\S+):\d+\n[^;]*invalid mem access 'map_value_or_null'", str(raised.value))
    assert refused, "no line of the source"
    assert refused[1] == "lb.h"


def test_after_an_error_the_next_attempt_starts_clean(store, bpffs, sources):
    spoil(sources / "sock.c", "int recvmsg4(struct bpf_sock_addr *ctx)", "int recvmsg4(void *ctx, #")
    with pytest.raises(LoaderError):
        load(store, bpffs / "maps")
    shutil.copy(Path(programs.__file__).parents[2] / "bpf" / "sock.c", sources / "sock.c")

    assert list(load(store, bpffs / "maps")) == EVERY


def test_a_compiler_that_hangs_is_given_up(store, bpffs, monkeypatch):
    monkeypatch.setattr(programs, "COMPILE_LIMIT_S", 0.05)

    with pytest.raises(LoaderError, match="took longer"):
        load(store, bpffs / "maps")


def test_no_part_of_the_agent_but_the_loader_imports_bcc():
    code = "import sys, agent.__main__, agent.app, agent.kernel.dataplane; sys.exit('bcc' in sys.modules)"

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
