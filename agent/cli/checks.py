"""What `ebproxy doctor` looks at. A check yields findings; one that may not look says so and goes on."""

from __future__ import annotations

import enum
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.cli.node_network import devices_of_kind
from agent.errors import ConfigError, UnsupportedKernel
from agent.kernel import bpffs, capabilities, probe, rivals, tc
from agent.kernel.attach import closing
from agent.kernel.cgroup import find_cgroup_root
from agent.observe.control import SOCKET

_BTF = Path("/sys/kernel/btf/vmlinux")
_SYSCTL = Path("/proc/sys/net/ipv4")
_NODE_PORTS = range(30000, 32768)
_KUBE_PROXY_PORTS = {10249: "metrics", 10256: "healthz"}
_AS_ROOT = "run ebproxy doctor as root on the node"
_CLEANUP = "stop kube-proxy on this node, then run `kube-proxy --cleanup` here"
_SHOWN = 3
_BCC_LIMIT_S = 60
# Exits 3 for PyPI's `bcc`, which is another package of that name.
_BCC_VERSION = "import sys, bcc; sys.exit(3) if not hasattr(bcc, 'BPF') else print(bcc.__version__)"


class Level(enum.StrEnum):
    """How bad a finding is: ``fail`` stops ebproxy, ``warn`` fights or limits it."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, and what to do about it; ``remedy`` is "" where there is nothing to do."""

    id: str
    level: Level
    seen: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an agent of this node would run."""

    state_dir: Path
    bpffs: Path
    cgroup_root: Path | None = None


Check = Callable[[Place], Iterator[Finding]]


def examine(place: Place) -> list[Finding]:
    """Run every check."""
    return [finding for check in CHECKS for finding in _guarded(check, place)]


def _guarded(check: Check, place: Place) -> Iterator[Finding]:
    try:
        yield from check(place)
    except (OSError, subprocess.SubprocessError) as error:
        name = check.__name__.removeprefix("check_").replace("_", "-")
        yield Finding(name, Level.WARN, f"could not be looked at: {error}", _AS_ROOT)


def check_capabilities(_: Place) -> Iterator[Finding]:
    """Look for what bpf(2) asks of its caller."""
    held = capabilities.effective()
    for number, name in capabilities.NEEDED.items():
        if capabilities.has(held, number):
            yield Finding(f"capability:{name}", Level.OK, "effective")
        elif capabilities.is_implied(held, name):
            yield Finding(f"capability:{name}", Level.OK, "implied by CAP_SYS_ADMIN")
        else:
            yield Finding(f"capability:{name}", Level.FAIL, "missing", f"run as root, or add {name} to the container")


def check_user(_: Place) -> Iterator[Finding]:
    """Say so where root alone would see everything."""
    if os.geteuid() != 0:
        seen = f"not root (uid {os.geteuid()}): not everything can be looked at"
        yield Finding("user", Level.WARN, seen, _AS_ROOT)


def check_kernel(_: Place) -> Iterator[Finding]:
    """Try every kernel feature that the dataplane uses."""
    features = probe.features()
    works = [feature.name for feature in features if feature.is_there]
    denied = [feature.name for feature in features if feature.is_denied]
    if denied:
        yield Finding("kernel:bpf", Level.FAIL, f"bpf(2) is not permitted to try {', '.join(denied)}", _AS_ROOT)
    for feature in features:
        if not (feature.is_there or feature.is_denied):
            seen = f"does not work: {os.strerror(feature.error)}"
            yield Finding(f"kernel:{feature.name}", Level.FAIL, seen, "use a newer kernel: Linux 5.18 has all of them")
    if works:
        yield Finding("kernel", Level.OK, f"works: {', '.join(works)}")


def check_btf(_: Place) -> Iterator[Finding]:
    """Look for the kernel's own types."""
    if _BTF.exists():
        yield Finding("btf", Level.OK, f"{_BTF} is there")
    else:
        yield Finding(
            "btf", Level.WARN, f"no {_BTF}", "nothing to do: only tools that show programs with types want it"
        )


def check_cgroup(place: Place) -> Iterator[Finding]:
    """Find the node's cgroup root."""
    try:
        found = find_cgroup_root(place.cgroup_root)
    except (ConfigError, UnsupportedKernel) as error:
        yield Finding("cgroup", Level.FAIL, str(error), "mount cgroup v2, or name the node's root with --cgroup-root")
        return
    if found.warning:
        yield Finding("cgroup", Level.WARN, found.warning, "mount the node's /sys/fs/cgroup here, or use --cgroup-root")
    else:
        extent = "the whole tree" if found.is_whole else f"the part of the tree at {found.root}"
        yield Finding("cgroup", Level.OK, f"{found.path}: {extent}")


def check_hooks(place: Place) -> Iterator[Finding]:
    """Look for programs of others on our hooks of the node's cgroup root."""
    try:
        root = find_cgroup_root(place.cgroup_root).path
    except (ConfigError, UnsupportedKernel):
        return  # the cgroup's own finding says it
    others = rivals.other_programs(root, place.bpffs / "ebproxy" / "links")
    for other in others:
        seen = f"program {other.id} {other.name or '(to read its name takes CAP_SYS_ADMIN)'} is attached at {root}"
        remedy = "remove what attached it: an address can be translated twice"
        yield Finding(f"hook:{other.hook.name.lower()}", Level.WARN, seen, remedy)
    if not others:
        yield Finding("hooks", Level.OK, f"no other program on our hooks of {root}")


def check_devices(_: Place) -> Iterator[Finding]:
    """Look how programs are attached to devices, and whether the kernel would drop what pods' devices take in."""
    try:
        with closing(probe.load_packet_passing()) as program:
            is_linked = tc.has_tcx(program)
    except OSError:
        return  # the kernel's own finding says it
    seen = "by links (tcx), beside others'" if is_linked else "by filters of clsact: this kernel has no tcx"
    yield Finding("devices", Level.OK, f"programs attach {seen}")
    strict = [name for name in devices_of_kind("veth") if _is_strict(name)]
    if strict:
        shown = f"{', '.join(strict[:_SHOWN])}{', ...' * (len(strict) > _SHOWN)}"
        seen = f"strict for {len(strict)} devices of pods: {shown}"
        remedy = "set net.ipv4.conf.all.rp_filter and theirs to 0 or 2: replies of pods may be taken for forged ones"
        yield Finding("rp-filter", Level.WARN, seen, remedy)
    else:
        yield Finding("rp-filter", Level.OK, "not strict for any device of a pod")


def _is_strict(name: str) -> bool:
    """Whether replies must come by the way that packets to their source would take. The larger of two settings holds.

    Source: Documentation/networking/ip-sysctl.rst, rp_filter.
    """
    settings = []
    for scope in ("all", name):
        try:
            settings.append(int((_SYSCTL / "conf" / scope / "rp_filter").read_text()))
        except FileNotFoundError:  # the device is gone again
            return False
    return max(settings) == 1


def check_bpffs(place: Place) -> Iterator[Finding]:
    """Look whether pins can be made."""
    mount = f"mount -t bpf bpf {place.bpffs}"
    if bpffs.is_bpffs(place.bpffs):
        if os.access(_nearest(place.bpffs), os.W_OK):
            yield Finding("bpffs", Level.OK, f"mounted at {place.bpffs}")
        else:
            yield Finding(
                "bpffs", Level.FAIL, f"{place.bpffs} may not be written", "run as root, with the mount writable"
            )
    elif capabilities.has(capabilities.effective(), capabilities.SYS_ADMIN):
        yield Finding("bpffs", Level.OK, f"not mounted at {place.bpffs}: the agent will mount it")
    else:
        yield Finding("bpffs", Level.FAIL, f"not mounted at {place.bpffs}, and we may not mount it", f"run: {mount}")


def check_state_dir(place: Place) -> Iterator[Finding]:
    """Look whether an agent runs already, and whether one could."""
    if _has_agent(place):
        yield Finding("state-dir", Level.OK, f"an agent runs: it answers in {place.state_dir}")
    elif os.access(_nearest(place.state_dir), os.W_OK):
        yield Finding("state-dir", Level.OK, f"{place.state_dir} can be written")
    else:
        yield Finding(
            "state-dir", Level.FAIL, f"{place.state_dir} may not be written", "run as root, or use --state-dir"
        )


def check_bcc(_: Place) -> Iterator[Finding]:
    """Look for BCC's Python binding, in a child: importing it takes 100 MB."""
    remedy = "install Debian's python3-bpfcc where this interpreter sees it (a venv with --system-site-packages)"
    if importlib.util.find_spec("bcc") is None:
        yield Finding("bcc", Level.FAIL, f"{sys.executable} has no module bcc", remedy)
        return
    command = [sys.executable, "-c", _BCC_VERSION]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_BCC_LIMIT_S)
    if ran.returncode == 0:
        yield Finding("bcc", Level.OK, f"version {ran.stdout.strip()}")
    else:
        last = ran.stderr.strip().splitlines()[-1:] or ["this is another package called bcc"]
        yield Finding("bcc", Level.FAIL, f"cannot be used: {last[0]}", remedy)


def check_iptables(_: Place) -> Iterator[Finding]:
    """Look for kube-proxy's chains, in both variants of iptables."""
    commands = rivals.save_commands()
    if not commands:
        yield Finding("iptables", Level.OK, "not looked at: iptables is not installed here")
    for command in commands:
        yield from _guarded_chains(command)


def _guarded_chains(command: str) -> Iterator[Finding]:
    ident = f"iptables:{command.removesuffix('-save')}"
    try:
        chains = rivals.kube_chains(command)
    except OSError as error:
        yield Finding(ident, Level.WARN, f"could not be looked at: {error}", _AS_ROOT)
        return
    if chains:
        seen = f"{len(chains)} chains of kube-proxy: {', '.join(chains[:_SHOWN])}{', ...' * (len(chains) > _SHOWN)}"
        yield Finding(ident, Level.WARN, seen, _CLEANUP)
    else:
        yield Finding(ident, Level.OK, "no chain of kube-proxy")


def check_nftables(_: Place) -> Iterator[Finding]:
    """Look for kube-proxy's nftables tables."""
    if not rivals.has_nft():
        yield Finding("nftables", Level.OK, "not looked at: nft is not installed here")
        return
    tables = rivals.kube_tables()
    if tables:
        yield Finding("nftables", Level.WARN, f"tables of kube-proxy: {', '.join(tables)}", _CLEANUP)
    else:
        yield Finding("nftables", Level.OK, "no table of kube-proxy")


def check_ipvs(_: Place) -> Iterator[Finding]:
    """Look for IPVS virtual servers, and for the device kube-proxy gives their addresses to."""
    servers, has_device = rivals.virtual_servers(), rivals.has_device("kube-ipvs0")
    if servers or has_device:
        seen = f"{servers} virtual servers; device kube-ipvs0 is {'there' if has_device else 'not there'}"
        yield Finding("ipvs", Level.WARN, seen, _CLEANUP)
    else:
        yield Finding("ipvs", Level.OK, "no virtual server, no kube-ipvs0")


def check_kube_proxy(place: Place) -> Iterator[Finding]:
    """Look for a kube-proxy that runs, and for whoever has its ports."""
    pids = rivals.processes("kube-proxy")
    if pids:
        yield Finding("kube-proxy", Level.WARN, f"it runs as process {', '.join(map(str, pids))}", _CLEANUP)
    else:
        yield Finding("kube-proxy", Level.OK, "no such process is visible here")
    is_ours = _has_agent(place)
    taken = rivals.listening_ports()
    for port, name in _KUBE_PROXY_PORTS.items():
        if port in taken and not is_ours:
            remedy = f"stop what listens there, or set {name}BindAddress (`ss -ltnp 'sport = :{port}'` names it)"
            yield Finding(f"port:{port}", Level.WARN, f"taken: the agent's {name} cannot listen there", remedy)
        else:
            yield Finding(f"port:{port}", Level.OK, "an agent of ours has it" if port in taken else "free")


def check_port_range(_: Place) -> Iterator[Finding]:
    """Look whether a process may be given a NodePort for its own end of a connection."""
    first, last = map(int, (_SYSCTL / "ip_local_port_range").read_text().split())
    reserved = _ports((_SYSCTL / "ip_local_reserved_ports").read_text())
    shared = [port for port in _NODE_PORTS if first <= port <= last and port not in reserved]
    if shared:
        seen = f"net.ipv4.ip_local_port_range {first}-{last} holds {len(shared)} ports of the NodePort range"
        yield Finding("port-range", Level.WARN, seen, "set net.ipv4.ip_local_reserved_ports=30000-32767")
    else:
        yield Finding("port-range", Level.OK, f"{first}-{last} is apart from the NodePort range, or that is reserved")


def _ports(text: str) -> frozenset[int]:
    """Read a list of ports and ranges, like ``80,30000-32767``."""
    bounds = [item.partition("-") for item in text.strip().split(",") if item]
    return frozenset(port for low, _, high in bounds for port in range(int(low), int(high or low) + 1))


def _has_agent(place: Place) -> bool:
    """Tell whether an agent takes questions in the state directory."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        try:
            client.connect(str(place.state_dir / SOCKET))
        except OSError:
            return False
    return True


def _nearest(path: Path) -> Path:
    """Find the path itself, or the nearest directory above it that exists."""
    return path if path.exists() else _nearest(path.parent)


CHECKS: tuple[Check, ...] = (
    check_user,
    check_capabilities,
    check_kernel,
    check_btf,
    check_cgroup,
    check_hooks,
    check_devices,
    check_bpffs,
    check_state_dir,
    check_bcc,
    check_kube_proxy,
    check_iptables,
    check_nftables,
    check_ipvs,
    check_port_range,
)
