"""See who else on this node translates Services, or would: kube-proxy's leftovers, and programs on our hooks."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from agent.kernel import bpf
from agent.kernel.attach import closing
from agent.kernel.bpf import AttachType

# The kubelet owns KUBE-FIREWALL, KUBE-KUBELET-CANARY and, before 1.28, KUBE-MARK-MASQ and KUBE-POSTROUTING.
_CHAIN = re.compile(
    r"^:(KUBE-(?:SERVICES|NODEPORTS|EXTERNAL-SERVICES|PROXY-\w+|LOAD-BALANCER|NODE-PORT|(?:SVC|SEP|EXT|FW|XLB)-\w+))\b",
    re.MULTILINE,
)
_VARIANTS = ("legacy", "nft")
_LISTENING = "0A"
_DEADLINE_S = 30


@dataclass(frozen=True, slots=True)
class Program:
    """A program on one of our hooks; ``name`` is "" where we may not read it."""

    hook: AttachType
    id: int
    name: str


def save_commands() -> tuple[str, ...]:
    """Choose the commands that print the rules there are: both variants where they are installed, else the default."""
    found = []
    for family in ("iptables", "ip6tables"):
        variants = [f"{family}-{variant}-save" for variant in _VARIANTS]
        found += [name for name in variants if _command(name)] or [
            name for name in [f"{family}-save"] if _command(name)
        ]
    return tuple(found)


def kube_chains(command: str) -> tuple[str, ...]:
    """List kube-proxy's chains out of what ``command`` prints. Raises OSError."""
    if "-legacy-" in command:
        _ask_for_legacy_tables()
    return tuple(dict.fromkeys(_CHAIN.findall(_output(command))))


def _ask_for_legacy_tables() -> None:
    """Fail where the legacy commands would print nothing, and succeed, because they may not look."""
    for name in ("ip_tables_names", "ip6_tables_names"):
        path = Path("/proc/thread-self/net", name)
        if path.exists():
            path.read_bytes()


def has_nft() -> bool:
    """Tell whether nft is installed."""
    return _command("nft") is not None


def kube_tables() -> tuple[str, ...]:
    """List kube-proxy's nftables tables, as family and name. Raises OSError."""
    listed = json.loads(_output("nft", "-j", "list", "tables"))["nftables"]
    tables = [entry["table"] for entry in listed if "table" in entry]
    return tuple(f"{table['family']} {table['name']}" for table in tables if table["name"] == "kube-proxy")


def virtual_servers(ip_vs: Path = Path("/proc/thread-self/net/ip_vs")) -> int:
    """Count the IPVS virtual servers of this network namespace. Source: net/netfilter/ipvs/ip_vs_ctl.c."""
    try:
        lines = ip_vs.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return 0
    return sum(line.startswith(("TCP ", "UDP ", "SCTP ", "FWM ")) for line in lines)


def has_device(name: str) -> bool:
    """Tell whether this network namespace has a device of that name."""
    return any(name == found for _, found in socket.if_nameindex())


def listening_ports(net: Path = Path("/proc/thread-self/net")) -> frozenset[int]:
    """List the TCP ports that something listens on, in this network namespace."""
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in (net / table).read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            if state == _LISTENING:
                ports.add(int(local.rpartition(":")[2], 16))
    return frozenset(ports)


def processes(name: str, proc: Path = Path("/proc")) -> tuple[int, ...]:
    """List the ids of the processes of that name that can be seen from here."""
    found = []
    for comm in proc.glob("[0-9]*/comm"):
        try:
            if comm.read_text().rstrip("\n") == name:
                found.append(int(comm.parent.name))
        except OSError:  # it has gone meanwhile
            continue
    return tuple(sorted(found))


def other_programs(cgroup: Path, links: Path) -> list[Program]:
    """List the programs on our hooks of ``cgroup`` that no link pinned in the directory ``links`` has put there.

    Raises OSError where the hooks may not be asked.
    """
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    with closing(fd):
        attached = [(hook, ident) for hook in AttachType for ident in bpf.prog_query(fd, hook)]
    ours = {_linked_program(pin) for pin in links.glob("*") if pin.is_file()} if attached else set()
    return [Program(hook, ident, _name(ident)) for hook, ident in attached if ident not in ours]


def _linked_program(pin: Path) -> int:
    with closing(bpf.obj_get(pin)) as link:
        return bpf.link_info(link).prog_id


def _name(ident: int) -> str:
    try:
        fd = bpf.prog_fd_by_id(ident)
    except OSError:  # it takes CAP_SYS_ADMIN to look at what others loaded
        return ""
    with closing(fd):
        return bpf.prog_info(fd).name


def _command(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _output(name: str, *arguments: str) -> str:
    ran = subprocess.run(
        [_command(name) or name, *arguments], capture_output=True, text=True, check=False, timeout=_DEADLINE_S
    )
    if ran.returncode != 0:
        words = ran.stderr.strip().splitlines()
        raise PermissionError(f"{name}: {words[0] if words else f'exit status {ran.returncode}'}")
    return ran.stdout
