"""Programs on devices, by links and by filters: attached, replaced, found again, detached, beside those of others."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.core.network import LOOPBACK, Device, DevicePatterns
from agent.errors import UnsupportedKernel
from agent.kernel import bpf, probe, tc
from agent.kernel.attach import closing
from agent.kernel.bpf import Direction
from agent.kernel.netlink import Netlink, read_network
from agent.kernel.packet_path import PacketPath, wanted_programs
from agent.kernel.programs import PacketProgram, ProgramOptions
from agent.kernel.tc import Attachment, Clsact, Hook, Tcx
from tests.lab import netns
from tests.requirements import require_root

Program = Callable[[str], int]
_numbers = itertools.count()


@pytest.fixture
def program() -> Iterator[Program]:
    """Load programs that pass everything."""
    with contextlib.ExitStack() as ends:

        def load(name: str = "tc_ingress") -> int:
            fd = probe.load_packet_passing(name)
            ends.callback(os.close, fd)
            return fd

        yield load


@pytest.fixture
def namespace() -> Iterator[str]:
    """Move the test into a namespace of its own, with the devices v0 and v1."""
    require_root()
    name = f"ebproxy-test-{os.getpid()}-{next(_numbers)}"
    with contextlib.ExitStack() as ends:
        ends.callback(netns.remove, name)
        netns.add(name)
        netns.configure(name, ["link add v0 type veth peer name v1"])
        ends.enter_context(netns.entered(name))
        yield name


@pytest.fixture(params=["tcx", "clsact"])
def attachment(request: pytest.FixtureRequest, bpffs: Path, namespace: str, program: Program) -> Iterator[Attachment]:
    if request.param == "clsact":
        yield Clsact()
        return
    if not tc.has_tcx(program("probe")):
        raise UnsupportedKernel("tcx links", "Linux 6.6 has them")
    tcx = Tcx(bpffs / "links")
    yield tcx
    for pin in tcx.directory.glob("*"):
        pin.unlink()


def ifindex(name: str) -> int:
    return socket.if_nametoindex(name)


def identity(fd: int) -> int:
    return bpf.prog_info(fd).id


def running(device: str, direction: Direction) -> list[int]:
    """Ask the kernel which programs a device runs: by its links, and, with `tc`, by its filters."""
    shown = subprocess.run(
        ["tc", "-j", "filter", "show", "dev", device, direction.name.lower()],
        capture_output=True,
        text=True,
        check=True,
    )
    filters = [entry.get("options", {}).get("prog", {}).get("id") for entry in json.loads(shown.stdout or "[]")]
    return [*bpf.prog_query(ifindex(device), direction), *filter(None, filters)]


def qdiscs(device: str) -> set[str]:
    shown = subprocess.run(["tc", "-j", "qdisc", "show", "dev", device], capture_output=True, text=True, check=True)
    return {qdisc["kind"] for qdisc in json.loads(shown.stdout)}


def tc_command(*arguments: str) -> None:
    subprocess.run(["tc", *arguments], check=True, capture_output=True)


def both(device: str) -> list[Hook]:
    return [Hook(ifindex(device), direction) for direction in Direction]


def test_each_direction_runs_its_own(attachment, program):
    ids = {}
    for hook in both("v0"):
        fd = program()
        attachment.attach(hook, fd)
        ids[hook] = identity(fd)

    assert ids == attachment.attached()
    for hook, ident in ids.items():
        assert [ident] == running("v0", hook.direction)
        assert running("v1", hook.direction) == []


def test_a_program_takes_the_place_of_the_one_before(attachment, program):
    hook = both("v0")[0]
    first, second = program(), program("tc_egress")
    attachment.attach(hook, first)
    before = link_ids(attachment)

    attachment.attach(hook, second)

    assert attachment.attached() == {hook: identity(second)}
    assert running("v0", hook.direction) == [identity(second)]
    assert before == link_ids(attachment), "the link is updated, not made anew"


def link_ids(attachment: Attachment) -> list[int]:
    found = []
    for pin in sorted(attachment.directory.glob("*")) if isinstance(attachment, Tcx) else ():
        with closing(bpf.obj_get(pin)) as link:
            found.append(bpf.tcx_info(link).id)
    return found


def test_another_agent_finds_what_is_attached(attachment, program):
    hook = both("v0")[1]
    fd = program()
    attachment.attach(hook, fd)

    other = Tcx(attachment.directory.parent) if isinstance(attachment, Tcx) else Clsact()

    assert other.attached() == {hook: identity(fd)}


def test_detaching_leaves_nothing(attachment, program):
    before = qdiscs("v0")
    for hook in both("v0"):
        attachment.attach(hook, program())

    assert tc.detach_all(attachment) == 2

    assert attachment.attached() == {}
    assert [running("v0", direction) for direction in Direction] == [[], []]
    assert qdiscs("v0") == before
    assert link_ids(attachment) == []
    assert tc.detach_all(attachment) == 0


def test_what_is_detached_already_may_be_detached_again(attachment, program):
    hook = both("v0")[0]
    attachment.attach(hook, program())

    for _ in range(2):
        attachment.detach(hook)
    attachment.detach(both("v1")[0])
    attachment.detach(Hook(9999, Direction.INGRESS))


@pytest.fixture
def foreign(namespace: str, bpffs: Path, program: Program) -> Iterator[dict[Direction, int]]:
    """Give v0 programs of somebody else's: a link at ingress, and the first filter at egress."""
    link_program, filter_program = program("rival_link"), program("rival_filter")
    tc_command("qdisc", "add", "dev", "v0", "clsact")
    pin = bpffs / "rival"
    bpf.obj_pin(filter_program, pin)
    tc_command("filter", "add", "dev", "v0", "egress", "prio", "1", "handle", "1", "bpf", "da", "pinned", str(pin))
    with closing(bpf.link_create(link_program, ifindex("v0"), Direction.INGRESS)):
        yield {Direction.INGRESS: identity(link_program), Direction.EGRESS: identity(filter_program)}


def test_programs_of_others_stay(attachment, program, foreign):
    for hook in both("v0"):
        fd = program()
        attachment.attach(hook, fd)
        assert {foreign[hook.direction], identity(fd)} == set(running("v0", hook.direction))
        assert foreign[hook.direction] not in attachment.attached().values()

    tc.detach_all(attachment)

    for direction, ident in foreign.items():
        assert [ident] == running("v0", direction)


def take_away(attachment: Attachment, hook: Hook) -> None:
    """Detach as an operator would."""
    if isinstance(attachment, Tcx):
        with closing(bpf.obj_get(attachment.directory / str(hook))) as link:
            bpf.link_detach(link)
    else:
        tc_command("qdisc", "del", "dev", "v0", "clsact")


def test_what_somebody_detached_is_told_and_attached_again(attachment, program):
    hook = both("v0")[0]
    fd = program()
    attachment.attach(hook, fd)

    take_away(attachment, hook)
    assert not attachment.attached().get(hook)
    attachment.attach(hook, fd)

    assert running("v0", hook.direction) == [identity(fd)]
    assert attachment.attached() == {hook: identity(fd)}


WITHOUT_POLICY = ProgramOptions().packet_programs


@pytest.fixture
def path(attachment: Attachment, program: Program) -> PacketPath:
    return PacketPath(attachment, {name: program(name) for name in WITHOUT_POLICY})


def wanted(*, excluded: tuple[str, ...] = ()) -> dict[Hook, PacketProgram]:
    with Netlink() as netlink:
        return wanted_programs(read_network(netlink).devices, DevicePatterns(excluded=excluded))


def ran(device: str) -> list[list[str]]:
    """Name the programs a device runs, ingress first."""
    names = []
    for direction in Direction:
        names.append([])
        for ident in running(device, direction):
            with closing(bpf.prog_fd_by_id(ident)) as fd:
                names[-1].append(bpf.prog_info(fd).name)
    return names


def test_devices_run_the_packet_path_and_lo_its_own(path):
    assert path.follow(wanted()) == 5

    assert ran("v0") == ran("v1") == [["tc_ingress"], ["tc_egress"]]
    assert ran("lo") == [[], ["tc_loopback"]]
    assert path.faults == {}


def test_where_there_is_policy_pods_devices_have_programs_of_their_own():
    devices = (
        Device(2, "eth0"),
        Device(3, "cni0", kind="bridge"),
        Device(4, "v10", kind="veth"),
        Device(5, "v11", kind="veth", master=3, master_kind="bridge"),
        Device(6, "vx0", kind="vxlan"),
        Device(7, "eth1", kind="veth"),
        Device(1, "lo", hardware=LOOPBACK),
    )

    chosen = wanted_programs(devices, DevicePatterns(), policy=True, uplinks={7})

    assert {(hook.device, hook.direction.name, program.value) for hook, program in chosen.items()} == {
        (1, "EGRESS", "tc_loopback"),
        *((device, "INGRESS", "tc_ingress") for device in (2, 6, 7)),
        *((device, "EGRESS", "tc_egress") for device in (2, 6, 7)),
        *((device, "INGRESS", "tc_from_pod") for device in (4, 5)),
        *((device, "EGRESS", "tc_to_pod") for device in (4, 5)),
    }


def test_what_there_is_no_time_for_is_attached_later_the_youngest_devices_first(path, namespace):
    youngest = max(("v0", "v1"), key=ifindex)

    assert path.follow(wanted(), budget_s=0) == 1
    assert ran(youngest) == [["tc_ingress"], []]
    assert path.is_behind

    assert path.follow(wanted()) == 4
    assert not path.is_behind
    assert ran("v0") == ran("v1") == [["tc_ingress"], ["tc_egress"]]


def test_to_replace_a_program_is_never_put_off(path, attachment, program):
    path.follow(wanted())
    second = PacketPath(attachment, {name: program(name) for name in WITHOUT_POLICY})

    assert second.follow(wanted(), budget_s=0) == 5
    assert not second.is_behind


def test_only_differences_are_attached(path, namespace):
    path.follow(wanted())
    assert path.follow(wanted()) == 0

    netns.configure(namespace, ["link add d0 type veth peer name d1"])
    assert path.follow(wanted()) == 4
    assert ran("d0") == [["tc_ingress"], ["tc_egress"]]

    assert path.follow(wanted(excluded=("v*",))) == 4
    assert ran("v0") == ran("v1") == [[], []]
    assert ran("d0") == [["tc_ingress"], ["tc_egress"]]


def test_other_programs_take_the_place_of_a_former_agents(path, attachment, program):
    path.follow(wanted())
    links = link_ids(attachment)

    second = PacketPath(attachment, {name: program(name) for name in WITHOUT_POLICY})

    assert second.follow(wanted()) == 5
    assert link_ids(attachment) == links
    assert ran("v0") == [["tc_ingress"], ["tc_egress"]]
    assert set(attachment.attached().values()) == set(second._ids.values())


def test_a_device_that_is_gone_leaves_no_pin(path, attachment, namespace):
    path.follow(wanted())
    netns.configure(namespace, ["link del v0"])

    path.follow(wanted())

    assert attachment.attached() == {Hook(1, Direction.EGRESS): path._ids[PacketProgram.LOOPBACK]}
    assert len(link_ids(attachment)) == isinstance(attachment, Tcx)


def test_a_device_that_is_moved_away_takes_no_program_along(path, namespace):
    """Into a pod, say, where it would find another node's worth of addresses."""
    path.follow(wanted())
    other = f"{namespace}-b"
    netns.add(other)
    try:
        netns.configure(namespace, [f"link set v1 netns {other}"])

        path.follow(wanted())

        with netns.entered(other):
            assert ran("v1") == [[], []]
    finally:
        netns.remove(other)


def test_a_check_heals_what_somebody_detached(path, attachment):
    path.follow(wanted())
    take_away(attachment, both("v0")[0])
    assert path.follow(wanted()) == 0, "what was done last is believed"

    assert path.check(wanted()) >= 1
    assert path.check(wanted()) == 0
    assert ran("v0") == [["tc_ingress"], ["tc_egress"]]


def test_a_device_that_takes_no_program_costs_only_itself(bpffs, namespace, program):
    """A qdisc of another kind is where ours would be."""
    tc_command("qdisc", "add", "dev", "v0", "ingress")
    path = PacketPath(Clsact(), {name: program(name) for name in WITHOUT_POLICY})

    path.follow(wanted())

    assert list(path.faults) == both("v0")
    assert "ingress is in the place of clsact" in path.faults[both("v0")[1]]
    assert ran("v1") == [["tc_ingress"], ["tc_egress"]]
    tc_command("qdisc", "del", "dev", "v0", "ingress")
    path.check(wanted())
    assert path.faults == {}
    assert ran("v0") == [["tc_ingress"], ["tc_egress"]]


def test_a_device_that_went_meanwhile_is_no_fault(path):
    gone = Device(9999, "gone")

    assert path.follow(wanted_programs([gone], DevicePatterns())) == 0
    assert path.faults == {}


def test_a_foreign_pin_among_the_links_is_left_alone(bpffs, namespace, program):
    tcx = Tcx(bpffs / "links")
    tcx.directory.mkdir(parents=True)
    try:
        bpf.obj_pin(program(), tcx.directory / "notes")

        assert tcx.attached() == {}
        assert tc.detach_all(tcx) == 0
        assert (tcx.directory / "notes").exists()
    finally:
        (tcx.directory / "notes").unlink()
