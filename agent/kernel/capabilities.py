"""The capabilities that the agent cannot do without, and which of them this thread has."""

from __future__ import annotations

from pathlib import Path

from agent.errors import EbproxyError

# Source: include/uapi/linux/capability.h.
SYS_ADMIN = 21
NEEDED = {39: "CAP_BPF", 12: "CAP_NET_ADMIN", 38: "CAP_PERFMON"}
# Source: include/linux/capability.h, bpf_capable() and perfmon_capable(). Netlink asks for CAP_NET_ADMIN itself.
_IMPLIED_BY_SYS_ADMIN = frozenset({"CAP_BPF", "CAP_PERFMON"})
_STATUS = Path("/proc/thread-self/status")


def effective(status: Path = _STATUS) -> int:
    """Read the effective set, a bit for each capability."""
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def has(held: int, number: int) -> bool:
    """Tell whether a set has a capability."""
    return bool(held >> number & 1)


def is_implied(held: int, name: str) -> bool:
    """Tell whether a set does for what a capability is for without having it."""
    return name in _IMPLIED_BY_SYS_ADMIN and has(held, SYS_ADMIN)


def missing(held: int) -> tuple[str, ...]:
    """Name what a set lacks of what the agent needs."""
    return tuple(name for number, name in NEEDED.items() if not has(held, number) and not is_implied(held, name))


def require(held: int) -> None:
    """Hold that a set has what the agent needs. Raises: EbproxyError; the verifier would not say what it lacks."""
    names = missing(held)
    if names:
        them = "it" if len(names) == 1 else "them"
        message = f"{', '.join(names)} missing: run as root, or add {them} to the container"
        raise EbproxyError(message)
