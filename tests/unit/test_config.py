"""The configuration: files, flags and the environment become one Config, or every fault at once."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import agent
from agent.cli import flags
from agent.config import Config, describe, load
from agent.config_fields import FIELDS, DetectLocalMode
from agent.config_sizes import MOST_CPUS, PER_CPU
from agent.config_values import BindAddress, Network, PortRange, go_duration, seconds
from agent.core.abi import MapSizes
from agent.core.options import NetworkPolicyMode, PolicyAnswer, PolicyOverflow
from agent.core.records import Algorithm, Forwarding
from agent.errors import ConfigError

WITH_POLICY = MapSizes(
    identities=65_536, blocks=16_384, policy=131_072, subjects=1_024, connections=65_536, events=262_144
)

# What `kubeadm init phase addon kube-proxy` stores: every field, most of them empty.
KUBEADM = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"""
CONFIG_MAP = yaml.safe_dump(
    {"apiVersion": "v1", "kind": "ConfigMap", "data": {"config.conf": KUBEADM, "kubeconfig.conf": ""}}
)
KUBEADM_INIT = f"apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\n---\n{KUBEADM}"
SOURCE_PORTS = "accepted: FIRST-LAST, from 1024 to 65535, 1024 ports or more"
PREFIXES = "accepted: prefixes like 10.244.0.0/16, a list or with commas"
DEVICE_NAME = "accepted: the name of a network device, at most 15 characters"
HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"


def networks(*texts: str) -> tuple[Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


@pytest.fixture
def from_text(tmp_path: Path):
    """Load a configuration file with this text, on a host called worker-7."""

    def load_text(
        text: str,
        overrides: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        hostname: str = "worker-7",
        cpus: int = 2,
    ) -> Config:
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return load(file, overrides, environment or {}, hostname, cpus)

    return load_text


def faults_of(call, *args, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        call(*args, **kwargs)
    return list(raised.value.faults)


@pytest.mark.parametrize("text", [KUBEADM, CONFIG_MAP, KUBEADM_INIT], ids=["bare", "config map", "among kubeadm's"])
def test_what_kubeadm_writes_is_valid_unchanged_and_warns_of_nothing(from_text, text):
    expected = Config(
        node_name="worker-7",
        kubeconfig=Path("/var/lib/kube-proxy/kubeconfig.conf"),
        cluster_cidrs=(ipaddress.ip_network("10.244.0.0/16"), ipaddress.ip_network("fd00:10:244::/56")),
    )

    assert from_text(text) == expected


@pytest.mark.parametrize(
    ("line", "unused"),
    [
        ("mode: ipvs", ["mode"]),
        ("conntrack: {maxPerCore: 0}", ["conntrack.maxPerCore"]),
        ("conntrack: {udpTimeout: 30s, tcpBeLiberal: true}", ["conntrack.tcpBeLiberal"]),
        ("iptables: {masqueradeBit: 14}", ["iptables.masqueradeBit"]),
        ("iptables: {minSyncPeriod: 1s}", ["iptables.minSyncPeriod"]),
        ("nftables: {masqueradeAll: true, syncPeriod: 9s}", ["nftables.masqueradeAll", "nftables.syncPeriod"]),
        ("mode: nftables\niptables: {masqueradeAll: true}", ["mode", "iptables.masqueradeAll"]),
        ("mode: ipvs\niptables: {masqueradeAll: true}\nipvs: {syncPeriod: 9s}", ["mode"]),
        (
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: br0, interfaceNamePrefix: veth}",
            ["detectLocal.interfaceNamePrefix"],
        ),
        ("featureGates: {A: true}", ["featureGates"]),
        ("winkernel: {sourceVip: 192.0.2.1}", ["winkernel"]),
        ("clientConnection: {acceptContentTypes: a}", ["clientConnection.acceptContentTypes"]),
        ("fromTheFuture: 1", ["fromTheFuture (unknown)"]),
        ("hostNameOverride: a", ["hostNameOverride (unknown; did you mean hostnameOverride?)"]),
    ],
)
def test_a_kube_proxy_field_without_effect_is_named(from_text, line, unused):
    assert unused == list(from_text(HEAD + line).unused)


@pytest.mark.parametrize(
    ("text", "attribute", "expected"),
    [
        ("healthzBindAddress: '[::]:10256'", "healthz_address", BindAddress("::", 10256)),
        ("healthzBindAddress: 192.0.2.1", "healthz_address", BindAddress("192.0.2.1", 10256)),
        ("metricsBindAddress: '::1'", "metrics_address", BindAddress("::1", 10249)),
        ("metricsBindAddress: '[::1]'", "metrics_address", BindAddress("::1", 10249)),
        ("metricsBindAddress: ''", "metrics_address", BindAddress("127.0.0.1", 10249)),
        ("metricsBindAddress: 0.0.0.0:0", "metrics_address", None),
        ("metricsBindAddress: ':0'", "metrics_address", None),
        ("bindAddress: 192.0.2.7", "bind_address", "192.0.2.7"),
        ("bindAddress: 'fd00::1'", "healthz_address", BindAddress("::", 10256)),
        ("bindAddress: 'fd00::1'", "metrics_address", BindAddress("::1", 10249)),
        ("{bindAddress: 'fd00::1', metricsBindAddress: 127.0.0.1:9}", "metrics_address", BindAddress("127.0.0.1", 9)),
        ("clusterCIDR: [10.0.0.0/8]", "cluster_cidrs", (ipaddress.ip_network("10.0.0.0/8"),)),
        ("", "api_qps", -1.0),
        ("clientConnection: {qps: 2.5}", "api_qps", 2.5),
        ("clientConnection: {qps: 2.5}", "api_burst", 10),
        ("clientConnection: {qps: -2}", "api_qps", -2.0),
        ("clientConnection: {burst: 20}", "api_qps", 5.0),
        ("clientConnection: {burst: 20}", "api_burst", 20),
        ("nodePortAddresses: [primary]", "node_port_addresses", "primary"),
        ("nodePortAddresses: primary", "node_port_addresses", "primary"),
        ("nodePortAddresses: [192.0.2.0/24, '::/0']", "node_port_addresses", networks("192.0.2.0/24", "::/0")),
        ("nodePortAddresses: []", "node_port_addresses", ()),
        ("detectLocalMode: NodeCIDR", "detect_local_mode", DetectLocalMode.NODE_CIDR),
        (
            "{detectLocalMode: BridgeInterface, detectLocal: {bridgeInterface: cni0}}",
            "detect_local_mode",
            DetectLocalMode.BRIDGE_INTERFACE,
        ),
        (
            "{detectLocalMode: BridgeInterface, detectLocal: {bridgeInterface: cni0}}",
            "detect_local_bridge",
            "cni0",
        ),
        (
            "{detectLocalMode: InterfaceNamePrefix, detectLocal: {interfaceNamePrefix: veth}}",
            "detect_local_prefix",
            "veth",
        ),
        ("", "localhost_node_ports", True),
        ("iptables: {localhostNodePorts: null}", "localhost_node_ports", True),
        ("iptables: {localhostNodePorts: false}", "localhost_node_ports", False),
        ("iptables: {masqueradeAll: true}", "masquerade_all", True),
        ("nftables: {masqueradeAll: true}", "masquerade_all", False),
        ("{mode: ipvs, iptables: {masqueradeAll: true}}", "masquerade_all", True),
        ("{mode: nftables, iptables: {masqueradeAll: true}}", "masquerade_all", False),
        ("{mode: nftables, nftables: {masqueradeAll: true}}", "masquerade_all", True),
        ("{masqueradeAll: false, iptables: {masqueradeAll: true}}", "masquerade_all", False),
        ("conntrack: {tcpEstablishedTimeout: 2h}", "tcp_established_timeout_s", 7_200.0),
        ("conntrack: {tcpEstablishedTimeout: 0h0m0s}", "tcp_established_timeout_s", 86_400.0),
        ("conntrack: {tcpCloseWaitTimeout: 1m}", "tcp_close_wait_timeout_s", 60.0),
        ("conntrack: {udpTimeout: 5s}", "udp_timeout_s", 5.0),
        ("conntrack: {udpStreamTimeout: 1500ms}", "udp_stream_timeout_s", 1.5),
        ("conntrack: {udpStreamTimeout: null}", "udp_stream_timeout_s", 120.0),
        ("allowedExternalIPs: 198.51.100.0/24", "allowed_external_ips", networks("198.51.100.0/24")),
        ("sourcePorts: 40000-41023", "source_ports", PortRange(40_000, 41_023)),
        ("forwarding: dsr", "forwarding", Forwarding.DSR),
        ("algorithm: maglev", "algorithm", Algorithm.MAGLEV),
        ("devices: 'eth*,ens?'", "devices", ("eth*", "ens?")),
        ("excludeDevices: [docker0]", "exclude_devices", ("docker0",)),
        ("mapSizes: {conntrack: 7, affinity: 6}", "map_sizes", MapSizes(conntrack=7, affinity=6)),
        ("mapSizes: {sourceRanges: 5, fragments: 4}", "map_sizes", MapSizes(source_ranges=5, fragments=4)),
        ("mapSizes: {maglevTables: 0}", "map_sizes", MapSizes(maglev_tables=0)),
        ("syncPeriod: 1m30s", "sync_period_s", 90.0),
        ("iptables: {syncPeriod: 20s}", "sync_period_s", 20.0),
        ("{mode: nftables, nftables: {syncPeriod: 9s}, iptables: {syncPeriod: 20s}}", "sync_period_s", 9.0),
        ("{syncPeriod: 5s, iptables: {syncPeriod: 20s}}", "sync_period_s", 5.0),
        ("socketLB: off", "socket_lb", "off"),
        ("rememberPeer: false", "remember_peer", False),
        ("", "network_policy", NetworkPolicyMode.OFF),
        ("networkPolicy: off", "network_policy", NetworkPolicyMode.OFF),
        ("networkPolicy: standard", "network_policy", NetworkPolicyMode.STANDARD),
        ("networkPolicy: strict", "network_policy", NetworkPolicyMode.STRICT),
        ("", "policy_overflow", PolicyOverflow.CLOSED),
        ("policyOverflow: open", "policy_overflow", PolicyOverflow.OPEN),
        ("", "policy_answer", PolicyAnswer.DROP),
        ("policyAnswer: reject", "policy_answer", PolicyAnswer.REJECT),
        ("", "anti_spoofing", True),
        ("antiSpoofing: false", "anti_spoofing", False),
        ("", "flow_sample", 0),
        ("flowSample: 64", "flow_sample", 64),
        ("", "map_sizes", MapSizes()),
        ("mapSizes: {identities: 9, policy: 9, events: 8192}", "map_sizes", MapSizes()),
        ("networkPolicy: strict", "map_sizes", WITH_POLICY),
        (
            "{networkPolicy: standard, mapSizes: {subjects: 7, events: 8192, conntrack: 6}}",
            "map_sizes",
            replace(WITH_POLICY, subjects=7, events=8_192, conntrack=6),
        ),
        ("bindAddressHardFail: true", "bind_address_hard_fail", True),
        ("oomScoreAdj: 0", "oom_score_adj", 0),
        ("mapSizes: {socketOrigins: 65536}", "map_sizes", MapSizes(socket_origins=65536)),
        ("apiServer: 192.0.2.1:6443", "api_server", "https://192.0.2.1:6443"),
        ("stateDir: /run/other", "state_dir", Path("/run/other")),
        ("logging: {format: text}", "log_format", "text"),
        ("{logging: {format: text}, logFormat: json}", "log_format", "json"),
        ("logging: {verbosity: 4}", "log_level", "debug"),
        ("logging: {verbosity: 2}", "log_level", "info"),
        ("", "state_dir", Path("/run/ebproxy")),
    ],
)
def test_a_field_is_applied(from_text, text, attribute, expected):
    assert expected == getattr(from_text(text), attribute)


@pytest.mark.parametrize(
    ("cpus", "text", "expected"),
    [
        pytest.param(1, "", MapSizes(), id="never-less-than-with-two"),
        pytest.param(
            3,
            "",
            MapSizes(socket_origins=32_768, peer_origins=6_144, affinity=6_144, fragments=1_536),
            id="a-power-of-two-for-sockets",
        ),
        pytest.param(
            64,
            "",
            MapSizes(
                socket_origins=524_288, peer_origins=131_072, conntrack=262_144, affinity=131_072, fragments=32_768
            ),
            id="flows-too-with-many",
        ),
        pytest.param(
            64,
            "mapSizes: {socketOrigins: 2, peerOrigins: 3, conntrack: 4, affinity: 5, fragments: 6}",
            MapSizes(socket_origins=2, peer_origins=3, conntrack=4, affinity=5, fragments=6),
            id="what-is-configured-wins",
        ),
    ],
)
def test_sizes_follow_the_cpus(from_text, cpus, text, expected):
    assert from_text(text, cpus=cpus).map_sizes == expected


def test_no_more_cpus_than_a_bound_count(from_text):
    most = from_text("", cpus=MOST_CPUS)

    assert from_text("", cpus=100 * MOST_CPUS).map_sizes == most.map_sizes
    assert from_text(yaml.safe_dump(describe(most)), cpus=1).map_sizes == most.map_sizes


def test_the_nodes_cpus_count_not_those_that_the_agent_may_use(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})

    assert load(None, {}, {}, "h").map_sizes.peer_origins == 16 * PER_CPU["mapSizes.peerOrigins"]


QUOTE = " (YAML reads on, off, yes and no as booleans: quote the word)"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("socketLb: all", "socketLb: no such field; did you mean socketLB?"),
        ("mapSizes: {frontend: 1}", "mapSizes.frontend: no such field; did you mean mapSizes.frontends?"),
        ("zzz: 1", "zzz: no such field"),
        ("mapSizes: 7", "mapSizes: accepted: a mapping"),
        ("mapSizes: {frontends: 0}", "mapSizes.frontends: is 0; accepted: a whole number from 1 to 16777216"),
        ("mapSizes: {socketOrigins: 30000}", "mapSizes.socketOrigins: is 30000; accepted: a power of two, like 32768"),
        ("socketLB: some", "socketLB: is 'some'; accepted: all, host, off"),
        ("networkPolicy: on", f"networkPolicy: is True{QUOTE}; accepted: off, standard, strict"),
        ("policyAnswer: no", f"policyAnswer: is False{QUOTE}; accepted: drop, reject"),
        ("networkPolicy: 1", "networkPolicy: is 1; accepted: off, standard, strict"),
        ("policyOverflow: some", "policyOverflow: is 'some'; accepted: closed, open"),
        ("policyAnswer: some", "policyAnswer: is 'some'; accepted: drop, reject"),
        ("antiSpoofing: 1", "antiSpoofing: is a number; accepted: true or false"),
        ("flowSample: -1", "flowSample: is -1; accepted: a whole number from 0 to 2147483647"),
        ("mapSizes: {subjects: 0}", "mapSizes.subjects: is 0; accepted: a whole number from 1 to 16777216"),
        ("mapSizes: {events: 5000}", "mapSizes.events: is 5000; accepted: a power of two, like 8192"),
        ("mapSizes: {events: 2048}", "mapSizes.events: is 2048; accepted: a whole number from 4096 to 268435456"),
        ("rememberPeer: 'yes'", "rememberPeer: is a string; accepted: true or false"),
        (
            "healthzBindAddress: localhost:1",
            "healthzBindAddress: is 'localhost:1'; accepted: IP:PORT, [IPv6]:PORT or IP; port 0 = do not listen",
        ),
        (
            "healthzBindAddress: ::1:99999",
            "healthzBindAddress: is '::1:99999'; accepted: IP:PORT, [IPv6]:PORT or IP; port 0 = do not listen",
        ),
        (
            "healthzBindAddress: ':10256'",
            "healthzBindAddress: is ':10256'; accepted: IP:PORT, [IPv6]:PORT or IP; port 0 = do not listen",
        ),
        (
            "clusterCIDR: 10.0.0.0/33",
            "clusterCIDR: holds '10.0.0.0/33'; accepted: prefixes like 10.244.0.0/16, a list or with commas",
        ),
        (
            "clusterCIDR: '::ffff:10.0.0.0/104'",
            f"clusterCIDR: holds '::ffff:10.0.0.0/104', IPv4 in the form of IPv6; {PREFIXES}",
        ),
        ("clusterCIDR: 7", "clusterCIDR: is a number; accepted: a list of strings, or a string with commas"),
        (
            "nodePortAddresses: [everywhere]",
            "nodePortAddresses: holds 'everywhere'; accepted: prefixes like 10.244.0.0/16, a list or with commas",
        ),
        (
            "nodePortAddresses: [primary, 192.0.2.0/24]",
            "nodePortAddresses: holds 'primary' among others; accepted: prefixes, or 'primary' alone",
        ),
        (
            f"clusterCIDR: [{', '.join(f'10.{i}.0.0/16' for i in range(65))}]",
            "clusterCIDR: holds 65 prefixes; accepted: at most 64",
        ),
        (
            "detectLocalMode: ByGuess",
            "detectLocalMode: is 'ByGuess'; accepted: ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix",
        ),
        (
            "detectLocalMode: BridgeInterface",
            "detectLocal.bridgeInterface: is not set; detectLocalMode BridgeInterface needs it",
        ),
        (
            "{detectLocalMode: InterfaceNamePrefix, detectLocal: {bridgeInterface: cni0}}",
            "detectLocal.interfaceNamePrefix: is not set; detectLocalMode InterfaceNamePrefix needs it",
        ),
        (
            "detectLocal: {bridgeInterface: sixteen-letters-}",
            f"detectLocal.bridgeInterface: is 'sixteen-letters-'; {DEVICE_NAME}",
        ),
        ("sourcePorts: 10000-11022", f"sourcePorts: is '10000-11022'; {SOURCE_PORTS}"),
        ("sourcePorts: 1023-9999", f"sourcePorts: is '1023-9999'; {SOURCE_PORTS}"),
        ("sourcePorts: 60000-65536", f"sourcePorts: is '60000-65536'; {SOURCE_PORTS}"),
        ("sourcePorts: '10000'", f"sourcePorts: is '10000'; {SOURCE_PORTS}"),
        ("sourcePorts: 10000", "sourcePorts: is a number; accepted: a string"),
        ("forwarding: hybrid", "forwarding: is 'hybrid'; accepted: snat, dsr"),
        ("algorithm: rr", "algorithm: is 'rr'; accepted: random, maglev"),
        ("devices: [eth 0]", "devices: holds 'eth 0'; accepted: patterns of device names, like eth* or ens?"),
        (
            "conntrack: {udpTimeout: -1s}",
            "conntrack.udpTimeout: is '-1s'; accepted: a duration of zero or more, like 30s or 1h0m0s",
        ),
        (
            "conntrack: {udpTimeout: 500ms}",
            "conntrack.udpTimeout: is '500ms'; accepted: 1s or more, or 0 for the default",
        ),
        ("mapSizes: {maglevTables: -1}", "mapSizes.maglevTables: is -1; accepted: a whole number from 0 to 65535"),
        ("mapSizes: {conntrack: 0}", "mapSizes.conntrack: is 0; accepted: a whole number from 1 to 16777216"),
        ("syncPeriod: 30", "syncPeriod: is 30; accepted: a duration of zero or more, like 30s or 1h0m0s"),
        ("syncPeriod: -1s", "syncPeriod: is '-1s'; accepted: a duration of zero or more, like 30s or 1h0m0s"),
        ("syncPeriod: 30 s", "syncPeriod: is no duration; accepted: a number with a unit, like 500ms, 30s or 1h0m0s"),
        ("driftCheckPeriod: 0s", "driftCheckPeriod: is 0; accepted: a duration of more than zero, like 30s"),
        ("oomScoreAdj: 1001", "oomScoreAdj: is 1001; accepted: a whole number from -1000 to 1000"),
        ("mode: ebpf", "mode: is 'ebpf'; accepted: iptables, ipvs, nftables, kernelspace"),
        ("apiServer: 'ftp://x'", "apiServer: is 'ftp://x'; accepted: a URL like https://192.0.2.1:6443"),
        (
            "nodeName: under_score",
            "nodeName: is 'under_score'; accepted: the name of a Node: letters, digits, '-' and '.', at most 253",
        ),
        ("bindAddress: node1", "bindAddress: is 'node1'; accepted: an IP address"),
        ("stateDir: 7", "stateDir: is a number; accepted: a string"),
    ],
)
def test_a_fault_names_its_field_and_what_is_accepted(from_text, line, fault):
    assert [fault] == faults_of(from_text, line)


def test_every_fault_of_file_and_flags_is_reported_at_once(from_text):
    text = "socketLB: some\nmapSizes: {segments: x}\nnodePort: 1\nsyncPeriod: soon\n"

    paths = [fault.partition(":")[0] for fault in faults_of(from_text, text, {"logLevel": "loud"}, hostname="no_good")]

    assert paths == ["socketLB", "mapSizes.segments", "nodePort", "syncPeriod", "nodeName", "logLevel"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[1, 2]", "accepted: a mapping of fields"),
        ("a: [", "while parsing"),
        ("kind: Deployment", "kind is 'Deployment'"),
        ("kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v9", "apiVersion is"),
        ("a: 1\n---\nb: 2", "several documents"),
        ("kind: ConfigMap\ndata: {other: x}", "a ConfigMap without a configuration"),
    ],
    ids=["a list", "no yaml", "another kind", "another version", "two documents", "empty config map"],
)
def test_a_file_that_is_no_configuration_is_refused(from_text, text, part):
    (fault,) = faults_of(from_text, text)

    assert part in fault


def test_a_file_that_is_not_there_is_refused(tmp_path):
    (fault,) = faults_of(load, tmp_path / "absent.yaml")

    assert "absent.yaml: cannot be read" in fault


@pytest.mark.parametrize(
    ("text", "overrides", "environment", "expected"),
    [
        ("nodeName: a\nhostnameOverride: b", {"nodeName": "f", "hostnameOverride": "g"}, {"NODE_NAME": "e"}, "f"),
        ("nodeName: a\nhostnameOverride: b", {"hostnameOverride": "g"}, {"NODE_NAME": "e"}, "g"),
        ("nodeName: a\nhostnameOverride: b", {}, {"NODE_NAME": "e"}, "a"),
        ("hostnameOverride: ' B '", {}, {"NODE_NAME": "e"}, "b"),
        ("", {}, {"NODE_NAME": "e"}, "e"),
        ("", {}, {"NODE_NAME": ""}, "worker-7.example"),
    ],
    ids=["flag", "other flag", "file", "override in lower case", "environment", "hostname in lower case"],
)
def test_the_node_name_comes_from_the_nearest_source(from_text, text, overrides, environment, expected):
    assert expected == from_text(text, overrides, environment, "Worker-7.Example").node_name


def test_a_flag_wins_over_the_file(from_text):
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    args = parser.parse_args(
        ["--socket-lb=host", "--metrics-bind-address=", "--state-dir", "/run/b", "--bpffs=/bpf", "--node-name="]
    )

    config = from_text("{socketLB: off, logLevel: debug, stateDir: /run/a}", flags.overrides_from(args))

    assert ("host", "debug", Path("/run/b"), Path("/bpf"), "worker-7") == (
        config.socket_lb,
        config.log_level,
        config.state_dir,
        config.bpffs,
        config.node_name,
    )
    assert config.metrics_address is None
    assert config.healthz_address == BindAddress("0.0.0.0", 10256)


def parsed(*arguments: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    return flags.overrides_from(parser.parse_args(arguments))


# As someone who comes from kube-proxy would type them.
KUBE_PROXY_FLAGS = {
    "--hostname-override=worker-1": ("node_name", "worker-1"),
    "--cluster-cidr=10.0.0.0/8,fd00::/48": ("cluster_cidrs", networks("10.0.0.0/8", "fd00::/48")),
    "--detect-local-mode=NodeCIDR": ("detect_local_mode", DetectLocalMode.NODE_CIDR),
    "--nodeport-addresses=192.0.2.0/24": ("node_port_addresses", networks("192.0.2.0/24")),
    "--nodeport-addresses=primary": ("node_port_addresses", "primary"),
    "--masquerade-all": ("masquerade_all", True),
    "--masquerade-all=T": ("masquerade_all", True),
    "--masquerade-all=false": ("masquerade_all", False),
    "--iptables-localhost-nodeports=false": ("localhost_node_ports", False),
    "--bind-address=fd00::1": ("healthz_address", BindAddress("::", 10256)),
    "--bind-address-hard-fail": ("bind_address_hard_fail", True),
    "--conntrack-tcp-timeout-established=2h": ("tcp_established_timeout_s", 7_200.0),
    "--conntrack-tcp-timeout-close-wait=1m": ("tcp_close_wait_timeout_s", 60.0),
    "--conntrack-udp-timeout=0": ("udp_timeout_s", 30.0),
    "--conntrack-udp-timeout-stream=1m": ("udp_stream_timeout_s", 60.0),
    "--iptables-sync-period=9s": ("sync_period_s", 9.0),
    "--kube-api-qps=50": ("api_qps", 50.0),
    "--kube-api-qps=0": ("api_qps", 0.0),
    "--kube-api-burst=100": ("api_burst", 100),
    "--oom-score-adj=-999": ("oom_score_adj", -999),
    "--logging-format=text": ("log_format", "text"),
    "-v=4": ("log_level", "debug"),
    "--master=192.0.2.1:6443": ("api_server", "https://192.0.2.1:6443"),
}


@pytest.mark.parametrize("flag", KUBE_PROXY_FLAGS)
def test_a_flag_of_kube_proxy_is_applied(flag):
    attribute, expected = KUBE_PROXY_FLAGS[flag]
    config = load(None, parsed(flag), {}, "h")

    assert expected == getattr(config, attribute)
    assert config.unused == ()


def test_flags_of_a_mode_of_kube_proxy_come_together():
    config = load(None, parsed("--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0"), {}, "h")

    assert (config.detect_local_mode, config.detect_local_bridge) == (DetectLocalMode.BRIDGE_INTERFACE, "cni0")


def test_a_false_flag_wins_over_a_true_file(from_text):
    text = "{iptables: {masqueradeAll: true}, bindAddressHardFail: true, conntrack: {udpTimeout: 9s}}"

    config = from_text(
        text, parsed("--masquerade-all=false", "--bind-address-hard-fail=0", "--conntrack-udp-timeout=0")
    )

    assert (config.masquerade_all, config.bind_address_hard_fail, config.udp_timeout_s) == (False, False, 30.0)


SAMPLES = {
    "mode": "ipvs",
    "ipvs.excludeCIDRs": "10.0.0.0/8",
    "ipvs.scheduler": "rr",
    "featureGates": "A=true",
    "logging.flushFrequency": "5s",
    "showHiddenMetricsForVersion": "1.35",
    "logging.vmodule": "a=1",
    "clientConnection.contentType": "json",
    "logging.options.json.infoBufferSize": "64Ki",
    "logging.options.text.infoBufferSize": "0",
    "--log_backtrace_at": "proxier.go:7",
    "--log_dir": "/var/log",
    "--log_file": "/var/log/kube-proxy.log",
    "--stderrthreshold": "WARNING",
}


@pytest.mark.parametrize("flag", [flag for flag in flags.FLAGS if not flag.help], ids=lambda flag: flag.names[0])
def test_a_flag_without_effect_is_accepted_and_named(flag):
    sample = SAMPLES.get(flag.field, {"NUMBER": "3", "DURATION": "3s", "BOOL": "true"}.get(flag.metavar))

    config = load(None, parsed(f"{flag.names[0]}={sample}"), {}, "h")

    assert config.unused == (flag.field,)


def test_a_flag_of_the_logging_library_is_spelt_as_kube_proxy_takes_it():
    config = load(None, parsed("--logtostderr", "--log-file=a", "--log_dir=b", "--skip-log-headers=false"), {}, "h")

    assert sorted(config.unused) == ["--log_dir", "--log_file", "--logtostderr", "--skip_log_headers"]


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        parsed("--version")

    assert (ended.value.code, capsys.readouterr().out) == (0, f"ebproxy {agent.__version__}\n")


def test_flags_have_help_if_their_field_has_an_effect():
    assert {flag.field for flag in flags.FLAGS if flag.help} == {
        flag.field for flag in flags.FLAGS if FIELDS[flag.field].is_applied
    }


@pytest.mark.parametrize(
    ("argument", "fault"),
    [
        ("--masquerade-all=maybe", "masqueradeAll: is a string; accepted: true or false"),
        ("--oom-score-adj=much", "oomScoreAdj: is 'much'; accepted: a whole number from -1000 to 1000"),
    ],
)
def test_a_flag_that_cannot_be_read_is_a_fault(argument, fault):
    assert [fault] == faults_of(load, None, parsed(argument), {}, "h")


@pytest.mark.parametrize(
    "text",
    [
        "",
        KUBEADM,
        "{metricsBindAddress: ':0', driftCheckPeriod: 1h1m1.5s, socketLB: off, mapSizes: {segments: 5}}",
        "{detectLocalMode: BridgeInterface, detectLocal: {bridgeInterface: cni0}, nodePortAddresses: primary}",
        "{nodePortAddresses: [192.0.2.0/24, 'fd00::/64'], conntrack: {udpTimeout: 1500ms, tcpEstablishedTimeout: 2h}}",
        "{iptables: {masqueradeAll: true}, sourcePorts: 40000-50000, forwarding: dsr, algorithm: maglev}",
        "{clientConnection: {qps: 7.5, burst: 3}, bindAddress: 'fd00::1', iptables: {localhostNodePorts: false}}",
        "{devices: ['eth*', ens3], excludeDevices: cni0, allowedExternalIPs: ['::/9'], mapSizes: {fragments: 9}}",
        "{networkPolicy: strict, policyAnswer: reject, flowSample: 9, mapSizes: {identities: 9, events: 4096}}",
        "{networkPolicy: off, policyOverflow: open, antiSpoofing: false, mapSizes: {identities: 9}}",
    ],
    ids=[
        "defaults",
        "kubeadm",
        "ours",
        "bridge",
        "conntrack",
        "packet path",
        "requests",
        "devices",
        "policy",
        "no policy",
    ],
)
def test_a_described_configuration_loads_as_itself(from_text, text):
    config = from_text(text)

    assert config == from_text(yaml.safe_dump(describe(config)), hostname="elsewhere")


@pytest.mark.parametrize(
    ("text", "duration_s", "canonical"),
    [
        ("30s", 30, "30s"),
        ("1h0m0s", 3600, "1h0m0s"),
        ("90m", 5400, "1h30m0s"),
        ("1.5m", 90, "1m30s"),
        ("500ms", 0.5, "500ms"),
        ("0", 0, "0s"),
        ("1m0.25s", 60.25, "1m0.25s"),
        (".5h", 1800, "30m0s"),
    ],
)
def test_a_go_duration_is_read_and_written(text, duration_s, canonical):
    assert duration_s == pytest.approx(seconds(text))
    assert canonical == go_duration(duration_s)


@pytest.mark.parametrize("text", ["", "s", "30", "1h 5m", "5d", "1hm", "--1s", "1s1"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="is no duration"):
        seconds(text)
