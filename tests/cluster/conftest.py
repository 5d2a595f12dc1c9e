"""Fixtures of the cluster layer: API servers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from tests.cluster.api_servers import AnyApiServer, OurApiServer
from tests.cluster.real_apiserver import RealApiServer, assets

_serial = itertools.count()


@pytest.fixture(scope="session", params=["ours", "real"])
def shared_api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnyApiServer]:
    """An API server that the session's tests share, each in a namespace of its own."""
    if request.param == "ours":
        ours = OurApiServer(has_kubernetes=True)
        ours.start()
        yield ours
        ours.stop()
        return
    yield from _real(tmp_path_factory)


def _real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealApiServer]:
    """Start the real one; to leave it out is allowed only where nobody named its binaries."""
    binaries = assets()
    if binaries is None:
        assert not os.environ.get("KUBEBUILDER_ASSETS"), "KUBEBUILDER_ASSETS has no kube-apiserver and etcd"
        pytest.skip("no real API server: KUBEBUILDER_ASSETS is not set")
    server = RealApiServer(binaries, tmp_path_factory.mktemp("real-apiserver"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def namespace() -> str:
    """A name no other test uses."""
    return f"ns-{os.getpid()}-{next(_serial)}"
