"""What the agent serves over HTTP, and the vitals it is judged by there.

Source: kube-proxy, with ``/metrics``, ``/proxyMode``, ``/configz`` and ``/healthz`` at one port, ``/healthz`` and
``/livez`` at the other.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import Counter

from agent.config import Config, describe
from agent.config_values import BindAddress
from agent.errors import EbproxyError
from agent.observe.health import Health, Vitals
from agent.observe.metrics import Metrics
from agent.observe.server import HttpServer, Route, json_answer, metrics_route, text_answer
from agent.reconciler import Reconciler

log = logging.getLogger("ebproxy")


def read_vitals(config: Config, reconciler: Reconciler) -> Vitals:
    """Read what health is judged by; blocks nobody."""
    model = reconciler.model
    since = reconciler.pending_since if model.is_synced else None
    # A directory that never held our Node says nothing about it; an API server without it says that it is gone.
    is_gone = model.node_exists is False and (model.node_was_seen or config.manifests is None)
    is_eligible = not is_gone and not model.node.deleting
    return Vitals(time.monotonic() - since if since else None, is_eligible, reconciler.failure is not None)


def open_servers(
    config: Config, metrics: Metrics, health: Health, has_settled: threading.Event
) -> Iterator[HttpServer]:
    """Bind the servers that are configured. Raises: EbproxyError where one cannot be, and that is not to be borne."""
    for name, address, routes in (
        ("metrics", config.metrics_address, _metrics_routes(config, metrics)),
        ("health", config.healthz_address, _health_routes(metrics, health, has_settled)),
    ):
        if address is None:
            continue
        try:
            yield HttpServer(address.host, address.port, routes)
        except OSError as error:
            message = _refusal(name, address, error)
            if config.bind_address_hard_fail:
                raise EbproxyError(message) from error
            metrics.error("bind")
            log.error("%s", message)


def _refusal(name: str, address: BindAddress, error: OSError) -> str:
    field = {"metrics": "metricsBindAddress", "health": "healthzBindAddress"}[name]
    likely = "kube-proxy has it most likely: stop it, or " if error.errno == errno.EADDRINUSE else ""
    return f"cannot serve {name} at {address}: {error}; {likely}set {field} to a free one"


def _metrics_routes(config: Config, metrics: Metrics) -> Mapping[str, Route]:
    return {
        "/metrics": metrics_route(metrics.registry),
        "/healthz": lambda _: text_answer("ok"),
        "/proxyMode": lambda _: text_answer("ebpf"),
        "/configz": lambda _: json_answer(200, {"kubeproxy.config.k8s.io": describe(config)}),
    }


def _health_routes(metrics: Metrics, health: Health, has_settled: threading.Event) -> Mapping[str, Route]:
    def readyz(_: str) -> tuple[int, str, bytes]:
        is_ready = has_settled.is_set()
        return (200 if is_ready else 503), "text/plain", b"ok\n" if is_ready else b"not programmed yet\n"

    return {
        "/healthz": _counted(health.healthz, metrics.healthz),
        "/livez": _counted(health.livez, metrics.livez),
        "/readyz": readyz,
    }


def _counted(judge: Callable[[], tuple[int, dict[str, Any]]], counter: Counter) -> Route:
    def answer(_: str) -> tuple[int, str, bytes]:
        code, body = judge()
        counter.labels(str(code)).inc()
        return json_answer(code, body)

    return answer
