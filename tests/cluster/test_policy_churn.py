"""Policy while pods come and go: 110 pods on the node, 1,000 identities, 250 policies, 50 pods replaced a second.

Two witnesses for as long as it lasts. Real pods connect as fast as they can: whom policy allows always gets through,
and no connection of theirs breaks; whom it denies never does. And the programs themselves are asked about all the
others, whose addresses change hands: each verdict is that of the pod that has the address, before or after the change
in hand; never one that was right for a pod whose successor's policy is in force.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from agent.core.abi import Direction
from agent.kernel.dataplane import active_layout
from tests import policy_builders as records
from tests.cluster.api_driver import NAMESPACES, NODES, PODS, POLICIES
from tests.cluster.api_servers import OurApiServer, driver
from tests.cluster.nodes import POD_RANGES, watching_agent
from tests.cluster.policy_churn import REAL, Churn, Population, Witnesses, namespaces, policies
from tests.cluster.policy_objects import as_written
from tests.cluster.policy_samples import Judge, Sample, Sampler
from tests.cluster.policy_tables import Prober
from tests.lab import netns
from tests.lab.lab import Lab, Pod
from tests.lab.manifests import namespace, pod
from tests.lab.polling import until
from tests.lab.processes import Place
from tests.lab.stage import Stage
from tests.lab.traffic import churning
from tests.policy_builders import PolicyNode
from tests.requirements import require_root

pytestmark = pytest.mark.timeout(180)

RATE, SECONDS = 50, 15
LOCAL, COUNT, POLICY_COUNT = 110, 2_000, 250
IDENTITIES = 1_000
PORT = 8080
REAL_PODS = ("server", "friend", "stranger", "mute")
SIZES = {"frontends": 4096, "segments": 8192, "socketOrigins": 16_384, "peerOrigins": 16_384, "connections": 262_144}
SILENCE_S = 0.2
AT_ONCE = 20
"""How often each pod asks each target at once where it is to hear nothing."""
FASTEST = 5_000
"""Connections a second, more than can be made."""
ROUND, PAUSE_S, AFTERWARDS = 16, 0.005, 10_000
"""How many questions are asked at once, and after how long again; how many when all is over."""
THOUSANDS = 3_000
LAG_LIMIT_S = 20.0
"""Far more than a change takes; the agent would be standing still."""


class ChurningNode(Stage):
    """A node with a few real pods and many that only its maps know of."""

    def __init__(self, api: OurApiServer) -> None:
        self._stack = ExitStack()
        with self.closed_on_failure():
            self.node = self._stack.enter_context(Lab(1)).nodes[0]
            self.pods = {name: self._add_pod(name) for name in REAL_PODS}
            self.policies = policies(random.Random(1), POLICY_COUNT)
            self._api = driver(api)
            self._write_objects()
            store = api.server.store
            local = LOCAL - len(REAL_PODS)
            self.population = Population(store, random.Random(2), self.node.name, local, COUNT - len(REAL_PODS))
            self.witnesses = Witnesses(store, self.population)
            given = {"clusterCIDR": POD_RANGES, "mapSizes": SIZES, "networkPolicy": "standard"}
            self.agent = watching_agent(self._stack, self.node, api, **given)
            self.agents = [self.agent]

    def close(self) -> None:
        self._stack.close()

    @property
    def server(self) -> Pod:
        """Whom the real pods ask."""
        return self.pods["server"]

    def _add_pod(self, name: str) -> Pod:
        return self.node.add_pod(name, *([PORT] if name == "server" else []))

    def _write_objects(self) -> None:
        self._api.create(NODES, self.node.manifest())
        for record in namespaces():
            self._api.create(NAMESPACES, namespace(record.key.name, **dict(record.labels)))
        for policy in self.policies:
            self._api.create(POLICIES.format(policy.key.namespace), as_written(policy))
        for name, made in self.pods.items():
            described = pod(name, self.node.name, made.addresses, name, namespace=REAL)
            self._api.create(PODS.format(REAL), described)
            self._api.set_status(PODS.format(REAL), name, described["status"])


class Denied(threading.Thread):
    """Asks a server from somewhere it may not be asked from; ``heard``: what was heard all the same."""

    def __init__(self, place: Place, addresses: tuple[str, ...]) -> None:
        super().__init__(name="denied", daemon=True)
        self.asked = 0
        self.heard: Counter[str] = Counter()
        self._prober = Prober(place)
        self._targets = [(protocol, it, PORT) for protocol in ("tcp", "udp", "sctp") for it in addresses] * AT_ONCE
        self._is_over = threading.Event()

    def run(self) -> None:
        """Ask until told otherwise."""
        while not self._is_over.is_set():
            self.ask()

    def ask(self) -> None:
        """Ask every target once more."""
        self._prober.send(self._targets, SILENCE_S)
        heard = self._prober.hear()
        self.asked += len(heard)
        self.heard.update(said for said in heard if said)

    def end(self) -> None:
        """Stop, and end the prober."""
        self._is_over.set()
        if self.is_alive():
            self.join()
        self._prober.close()


@pytest.fixture
def churned() -> Iterator[ChurningNode]:
    require_root()
    api = OurApiServer()
    api.start()
    try:
        with ChurningNode(api) as made:
            yield made
    finally:
        api.stop()


@pytest.fixture
def sampler(churned: ChurningNode) -> Iterator[Sampler]:
    with churned.agent.maps() as store, netns.entered(churned.node.netns):
        layout = active_layout(churned.agent.bpffs)
        assert layout
        (pins,) = layout.glob("programs_*")
        made = Sampler(store, pins, churned.population, churned.witnesses)
        try:
            yield made
        finally:
            made.close()


def test_no_verdict_is_wrong_while_pods_are_replaced(churned: ChurningNode, sampler: Sampler) -> None:
    population, witnesses, server = churned.population, churned.witnesses, churned.server
    churn = Churn(population, witnesses, RATE, SECONDS)
    with ExitStack() as stack:
        targets = [(mode, address, PORT) for mode in ("tcp", "udp") for address in server.addresses]
        allowed = stack.enter_context(churning(churned.pods["friend"].place, targets, rate=FASTEST))
        denied = [Denied(churned.pods[name].place, server.addresses) for name in ("stranger", "mute")]
        for it in denied:
            stack.callback(it.end)
            it.start()
        stack.callback(churn.end)
        churn.start()
        while churn.is_alive() or witnesses.is_waiting:
            sampler.take(ROUND)
            assert witnesses.lag_s < LAG_LIMIT_S, "the agent no longer follows"
            churn.join(PAUSE_S)
        during = len(sampler.samples)
        sampler.take(AFTERWARDS)
        tally = allowed.stop()

    assert (churn.error, population.replaced) == (None, RATE * SECONDS)
    judge = Judge([*churned.policies, *namespaces()])
    assert [*judge.wrong(sampler.samples)] == []
    assert tally.errors == {}
    assert tally.made > THOUSANDS
    assert tally.held > 100
    assert [it.heard for it in denied] == [Counter(), Counter()]
    assert sum(it.asked for it in denied) > THOUSANDS
    assert_much_was_asked(sampler.samples[:during], judge)
    assert_nothing_is_left_over(churned)


def assert_much_was_asked(samples: list[Sample], judge: Judge) -> None:
    """See that there was something to be wrong about: changed answers, in both directions."""
    assert len(samples) > THOUSANDS
    for direction in Direction:
        said = Counter(it.is_allowed for it in samples if it.question.direction is direction)
        assert min(said[True], said[False]) > len(samples) / 50, (direction, said)
    assert sum(len(judge.verdicts(it)) == 1 for it in samples) > len(samples) / 2, "most are decided"
    before = [it._replace(first=0, last=0) for it in samples]
    changed = sum(judge.verdicts(was) != judge.verdicts(it) for was, it in zip(before, samples, strict=True))
    assert changed > len(samples) / 50, "addresses changed hands, and verdicts with them"


def assert_nothing_is_left_over(churned: ChurningNode) -> None:
    """The maps are as full as those of an agent that only knows what there is now."""
    until(churned.agent.is_settled, "everything is in force")
    said = churned.agent.status()["policy"]
    real = [records.pod(f"{REAL}/{name}", *it.addresses, local=True, app=name) for name, it in churned.pods.items()]
    witnesses = churned.witnesses.records()
    pods = [it.owner for it in churned.population.slots if it.owner]
    fresh = PolicyNode(*namespaces(), *churned.policies, *pods, *real, *witnesses).planner

    assert {name: it["entries"] for name, it in said["maps"].items()} == fresh.entry_counts
    assert said["identities"] == fresh.identity_count
    assert said["identities"] >= IDENTITIES
    assert said["degraded"] == []
    assert said["subjects"] >= 2 * (LOCAL - 20)
    assert said["policies"] == POLICY_COUNT
