"""The agent in a cgroup namespace of its own, as in a pod of a DaemonSet or a node of kind."""

from __future__ import annotations

import pytest

from agent.kernel import bpffs
from tests.lab.cgroups import mount_point

# As kind's node: the node's cgroup is all it sees, mounted at another place; the agent is somewhere below.
KIND = """
set -e
mkdir -p "$1"
mount -t cgroup2 none "$1"
umount "$2"
echo $$ > "$1/agent/cgroup.procs"
shift 2
exec "$@"
"""


def enter_namespace(scene, setup=""):
    """Run the agent in cgroup and mount namespaces whose cgroup root is the node's, after some setup."""
    procs = scene.node.cgroup / "cgroup.procs"
    inner = ("sh", "-c", setup, "sh", str(scene.node.directory / "cgroup"), str(mount_point())) if setup else ()
    outer = ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(procs), "unshare", "--cgroup", "--mount")
    scene.agent.wrapper = (*outer, *inner)
    # It is mounted here, where the tests read the maps too, not in the agent's namespace alone.
    bpffs.ensure_mounted(scene.agent.bpffs)


@pytest.mark.parametrize(
    ("setup", "names_root"),
    [(KIND, False), ("", True)],
    ids=["as kind has it, found", "as a DaemonSet has it, named"],
)
def test_hooks_cover_pods_and_host(make_scene, setup, names_root):
    scene = make_scene(web=1)
    scene.agent.stop()
    assert scene.agent.cli("cleanup").returncode == 0
    ips = scene.ips("web")
    assert scene.host.is_unanswered("tcp", ips[0], 80)
    enter_namespace(scene, setup)
    scene.agent.cgroup_root = str(scene.node.cgroup) if names_root else ""

    scene.agent.start().wait()

    scene.publish("web", scene.web)
    for client in scene.clients.values():
        assert [client.ask("tcp", ip, 80).name for ip in ips] == ["web-1"] * 2


def test_a_cgroup_that_is_not_the_nodes_is_refused(make_scene):
    """The self-test: hooks that no process of the node goes through would translate nothing, silently."""
    scene = make_scene(web=1)
    scene.agent.stop()
    assert scene.agent.cli("cleanup").returncode == 0
    scene.agent.cgroup_root = "/proc"

    scene.agent.start()
    assert scene.agent.process
    assert scene.agent.process.wait(20) == 2

    assert "is not on a cgroup v2 file system" in scene.agent.log.read_text(encoding="utf-8")
