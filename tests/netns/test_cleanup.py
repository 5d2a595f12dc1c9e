"""`ebproxy cleanup` leaves no program, link, map, pin, mount or file; and a lab leaves nothing either."""

from __future__ import annotations

import os
from pathlib import Path

from agent.kernel import attach, bpf
from tests.lab import leftovers
from tests.lab.lab import Lab
from tests.lab.polling import until


def is_gone(open_by_id, ident):
    """Whether the kernel no longer has a map or program of this id."""
    try:
        os.close(open_by_id(ident))
    except FileNotFoundError:
        return True
    return False


def map_fd_by_id(ident):
    return bpf.bpf(bpf.Command.MAP_GET_FD_BY_ID, bpf._attr("=II", ident, 0))


def test_cleanup_leaves_nothing(make_scene):
    scene = make_scene(web=1)
    ips = scene.publish("web", scene.web)
    maps = scene.agent.map_ids().values()
    programs = [info.id for info in attach.attached_programs(scene.agent.bpffs / "ebproxy" / "links").values()]
    assert len(programs) >= 9
    assert not any(is_gone(bpf.prog_fd_by_id, ident) for ident in programs)
    scene.agent.stop()

    ran = scene.agent.cli("cleanup")

    assert ran.returncode == 0, ran.stderr
    until(lambda: all(is_gone(bpf.prog_fd_by_id, ident) for ident in programs), "the programs are gone")
    until(lambda: all(is_gone(map_fd_by_id, ident) for ident in maps), "the maps are gone")
    assert not scene.agent.state_dir.exists()
    assert str(scene.agent.bpffs) not in Path("/proc/mounts").read_text(encoding="utf-8")
    assert list(scene.agent.bpffs.glob("*")) == []
    assert scene.host.is_unanswered("tcp", ips[0], 80)


def test_cleanup_with_nothing_there_succeeds(make_scene):
    scene = make_scene(web=1)
    scene.agent.stop()

    assert [scene.agent.cli("cleanup").returncode for _ in range(2)] == [0, 0]


def test_cleanup_while_an_agent_runs_is_refused(scene, name):
    ips = scene.publish(name, scene.web[:1])

    ran = scene.agent.cli("cleanup")

    assert ran.returncode == 1
    assert "another agent holds" in ran.stderr
    assert scene.pod.ask("tcp", ips[0], 80).name == "web-1"


def test_after_cleanup_an_agent_starts_anew(make_scene):
    scene = make_scene(web=1)
    ips = scene.publish("web", scene.web)
    scene.agent.stop()
    assert scene.agent.cli("cleanup").returncode == 0

    scene.agent.start().wait()

    assert scene.pod.ask("tcp", ips[0], 80).name == "web-1"


def test_a_lab_leaves_nothing(make_scene):
    scene = make_scene(web=1)
    scene.publish("web", scene.web)
    directory = scene.lab.directory
    kinds = {line.split()[0] for line in leftovers.find(directory)}
    assert {"namespace", "mount", "process", "cgroup", "directory"} == kinds

    scene.lab.close()

    assert leftovers.find(directory) == []


def test_what_a_killed_run_left_is_swept(tmp_path):
    child = os.fork()
    if child == 0:
        lab = Lab()
        lab.nodes[0].add_pod("web", 8080)
        (tmp_path / "directory").write_text(str(lab.directory))
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    directory = Path((tmp_path / "directory").read_text())
    assert leftovers.find(directory)

    swept = leftovers.sweep()

    assert directory.name in swept
    assert leftovers.find(directory) == []
