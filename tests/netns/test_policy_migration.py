"""An agent whose maps have another layout comes after one that enforced policy: what it denied and allowed stays so."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Self

import pytest

from agent.core.abi import SUBJECT, U32
from agent.core.addresses import parse_address
from tests.lab import netns
from tests.lab.lab import Pod
from tests.lab.manifests import Object, network_policy
from tests.lab.polling import until
from tests.lab.scene import SIZES
from tests.netns.policies import PolicyScene, policy_scene
from tests.netns.test_policy_placing import wait_until_placed
from tests.requirements import require_root

PORT = 7001
_PAUSE_S = 0.001
ROOM = {"identities": 50, "policy": 60}
FROM_SHOPPER = network_policy("web", "web", ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "shopper"}}}]}])
SHOPPER = ("shopper", "udp", 8080)
GUEST = ("guest", "udp", 8080)


class Flood:
    """Datagrams from one pod to another, a thousand a second for as long as it lasts; counts those that arrive."""

    def __init__(self, sender: Pod, receiver: Pod, port: int = 0) -> None:
        """``port``: the sender's; 0 = any."""
        with netns.entered(receiver.netns):
            self._receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._receiver.bind((receiver.v4, PORT))
        with netns.entered(sender.netns):
            self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._sender.bind((sender.v4, port))
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


@contextlib.contextmanager
def enforced(policy: Object, **config: str) -> Iterator[PolicyScene]:
    """A node on which a policy is in force, and known where each pod is."""
    require_root()
    with policy_scene(mapSizes=SIZES | ROOM, **config) as shop:
        shop.set(policy)
        wait_until_placed(shop, shop.web, shop.shopper, shop.guest, limit_s=5)
        shop.wait_for({SHOPPER}, [SHOPPER, GUEST])
        yield shop


def grow_old(shop: PolicyScene, pods_elsewhere: int = 0) -> None:
    """Have the maps as they are long after an agent's first start, with pods of other nodes that end meanwhile."""
    with shop.agent.maps() as store:
        subjects, identities = store.maps["subjects"], store.maps["identities"]
        for address, value in [*subjects.items()]:
            identity, flags, _, device = SUBJECT.packer.unpack(value)
            subjects.update(address, SUBJECT.packer.pack(identity, flags, 0, device))
        for number in range(pods_elsewhere):
            identities.update(parse_address(f"10.99.0.{number}"), U32.packer.pack(900 + number))


def take_over(shop: PolicyScene, sizes: dict[str, int]) -> None:
    """Start an agent with maps of other sizes, and wait until nothing of the former's is left."""
    (former,) = layouts(shop)
    shop.agent.config["mapSizes"] = SIZES | ROOM | sizes
    shop.agent.start()
    until(lambda: layouts(shop) and former not in layouts(shop), "the former layout is gone", 60)
    shop.agent.wait()


@pytest.mark.parametrize("sizes", [{"identities": 100}, {"connections": 5000}], ids=lambda it: next(iter(it)))
def test_a_stream_on_which_only_the_server_speaks_goes_on_while_another_layout_takes_over(sizes):
    """Its egress is denied but for what was asked: who began is to be known still."""
    both = FROM_SHOPPER["spec"] | {"policyTypes": ["Ingress", "Egress"]}
    with enforced(FROM_SHOPPER | {"spec": both}) as shop, contextlib.ExitStack() as ends:
        with netns.entered(shop.web.netns):
            listener = ends.enter_context(socket.create_server((shop.web.v4, PORT)))
        with netns.entered(shop.shopper.netns):
            client = ends.enter_context(socket.create_connection((shop.web.v4, PORT), timeout=10))
        server = ends.enter_context(listener.accept()[0])
        server.send(b"before")
        assert client.recv(16) == b"before"

        shop.agent.kill()
        grow_old(shop)
        take_over(shop, sizes)

        server.send(b"after")
        assert client.recv(16) == b"after"


@pytest.mark.parametrize("pods_elsewhere", [pytest.param(0, id="adopted"), pytest.param(30, id="does not fit")])
def test_nobody_guesses_who_began_because_another_layout_has_taken_over(pods_elsewhere):
    """A client with a server's port, which was taken for an answer at an agent's very first start."""
    with enforced(FROM_SHOPPER) as shop:
        shop.agent.kill()
        grow_old(shop, pods_elsewhere)
        take_over(shop, {"identities": 20})

        with Flood(shop.shopper, shop.web) as allowed:
            until(lambda: allowed.received, "what is allowed arrives", 5)
        with Flood(shop.guest, shop.web, port=54) as denied:
            until(lambda: denied.sent > 100, "enough was sent", 5)
        assert denied.received == 0


def test_no_pod_is_held_while_another_layout_takes_over():
    """``strict``: where pods are was known, and the node hears nothing of them until they are asked."""
    with enforced(FROM_SHOPPER, networkPolicy="strict") as shop:
        before = shop.agent.metric("ebproxy_policy_dropped_packets_total", reason="held")
        with Flood(shop.shopper, shop.web) as flood:
            shop.agent.kill()
            netns.ip("-n", shop.scene.node.netns, "neigh", "flush", "all")
            take_over(shop, {"identities": 100})
            sent = flood.sent
            until(lambda: flood.sent > sent + 100, "more was sent", 5)

        assert flood.received > 0
        assert shop.agent.metric("ebproxy_policy_dropped_packets_total", reason="held") == before
