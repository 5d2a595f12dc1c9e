"""Fixtures of the cluster layer: API servers, and three nodes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.api_servers import AnyApiServer, OurApiServer, running
from tests.cluster.policy_cluster import PolicyCluster
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
    with _chosen_api(tmp_path_factory) as api, ThreeNodes(api, socketLB=request.param) as made:
        yield made


@pytest.fixture(scope="session", params=["all", "off"])
def policy_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyCluster]:
    """Two nodes under policy that the session's tests share; with an API server as ``cluster`` has."""
    require_root()
    with _chosen_api(tmp_path_factory) as api, PolicyCluster(api, socketLB=request.param) as made:
        made.tables.expect(lambda _: True, limit_s=15)
        yield made


@pytest.fixture
def policies(policy_cluster: PolicyCluster) -> Iterator[PolicyCluster]:
    """A cluster under policy in which there is none yet."""
    yield policy_cluster
    policy_cluster.reset()


@contextmanager
def _chosen_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnyApiServer]:
    if os.environ.get("EBPROXY_REAL_API"):
        with running("real", tmp_path_factory.mktemp("apiserver")) as real:
            yield real
        return
    ours = OurApiServer()
    ours.start()
    try:
        yield ours
    finally:
        ours.stop()


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
