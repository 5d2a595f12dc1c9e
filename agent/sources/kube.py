"""Objects from an API server: one thread a kind, each handing typed events to the reconciler."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable

from agent.core.events import Event
from agent.core.records import Kind
from agent.sources.decode import Decoder
from agent.sources.kube_client import KubeClient
from agent.sources.kube_reflector import Reflector
from agent.sources.kube_watch import DEFAULT_TUNING, OnError, Resource, WatchStatus, WatchTuning

log = logging.getLogger("ebproxy.source.kube")

# A pod that has ended gives its addresses to others, however long the object stays: it arrives as a deletion.
_POLICY_RESOURCES = (
    Resource(Kind.POD, "/api/v1/pods", (("fieldSelector", "status.phase!=Succeeded,status.phase!=Failed"),)),
    Resource(Kind.NAMESPACE, "/api/v1/namespaces"),
    Resource(Kind.NETWORK_POLICY, "/apis/networking.k8s.io/v1/networkpolicies"),
    Resource(
        Kind.CLUSTER_NETWORK_POLICY,
        "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
        is_optional=True,
    ),
)


def resources(node_name: str, *, policy: bool = False) -> tuple[Resource, ...]:
    """Return what is watched; what policy is made of only where it is on.

    Services are not narrowed by label here: one that gets another proxy's label must be seen to lose its frontends,
    which the decoder does. Headless slices are many and never of use; one relabelled arrives as a deletion.
    """
    services = (
        Resource(Kind.SERVICE, "/api/v1/services"),
        Resource(
            Kind.ENDPOINT_SLICE,
            "/apis/discovery.k8s.io/v1/endpointslices",
            (("labelSelector", "!service.kubernetes.io/headless"),),
        ),
        Resource(Kind.NODE, "/api/v1/nodes", (("fieldSelector", f"metadata.name={node_name}"),)),
    )
    return (*services, *_POLICY_RESOURCES) if policy else services


class KubeSource:
    """Watches Services, EndpointSlices and this Node, and what policy is made of where ``policy`` is true.

    ``emit`` is called from several threads. After a ``ListStarted`` another one of the same kind may come instead of
    ``ListEnded``: the list failed and begins anew.
    """

    def __init__(
        self,
        client: KubeClient,
        node_name: str,
        emit: Callable[[Event], None],
        on_error: OnError = lambda _cause, _message: None,
        tuning: WatchTuning = DEFAULT_TUNING,
        *,
        policy: bool = False,
    ) -> None:
        self._client = client
        self._stopping = threading.Event()
        self._reflectors = tuple(
            Reflector(resource, client, Decoder(node_name, policy=policy), emit, on_error, tuning, self._stopping)
            for resource in resources(node_name, policy=policy)
        )
        self._threads = tuple(
            threading.Thread(target=reflector.run, name=f"watch-{reflector.status.kind}", daemon=True)
            for reflector in self._reflectors
        )

    def start(self) -> None:
        """Begin to list and watch; returns at once."""
        log.info("watching server=%s", self._client.host)
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End all watches, close the client, and wait for the threads."""
        self._stopping.set()
        self._client.close()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def describe(self) -> dict[str, object]:
        """Say for ``ebproxy status`` what is watched and how that goes."""
        watches = {str(watch.kind): _state_of(watch) for watch in self.status()}
        return {"kind": "api", "server": self._client.host, **watches}

    @property
    def is_synced(self) -> bool:
        """Whether every kind has been listed in full at least once."""
        return all(reflector.status.is_synced for reflector in self._reflectors)

    def status(self) -> tuple[WatchStatus, ...]:
        """Return how each watch is doing."""
        return tuple(dataclasses.replace(reflector.status) for reflector in self._reflectors)


def _state_of(watch: WatchStatus) -> str:
    if watch.error or not watch.is_synced:
        return watch.error or "not listed yet"
    return "not defined" if watch.is_absent else "listed"
