"""Three nodes, their agents and an API server: what is created there is reached here, whatever becomes of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from tests.cluster.api_driver import NODES, SERVICES, SLICES, ApiDriver
from tests.cluster.api_servers import AnyApiServer, driver, running, write_kubeconfig
from tests.cluster.relay import Relay
from tests.lab.agents import Agent
from tests.lab.lab import Lab, Pod
from tests.lab.manifests import NAMESPACE, endpoint_slice, service
from tests.lab.polling import until
from tests.lab.scene import SIZES
from tests.lab.traffic import MODES, Client, churning
from tests.requirements import require_root

NODE_COUNT = 3
OUTAGE_LIMIT_S = 40  # the agents' retries may have backed off by then


class Cluster:
    """Nodes with an agent, a server pod and a client pod each, that take their objects from an API server."""

    def __init__(self, api: AnyApiServer) -> None:
        self.api = api
        self._stack = ExitStack()
        try:
            self.lab = self._stack.enter_context(Lab(NODE_COUNT))
            self.web = [node.add_pod(f"web-{node.number}", 8080) for node in self.lab.nodes]
            self.clients = [node.add_pod("shopper").client() for node in self.lab.nodes]
            self.api_driver = self.populate({})
            port = urlsplit(api.url).port or 0
            self.relays = [self._stack.enter_context(Relay(node.netns, port)) for node in self.lab.nodes]
            self.agents = [self._make_agent(node.number) for node in self.lab.nodes]
            for agent in self.agents:
                agent.start()
            for agent in self.agents:
                agent.wait()
        except BaseException:
            self.close()
            raise

    def _make_agent(self, number: int) -> Agent:
        node = self.lab.nodes[number - 1]
        kubeconfig = write_kubeconfig(node.directory / "kubeconfig", self.api)
        return Agent(node, flags=("--kubeconfig", str(kubeconfig)), mapSizes=SIZES)

    def close(self) -> None:
        """Take everything down."""
        self._stack.close()

    def populate(self, services: dict[str, Sequence[Pod]]) -> ApiDriver:
        """Fill an empty API server: the namespace, the nodes, and Services over pods; returns its driver."""
        filled = driver(self.api, NAMESPACE)
        for node in self.lab.nodes:
            filled.create(NODES, node.manifest())
        self.api_driver = filled
        for name, pods in services.items():
            self.create(name, pods)
        return filled

    def ips(self, name: str) -> tuple[str, str]:
        """The ClusterIPs of a Service of this name; in the ranges the real server gives out."""
        number = 16 + sum(name.encode()) % 4096
        return f"10.96.{number >> 8}.{number & 255}", f"fd00:96::{number:x}"

    def create(self, name: str, pods: Sequence[Pod]) -> tuple[str, str]:
        """Create a Service and its slices."""
        self.api_driver.create(SERVICES.format(NAMESPACE), service(name, self.ips(name)))
        for family in (4, 6):
            self.api_driver.create(SLICES.format(NAMESPACE), self.slice(name, pods, family))
        return self.ips(name)

    def slice(self, name: str, pods: Sequence[Pod], family: int) -> dict[str, object]:
        """Build a slice of one family."""
        return endpoint_slice(name, [pod.endpoint(family) for pod in pods], ipv6=family == 6)

    def set_endpoints(self, name: str, pods: Sequence[Pod]) -> None:
        """Replace the endpoints of a Service."""
        for family in (4, 6):
            self.api_driver.update(SLICES.format(NAMESPACE), self.slice(name, pods, family))

    def wait_for(self, name: str, count: int | None, limit_s: float = 10) -> None:
        """Wait until every node has so many backends for every frontend of a Service."""
        v4, v6 = self.ips(name)
        for agent in self.agents:
            for frontend in (f"{v4}:80/TCP", f"{v4}:80/UDP", f"[{v6}]:80/TCP", f"[{v6}]:80/UDP"):
                agent.wait_for(frontend, count, limit_s)

    def clear(self) -> None:
        """Delete every Service of ours and its slices, and wait until no node has it."""
        for collection in (SERVICES.format(NAMESPACE), SLICES.format(NAMESPACE)):
            names = [found["metadata"]["name"] for found in self.api_driver.get(collection)["items"]]
            for name in names:
                self.api_driver.delete(collection, name)
        for agent in self.agents:
            until(lambda: agent.status()["services"] == self._others(), "no Service is left")  # noqa: B023

    def _others(self) -> int:
        return len(self.api_driver.get("/api/v1/services")["items"])


@pytest.fixture(scope="module", params=["ours", "real"])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnyApiServer]:
    """An API server of this module's own: it is killed and emptied."""
    require_root()
    with running(request.param, tmp_path_factory.mktemp("apiserver")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(api: AnyApiServer) -> Iterator[Cluster]:
    made = Cluster(api)
    yield made
    made.close()


def map_writes(agent: Agent) -> tuple[float, float]:
    """What an agent has written: slots of segments, and frontends."""
    segments, frontends = (agent.metric("ebproxy_map_writes_total", map=name) for name in ("segments", "frontends"))
    return segments, frontends


def first_answers(clients: Sequence[Client], ip: str) -> list[float]:
    """When each client first reached anybody (monotonic seconds)."""
    return [client.first_reply(ip, 80, [f"web-{n}" for n in range(1, NODE_COUNT + 1)]) for client in clients]


def test_a_created_service_answers_everywhere_within_a_second(cluster):
    took = []
    for number in range(5):
        started = time.monotonic()
        ips = cluster.create(f"fresh-{number}", cluster.web)
        took.append(max(first_answers(cluster.clients, ips[number % 2])) - started)

    assert max(took) < 1, took


def test_pods_of_every_node_are_reached_from_every_node(cluster):
    ips = cluster.create("everywhere", cluster.web)
    cluster.wait_for("everywhere", NODE_COUNT)

    for client in cluster.clients:
        for mode in MODES:
            for ip in ips:
                assert {"web-1", "web-2", "web-3"} == set(client.spread(mode, ip, 80, 60)), (mode, ip)


def test_changed_endpoints_are_followed_everywhere(cluster):
    ips = cluster.create("moving", cluster.web[:1])
    cluster.wait_for("moving", 1)
    for pods in (cluster.web[1:2], cluster.web[:2], cluster.web[2:]):
        names = {pod.name for pod in pods}

        cluster.set_endpoints("moving", pods)

        for client in cluster.clients:
            until(lambda: names == set(client.spread("tcp", ips[0], 80, 20)), f"{names} answer")  # noqa: B023


def test_a_deleted_service_is_gone_everywhere(cluster):
    cluster.create("short-lived", cluster.web)
    cluster.wait_for("short-lived", NODE_COUNT)

    cluster.api_driver.delete(SERVICES.format(NAMESPACE), "short-lived")

    cluster.wait_for("short-lived", None)


def test_local_policy_means_the_pod_of_each_node(cluster):
    ips = cluster.ips("local")
    cluster.api_driver.create(SERVICES.format(NAMESPACE), service("local", ips, internalTrafficPolicy="Local"))
    for family in (4, 6):
        cluster.api_driver.create(SLICES.format(NAMESPACE), cluster.slice("local", cluster.web, family))
    cluster.wait_for("local", 1)

    for number, client in enumerate(cluster.clients, start=1):
        for ip in ips:
            assert {f"web-{number}": 20} == client.spread("tcp", ip, 80, 20)


def test_an_api_server_restarted_with_other_objects(cluster):
    """Forwarding never stops; the difference is applied; nothing else is written again."""
    existing = ("stays", "changes", "goes")
    cluster.clear()
    ips = {name: cluster.create(name, cluster.web[:1]) for name in existing}
    for name in existing:
        cluster.wait_for(name, 1)
    targets = [(mode, ip, 80) for name in ("stays", "changes") for ip in ips[name] for mode in MODES]
    with ExitStack() as stack:
        places = [node.pods["shopper"].place for node in cluster.lab.nodes]
        churns = [stack.enter_context(churning(place, targets, rate=100)) for place in places]
        writes = [map_writes(agent) for agent in cluster.agents]

        for relay in cluster.relays:
            relay.cut()
        cluster.api.restart_empty()
        cluster.populate({"stays": cluster.web[:1], "changes": cluster.web[1:2], "comes": cluster.web[2:]})
        assert writes == [map_writes(agent) for agent in cluster.agents]
        for relay in cluster.relays:
            relay.open()

        cluster.wait_for("comes", 1, OUTAGE_LIMIT_S)
        cluster.wait_for("goes", None, OUTAGE_LIMIT_S)
        for client in cluster.clients:
            until(lambda: client.ask("tcp", ips["changes"][0], 80).name == "web-2", "the change is there")  # noqa: B023
        for agent in cluster.agents:
            agent.wait()
        tallies = [churn.stop() for churn in churns]

    assert [tally.errors for tally in tallies] == [{}] * NODE_COUNT
    assert all(tally.held > 0 for tally in tallies)
    for agent, (segments, frontends) in zip(cluster.agents, writes, strict=True):
        now_segments, now_frontends = map_writes(agent)
        # For each family and protocol: a slot of `changes`, header and backend of `comes`; the header of `goes`, if its
        # slices are found gone before itself.
        assert now_segments - segments in (4 * (1 + 2), 4 * (1 + 2 + 1))
        # For each family the ClusterIP of `goes` and of `comes`, and for each protocol too their frontends; that of
        # `comes` is written twice if its slices are listed after itself.
        assert now_frontends - frontends in (2 * 2 + 4 * 2, 2 * 2 + 4 * 3)


def test_an_agent_restarted_while_the_api_server_is_away(cluster):
    """It keeps what it finds until it can ask again, and then finds nothing to write."""
    ips = cluster.create("lasting", cluster.web)
    cluster.wait_for("lasting", NODE_COUNT)
    agent, client, relay = cluster.agents[0], cluster.clients[0], cluster.relays[0]
    relay.cut()
    agent.kill()

    agent.start()
    until(lambda: agent.has_ended() or _unlisted(agent), "it runs, and has nothing listed")
    assert not agent.has_ended()
    assert {"web-1", "web-2", "web-3"} == set(client.spread("tcp", ips[0], 80, 60))
    assert agent.map_writes() == 0

    relay.open()
    agent.wait(OUTAGE_LIMIT_S)
    assert agent.map_writes() == 0
    assert {"web-1", "web-2", "web-3"} == set(client.spread("tcp", ips[1], 80, 60))


def _unlisted(agent: Agent) -> bool:
    try:
        return bool(agent.status()["not_listed"])
    except Exception:  # noqa: BLE001 - it does not answer yet
        return False
