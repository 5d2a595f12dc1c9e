"""The node's cgroup root is found from where kind, a DaemonSet's pod or a plain process stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import ConfigError, UnsupportedKernel
from agent.kernel.cgroup import Mount, choose, contains, find_cgroup_root, read_mounts, read_own

REPOSITORY = Path(__file__).resolve().parents[2]
FIND = (
    "import json, sys; from pathlib import Path; from agent.kernel.cgroup import find_cgroup_root;"
    "found = find_cgroup_root(Path(sys.argv[1]) if sys.argv[1:] else None);"
    "print(json.dumps([str(found.path), found.root, found.own, found.warning]))"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for namespaces and cgroups")


@pytest.fixture
def tree() -> Iterator[Path]:
    """Make a node's cgroup with a pod's below it, as runc would, and remove them."""
    node = find_cgroup_root().path / f"ebproxy-test-{os.getpid()}"
    pod = node / "kubepods" / "pod1"
    pod.mkdir(parents=True)
    yield node
    for directory in (pod, pod.parent, node):
        directory.rmdir()


def find_in(cgroup: Path, setup: str, *override: str) -> list[str]:
    """Run the search in a cgroup namespace whose root is ``cgroup``, after ``setup`` in its own mount namespace.

    Returns path, root, own and warning.
    """
    inner = f'set -e\n{setup}\nexec "{sys.executable}" -c \'{FIND}\' "$@"'
    outer = 'echo $$ > "$0/cgroup.procs" && exec unshare --cgroup --mount sh -c "$@"'
    ran = subprocess.run(
        ["sh", "-c", outer, cgroup, inner, "sh", *override],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert ran.returncode == 0, ran.stderr
    found: list[str] = json.loads(ran.stdout)
    return found


@needs_root
def test_a_plain_process_finds_the_root_of_the_tree():
    found = find_cgroup_root()

    assert found.is_whole
    assert (found.root, found.warning) == ("/", "")
    assert any(f" {found.path} cgroup2 " in line for line in Path("/proc/mounts").read_text().splitlines())


@needs_root
def test_a_nested_namespace_with_the_nodes_tree_mounted_finds_the_node(tree, tmp_path):
    """As a DaemonSet's pod: a private namespace, its own tree at one path, the node's by hostPath at another."""
    whole, host = tree.parent, tmp_path / "host cgroup"
    (tmp_path / "own").mkdir()
    host.mkdir()
    setup = f'mount --bind "{whole}" "{host}"\nmount -t cgroup2 none "{tmp_path}/own"\numount "{whole}"'

    assert [str(host), "/../../..", "/", ""] == find_in(tree / "kubepods" / "pod1", setup)


@needs_root
def test_a_mount_of_a_sibling_is_passed_over(tree, tmp_path):
    """The mount farthest from us is useless where our own cgroup is not below it."""
    sibling = tree / "sibling"
    sibling.mkdir()
    try:
        setup = f'mkdir "{tmp_path}/a" "{tmp_path}/b"\nmount --bind "{sibling}" "{tmp_path}/a"\n'
        setup += f'mount --bind "{tree}" "{tmp_path}/b"\numount "{tree.parent}"'

        assert [f"{tmp_path}/b", "/../..", "/", ""] == find_in(tree / "kubepods" / "pod1", setup)
    finally:
        sibling.rmdir()


@needs_root
def test_a_namespace_that_is_the_node_itself_finds_its_own_root(tree, tmp_path):
    """As kind's node: the node is a subtree of the machine's, and all it sees of it."""
    setup = (
        f'mount -t cgroup2 none "{tmp_path}"\numount "{tree.parent}"\necho $$ > "{tmp_path}/kubepods/pod1/cgroup.procs"'
    )

    assert [str(tmp_path), "/", "/kubepods/pod1", ""] == find_in(tree, setup)


@needs_root
def test_seeing_only_ourselves_is_warned_of(tree, tmp_path):
    setup = f'mount -t cgroup2 none "{tmp_path}"\numount "{tree.parent}"'

    path, root, own, warning = find_in(tree / "kubepods" / "pod1", setup)

    assert (path, root, own) == (str(tmp_path), "/", "/")
    assert "is our own cgroup and not the whole tree" in warning


@needs_root
def test_what_is_mounted_over_is_not_found(tree, tmp_path):
    setup = f'mount -t cgroup2 none "{tmp_path}"\nmount -t tmpfs none "{tree.parent}"'

    assert str(tmp_path) == find_in(tree, setup)[0]


@needs_root
def test_an_override_may_be_a_subtree_that_holds_us(tree):
    pod = tree / "kubepods" / "pod1"

    assert [str(tree), f"/../../../{tree.name}", "/", ""] == find_in(pod, "", str(tree))


@needs_root
def test_an_override_beside_us_is_warned_of_in_a_nested_namespace_too(tree):
    sibling = tree / "sibling"
    sibling.mkdir()
    try:
        assert "is not below" in find_in(tree / "kubepods" / "pod1", "", str(sibling))[3]
    finally:
        sibling.rmdir()


@needs_root
def test_an_override_that_does_not_hold_us_is_warned_of(tree):
    found = find_cgroup_root(tree)

    assert found.root == f"/{tree.name}"
    assert "is not below" in found.warning


@pytest.mark.parametrize(
    ("path", "fault"), [("/proc", "is not on a cgroup v2 file system"), ("/nowhere", "does not exist")]
)
def test_an_override_that_is_no_cgroup2_is_refused(path, fault):
    with pytest.raises(ConfigError, match=f"cgroupRoot: {path} {fault}"):
        find_cgroup_root(Path(path))


def test_without_any_cgroup2_mount_the_feature_is_named(tmp_path):
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text("32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n")

    with pytest.raises(UnsupportedKernel, match="a cgroup v2 mount"):
        find_cgroup_root(mountinfo=mountinfo)


def test_mountinfo_is_read_with_its_optional_fields_and_escapes():
    text = (
        "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
        r"52 41 0:38 /../a /host\040cgroup ro shared:7 master:1 - cgroup2 none rw"
        "\n"
        "60 31 0:29 / /cpu rw - cgroup cgroup2 rw\n"
    )

    assert [Mount(41, "/", Path("/sys/fs/cgroup/unified")), Mount(52, "/../a", Path("/host cgroup"))] == read_mounts(
        text
    )


@pytest.mark.parametrize(
    ("text", "own"),
    [("4:memory:/x\n0::/a/b\n", "/a/b"), ("0::/a (deleted)\n", "/a"), ("1:cpu:/x\n", "/"), ("0::/\n", "/")],
)
def test_our_own_cgroup_is_read(text, own):
    assert own == read_own(text)


@pytest.mark.parametrize(
    ("root", "own", "expected"),
    [
        ("/", "/", True),
        ("/", "/a", True),
        ("/a", "/a/b", True),
        ("/a", "/ab", False),
        ("/a/b", "/a", False),
        ("/..", "/a", True),
        ("/../..", "/../x", True),
        ("/..", "/../../x", False),
        ("/../x", "/../x/y", True),
        ("/../x", "/", False),
        ("/", "/../x", False),
    ],
)
def test_containment(root, own, expected):
    assert expected is contains(root, own)


@pytest.mark.parametrize(
    ("roots", "own", "expected"),
    [
        (["/", "/..", "/../.."], "/", 2),
        (["/../../x", "/.."], "/", 1),
        (["/a/b", "/a", "/"], "/a/b/c", 2),
        (["/x", "/y/z"], "/a", 0),
        ([], "/", None),
    ],
    ids=["farthest up", "not a sibling's", "fewest down", "none holds us", "none at all"],
)
def test_the_outermost_mount_that_holds_us_is_chosen(roots, own, expected):
    mounts = [Mount(i, root, Path(f"/m{i}")) for i, root in enumerate(roots)]

    assert (None if expected is None else mounts[expected]) == choose(mounts, own)
