"""An agent whose maps have another layout comes after one that enforced policy: what was denied stays denied."""

from __future__ import annotations

import socket
import threading
from typing import Self

import pytest

from tests.lab import netns
from tests.lab.lab import Pod
from tests.lab.manifests import network_policy
from tests.lab.polling import until
from tests.lab.scene import SIZES
from tests.netns.policies import PolicyScene, policy_scene
from tests.requirements import require_root

PORT = 7001
_PAUSE_S = 0.001
ROOM = {"identities": 50, "policy": 60}
FROM_SHOPPER = network_policy("web", "web", ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "shopper"}}}]}])
SHOPPER = ("shopper", "udp", 8080)
GUEST = ("guest", "udp", 8080)


class Flood:
    """Datagrams from one pod to another, a thousand a second for as long as it lasts; counts those that arrive."""

    def __init__(self, sender: Pod, receiver: Pod) -> None:
        with netns.entered(receiver.netns):
            self._receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._receiver.bind((receiver.v4, PORT))
        with netns.entered(sender.netns):
            self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._sender.connect((receiver.v4, PORT))
        self.sent = self.received = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._sender.close()
        self._receiver.close()

    def _run(self) -> None:
        while not self._over.wait(_PAUSE_S):
            self._sender.send(b"denied")
            self.sent += 1
            try:
                while self._receiver.recv(16):
                    self.received += 1
            except BlockingIOError:
                pass


def layouts(shop: PolicyScene) -> set[str]:
    """List the layouts whose maps there are."""
    return {path.name for path in (shop.agent.bpffs / "ebproxy").iterdir()} - {"links"}


@pytest.mark.parametrize(
    "sizes",
    [pytest.param({"identities": 100}, id="adopted"), pytest.param({"identities": 5}, id="does not fit")],
)
def test_what_is_denied_stays_denied_while_another_layout_takes_over(sizes):
    require_root()
    with policy_scene(mapSizes=SIZES | ROOM) as shop:
        shop.set(FROM_SHOPPER)
        shop.wait_for({SHOPPER}, [SHOPPER, GUEST])
        former = shop.agent.status()["layout"]
        with Flood(shop.guest, shop.web) as flood:
            shop.agent.kill()
            shop.agent.config["mapSizes"] = SIZES | ROOM | sizes
            shop.agent.start()
            until(lambda: layouts(shop) and former not in layouts(shop), "the former layout is gone", 60)

    assert flood.sent > 0
    assert flood.received == 0
