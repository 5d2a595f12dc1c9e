"""Fixtures of the cluster layer: API servers, and three nodes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.cluster.api_servers import AnyApiServer, OurApiServer, running
from tests.cluster.three_nodes import Service, ThreeNodes
from tests.requirements import require_root

_serial = itertools.count()


@pytest.fixture(scope="session", params=["ours", "real"])
def shared_api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnyApiServer]:
    """An API server that the session's tests share, each in a namespace of its own."""
    with running(request.param, tmp_path_factory.mktemp("apiserver")) as server:
        yield server


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
            api = stack.enter_context(running("real", tmp_path_factory.mktemp("apiserver")))
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
