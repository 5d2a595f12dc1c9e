"""Which requests to the API server wait for their turn."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from agent.sources.kube_client import KubeClient, KubeTarget
from agent.sources.kube_limits import RequestLimit
from tests.cluster.api_driver import SERVICES, service
from tests.cluster.api_servers import OurApiServer, driver, write_kubeconfig

WEB = SERVICES.format("web")
EVENTS = "/api/v1/namespaces/web/events"


class Turns(RequestLimit):
    """Counts who waits, and lets them go on."""

    waited = 0

    def wait(self, closing: threading.Event) -> None:
        assert not closing.is_set()
        self.waited += 1


@pytest.fixture
def ours() -> Iterator[OurApiServer]:
    server = OurApiServer()
    server.start()
    yield server
    server.stop()


def test_lists_and_events_wait_and_further_pages_do_not(ours: OurApiServer, tmp_path) -> None:
    api = driver(ours, "web")
    for number in range(3):
        api.create(WEB, service(f"web-{number}", clusterIP=f"10.96.1.{number}"))
    turns = Turns(1, 1)
    client = KubeClient(KubeTarget(write_kubeconfig(tmp_path / "kubeconfig", ours)), limit=turns)

    first = api_page(client, ())
    rest = api_page(client, (("continue", first["metadata"]["continue"]),))
    assert (len(first["items"]), len(rest["items"]), turns.waited) == (2, 1, 1)

    event = {"metadata": {"generateName": "web."}, "involvedObject": {}, "reason": "r", "message": "m"}
    client.post(EVENTS, {"apiVersion": "v1", "kind": "Event", **event})
    assert turns.waited == 2
    client.close()


def api_page(client: KubeClient, query: tuple[tuple[str, str], ...]) -> dict:
    page: dict = json.loads(client.read(WEB, (("limit", "2"), *query), 5))
    return page
