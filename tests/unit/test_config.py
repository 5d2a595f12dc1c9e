"""The configuration: files, flags and the environment become one Config, or every fault at once."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from agent.cli import flags
from agent.config import Config, describe, load
from agent.config_values import BindAddress, go_duration, seconds
from agent.core.abi import MapSizes
from agent.errors import ConfigError

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
HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"


@pytest.fixture
def from_text(tmp_path: Path):
    """Load a configuration file with this text, on a host called worker-7."""

    def load_text(
        text: str,
        overrides: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        hostname: str = "worker-7",
    ) -> Config:
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return load(file, overrides, environment or {}, hostname)

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
        ("conntrack: {udpTimeout: 30s, tcpBeLiberal: true}", ["conntrack.udpTimeout", "conntrack.tcpBeLiberal"]),
        ("iptables: {localhostNodePorts: false}", ["iptables.localhostNodePorts"]),
        ("nodePortAddresses: [primary, 192.0.2.0/24]", ["nodePortAddresses"]),
        ("featureGates: {A: true}", ["featureGates"]),
        ("winkernel: {sourceVip: 192.0.2.1}", ["winkernel"]),
        ("clientConnection: {qps: 5, burst: 10}", ["clientConnection.qps", "clientConnection.burst"]),
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
        ("bindAddress: 'fd00::1'", "healthz_address", BindAddress("::", 10256)),
        ("bindAddress: 'fd00::1'", "metrics_address", BindAddress("::1", 10249)),
        ("{bindAddress: 'fd00::1', metricsBindAddress: 127.0.0.1:9}", "metrics_address", BindAddress("127.0.0.1", 9)),
        ("clusterCIDR: [10.0.0.0/8]", "cluster_cidrs", (ipaddress.ip_network("10.0.0.0/8"),)),
        ("syncPeriod: 1m30s", "sync_period_s", 90.0),
        ("iptables: {syncPeriod: 20s}", "sync_period_s", 20.0),
        ("{mode: nftables, nftables: {syncPeriod: 9s}, iptables: {syncPeriod: 20s}}", "sync_period_s", 9.0),
        ("{syncPeriod: 5s, iptables: {syncPeriod: 20s}}", "sync_period_s", 5.0),
        ("socketLB: off", "socket_lb", "off"),
        ("rememberPeer: false", "remember_peer", False),
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
    ("line", "fault"),
    [
        ("socketLb: all", "socketLb: no such field; did you mean socketLB?"),
        ("mapSizes: {frontend: 1}", "mapSizes.frontend: no such field; did you mean mapSizes.frontends?"),
        ("zzz: 1", "zzz: no such field"),
        ("mapSizes: 7", "mapSizes: accepted: a mapping"),
        ("mapSizes: {frontends: 0}", "mapSizes.frontends: is 0; accepted: a whole number from 1 to 16777216"),
        ("mapSizes: {socketOrigins: 30000}", "mapSizes.socketOrigins: is 30000; accepted: a power of two, like 32768"),
        ("socketLB: some", "socketLB: is 'some'; accepted: all, host, off"),
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
        ("clusterCIDR: 7", "clusterCIDR: is a number; accepted: a list of strings, or a string with commas"),
        (
            "nodePortAddresses: [everywhere]",
            "nodePortAddresses: holds 'everywhere'; accepted: prefixes like 10.244.0.0/16, a list or with commas",
        ),
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


def test_every_flag_sets_a_field_that_exists():
    values = {"manifests": "/m", "nodeName": "n", "apiServer": "http://a", "socketLB": "off", "clusterCIDR": "::/0"}
    values |= {"logFormat": "text", "logLevel": "error", "hostnameOverride": "h"}
    overrides = {
        flag.field: values.get(flag.field, "/p" if "Address" not in flag.field else "::1") for flag in flags.FLAGS
    }

    config = load(None, overrides, {}, "h")

    assert config.unused == ()
    assert Path("/p") == config.kubeconfig == config.cgroup_root == config.state_dir == config.bpffs


@pytest.mark.parametrize(
    "text",
    ["", KUBEADM, "{metricsBindAddress: ':0', driftCheckPeriod: 1h1m1.5s, socketLB: off, mapSizes: {segments: 5}}"],
    ids=["defaults", "kubeadm", "ours"],
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
