"""`ebproxy doctor` on a real kernel: what is planted is found, with its remedy; what is not there is not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.kernel import bpf, bpffs, probe, rivals
from agent.kernel.attach import closing
from agent.kernel.bpf import AttachType
from agent.kernel.cgroup import find_cgroup_root
from agent.observe.control import SOCKET

REPOSITORY = Path(__file__).resolve().parents[2]
DOCTOR = "import sys; from agent.__main__ import main; sys.exit(main(['doctor', *sys.argv[1:]]))"
LISTEN = "import socket; held = socket.create_server(('127.0.0.1', 10256));"
KUBE_CHAINS = """
*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABCDEFGH23456789 - [0:0]
-A OUTPUT -j KUBE-SERVICES
-A KUBE-SERVICES -d 192.0.2.10/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-ABCDEFGH23456789
COMMIT
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for namespaces, cgroups and bpf(2)")


def run(*command: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60, env=environment)


class Node:
    """A network namespace to plant things in and to examine."""

    def __init__(self, name: str, state_dir: Path) -> None:
        self.enter = ("nsenter", f"--net=/run/netns/{name}", "--")
        self.state_dir = state_dir

    def plant(self, *command: str, text: str | None = None) -> None:
        ran = run(*self.enter, *command, text=text)
        assert ran.returncode == 0, ran.stderr

    def examine(self, *flags: str | Path, before: str = "", wrapper: tuple[str, ...] = ()) -> dict[str, dict[str, str]]:
        """Return the findings by id, after checking that the exit status agrees with them."""
        command = (*self.enter, *wrapper, sys.executable, "-c", before + DOCTOR)
        ran = run(*command, "--state-dir", self.state_dir, "-o", "json", *flags)
        findings = json.loads(ran.stdout)["findings"]
        assert ran.returncode == any(finding["level"] == "fail" for finding in findings), ran.stderr
        return {finding["id"]: finding for finding in findings}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    name = f"ebproxy-doctor-{os.getpid()}"
    assert run("ip", "netns", "add", name).returncode == 0
    yield Node(name, tmp_path / "state")
    run("ip", "netns", "del", name)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    directory = find_cgroup_root().path / f"ebproxy-doctor-{os.getpid()}"
    directory.mkdir()
    yield directory
    directory.rmdir()


def levels(findings: dict[str, dict[str, str]]) -> dict[str, str]:
    return {ident: finding["level"] for ident, finding in findings.items()}


def test_a_clean_node_has_nothing_to_complain_of(node):
    findings = node.examine()

    assert {
        ident: finding
        for ident, finding in findings.items()
        # others may have attached something to this machine's root
        if finding["level"] != "ok" and not ident.startswith("hook:")
    } == {}
    assert "hook:sock_release" in findings["kernel"]["seen"]


@pytest.mark.parametrize("variant", ["iptables-legacy", "iptables-nft", "ip6tables-legacy", "ip6tables-nft"])
def test_chains_of_kube_proxy_are_found_in_their_variant_only(node, variant):
    family_fit = KUBE_CHAINS.replace("192.0.2.10/32", "2001:db8::10/128") if variant.startswith("ip6") else KUBE_CHAINS
    node.plant(f"{variant}-restore", text=family_fit)

    found = {ident: finding for ident, finding in node.examine().items() if ident.startswith("iptables:")}

    assert {f"iptables:{variant}"} == {ident for ident, finding in found.items() if finding["level"] == "warn"}
    assert "KUBE-SVC-ABCDEFGH23456789" in found[f"iptables:{variant}"]["seen"]
    assert "kube-proxy --cleanup" in found[f"iptables:{variant}"]["remedy"]


def test_tables_of_kube_proxy_are_found(node):
    node.plant("nft", "add table ip kube-proxy; add table ip6 kube-proxy; add table inet mine")

    assert node.examine()["nftables"]["seen"] == "tables of kube-proxy: ip kube-proxy, ip6 kube-proxy"


def test_the_device_of_ipvs_mode_is_found(node):
    node.plant("ip", "link", "add", "kube-ipvs0", "type", "veth", "peer", "name", "other")

    assert levels(node.examine())["ipvs"] == "warn"


def test_a_taken_port_is_found(node):
    findings = node.examine(before=LISTEN)

    assert (findings["port:10256"]["level"], findings["port:10249"]["level"]) == ("warn", "ok")


@pytest.mark.parametrize(("reserved", "level"), [("", "warn"), ("30000-32767", "ok"), ("30000-32000", "warn")])
def test_local_ports_among_the_node_ports_are_found(node, reserved, level):
    sysctl = "/proc/sys/net/ipv4/ip_local"
    node.plant("sh", "-c", f"echo 20000 40000 > {sysctl}_port_range; echo '{reserved}' > {sysctl}_reserved_ports")

    assert level == levels(node.examine())["port-range"]


def test_a_running_kube_proxy_is_found(node, tmp_path):
    impostor = tmp_path / "kube-proxy"
    shutil.copy("/bin/sleep", impostor)
    with subprocess.Popen([impostor, "60"]) as process:
        try:
            finding = node.examine()["kube-proxy"]
        finally:
            process.kill()

    assert finding["level"] == "warn"
    assert str(process.pid) in finding["seen"]


def test_a_running_agent_has_its_ports(node):
    node.state_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(node.state_dir / SOCKET))
        agent.listen()
        findings = node.examine(before=LISTEN)

    assert findings["port:10256"]["seen"] == "an agent of ours has it"
    assert "an agent runs" in findings["state-dir"]["seen"]


def test_a_program_of_others_on_a_hook_is_found_by_name(node, cgroup):
    with attached(cgroup, AttachType.CONNECT4, "rival_connect"):
        findings = node.examine("--cgroup-root", cgroup)

    assert findings["hook:connect4"]["level"] == "warn"
    assert "rival_connect" in findings["hook:connect4"]["seen"]
    assert "hooks" not in findings
    assert "hooks" in node.examine("--cgroup-root", cgroup)


def test_our_own_programs_are_not_held_against_us(node, cgroup, tmp_path):
    with mounted_bpffs(tmp_path / "bpf") as mount, attached(cgroup, AttachType.CONNECT6, "connect6") as link:
        links = mount / "ebproxy" / "links"
        links.mkdir(parents=True)
        bpf.obj_pin(link, links / "connect6")

        assert "hooks" in node.examine("--cgroup-root", cgroup, "--bpffs", mount)
        (links / "connect6").unlink()
        assert "hook:connect6" in node.examine("--cgroup-root", cgroup, "--bpffs", mount)


def test_missing_capabilities_are_named(node):
    findings = node.examine(wrapper=("setpriv", "--bounding-set=-bpf,-net_admin,-perfmon,-sys_admin"))

    assert {ident: level for ident, level in levels(findings).items() if ident.startswith("capability:")} == {
        "capability:CAP_BPF": "fail",
        "capability:CAP_NET_ADMIN": "fail",
        "capability:CAP_PERFMON": "fail",
    }
    assert "bpf(2) is not permitted" in findings["kernel:bpf"]["seen"]
    assert "add CAP_BPF" in findings["capability:CAP_BPF"]["remedy"]


def test_the_capabilities_of_the_manifest_are_enough(node):
    """What the DaemonSet asks for: no CAP_SYS_ADMIN, no privileged container."""
    findings = node.examine(wrapper=("setpriv", "--bounding-set=-all,+bpf,+net_admin,+perfmon"))

    assert "kernel:bpf" not in findings
    assert {"ok"} == {level for ident, level in levels(findings).items() if ident.startswith(("capability:", "kernel"))}


def test_without_any_capability_there_is_still_an_answer(node):
    findings = node.examine(wrapper=("setpriv", "--bounding-set=-all"))

    assert levels(findings)["hooks"] == "warn"
    assert "could not be looked at" in findings["hooks"]["seen"]
    assert "could not be looked at" in findings["nftables"]["seen"]


def test_legacy_rules_that_may_not_be_read_are_not_taken_for_none(monkeypatch):
    """iptables-legacy-save prints nothing to who is not root, and succeeds."""
    if not Path("/proc/thread-self/net/ip_tables_names").exists():
        pytest.skip("this kernel lacks legacy iptables")
    monkeypatch.setattr(rivals, "_output", lambda _: "")

    assert as_nobody(lambda: rivals.kube_chains("iptables-legacy-save")) == "PermissionError"


def test_a_bcc_that_is_another_package_is_not_taken_for_ours(node, tmp_path):
    (tmp_path / "bcc.py").write_text("__version__ = '1.0'\n")

    finding = node.examine(
        before=f"import os, sys; os.environ['PYTHONPATH'] = sys.path[0] = {str(tmp_path)!r};"
        f"sys.path.insert(1, {str(REPOSITORY)!r});"
    )["bcc"]

    assert "another package called bcc" in finding["seen"]
    assert finding["level"] == "fail"


def test_a_broken_feature_is_told_by_the_kernel_itself():
    """The probe can fail: a helper that no kernel has is refused."""
    with pytest.raises(OSError, match="Invalid argument"):
        probe.prog_load(bpf.PROG_TYPE_CGROUP_SOCK_ADDR, AttachType.CONNECT4, probe.calling(9999), "probe")


def test_the_table_reads_without_a_terminal(node):
    ran = run(*node.enter, sys.executable, "-m", "agent", "doctor", "--state-dir", node.state_dir)

    assert ran.stdout.splitlines()[0].split() == ["ID", "LEVEL", "SEEN", "REMEDY"]
    assert "hook:connect4" in ran.stdout
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(
    ("every", "own", "level"), [(0, 0, "ok"), (0, 1, "warn"), (1, 0, "warn"), (1, 2, "ok"), (2, 1, "ok")]
)
def test_strict_reverse_paths_of_devices_of_pods_are_found(node, every, own, level):
    """The larger of two settings holds."""
    node.plant("ip", "link", "add", "veth1", "type", "veth", "peer", "name", "veth2")
    conf = "/proc/sys/net/ipv4/conf"
    written = f"echo {own} | tee {conf}/veth1/rp_filter {conf}/veth2/rp_filter; echo {every} > {conf}/all/rp_filter"
    node.plant("sh", "-c", written)

    finding = node.examine()["rp-filter"]

    assert finding["level"] == level
    assert ("veth1" in finding["seen"]) == (level == "warn")


def test_how_programs_are_attached_to_devices_is_told(node):
    assert "tcx" in node.examine()["devices"]["seen"]


def as_nobody(call: Callable[[], object]) -> str:
    """Call in a child without any privilege; returns the name of what it raised, or "" for nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            call()
        except Exception as error:  # noqa: BLE001 - its name is the answer
            os.write(writer, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return pipe.read()


@contextlib.contextmanager
def attached(cgroup: Path, hook: AttachType, name: str) -> Iterator[int]:
    """Attach a program that lets everything pass; yields the link."""
    with (
        closing(os.open(cgroup, os.O_RDONLY)) as directory,
        closing(probe.load_passing(hook, name)) as program,
        closing(bpf.link_create(program, directory, hook)) as link,
    ):
        yield link


@contextlib.contextmanager
def mounted_bpffs(path: Path) -> Iterator[Path]:
    bpffs.ensure_mounted(path)
    try:
        yield path
    finally:
        run("umount", path)
