"""Fixtures of the cluster layer: API servers, and three nodes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.cluster.api_servers import AnyApiServer, OurApiServer
from tests.cluster.real_apiserver import RealApiServer, assets
from tests.cluster.three_nodes import Service, ThreeNodes
from tests.requirements import require_root

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


@pytest.fixture(scope="session", params=["all", "off"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreeNodes]:
    """Three nodes that the session's tests share, each with Services of its own; with the tests' own API server.

    With ``EBPROXY_REAL_API=1`` with a real one.
    """
    require_root()
    with ExitStack() as stack:
        api: AnyApiServer
        if os.environ.get("EBPROXY_REAL_API"):
            api = stack.enter_context(contextmanager(_real)(tmp_path_factory))
        else:
            api = OurApiServer()
            api.start()
            stack.callback(api.stop)
        yield stack.enter_context(ThreeNodes(api, socketLB=request.param))


@pytest.fixture
def make_service(cluster: ThreeNodes) -> Iterator[Callable[[], Service]]:
    """Make Services that are deleted at the end."""
    made: list[Service] = []

    def make() -> Service:
        made.append(cluster.service())
        return made[-1]

    yield make
    for service in made:
        service.delete()


@pytest.fixture
def service(make_service: Callable[[], Service]) -> Service:
    """A Service of the test's own, not yet written."""
    return make_service()
