"""Prove at start that the connect hook fires for processes of this node.

A frontend without backends is planted at an address that is nobody's (TEST-NET-1, RFC 5737) and a UDP socket is
connected to it, which sends nothing: ECONNREFUSED can only come from the hook.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

from agent.core.abi import BASE_REJECT, Frontend, FrontendKey
from agent.core.addresses import parse_address
from agent.core.records import Protocol
from agent.errors import DataplaneError
from agent.kernel.maps import MapStore

CGROUP_PREFIX = "ebproxy_selftest_"
_ADDRESS = "192.0.2.1"
_CHILD_LIMIT_S = 10
# Runs in a cgroup below the node's root: join it, connect, and say by exit status whether the hook refused.
_CHILD = """
import os, socket, sys
with open(sys.argv[1], "w") as procs:
    procs.write(str(os.getpid()))
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect((sys.argv[2], int(sys.argv[3])))
except ConnectionRefusedError:
    sys.exit(0)
except OSError:
    pass
sys.exit(3)
"""


def prove_hook_fires(store: MapStore, cgroup: Path) -> None:
    """Connect through the hook, from this process or else from a child below the cgroup. Raises: DataplaneError."""
    port = 1024 + secrets.randbelow(60_000)
    key = FrontendKey(parse_address(_ADDRESS), port, Protocol.UDP).pack()
    store.maps["frontends"].update(key, Frontend(0, BASE_REJECT, BASE_REJECT).pack())
    try:
        if not (_is_refused(port) or _is_refused_below(cgroup, port)):
            message = (
                f"the programs are attached at {cgroup}, yet a connect() below it does not reach them: "
                "is this the node's cgroup root, and not that of a container? Name it with --cgroup-root"
            )
            raise DataplaneError(message)
    finally:
        store.maps["frontends"].delete(key)


def _is_refused(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((_ADDRESS, port))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _is_refused_below(cgroup: Path, port: int) -> bool:
    """Whether a process in a new cgroup below the root is refused (the agent itself may run beside the node's tree)."""
    below = cgroup / f"{CGROUP_PREFIX}{os.getpid()}"
    try:
        below.mkdir()
    except OSError:
        return False  # a read-only mount
    try:
        command = [sys.executable, "-ISc", _CHILD, str(below / "cgroup.procs"), _ADDRESS, str(port)]
        return subprocess.run(command, check=False, capture_output=True, timeout=_CHILD_LIMIT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(OSError):
            below.rmdir()
