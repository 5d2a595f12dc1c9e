"""The flags of `ebproxy run` that set a field of the configuration; a flag wins over the file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple


class Flag(NamedTuple):
    """A flag, the field it sets, and its help."""

    names: tuple[str, ...]
    field: str
    metavar: str
    help: str


FLAGS = (
    Flag(("--manifests",), "manifests", "DIR", "read objects from the YAML files of DIR instead of an API server"),
    Flag(("--node-name",), "nodeName", "NAME", "name of this Node (default: NODE_NAME, else the host's name)"),
    Flag(("--kubeconfig",), "clientConnection.kubeconfig", "FILE", "how to reach the API server (default: in-cluster)"),
    Flag(("--api-server", "--master"), "apiServer", "URL", "address of the API server, instead of the kubeconfig's"),
    Flag(("--cgroup-root",), "cgroupRoot", "DIR", "the node's cgroup v2 root (default: found)"),
    Flag(("--state-dir",), "stateDir", "DIR", "unix socket and lock (default: /run/ebproxy)"),
    Flag(("--bpffs",), "bpffs", "DIR", "where maps, programs and links are pinned (default: /sys/fs/bpf)"),
    Flag(("--socket-lb",), "socketLB", "all|host|off", "how much the socket hooks take over (default: all)"),
    Flag(("--metrics-bind-address",), "metricsBindAddress", "IP:PORT", "default 127.0.0.1:10249; empty: not at all"),
    Flag(("--healthz-bind-address",), "healthzBindAddress", "IP:PORT", "default 0.0.0.0:10256; empty: not at all"),
    Flag(("--log-format",), "logFormat", "json|text", "default json"),
    Flag(("--log-level",), "logLevel", "debug|info|warning|error", "default info"),
    Flag(("--hostname-override",), "hostnameOverride", "NAME", "kube-proxy's name for --node-name"),
    Flag(("--cluster-cidr",), "clusterCIDR", "CIDR[,CIDR]", "where the cluster's pods are"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and every flag that sets a field of it.

    A flag that was not given is None, so that it does not hide what the file says.
    """
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML; a KubeProxyConfiguration is valid too")
    for flag in FLAGS:
        parser.add_argument(*flag.names, metavar=flag.metavar, help=flag.help)


def overrides_from(args: argparse.Namespace) -> dict[str, str]:
    """Gather the flags that were given, by the field each sets; an address may be empty, which means: do not listen."""
    given = {}
    for flag in FLAGS:
        value = getattr(args, flag.names[0].removeprefix("--").replace("-", "_"), None)
        if value is not None and (value != "" or flag.field.endswith("BindAddress")):
            given[flag.field] = str(value)
    return given
