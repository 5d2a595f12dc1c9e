"""What the configuration means to each part of the agent."""

from __future__ import annotations

import ipaddress
import logging
from pathlib import Path

from agent.config import Config
from agent.config_fields import DetectLocalMode
from agent.config_values import PRIMARY, Network
from agent.core.addresses import AddressRange, parse_address
from agent.core.flows import Timeouts
from agent.core.network import DevicePatterns, PodDetection
from agent.core.options import NetworkPolicyMode, ServiceOptions
from agent.errors import UnsupportedKernel
from agent.kernel.cgroup import find_cgroup_root
from agent.kernel.dataplane import DataplaneOptions
from agent.kernel.programs import ProgramOptions

log = logging.getLogger("ebproxy")


def dataplane_options(config: Config) -> DataplaneOptions:
    """Say where and how packets and sockets are translated. Raises: UnsupportedKernel."""
    return DataplaneOptions(
        config.bpffs,
        _cgroup_root(config),
        config.map_sizes,
        ProgramOptions(
            remember_peer=config.remember_peer,
            host_only=config.socket_lb == "host",
            source_ports=config.source_ports,
            tcp_established_s=round(config.tcp_established_timeout_s),
            tcp_close_wait_s=round(config.tcp_close_wait_timeout_s),
            udp_s=round(config.udp_timeout_s),
            udp_stream_s=round(config.udp_stream_timeout_s),
            policy=config.network_policy is not NetworkPolicyMode.OFF,
            anti_spoofing=config.anti_spoofing,
        ),
        config.socket_lb != "off",
        DevicePatterns(config.devices, config.exclude_devices),
        _pod_detection(config),
    )


def service_options(config: Config) -> ServiceOptions:
    """Say how this node answers for Services."""
    chosen = config.node_port_addresses
    bound = ipaddress.ip_address(config.bind_address)
    return ServiceOptions(
        node_port_ranges=() if isinstance(chosen, str) else _ranges(chosen),
        is_node_port_primary=chosen == PRIMARY,
        has_localhost_node_ports=config.localhost_node_ports,
        bind_address=None if bound.is_unspecified else parse_address(str(bound)),
        masquerade_all=config.masquerade_all,
        allowed_external_ips=_ranges(config.allowed_external_ips),
        forwarding=config.forwarding,
        algorithm=config.algorithm,
    )


def _ranges(networks: tuple[Network, ...]) -> tuple[AddressRange, ...]:
    return tuple(AddressRange.parse(str(network)) for network in networks)


def flow_timeouts(config: Config) -> Timeouts:
    """Say when a tracked flow is over."""
    return Timeouts(
        tcp_established_s=round(config.tcp_established_timeout_s),
        tcp_close_wait_s=round(config.tcp_close_wait_timeout_s),
        udp_s=round(config.udp_timeout_s),
        udp_stream_s=round(config.udp_stream_timeout_s),
    )


def _cgroup_root(config: Config) -> Path | None:
    try:
        found = find_cgroup_root(config.cgroup_root)
    except UnsupportedKernel as error:
        if config.socket_lb != "off":
            raise
        log.warning("%s; NodePorts are not kept from processes of the node", error)
        return None
    if found.warning:
        log.warning("%s", found.warning)
    return found.path


def _pod_detection(config: Config) -> PodDetection:
    match config.detect_local_mode:
        case DetectLocalMode.CLUSTER_CIDR:
            return PodDetection(tuple(map(str, config.cluster_cidrs)))
        case DetectLocalMode.NODE_CIDR:
            return PodDetection(is_by_node=True)
        case DetectLocalMode.BRIDGE_INTERFACE:
            return PodDetection(bridge=config.detect_local_bridge)
        case DetectLocalMode.INTERFACE_NAME_PREFIX:
            return PodDetection(prefix=config.detect_local_prefix)
