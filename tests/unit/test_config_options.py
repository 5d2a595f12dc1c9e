"""What the configuration means to the parts: nothing of it is lost on the way."""

from __future__ import annotations

import ipaddress

import pytest

from agent.config import Config
from agent.config_fields import DetectLocalMode
from agent.config_options import dataplane_options, flow_timeouts, service_options
from agent.config_values import PortRange
from agent.core.addresses import AddressRange, parse_address
from agent.core.flows import Timeouts
from agent.core.network import DevicePatterns, PodDetection
from agent.core.options import NetworkPolicyMode, ServiceOptions
from agent.core.records import Algorithm, Forwarding

NETWORKS = (ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("2001:db8::/64"))
RANGES = (AddressRange.parse("192.0.2.0/24"), AddressRange.parse("2001:db8::/64"))


def config(**changes: object) -> Config:
    return Config(**{"node_name": "a", "socket_lb": "off", **changes})


@pytest.mark.parametrize(
    ("given", "options"),
    [
        pytest.param({}, ServiceOptions(), id="defaults"),
        pytest.param({"node_port_addresses": NETWORKS}, ServiceOptions(node_port_ranges=RANGES), id="node ports"),
        pytest.param({"node_port_addresses": "primary"}, ServiceOptions(is_node_port_primary=True), id="primary"),
        pytest.param({"bind_address": "::"}, ServiceOptions(), id="bound to nothing in particular"),
        pytest.param(
            {"bind_address": "192.0.2.7"}, ServiceOptions(bind_address=parse_address("192.0.2.7")), id="bind address"
        ),
        pytest.param(
            {"localhost_node_ports": False}, ServiceOptions(has_localhost_node_ports=False), id="no localhost"
        ),
        pytest.param({"masquerade_all": True}, ServiceOptions(masquerade_all=True), id="masquerade all"),
        pytest.param({"allowed_external_ips": NETWORKS}, ServiceOptions(allowed_external_ips=RANGES), id="externalIPs"),
        pytest.param({"forwarding": Forwarding.DSR}, ServiceOptions(forwarding=Forwarding.DSR), id="forwarding"),
        pytest.param({"algorithm": Algorithm.MAGLEV}, ServiceOptions(algorithm=Algorithm.MAGLEV), id="algorithm"),
    ],
)
def test_how_a_node_answers_for_services(given, options):
    assert options == service_options(config(**given))


@pytest.mark.parametrize(
    ("given", "pods"),
    [
        pytest.param({}, PodDetection(), id="by the Node's podCIDRs"),
        pytest.param({"cluster_cidrs": NETWORKS}, PodDetection(("192.0.2.0/24", "2001:db8::/64")), id="by clusterCIDR"),
        pytest.param(
            {"cluster_cidrs": NETWORKS, "detect_local_mode": DetectLocalMode.NODE_CIDR},
            PodDetection(is_by_node=True),
            id="NodeCIDR",
        ),
        pytest.param(
            {"detect_local_mode": DetectLocalMode.BRIDGE_INTERFACE, "detect_local_bridge": "cni0"},
            PodDetection(bridge="cni0"),
            id="BridgeInterface",
        ),
        pytest.param(
            {"detect_local_mode": DetectLocalMode.INTERFACE_NAME_PREFIX, "detect_local_prefix": "veth"},
            PodDetection(prefix="veth"),
            id="InterfaceNamePrefix",
        ),
    ],
)
def test_how_pods_are_told(given, pods):
    assert pods == dataplane_options(config(**given)).pods


def test_devices_and_source_ports():
    options = dataplane_options(
        config(devices=("eth*",), exclude_devices=("eth7",), source_ports=PortRange(40_000, 50_000))
    )

    assert options.patterns == DevicePatterns(("eth*",), ("eth7",))
    assert options.programs.source_ports == PortRange(40_000, 50_000)


def test_programs_and_sweep_have_the_same_timeouts():
    given = config(
        tcp_established_timeout_s=7_200.0, tcp_close_wait_timeout_s=60.0, udp_timeout_s=5.0, udp_stream_timeout_s=50.0
    )
    programs = dataplane_options(given).programs

    assert flow_timeouts(given) == Timeouts(tcp_established_s=7_200, tcp_close_wait_s=60, udp_s=5, udp_stream_s=50)
    assert (programs.tcp_established_s, programs.tcp_close_wait_s) == (7_200, 60)
    assert (programs.udp_s, programs.udp_stream_s) == (5, 50)


def test_the_defaults_are_those_of_the_sweep():
    assert flow_timeouts(config()) == Timeouts()


@pytest.mark.parametrize(("mode", "policy"), [("off", False), ("standard", True), ("strict", True)])
def test_policy(mode, policy):
    options = dataplane_options(config(network_policy=NetworkPolicyMode(mode), anti_spoofing=False))

    assert (options.programs.policy, options.programs.anti_spoofing) == (policy, False)
