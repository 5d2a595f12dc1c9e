"""The configuration of the agent: from a file, from flags, from the environment, else defaults.

Where kube-proxy has the concept, the field has its name there, so that its KubeProxyConfiguration is valid here.
Everything wrong is reported at once.
"""

from __future__ import annotations

import enum
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import config_values
from agent.config_fields import DetectLocalMode, Reading, read_document, read_fields
from agent.config_sizes import describe_sizes, map_sizes
from agent.config_values import BindAddress, Network, PortRange, go_duration
from agent.core.abi import MapSizes
from agent.core.options import NetworkPolicyMode, PolicyAnswer, PolicyOverflow
from agent.core.records import Algorithm, Forwarding
from agent.errors import ConfigError

_DEBUG_VERBOSITY = 4  # klog's convention: from 4 on, messages are for debugging
_HEALTHZ = BindAddress("0.0.0.0", 10256)
_METRICS = BindAddress("127.0.0.1", 10249)
_SOURCE_PORTS = PortRange(10_000, 29_999)  # below the NodePorts, which are below the ports of the node's own sockets

_ATTRIBUTES = {
    "manifests": "manifests",
    "clientConnection.kubeconfig": "kubeconfig",
    "clientConnection.qps": "api_qps",
    "clientConnection.burst": "api_burst",
    "apiServer": "api_server",
    "clusterCIDR": "cluster_cidrs",
    "detectLocalMode": "detect_local_mode",
    "detectLocal.bridgeInterface": "detect_local_bridge",
    "detectLocal.interfaceNamePrefix": "detect_local_prefix",
    "nodePortAddresses": "node_port_addresses",
    "iptables.localhostNodePorts": "localhost_node_ports",
    "masqueradeAll": "masquerade_all",
    "allowedExternalIPs": "allowed_external_ips",
    "sourcePorts": "source_ports",
    "forwarding": "forwarding",
    "algorithm": "algorithm",
    "devices": "devices",
    "excludeDevices": "exclude_devices",
    "cgroupRoot": "cgroup_root",
    "stateDir": "state_dir",
    "bpffs": "bpffs",
    "socketLB": "socket_lb",
    "rememberPeer": "remember_peer",
    "networkPolicy": "network_policy",
    "policyOverflow": "policy_overflow",
    "policyAnswer": "policy_answer",
    "antiSpoofing": "anti_spoofing",
    "flowSample": "flow_sample",
    "bindAddress": "bind_address",
    "healthzBindAddress": "healthz_address",
    "metricsBindAddress": "metrics_address",
    "bindAddressHardFail": "bind_address_hard_fail",
    "syncPeriod": "sync_period_s",
    "driftCheckPeriod": "drift_check_period_s",
    "conntrack.tcpEstablishedTimeout": "tcp_established_timeout_s",
    "conntrack.tcpCloseWaitTimeout": "tcp_close_wait_timeout_s",
    "conntrack.udpTimeout": "udp_timeout_s",
    "conntrack.udpStreamTimeout": "udp_stream_timeout_s",
    "oomScoreAdj": "oom_score_adj",
    "logFormat": "log_format",
    "logLevel": "log_level",
}
_DETECTED_BY = {
    DetectLocalMode.BRIDGE_INTERFACE.value: "detectLocal.bridgeInterface",
    DetectLocalMode.INTERFACE_NAME_PREFIX.value: "detectLocal.interfaceNamePrefix",
}
_DEFAULT_MODE = "iptables"
_DEFAULT_QPS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What one agent runs with.

    ``cluster_cidrs``: where pods are; () = unknown. An address of None: that server does not listen.
    ``oom_score_adj`` of None: left as it is. ``unused``: fields that were set and have no effect.
    """

    node_name: str
    manifests: Path | None = None
    kubeconfig: Path | None = None
    api_server: str = ""
    api_qps: float = -1.0
    """How many requests a second the API server gets at most; not above zero = no limit."""
    api_burst: int = 10
    cluster_cidrs: tuple[Network, ...] = ()
    cgroup_root: Path | None = None
    state_dir: Path = Path("/run/ebproxy")
    bpffs: Path = Path("/sys/fs/bpf")
    detect_local_mode: DetectLocalMode = DetectLocalMode.CLUSTER_CIDR
    """How pods are told: by ``cluster_cidrs``, the Node's podCIDRs where a family has none; or by the next two."""
    detect_local_bridge: str = ""
    detect_local_prefix: str = ""
    node_port_addresses: tuple[Network, ...] | str = ()
    """Where NodePorts answer: local addresses in these networks (a family without one: all), or ``primary``."""
    localhost_node_ports: bool = True
    bind_address: str = "0.0.0.0"
    """The node's primary address of its family; unspecified = what the Node object says."""
    masquerade_all: bool = False
    allowed_external_ips: tuple[Network, ...] = ()
    """Which externalIPs are served; () = all."""
    source_ports: PortRange = _SOURCE_PORTS
    """What masqueraded flows get their source ports from: nobody else's."""
    forwarding: Forwarding = Forwarding.SNAT
    algorithm: Algorithm = Algorithm.RANDOM
    devices: tuple[str, ...] = ()
    """Shell patterns of the devices that get programs; () = every suitable one. ``exclude_devices`` wins."""
    exclude_devices: tuple[str, ...] = ()
    tcp_established_timeout_s: float = 86_400.0
    tcp_close_wait_timeout_s: float = 3_600.0
    udp_timeout_s: float = 30.0
    udp_stream_timeout_s: float = 120.0
    socket_lb: str = "all"
    """``all``, ``host`` or ``off``: how much the socket hooks take over."""
    remember_peer: bool = True
    """Whether getpeername reports the address that was asked for; it costs a little for every connect."""
    healthz_address: BindAddress | None = _HEALTHZ
    metrics_address: BindAddress | None = _METRICS
    bind_address_hard_fail: bool = False
    sync_period_s: float = 30.0
    drift_check_period_s: float = 300.0
    oom_score_adj: int | None = None
    network_policy: NetworkPolicyMode = NetworkPolicyMode.OFF
    policy_overflow: PolicyOverflow = PolicyOverflow.CLOSED
    policy_answer: PolicyAnswer = PolicyAnswer.DROP
    anti_spoofing: bool = True
    """Whether packets from pods are dropped that have another source than the pod; only where policy is on."""
    flow_sample: int = 0
    """Of new allowed connections one in so many is told; 0 = none."""
    map_sizes: MapSizes = field(default_factory=MapSizes)
    log_format: str = "json"
    log_level: str = "info"
    unused: tuple[str, ...] = ()


def load(
    config_file: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    environment: Mapping[str, str] = os.environ,
    hostname: str | None = None,
    cpus: int | None = None,
) -> Config:
    """Read the configuration; ``overrides`` (flags) have the fields' dotted paths and win over the file.

    ``cpus``: how many the node has, whatever share of them this agent may use; None = the kernel is asked.
    Raises ConfigError, with every fault of the file and of the flags.
    """
    file, flags = Reading(), Reading()
    if config_file:
        read_fields(read_document(config_file), file)
    read_fields(overrides or {}, flags, keeps_empty=True)
    node_name = _node_name(file, flags, environment, hostname or socket.gethostname())
    values = file.values | flags.values
    faults = (*file.faults, *flags.faults, *_contradictions(values))
    if faults:
        raise ConfigError(faults)
    sizes = map_sizes(values, cpus or os.cpu_count() or 1)
    return _assemble(node_name, values, sizes, (*file.unused, *flags.unused, *_of_other_modes(values)))


def _contradictions(values: Mapping[str, object]) -> Iterator[str]:
    """Find faults that no field has alone."""
    mode = values.get("detectLocalMode")
    path = _DETECTED_BY.get(str(mode))
    if path and not values.get(path):
        yield f"{path}: is not set; detectLocalMode {mode} needs it"


def _of_other_modes(values: Mapping[str, object]) -> Iterator[str]:
    """Name fields that are set for a mode that is not the chosen one: they have no effect, as in kube-proxy."""
    chosen = str(values.get("mode", _DEFAULT_MODE))
    relevant = {f"{chosen}.syncPeriod", f"{_masquerading(chosen)}.masqueradeAll"}
    yield from (path for path in values if path.endswith((".syncPeriod", ".masqueradeAll")) and path not in relevant)
    detected_by = _DETECTED_BY.get(str(values.get("detectLocalMode", "")))
    yield from (path for path in _DETECTED_BY.values() if path in values and path != detected_by)


def _masquerading(mode: str) -> str:
    """Choose whose masqueradeAll is meant.

    Source: Convert_v1alpha1_KubeProxyConfiguration_To_config_KubeProxyConfiguration.
    """
    return "nftables" if mode == "nftables" else "iptables"


def _node_name(file: Reading, flags: Reading, environment: Mapping[str, str], hostname: str) -> str:
    """Choose the node's name: a flag, then the file, then NODE_NAME, then the host's own."""
    for values in (flags.values, file.values):
        for path in ("nodeName", "hostnameOverride"):
            if path in values:
                return str(values[path])
    source, name = ("NODE_NAME", environment["NODE_NAME"]) if environment.get("NODE_NAME") else ("hostname", hostname)
    try:
        return config_values.node_name(name)
    except ValueError as error:
        file.faults.append(f"nodeName: {source} {error}")
        return ""


def _assemble(node_name: str, values: Mapping[str, object], sizes: MapSizes, unused: tuple[str, ...]) -> Config:
    # Source: kube-proxy's conntrack flags: a timeout of 0 leaves what is there.
    left = {path for path, value in values.items() if path.startswith("conntrack.") and value == 0}
    given: dict[str, Any] = {
        attribute: values[path] for path, attribute in _ATTRIBUTES.items() if path in values.keys() - left
    }
    return Config(
        node_name=node_name,
        map_sizes=sizes,
        unused=unused,
        **_implied(values) | given,
    )


def _implied(values: Mapping[str, object]) -> dict[str, Any]:
    """Derive what kube-proxy's other fields say of ours, for where ours are not set.

    Source: SetDefaults_KubeProxyConfiguration: listening addresses follow the family of bindAddress.
    """
    implied: dict[str, Any] = {}
    if ":" in str(values.get("bindAddress", "")):
        implied |= {"healthz_address": BindAddress("::", 10256), "metrics_address": BindAddress("::1", 10249)}
    mode = str(values.get("mode", _DEFAULT_MODE))
    if f"{mode}.syncPeriod" in values:
        implied["sync_period_s"] = values[f"{mode}.syncPeriod"]
    implied["masquerade_all"] = values.get(f"{_masquerading(mode)}.masqueradeAll", False)
    if "clientConnection.burst" in values:
        implied["api_qps"] = _DEFAULT_QPS
    if "logging.format" in values:
        implied["log_format"] = values["logging.format"]
    if int(str(values.get("logging.verbosity", 0))) >= _DEBUG_VERBOSITY:
        implied["log_level"] = "debug"
    return implied


def describe(config: Config) -> dict[str, Any]:
    """Write ``config`` with the names and the forms a configuration file has: loading it gives ``config`` again."""
    flat = {path: getattr(config, attribute) for path, attribute in _ATTRIBUTES.items()}
    flat |= {"nodeName": config.node_name}
    flat |= describe_sizes(config.map_sizes, config.network_policy)
    nested: dict[str, Any] = {}
    for path, value in sorted(flat.items()):
        section, _, name = path.rpartition(".")
        target = nested.setdefault(section, {}) if section else nested
        target[name] = _written(path, value)
    return nested


def _written(path: str, value: object) -> object:
    if path.endswith("BindAddress"):
        return str(value or BindAddress("0.0.0.0", 0))
    if path.endswith(("Period", "Timeout")):
        return go_duration(float(str(value)))
    if isinstance(value, PortRange | Path | enum.StrEnum):
        return str(value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else value
