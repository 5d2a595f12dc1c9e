"""The agent's very first start: what pods have open already survives it, whichever end speaks next."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.lab import netns
from tests.lab.manifests import network_policy
from tests.lab.polling import until
from tests.lab.scene import Scene
from tests.netns.policies import write_pods
from tests.requirements import require_root

PORT = 8099


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A node whose server is isolated both ways, and may be asked by one pod alone; no agent has run there yet."""
    require_root()
    made = Scene(web=1, networkPolicy="standard")
    with made.closed_on_failure():
        write_pods(made, made.node.add_pod("guest"))
        shopper = {"podSelector": {"matchLabels": {"app": "shopper"}}}
        policy = network_policy("web", "web", ingress=[{"from": [shopper]}], policyTypes=["Ingress", "Egress"])
        made.manifests.write("policies", policy)
    with ExitStack() as ends:
        ends.callback(made.close)
        yield made


def connected(scene: Scene, family: int, ends: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Connect the pod that may to the server; returns the client's socket and the server's."""
    kind = (socket.AF_INET, socket.AF_INET6)[family]
    with netns.entered(scene.web[0].netns):
        listening = ends.enter_context(socket.socket(kind, socket.SOCK_STREAM))
    with netns.entered(scene.shopper.netns):
        client = ends.enter_context(socket.socket(kind, socket.SOCK_STREAM))
    listening.bind((scene.web[0].addresses[family], PORT))
    listening.listen()
    client.settimeout(5)
    client.connect((scene.web[0].addresses[family], PORT))
    server = ends.enter_context(listening.accept()[0])
    server.settimeout(5)
    return client, server


@pytest.mark.parametrize("first", ["client", "server"])
def test_what_was_open_goes_on(scene, first):
    with ExitStack() as ends:
        pairs = [connected(scene, family, ends) for family in (0, 1)]
        scene.agent.start().wait()
        host = scene.host
        guest = scene.node.pods["guest"].client()
        host.first_reply(scene.web[0].v4, 8080, ["web-1"], 5)
        until(lambda: guest.is_unanswered("tcp", scene.web[0].v4, 8080), "policy is in force")

        for pair in pairs:
            speaking, listening = pair if first == "client" else pair[::-1]
            for turn in (b"one", b"two"):
                speaking.sendall(turn)
                assert listening.recv(99) == turn
                listening.sendall(turn * 2)
                assert speaking.recv(99) == turn * 2
