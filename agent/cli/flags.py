"""The flags of `ebproxy run` that set a field of the configuration; a flag wins over the file.

kube-proxy's flags are accepted, but for what it does instead of running: its command line is valid here too. Help is
given for those with an effect.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import agent

_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def _number(text: str) -> object:
    """Read a number; what is none stays text, for the field's reader to refuse."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _boolean(text: str) -> object:
    """Read what pflag takes for true and false. Source: Go strconv.ParseBool."""
    return _BOOLEANS.get(text.lower(), text)


class Flag(NamedTuple):
    """A flag, the field it sets, its help ("" = not listed), and how its text becomes the field's value."""

    names: tuple[str, ...]
    field: str
    metavar: str
    help: str
    read: Callable[[str], object] = str


def _of_klog(name: str, metavar: str, read: Callable[[str], object] = str) -> Flag:
    """Describe a flag of kube-proxy's logging library, without effect, in both spellings that kube-proxy takes."""
    return Flag(tuple(dict.fromkeys((name, f"--{name[2:].replace('_', '-')}"))), name, metavar, "", read)


FLAGS = (
    Flag(("--manifests",), "manifests", "DIR", "read objects from the YAML files of DIR instead of an API server"),
    Flag(("--node-name",), "nodeName", "NAME", "name of this Node (default: NODE_NAME, else the host's name)"),
    Flag(("--kubeconfig",), "clientConnection.kubeconfig", "FILE", "how to reach the API server (default: in-cluster)"),
    Flag(("--api-server", "--master"), "apiServer", "URL", "address of the API server, instead of the kubeconfig's"),
    Flag(("--cgroup-root",), "cgroupRoot", "DIR", "the node's cgroup v2 root (default: found)"),
    Flag(("--state-dir",), "stateDir", "DIR", "unix socket and lock (default: /run/ebproxy)"),
    Flag(("--bpffs",), "bpffs", "DIR", "where maps, programs and links are pinned (default: /sys/fs/bpf)"),
    Flag(("--socket-lb",), "socketLB", "all|host|off", "how much the socket hooks take over (default: all)"),
    Flag(("--network-policy",), "networkPolicy", "off|standard|strict", "enforce NetworkPolicy (default: off)"),
    Flag(
        ("--devices",), "devices", "PATTERN[,PATTERN]", "devices whose packets are translated (default: all suitable)"
    ),
    Flag(("--exclude-devices",), "excludeDevices", "PATTERN[,PATTERN]", "devices that are left alone"),
    Flag(("--source-ports",), "sourcePorts", "FIRST-LAST", "source ports of masqueraded flows (default: 10000-29999)"),
    Flag(("--forwarding",), "forwarding", "snat|dsr", "how clients outside reach other nodes' pods (default: snat)"),
    Flag(("--algorithm",), "algorithm", "random|maglev", "how backends are chosen (default: random)"),
    Flag(
        ("--allowed-external-ips",), "allowedExternalIPs", "CIDR[,CIDR]", "externalIPs that are served (default: all)"
    ),
    Flag(("--metrics-bind-address",), "metricsBindAddress", "IP:PORT", "default 127.0.0.1:10249; empty: not at all"),
    Flag(("--healthz-bind-address",), "healthzBindAddress", "IP:PORT", "default 0.0.0.0:10256; empty: not at all"),
    Flag(("--log-format",), "logFormat", "json|text", "default json"),
    Flag(("--log-level",), "logLevel", "debug|info|warning|error", "default info"),
    # kube-proxy's, with effect
    Flag(("--hostname-override",), "hostnameOverride", "NAME", "kube-proxy's name for --node-name"),
    Flag(("--cluster-cidr",), "clusterCIDR", "CIDR[,CIDR]", "where the cluster's pods are"),
    Flag(("--kube-api-qps",), "clientConnection.qps", "NUMBER", "requests a second (default: no limit)", _number),
    Flag(("--kube-api-burst",), "clientConnection.burst", "NUMBER", "requests at once (default: 10)", _number),
    Flag(("--detect-local-mode",), "detectLocalMode", "MODE", "how pods are told from others (default: ClusterCIDR)"),
    Flag(("--pod-bridge-interface",), "detectLocal.bridgeInterface", "DEVICE", "for mode BridgeInterface"),
    Flag(("--pod-interface-name-prefix",), "detectLocal.interfaceNamePrefix", "TEXT", "for mode InterfaceNamePrefix"),
    Flag(
        ("--nodeport-addresses",), "nodePortAddresses", "CIDR[,CIDR]|primary", "where NodePorts answer (default: all)"
    ),
    Flag(
        ("--iptables-localhost-nodeports",),
        "iptables.localhostNodePorts",
        "BOOL",
        "whether 127.0.0.1 answers NodePorts (default: true)",
        _boolean,
    ),
    Flag(("--masquerade-all",), "masqueradeAll", "BOOL", "masquerade whatever goes to a ClusterIP", _boolean),
    Flag(("--bind-address",), "bindAddress", "IP", "the node's primary address, where the Node says another"),
    Flag(("--bind-address-hard-fail",), "bindAddressHardFail", "BOOL", "end if an address cannot be bound", _boolean),
    Flag(
        ("--conntrack-tcp-timeout-established",),
        "conntrack.tcpEstablishedTimeout",
        "DURATION",
        "idle TCP connections are forgotten (default: 24h)",
    ),
    Flag(
        ("--conntrack-tcp-timeout-close-wait",),
        "conntrack.tcpCloseWaitTimeout",
        "DURATION",
        "half-closed ones are (default: 1h)",
    ),
    Flag(
        ("--conntrack-udp-timeout",), "conntrack.udpTimeout", "DURATION", "UDP flows without a reply are (default: 30s)"
    ),
    Flag(
        ("--conntrack-udp-timeout-stream",),
        "conntrack.udpStreamTimeout",
        "DURATION",
        "those with one are (default: 2m)",
    ),
    Flag(
        ("--iptables-sync-period",),
        "iptables.syncPeriod",
        "DURATION",
        "longest wait before a failed write is tried again (default: 30s)",
    ),
    Flag(("--ipvs-sync-period",), "ipvs.syncPeriod", "DURATION", "the same, with --proxy-mode=ipvs"),
    Flag(("--oom-score-adj",), "oomScoreAdj", "NUMBER", "from -1000 to 1000 (default: as it is)", _number),
    Flag(("--logging-format",), "logging.format", "json|text", "kube-proxy's name for --log-format"),
    Flag(("--v", "-v"), "logging.verbosity", "NUMBER", "from 4 on: --log-level=debug", _number),
    # kube-proxy's, without effect: named in the log
    Flag(("--proxy-mode",), "mode", "MODE", ""),
    Flag(("--kube-api-content-type",), "clientConnection.contentType", "TYPE", ""),
    Flag(("--config-sync-period",), "configSyncPeriod", "DURATION", ""),
    Flag(("--conntrack-max-per-core",), "conntrack.maxPerCore", "NUMBER", "", _number),
    Flag(("--conntrack-min",), "conntrack.min", "NUMBER", "", _number),
    Flag(("--conntrack-tcp-be-liberal",), "conntrack.tcpBeLiberal", "BOOL", "", _boolean),
    Flag(("--feature-gates",), "featureGates", "GATE=BOOL", ""),
    Flag(("--iptables-masquerade-bit",), "iptables.masqueradeBit", "NUMBER", "", _number),
    Flag(("--iptables-min-sync-period",), "iptables.minSyncPeriod", "DURATION", ""),
    Flag(("--ipvs-exclude-cidrs",), "ipvs.excludeCIDRs", "CIDR", ""),
    Flag(("--ipvs-min-sync-period",), "ipvs.minSyncPeriod", "DURATION", ""),
    Flag(("--ipvs-scheduler",), "ipvs.scheduler", "NAME", ""),
    Flag(("--ipvs-strict-arp",), "ipvs.strictARP", "BOOL", "", _boolean),
    Flag(("--ipvs-tcp-timeout",), "ipvs.tcpTimeout", "DURATION", ""),
    Flag(("--ipvs-tcpfin-timeout",), "ipvs.tcpFinTimeout", "DURATION", ""),
    Flag(("--ipvs-udp-timeout",), "ipvs.udpTimeout", "DURATION", ""),
    Flag(("--log-flush-frequency",), "logging.flushFrequency", "DURATION", ""),
    Flag(("--profiling",), "enableProfiling", "BOOL", "", _boolean),
    Flag(("--show-hidden-metrics-for-version",), "showHiddenMetricsForVersion", "VERSION", ""),
    Flag(("--vmodule",), "logging.vmodule", "PATTERN", ""),
    Flag(("--log-json-info-buffer-size",), "logging.options.json.infoBufferSize", "QUANTITY", ""),
    Flag(("--log-json-split-stream",), "logging.options.json.splitStream", "BOOL", "", _boolean),
    Flag(("--log-text-info-buffer-size",), "logging.options.text.infoBufferSize", "QUANTITY", ""),
    Flag(("--log-text-split-stream",), "logging.options.text.splitStream", "BOOL", "", _boolean),
    _of_klog("--add_dir_header", "BOOL", _boolean),
    _of_klog("--alsologtostderr", "BOOL", _boolean),
    _of_klog("--log_backtrace_at", "FILE:LINE"),
    _of_klog("--log_dir", "DIR"),
    _of_klog("--log_file", "FILE"),
    _of_klog("--log_file_max_size", "NUMBER", _number),
    _of_klog("--logtostderr", "BOOL", _boolean),
    _of_klog("--one_output", "BOOL", _boolean),
    _of_klog("--skip_headers", "BOOL", _boolean),
    _of_klog("--skip_log_headers", "BOOL", _boolean),
    _of_klog("--stderrthreshold", "SEVERITY"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, ``--version`` and every flag that sets a field of the configuration.

    A flag that was not given is None, so that it does not hide what the file says. One of a boolean may stand alone.
    """
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML; a KubeProxyConfiguration is valid too")
    parser.add_argument("--version", action="version", version=f"ebproxy {agent.__version__}")
    for flag in FLAGS:
        described = flag.help or argparse.SUPPRESS
        if flag.read is _boolean:
            parser.add_argument(*flag.names, metavar=flag.metavar, help=described, nargs="?", const="true")
        else:
            parser.add_argument(*flag.names, metavar=flag.metavar, help=described)


def overrides_from(args: argparse.Namespace) -> dict[str, object]:
    """Gather the flags that were given, by the field each sets; an address may be empty, which means: do not listen."""
    given = {}
    for flag in FLAGS:
        value = getattr(args, flag.names[0].removeprefix("--").replace("-", "_"), None)
        if value is not None and (value != "" or flag.field.endswith("BindAddress")):
            given[flag.field] = flag.read(str(value))
    return given
