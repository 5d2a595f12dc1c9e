"""What somebody should know of a configuration that is valid: said once, when the agent starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agent.config import Config
from agent.config_values import PortRange
from agent.core.options import NetworkPolicyMode, PolicyAnswer, PolicyOverflow

EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def read_ephemeral_ports(file: Path = EPHEMERAL_PORTS) -> PortRange | None:
    """Read which ports the node's own sockets get; it holds for both families. None = not told."""
    try:
        first, last = file.read_text(encoding="ascii").split()
        return PortRange(int(first), int(last))
    except (OSError, ValueError):
        return None


def _idle_fields(config: Config) -> tuple[str, ...]:
    """Name what is said of policy; that it is on by default is not."""
    said = {
        "policyOverflow": config.policy_overflow is not PolicyOverflow.CLOSED,
        "policyAnswer": config.policy_answer is not PolicyAnswer.DROP,
        "flowSample": config.flow_sample != 0,
    }
    return tuple(path for path, is_said in said.items() if is_said)


def remarks(config: Config, ephemeral: PortRange | None) -> Iterator[str]:
    """Name what has no effect, and what may collide."""
    if config.unused:
        yield f"fields of the configuration without effect here: {', '.join(config.unused)}"
    if config.manifests and (config.kubeconfig or config.api_server):
        yield f"objects come from {config.manifests}: kubeconfig and apiServer have no effect"
    if config.network_policy is NetworkPolicyMode.OFF and (idle := _idle_fields(config)):
        yield f"networkPolicy is off: {', '.join(idle)} have no effect"
    ports = config.source_ports
    if ephemeral and ports.first <= ephemeral.last and ephemeral.first <= ports.last:
        yield (
            f"sourcePorts {ports} overlap the ports of the node's own sockets ({ephemeral}, {EPHEMERAL_PORTS}): "
            "a connection of its own may get a port that a masqueraded flow has"
        )
