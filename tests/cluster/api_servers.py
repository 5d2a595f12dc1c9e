"""The API servers a cluster test can run against, seen alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from tests.cluster.api_driver import NAMESPACES, ApiDriver, service
from tests.cluster.api_store import Resource, Store
from tests.cluster.apiserver import ApiServer, Options
from tests.cluster.real_apiserver import RealApiServer, assets

OUR_TOKEN = "admin-of-the-tests"


class AnyApiServer(Protocol):
    """What contract tests need of a server."""

    @property
    def url(self) -> str:
        """Where it listens."""

    @property
    def token(self) -> str:
        """A token that may do anything."""

    @property
    def ca_file(self) -> Path | None:
        """What its certificate is signed by; None is plain HTTP."""

    def stop(self) -> None:
        """End it."""

    def restart_empty(self) -> None:
        """Start again at the same address with nothing stored."""

    def compact(self) -> None:
        """Forget old versions."""


@dataclass
class OurApiServer:
    """The tests' own server behind the common face; ``has_kubernetes``: it has a Service of its own, as real ones."""

    server: ApiServer = field(default_factory=lambda: ApiServer(Options(bookmark_s=60.0, tokens={OUR_TOKEN})))
    token: str = OUR_TOKEN
    ca_file: Path | None = None
    has_kubernetes: bool = False

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.server.url

    def start(self) -> None:
        """Listen, with what an empty store begins with."""
        self._furnish()
        self.server.start()

    def stop(self) -> None:
        """End it."""
        self.server.stop()

    def restart_empty(self) -> None:
        """Start again with another store."""
        self.server.stop()
        self.server.store = Store()
        self.start()

    def compact(self) -> None:
        """Forget all but the present."""
        self.server.store.compact()

    def _furnish(self) -> None:
        if self.has_kubernetes:
            kubernetes = service("kubernetes", 443, clusterIP="10.96.0.1")
            self.server.store.create(Resource("", "v1", "services"), "default", kubernetes)


@contextmanager
def running(name: str, directory: Path) -> Iterator[AnyApiServer]:
    """Run "ours" or the "real" one, which leaves its files in ``directory``; both have what a new cluster has.

    To leave the real one out is allowed only where nobody named its binaries.
    """
    server: AnyApiServer = OurApiServer(has_kubernetes=True)
    if name == "real":
        binaries = assets()
        if binaries is None:
            assert not os.environ.get("KUBEBUILDER_ASSETS"), "KUBEBUILDER_ASSETS has no kube-apiserver and etcd"
            pytest.skip("no real API server: KUBEBUILDER_ASSETS is not set")
        server = RealApiServer(binaries, directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def driver(server: AnyApiServer, namespace: str = "") -> ApiDriver:
    """Return a driver for a server, with a namespace made in it."""
    made = ApiDriver(server.url, server.token, server.ca_file)
    if namespace:
        made.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    return made


def write_kubeconfig(path: Path, server: AnyApiServer, token: str = "") -> Path:
    """Write a kubeconfig for a server."""
    path.write_text(
        KUBECONFIG.format(
            server=server.url,
            ca=f", certificate-authority: {server.ca_file}" if server.ca_file else "",
            token=token or server.token,
        )
    )
    return path


KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: test
contexts: [{{name: test, context: {{cluster: test, user: test}}}}]
clusters: [{{name: test, cluster: {{server: "{server}"{ca}}}}}]
users: [{{name: test, user: {{token: "{token}"}}}}]
"""
