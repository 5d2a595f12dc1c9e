"""The composition root of ``ebproxy run``: build the parts, start them, wait for a signal, stop them.

Stopping leaves everything programmed: the kernel keeps forwarding, and the next agent adopts what it finds.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import logging
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import agent
from agent.config import Config
from agent.config_options import dataplane_options, flow_timeouts, service_options
from agent.config_remarks import read_ephemeral_ports, remarks
from agent.core.flows import UdpServices
from agent.core.model import Model
from agent.core.network import Network
from agent.core.options import NetworkPolicyMode
from agent.core.records import Kind, ObjectKey
from agent.errors import ConfigError, DataplaneError, EbproxyError, LoaderError, UnsupportedKernel
from agent.kernel import capabilities, netlink, probe
from agent.kernel.conntrack import FlowSweep, Swept
from agent.kernel.dataplane import Dataplane
from agent.kernel.follower import NetworkFollower
from agent.kernel.sockets import StaleSockets
from agent.live_metrics import LiveMetrics
from agent.observe.control import ControlServer
from agent.observe.facts import Facts, read_facts, write_facts
from agent.observe.former_policies import remove_policies
from agent.observe.health import Health
from agent.observe.health_checks import HealthCheckServers
from agent.observe.listeners import listening_hosts
from agent.observe.metrics import Metrics
from agent.observe.names import NameJournal
from agent.observe.numbers import remove_numbers
from agent.observe.policy_off import answers_without_policy
from agent.reconciler import Reconciler
from agent.servers import open_servers, read_vitals
from agent.sources.decode import Decoder
from agent.status import read_status

if TYPE_CHECKING:
    from agent.policy_sync import PolicySync
    from agent.policy_telling import PolicyTelling
    from agent.sources.kube_client import KubeClient
    from agent.sources.kube_events import EventRecorder

log = logging.getLogger("ebproxy")
LOCK = "agent.lock"
_M_ARENA_MAX = -8
_MOST_DESCRIPTORS = 65_536


class Source(Protocol):
    """Where objects come from."""

    def start(self) -> None:
        """Begin to list and watch."""

    def stop(self) -> None:
        """Stop promptly."""

    def describe(self) -> dict[str, Any]:
        """Say for ``status`` what is read and how that goes."""


@contextlib.contextmanager
def only_agent(state_dir: Path) -> Iterator[None]:
    """Hold the state directory's lock. Raises: EbproxyError when an agent does, or the directory cannot be had."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / LOCK).open("w", encoding="ascii")
    except OSError as error:
        raise EbproxyError(f"cannot use state directory {state_dir}: {error.strerror}; run as root") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "stop it first (several agents on one machine need a --state-dir and --bpffs each)"
            raise EbproxyError(f"another agent holds {lock.name}; {hint}") from error
        yield


class Agent:
    """Every part of a running agent."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.has_policy = config.network_policy is not NetworkPolicyMode.OFF
        self.metrics = Metrics()
        self._client = None if config.manifests else _begin_client(config)
        if config.manifests and not config.manifests.is_dir():
            raise ConfigError([f"manifests: {config.manifests} is not a directory"])
        if self._client:
            self._client.connect()  # before anything is put into the kernel that nobody would fill
        self.follower = NetworkFollower(self._on_network)
        self.dataplane = Dataplane(dataplane_options(config))
        self.dataplane.follow(self.follower.network, None)
        self._opened = netlink.open_loopback()
        if not self.dataplane.is_migrating:
            self.dataplane.activate()
        self.names = NameJournal(config.state_dir, self._ids_in_use())
        self.reconciler = Reconciler(
            Model(config.node_name, service_options(config), awaits_addresses=True),
            self.dataplane,
            self.metrics,
            self.names,
            sync_period_s=config.sync_period_s,
            drift_period_s=config.drift_check_period_s,
            on_degraded=self._on_degraded,
            flows=self._make_flows(),
            policy=self._make_policy(),
            on_synced=self._publish,
        )
        self.dataplane.tables.on_ready = self.reconciler.build_tables
        self._recorder: EventRecorder | None = None
        self.has_settled = threading.Event()
        """Set once what was listed first is programmed: what ``/readyz`` says, so that a rollout waits for it."""
        self.source = self._make_source()
        health = Health(lambda: read_vitals(config, self.reconciler), config.sync_period_s)
        self.health_checks = HealthCheckServers(lambda: health.is_healthy, self._on_unserved, config.sync_period_s)
        live = LiveMetrics(config.map_sizes, self.reconciler, self.health_checks, self.metrics, self._source_faults)
        self.metrics.add_live(live.read)
        self.telling = self._make_telling()
        answers = self.telling.answers if self.telling else answers_without_policy()
        self.control = ControlServer(config.state_dir, {"status": self.status, **answers})
        self.servers = list(open_servers(config, self.metrics, health, self.has_settled))
        write_facts(config.state_dir, self._facts())

    def _make_policy(self) -> PolicySync | None:
        """Build what enforces policy, over what is in force; nothing where it is off."""
        if not self.has_policy:
            remove_numbers(self.config.state_dir)
            remove_policies(self.config.state_dir)
            return None
        from agent.policy_parts import make_policy  # noqa: PLC0415 - nothing of it is held where policy is off

        return make_policy(self.config, self.dataplane, self.metrics, self._on_degraded_subject)

    def _make_telling(self) -> PolicyTelling | None:
        if self.reconciler.policy is None:
            return None
        from agent.policy_telling import PolicyTelling  # noqa: PLC0415

        return PolicyTelling(self.reconciler.policy, self.reconciler, self.dataplane.store, self.has_settled)

    def _make_flows(self) -> FlowSweep:
        maps, services = self.dataplane.store.maps, UdpServices()
        sockets = StaleSockets(maps["socket_origins"], maps["peer_origins"], services)
        timeouts = flow_timeouts(self.config)
        flows = FlowSweep(maps["conntrack"], timeouts, sockets, services)
        flows.on_pass = self._on_swept
        return flows

    def _on_swept(self, swept: Swept) -> None:
        self.metrics.cleaned(swept.duration_s, swept.stale)
        self.metrics.counted("conntrack", swept.entries)

    def _ids_in_use(self) -> set[int] | None:
        """Read which service ids the maps hold; None while another layout is in use, and with it other ids."""
        if self.dataplane.is_migrating:
            return None
        return {frontend.service for frontend in self.dataplane.store.read_state().frontends.values()}

    def start(self) -> None:
        """Start every part, the source last."""
        self.reconciler.start()
        self.follower.start()
        self.control.start()
        if self.telling:
            self.telling.start()
        for server in self.servers:
            server.start()
        self.source.start()
        threading.Thread(target=self._settle_memory, name="settle", daemon=True).start()

    def stop(self) -> None:
        """Stop every part, the source first."""
        if self._recorder:
            self._recorder.stop()
        self.source.stop()
        for server in self.servers:
            server.stop()
        if self.telling:
            self.telling.stop()
        self.control.stop()
        self.follower.stop()
        self.reconciler.stop()
        if self.reconciler.flows:
            self.reconciler.flows.sockets.stop()
        self.health_checks.stop()
        self.names.close()
        self.dataplane.close()

    def status(self) -> dict[str, Any]:
        """Answer ``ebproxy status``."""
        return read_status(self.config, self.reconciler, self.source.describe())

    def _make_source(self) -> Source:
        if self._client is None:
            from agent.sources.manifests import ManifestSource  # noqa: PLC0415 - only the source in use is held

            assert self.config.manifests  # noqa: S101 - else there is a client
            decoder = Decoder(self.config.node_name, policy=self.has_policy)
            return ManifestSource(self.config.manifests, decoder, self.reconciler.submit, self._on_source_error)
        from agent.sources.kube import KubeSource  # noqa: PLC0415
        from agent.sources.kube_events import EventRecorder  # noqa: PLC0415

        self._recorder = EventRecorder(self._client, self.config.node_name)
        return KubeSource(
            self._client, self.config.node_name, self.reconciler.submit, self._on_source_error, policy=self.has_policy
        )

    def _on_network(self, network: Network) -> None:
        self.reconciler.submit(network)

    def _on_degraded(self, service: ObjectKey, reason: str) -> None:
        if self._recorder:
            self._recorder.warn(service, "DataplaneFull", reason)

    def _on_degraded_subject(self, pod: ObjectKey, reason: str) -> None:
        if self._recorder:
            self._recorder.warn(pod, "PolicyFull", reason, kind=Kind.POD)

    def _source_faults(self) -> int:
        return len(self.source.describe().get("faults", ()))

    def _on_source_error(self, kind: str, message: str) -> None:
        self.metrics.error(kind)
        log.warning("source: %s: %s", kind, message)

    def _publish(self) -> None:
        """Have load balancers told of what is programmed now."""
        model = self.reconciler.model
        hosts = listening_hosts(self.config.node_port_addresses, model.node_port_addresses)
        self.health_checks.update(model.health_checks(), hosts)

    def _on_unserved(self, service: ObjectKey, reason: str) -> None:
        if self._recorder:
            self._recorder.warn(service, "FailedToStartServiceHealthcheck", reason)

    def _facts(self) -> Facts:
        return Facts(
            node=self.config.node_name,
            pid=os.getpid(),
            socket_lb=self.config.socket_lb,
            cluster_cidrs=tuple(str(cidr) for cidr in self.config.cluster_cidrs),
            cgroup=str(self.dataplane.options.cgroup or ""),
            network_policy=self.config.network_policy.value,
            # What an agent before this one changed is still to be undone.
            loopback=tuple(sorted({*read_facts(self.config.state_dir).loopback, *self._opened})),
        )

    def _settle_memory(self) -> None:
        """Once the first state is programmed: keep the collector away from it, and give what decoding took back."""
        self.reconciler.is_settled.wait()
        self.has_settled.set()
        gc.collect()
        gc.freeze()
        gc.enable()
        ctypes.CDLL(None).malloc_trim(0)


def _begin_client(config: Config) -> KubeClient:
    """Have the credentials read, in a child, while the dataplane is being opened."""
    from agent.sources.kube_client import KubeClient, KubeTarget  # noqa: PLC0415 - not for manifests
    from agent.sources.kube_limits import RequestLimit  # noqa: PLC0415

    limit = RequestLimit(config.api_qps, config.api_burst) if config.api_qps > 0 else None
    return KubeClient(KubeTarget(config.kubeconfig, config.api_server or None), limit=limit)


def run(config: Config) -> int:
    """Run an agent until SIGTERM or SIGINT; returns the exit status. Raises: EbproxyError."""
    capabilities.require(capabilities.effective())
    gc.disable()  # the first lists are a hundred thousand objects that all stay
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)
    for remark in remarks(config, read_ephemeral_ports()):
        log.warning("%s", remark)
    _raise_descriptor_limit()
    if config.oom_score_adj is not None:
        with contextlib.suppress(PermissionError):
            Path("/proc/self/oom_score_adj").write_text(str(config.oom_score_adj), encoding="ascii")
    with only_agent(config.state_dir):
        parts = _build(config)
        parts.start()
        log.info("ebproxy %s runs on node %s, layout %s", agent.__version__, config.node_name, parts.dataplane.layout)
        status = _wait(parts.reconciler)
        parts.stop()
        log.info("stopped; what is programmed stays, and `ebproxy cleanup` removes it")
    return status


def _raise_descriptor_limit() -> None:
    """Make room for the sockets of health checks; some runtimes begin with a soft limit of 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _build(config: Config) -> Agent:
    """Build an agent. Raises: UnsupportedKernel where it is the kernel that cannot, else what went wrong."""
    try:
        return Agent(config)
    except OSError as error:
        raise EbproxyError(f"cannot start on {config.bpffs} and {config.state_dir}: {error}") from error
    except (DataplaneError, LoaderError) as error:
        for feature in probe.features():
            if not feature.is_there and not feature.is_denied:
                remedy = "ebproxy needs Linux 5.18 or later; `ebproxy doctor` lists everything that is missing"
                raise UnsupportedKernel(feature.name, remedy) from error
        raise


def _wait(reconciler: Reconciler) -> int:
    """Wait for a signal, or for the reconciler to fail."""
    wake = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: wake.set())
    while not wake.wait(timeout=5):
        if reconciler.failure is not None:
            return 1
    return 0


__all__ = ["Agent", "Source", "only_agent", "run"]
