"""The fields a configuration file may have, and how a file becomes their values.

A field is known by its dotted path in the file. Ours and kube-proxy's stand in one table: a KubeProxyConfiguration
is valid here unchanged, and what of it has no effect is named, not refused.
Source: kubeproxy.config.k8s.io/v1alpha1 KubeProxyConfiguration.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from agent import config_values as read
from agent.core.abi import POD_RANGES
from agent.core.options import NetworkPolicyMode, PolicyAnswer, PolicyOverflow
from agent.core.records import Algorithm, Forwarding
from agent.errors import ConfigError

KUBE_PROXY_GROUP = "kubeproxy.config.k8s.io"
KUBE_PROXY_KIND = "KubeProxyConfiguration"
_CONFIG_MAP_KEYS = ("config.conf", "config", "config.yaml")
_MOST_ENTRIES = 1 << 24
_LEAST_BYTES = 4096
_MOST_BYTES = 1 << 28
_MOST_TABLES = 65_535  # what a header can name


class DetectLocalMode(enum.StrEnum):
    """How the traffic of pods is told from others': by where it comes from, or the device it comes by."""

    CLUSTER_CIDR = "ClusterCIDR"
    NODE_CIDR = "NodeCIDR"
    BRIDGE_INTERFACE = "BridgeInterface"
    INTERFACE_NAME_PREFIX = "InterfaceNamePrefix"


@dataclass(frozen=True, slots=True)
class Field:
    """How one field is read, and whether it has an effect.

    ``is_defaulted`` is kube-proxy's way: Go's zero value ("", 0, 0s, false) means unset.
    """

    read: read.Reader
    is_applied: bool = True
    is_defaulted: bool = False


def _ours(reader: read.Reader) -> Field:
    return Field(reader)


def _shared(reader: read.Reader) -> Field:
    return Field(reader, is_defaulted=True)


def _unused(reader: read.Reader = read.anything) -> Field:
    return Field(reader, is_applied=False, is_defaulted=True)


def _unused_pointer(reader: read.Reader) -> Field:
    return Field(reader, is_applied=False)


_SIZE = read.integer(1, _MOST_ENTRIES)
_COUNT = read.integer(0, (1 << 31) - 1)
_BIT = read.integer(0, 31)

FIELDS: Mapping[str, Field] = {
    # ours
    "nodeName": _ours(read.node_name),
    "apiServer": _ours(read.url),
    "manifests": _ours(read.path),
    "stateDir": _ours(read.path),
    "bpffs": _ours(read.path),
    "cgroupRoot": _ours(read.path),
    "socketLB": _ours(read.choice("all", "host", "off")),
    "rememberPeer": _ours(read.boolean),
    "mapSizes.frontends": _ours(_SIZE),
    "mapSizes.segments": _ours(read.integer(4, _MOST_ENTRIES)),  # the shared empty ones, and one of its own
    "mapSizes.socketOrigins": _ours(read.power_of_two(2, _MOST_ENTRIES)),
    "mapSizes.peerOrigins": _ours(_SIZE),
    "mapSizes.conntrack": _ours(_SIZE),
    "mapSizes.affinity": _ours(_SIZE),
    "mapSizes.sourceRanges": _ours(_SIZE),
    "mapSizes.fragments": _ours(_SIZE),
    "mapSizes.maglevTables": _ours(read.integer(0, _MOST_TABLES)),
    "mapSizes.identities": _ours(_SIZE),
    "mapSizes.blocks": _ours(_SIZE),
    "mapSizes.policy": _ours(_SIZE),
    "mapSizes.subjects": _ours(_SIZE),
    "mapSizes.connections": _ours(_SIZE),
    "mapSizes.events": _ours(read.power_of_two(_LEAST_BYTES, _MOST_BYTES)),
    "networkPolicy": _ours(read.member(NetworkPolicyMode)),
    "policyOverflow": _ours(read.member(PolicyOverflow)),
    "policyAnswer": _ours(read.member(PolicyAnswer)),
    "antiSpoofing": _ours(read.boolean),
    "flowSample": _ours(_COUNT),
    "masqueradeAll": _ours(read.boolean),
    "sourcePorts": _ours(read.port_range),
    "forwarding": _ours(read.member(Forwarding)),
    "algorithm": _ours(read.member(Algorithm)),
    "allowedExternalIPs": _ours(read.networks),
    "devices": _ours(read.device_patterns),
    "excludeDevices": _ours(read.device_patterns),
    "driftCheckPeriod": _ours(read.period),
    "logFormat": _ours(read.choice("json", "text")),
    "logLevel": _ours(read.choice("debug", "info", "warning", "error")),
    # kube-proxy's, with effect
    "clusterCIDR": _shared(read.ranges(POD_RANGES)),
    "detectLocalMode": _shared(read.member(DetectLocalMode)),
    "detectLocal.bridgeInterface": _shared(read.device),
    "detectLocal.interfaceNamePrefix": _shared(read.device),
    "nodePortAddresses": _shared(read.node_port_addresses),
    "iptables.localhostNodePorts": Field(read.boolean),
    "iptables.masqueradeAll": _shared(read.boolean),
    "nftables.masqueradeAll": _shared(read.boolean),
    "conntrack.tcpEstablishedTimeout": _shared(read.timeout),
    "conntrack.tcpCloseWaitTimeout": _shared(read.timeout),
    "conntrack.udpTimeout": _shared(read.timeout),
    "conntrack.udpStreamTimeout": _shared(read.timeout),
    "hostnameOverride": _shared(read.node_name),
    "bindAddress": _shared(read.address),
    "healthzBindAddress": _shared(read.bind_address(10256)),
    "metricsBindAddress": _shared(read.bind_address(10249)),
    "bindAddressHardFail": _shared(read.boolean),
    "clientConnection.kubeconfig": _shared(read.path),
    "clientConnection.qps": _shared(read.number),
    "clientConnection.burst": _shared(_COUNT),
    "syncPeriod": _shared(read.period),
    "iptables.syncPeriod": _shared(read.period),
    "ipvs.syncPeriod": _shared(read.period),
    "nftables.syncPeriod": _shared(read.period),
    "oomScoreAdj": Field(read.integer(-1000, 1000)),
    "logging.format": _shared(read.choice("json", "text")),
    "logging.verbosity": _shared(_COUNT),
    # kube-proxy's, without effect so far, or for good
    # (mode still says whose syncPeriod and masqueradeAll are meant)
    "mode": _unused(read.choice("iptables", "ipvs", "nftables", "kernelspace")),
    "clientConnection.acceptContentTypes": _unused(read.text),
    "clientConnection.contentType": _unused(read.text),
    "configSyncPeriod": _unused(read.duration),
    "minSyncPeriod": _unused(read.duration),
    "iptables.minSyncPeriod": _unused(read.duration),
    "iptables.masqueradeBit": _unused_pointer(_BIT),
    "iptables.snatNodeInternalIP": _unused_pointer(read.boolean),
    "ipvs.minSyncPeriod": _unused(read.duration),
    "ipvs.scheduler": _unused(read.text),
    "ipvs.excludeCIDRs": _unused(read.networks),
    "ipvs.strictARP": _unused(read.boolean),
    "ipvs.tcpTimeout": _unused(read.duration),
    "ipvs.tcpFinTimeout": _unused(read.duration),
    "ipvs.udpTimeout": _unused(read.duration),
    "nftables.minSyncPeriod": _unused(read.duration),
    "nftables.masqueradeBit": _unused_pointer(_BIT),
    "conntrack.maxPerCore": _unused_pointer(_COUNT),
    "conntrack.min": _unused_pointer(_COUNT),
    "conntrack.tcpBeLiberal": _unused(read.boolean),
    "enableProfiling": _unused(read.boolean),
    "featureGates": _unused(),
    "logging.flushFrequency": _unused(),
    "logging.options": _unused(),
    "logging.options.json.infoBufferSize": _unused(read.text),
    "logging.options.json.splitStream": _unused(read.boolean),
    "logging.options.text.infoBufferSize": _unused(read.text),
    "logging.options.text.splitStream": _unused(read.boolean),
    "logging.vmodule": _unused(),
    "portRange": _unused(read.text),
    "showHiddenMetricsForVersion": _unused(read.text),
    "udpIdleTimeout": _unused(read.duration),
    "windowsRunAsService": _unused(read.boolean),
    "winkernel": _unused(),
    # flags of kube-proxy's logging library, which have no field
    "--add_dir_header": _unused(read.boolean),
    "--alsologtostderr": _unused(read.boolean),
    "--log_backtrace_at": _unused(read.text),
    "--log_dir": _unused(read.text),
    "--log_file": _unused(read.text),
    "--log_file_max_size": _unused(_COUNT),
    "--logtostderr": _unused(read.boolean),
    "--one_output": _unused(read.boolean),
    "--skip_headers": _unused(read.boolean),
    "--skip_log_headers": _unused(read.boolean),
    "--stderrthreshold": _unused(),
}
_SECTIONS = frozenset(path.partition(".")[0] for path in FIELDS if "." in path)


@dataclass(slots=True)
class Reading:
    """What reading gathered: values by path, fields without effect, and every fault."""

    values: dict[str, object] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_document(file: Path) -> dict[str, object]:
    """Read the configuration out of a file: bare, or inside a ConfigMap; of several documents, kube-proxy's.

    Raises ConfigError.
    """
    try:
        return _chosen(_documents(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: cannot be read: {error}"]) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{file}: {error}"]) from error


def read_fields(document: Mapping[str, object], into: Reading, *, keeps_empty: bool = False) -> None:
    """Read every field of ``document``, nested or with dotted names, and keep going after a fault.

    ``keeps_empty``: an empty value is a value (a flag given as ""), not an unset field.
    """
    is_kube_proxy = document.get("kind") == KUBE_PROXY_KIND
    for path, value in _leaves(document):
        known = FIELDS.get(path)
        if path in ("apiVersion", "kind"):
            continue
        if known is None:
            _note_unknown(path, value, into, is_kube_proxy=is_kube_proxy)
        elif keeps_empty or not _is_unset(known, value):
            _read_field(path, known, value, into)


def _read_field(path: str, known: Field, value: object, into: Reading) -> None:
    try:
        into.values[path] = known.read(value)
    except ValueError as error:
        into.faults.append(f"{path}: {error}")
        return
    if not known.is_applied:
        into.unused.append(path)


def _note_unknown(path: str, value: object, into: Reading, *, is_kube_proxy: bool) -> None:
    if path in _SECTIONS:
        if value is not None:
            into.faults.append(f"{path}: accepted: a mapping")
        return
    near = difflib.get_close_matches(path, FIELDS, n=1, cutoff=0.7)
    hint = f"; did you mean {near[0]}?" if near else ""
    if is_kube_proxy:
        into.unused.append(f"{path} (unknown{hint})")
    else:
        into.faults.append(f"{path}: no such field{hint}")


def _leaves(document: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in document.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and path in _SECTIONS:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _is_unset(known: Field, value: object) -> bool:
    return value in (None, "", [], {}) or (known.is_defaulted and _is_go_zero(value))


def _is_go_zero(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_go_zero(item) for item in value.values())
    return value in (None, "", "0", "0s", 0, [])


def _documents(text: str) -> list[dict[str, object]]:
    found = [document for document in yaml.safe_load_all(text) if document is not None]
    if not all(isinstance(document, dict) for document in found):
        raise ValueError("accepted: a mapping of fields")
    return [_inner(document) for document in found]


def _inner(document: dict[str, object]) -> dict[str, object]:
    """Unwrap a ConfigMap."""
    if document.get("kind") != "ConfigMap":
        return document
    data = document.get("data")
    for key in _CONFIG_MAP_KEYS:
        if isinstance(data, dict) and isinstance(data.get(key), str):
            return _chosen(_documents(data[key]))
    raise ValueError(f"a ConfigMap without a configuration; accepted: one under {', '.join(_CONFIG_MAP_KEYS)}")


def _chosen(documents: list[dict[str, object]]) -> dict[str, object]:
    if len(documents) > 1:
        documents = [document for document in documents if document.get("kind") == KUBE_PROXY_KIND]
        if len(documents) != 1:
            raise ValueError(f"several documents; accepted: one, or several of which one is a {KUBE_PROXY_KIND}")
    document = documents[0] if documents else {}
    _check_type(document)
    return document


def _check_type(document: Mapping[str, object]) -> None:
    kind, version = document.get("kind", ""), document.get("apiVersion", "")
    if kind not in ("", KUBE_PROXY_KIND):
        raise ValueError(f"kind is {kind!r}; accepted: {KUBE_PROXY_KIND}, a ConfigMap that holds one, or none")
    if version not in ("", f"{KUBE_PROXY_GROUP}/v1alpha1"):
        raise ValueError(f"apiVersion is {version!r}; accepted: {KUBE_PROXY_GROUP}/v1alpha1, or none")
