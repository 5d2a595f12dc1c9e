"""A node under policy: who may talk to its server, asked with real connections in both families."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import product
from typing import Any

from tests.lab import manifests
from tests.lab.lab import Pod
from tests.lab.manifests import Object
from tests.lab.polling import until
from tests.lab.scene import Scene
from tests.lab.traffic import Client

CLIENTS = ("shopper", "guest", "host")
MODES = ("tcp", "udp", "sctp")
PORTS = (8080, 8081)
NAMED = (("web", 8080, "TCP"), ("web", 8081, "UDP"))
"""One name, another port in each protocol."""
_SILENCE_S = 0.2

Question = tuple[str, str, int]
"""Who asks, by what protocol, at which port."""


class PolicyScene:
    """A scene whose pods are known: ``web`` (web-1) and ``shopper`` in namespace shop, ``guest`` in namespace inn."""

    def __init__(self, scene: Scene, guest: Pod) -> None:
        self.scene = scene
        self.agent = scene.agent
        self.web = scene.web[0]
        self.shopper = scene.shopper
        self.guest = guest
        places = {"shopper": scene.shopper.place, "guest": guest.place, "host": scene.node.host}
        self._askers = {(name, mode): Client(place) for name, place in places.items() for mode in MODES}
        self.clients = {name: self._askers[name, "tcp"] for name in places}

    def set(self, *policies: Object) -> None:
        """Have these policies and no others."""
        if policies:
            self.scene.manifests.write("policies", *policies)
            return
        with suppress(FileNotFoundError):
            self.scene.manifests.remove("policies")

    def answered(self, questions: Iterable[Question], addresses: tuple[str, ...] = ()) -> set[Question]:
        """Ask the server; returns what was answered in both families. Raises: AssertionError where they differ."""
        asked = list(questions)
        with ThreadPoolExecutor(len(self._askers)) as pool:
            shares = [[it for it in asked if it[:2] == asker] for asker in self._askers]
            found = [it for share in pool.map(lambda share: self._ask(share, addresses), shares) for it in share]
        one, other = ({it for it in asked if (it, family) in found} for family in (0, 1))
        assert one == other, ("families differ", one ^ other)
        return one

    def _ask(self, questions: list[Question], addresses: tuple[str, ...]) -> list[tuple[Question, int]]:
        return [
            (asked, family)
            for asked in questions
            for family, address in enumerate(addresses or self.web.addresses)
            if self._askers[asked[:2]].ask(asked[1], address, asked[2], _SILENCE_S).name == self.web.name
        ]

    def wait_for(self, expected: set[Question], asked: Iterable[Question], limit_s: float = 5) -> None:
        """Wait until just this is answered. Raises: TimeoutError."""
        asked = list(asked)
        wrong: object = None

        def is_so() -> bool:
            nonlocal wrong
            try:
                wrong = self.answered(asked) ^ expected
            except AssertionError as error:
                wrong = error
            return not wrong

        try:
            until(is_so, "just the expected is answered", limit_s)
        except TimeoutError as error:
            raise TimeoutError(f"answered and not expected, or the other way round: {wrong}") from error


def questions(
    clients: Iterable[str] = CLIENTS, modes: Iterable[str] = MODES, ports: Iterable[int] = PORTS
) -> set[Question]:
    """Every question there is of these."""
    return set(product(clients, modes, ports))


@contextmanager
def policy_scene(**config: Any) -> Iterator[PolicyScene]:
    """Make a node with policy, and pods that are known to it."""
    scene = Scene(web=1, **{"networkPolicy": "standard"} | config)
    try:
        guest = scene.node.add_pod("guest")
    except BaseException:
        scene.close()
        raise
    write_pods(scene, guest)
    with scene:
        yield PolicyScene(scene, guest)


def write_pods(scene: Scene, guest: Pod | None = None) -> None:
    """Describe the pods and namespaces, but for a guest that is not given."""
    node = scene.node.name
    guests = [manifests.pod("guest", node, guest.addresses, "guest", namespace="inn")] if guest else []
    scene.manifests.write(
        "pods",
        manifests.namespace("shop", kind="shop"),
        manifests.namespace("inn", kind="inn"),
        manifests.pod("web-1", node, scene.web[0].addresses, "web", ports=NAMED),
        manifests.pod("shopper", node, scene.shopper.addresses, "shopper"),
        *guests,
    )
