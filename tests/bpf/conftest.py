"""A bpffs and a cgroup of the test's own; both are gone when it ends."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.abi import MapSizes, map_specs
from agent.kernel import bpffs as mounts
from agent.kernel.cgroup import find_cgroup_root
from agent.kernel.maps import MapStore
from agent.kernel.programs import ProgramOptions
from tests.bpf import packet_path as path_of_packets
from tests.bpf import policy_path as path_of_policy
from tests.bpf.packet_path import PacketPath
from tests.bpf.policy_path import PolicyPath
from tests.lab.lab import Lab
from tests.requirements import require_root

SIZES = MapSizes(frontends=64, segments=256, socket_origins=64, peer_origins=64)
SPECS = map_specs(SIZES)
PACKET_SPECS = map_specs(replace(SIZES, conntrack=1024, affinity=64, source_ranges=64, fragments=64))
POLICY_SPECS = map_specs(
    replace(
        SIZES,
        conntrack=1024,
        affinity=64,
        source_ranges=64,
        fragments=64,
        identities=64,
        blocks=64,
        policy=1024,
        subjects=64,
        connections=1024,
        events=65_536,
    )
)
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


@pytest.fixture(scope="session")
def bpf_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    require_root()
    point = tmp_path_factory.mktemp("bpffs")
    mounts.ensure_mounted(point)
    yield point
    shutil.rmtree(point, ignore_errors=True)
    _libc.umount2(bytes(point), 2)


@pytest.fixture
def bpffs(bpf_mount: Path) -> Iterator[Path]:
    """Give an empty directory in a bpffs."""
    directory = bpf_mount / f"test{next(_numbers)}"
    directory.mkdir()
    yield directory
    for pin in sorted(directory.glob("**/links/**/*")):
        if not pin.is_dir():
            pin.unlink()
    shutil.rmtree(directory, ignore_errors=True)  # cleanup removes the directory, too


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """Give an empty cgroup below the machine's root, with nothing attached."""
    require_root()
    directory = find_cgroup_root().path / f"ebproxy-test-{os.getpid()}-{next(_numbers)}"
    directory.mkdir()
    yield directory
    with contextlib.suppress(FileNotFoundError):
        directory.rmdir()


@pytest.fixture
def store(bpffs: Path) -> Iterator[MapStore]:
    """Give the maps of one layout, small."""
    opened = MapStore.open(bpffs / "maps", SPECS)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def shared_packet_path(bpf_mount: Path) -> Iterator[PacketPath]:
    """Give a node for packets, and the programs, which take seconds to compile."""
    with Lab(2) as lab:
        node = lab.nodes[1]
        for name in ("one", "two"):
            node.add_pod(name)
        path_of_packets.furnish(node)
        with path_of_packets.opened(node, bpf_mount / "packets", PACKET_SPECS) as made:
            yield made


@pytest.fixture
def path(shared_packet_path: PacketPath) -> PacketPath:
    """Give a node without services and flows; see packet_path.py."""
    shared_packet_path.clear()
    return shared_packet_path


@pytest.fixture(scope="session")
def shared_policy(shared_packet_path: PacketPath, bpf_mount: Path) -> Iterator[PolicyPath]:
    """Give the same node with programs for policy, over maps of their own."""
    options = ProgramOptions(policy=True)
    with path_of_policy.opened(shared_packet_path.node, bpf_mount / "policy", POLICY_SPECS, options) as made:
        yield made


@pytest.fixture
def policy(shared_policy: PolicyPath) -> PolicyPath:
    """Give a node whose pod ``one`` is isolated; see policy_path.py."""
    shared_policy.clear()
    return shared_policy
