"""Policy's turns: what is listed comes into force, beside Services, and whatever fails is made good."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterable
from types import SimpleNamespace

import msgspec
import pytest

from agent.core.abi import POLICY_STATE, SUBJECT, SubjectFlag
from agent.core.events import Delete, Event, ListEnded, ListStarted, Malformed, Upsert
from agent.core.network import Network
from agent.core.policy_model import PolicyModel
from agent.core.policy_plan import PolicySizes
from agent.core.policy_records import Action, PolicyRecord, Rule, TierRule, not_understood
from agent.core.records import POLICY_KINDS, Kind
from agent.errors import DataplaneError
from agent.kernel.policy_maps import PolicyMaps, PolicySwitches
from agent.observe.former_policies import FILE as POLICIES
from agent.observe.former_policies import PolicyFile, read_policies
from agent.observe.metrics import Metrics
from agent.observe.numbers import FILE, NumberFile, read_numbers
from agent.observe.policy_metrics import PolicyMetrics
from agent.observe.policy_views import PolicyViews
from agent.policy_sync import PolicyOptions, PolicySync
from agent.status import _policy
from tests.builders import key, service
from tests.policy_builders import cidr, cluster_policy, network_policy, pod, pods, rule, selector
from tests.policy_store import ONLY, FakeStore
from tests.property.simulation import CLOCK, METRICS, SimulatedAgent

WEB = pod("web", "10.0.0.1", "fd00::1", app="web")
SHOP = pod("shop", "10.0.0.2", app="shop")
DENY = network_policy("deny", selector(app="web"), ingress=[])
ALLOW = network_policy("deny", selector(app="web"), ingress=[rule(pods(app="shop"))])


class Devices:
    """Stands for PodDevices: which pods it was told of."""

    due_at = math.inf
    missing = 0

    def __init__(self) -> None:
        self.told: list[list[list[bytes]]] = []
        self.places: dict[bytes, int] = {}
        self.without_room: Container[bytes] = ()
        self.fails = ""

    def turn(
        self, _now: float, _network: Network, found: list[list[bytes]], without_room: Container[bytes], *, is_new: bool
    ) -> None:
        assert is_new
        self.told.append(sorted(map(sorted, found)))
        self.without_room = without_room
        if self.fails:
            raise DataplaneError(self.fails)

    def forget(self) -> None:
        pass


class Node:
    """Maps and a state directory, which outlive agents; nothing happens by itself."""

    def __init__(self, state_dir, clock, sizes: PolicySizes | None = None, *, fails_open: bool = False) -> None:
        self.state_dir = state_dir
        self.clock = clock
        self.sizes = sizes or PolicySizes()
        self.fails_open = fails_open
        self.store = FakeStore()
        self.degraded: list[tuple[str, str]] = []
        self.start()

    def start(self) -> None:
        """Start an agent over the maps as they are; it knows no objects yet."""
        self.store.fail_after = None
        self.store.writes.clear()
        self.metrics = Metrics()
        maps = PolicyMaps(self.store)  # type: ignore[arg-type]
        maps.open(PolicySwitches())
        self.devices = Devices()
        self.sync = PolicySync(
            PolicyModel("n1", read_policies(self.state_dir)),
            maps,
            NumberFile(self.state_dir),
            self.devices,  # type: ignore[arg-type]
            SimpleNamespace(due_at=math.inf, deleted=0),  # type: ignore[arg-type]
            self.metrics,
            PolicyOptions(self.sizes, fails_open=self.fails_open, drift_period_s=300),
            on_degraded=lambda pod_key, reason: self.degraded.append((str(pod_key), reason)),
            keep_policies=PolicyFile(self.state_dir).write,
        )
        self.sync.on_enforced = PolicyMetrics(self.metrics, self.sync.facts).enforced

    def list(self, *records: PolicyRecord | Malformed, but: Iterable[Kind] = ()) -> None:
        """Deliver the first lists."""
        kinds = POLICY_KINDS - set(but)
        for kind in kinds:
            self.take(ListStarted(kind))
        for record in records:
            self.take(record if isinstance(record, Malformed) else Upsert(record))
        for kind in kinds:
            self.take(ListEnded(kind))
        self.sync.turn()

    def take(self, *events: Event) -> None:
        """Take in what was received a moment ago."""
        for event in events:
            self.sync.take(event, self.clock.now - 0.25)

    def change(self, *records: PolicyRecord) -> None:
        """Take in changes and do a turn."""
        self.take(*map(Upsert, records))
        self.sync.turn()

    def read(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    @property
    def is_as_planned(self) -> bool:
        return self.sync.planner.differences(self.sync.maps.read()) == 0


@pytest.fixture
def clock(monkeypatch):
    made = SimpleNamespace(now=1000.0)
    made.monotonic = lambda: made.now
    monkeypatch.setattr("agent.policy_sync.time", made)
    return made


@pytest.fixture
def node(tmp_path, clock) -> Node:
    return Node(tmp_path, clock)


@pytest.mark.parametrize("missing", sorted(POLICY_KINDS))
def test_nothing_is_in_force_before_every_list_is_there(node, missing):
    node.list(WEB, SHOP, DENY, but=[missing])

    assert not node.sync.is_settled
    assert not node.sync.is_behind
    assert node.sync.maps.read().subjects == {}
    node.take(ListStarted(missing), ListEnded(missing))
    node.sync.turn()
    assert node.sync.is_settled


def since(node: Node) -> set[int]:
    return {SUBJECT.packer.unpack(value)[2] for value in node.sync.maps.read().subjects.values()}


@pytest.mark.parametrize("is_known", [True, False])
def test_how_long_pods_may_have_older_connections_counts_from_when_the_programs_are_turned_on(node, is_known):
    node.list(WEB, SHOP, DENY)
    started = int(node.clock.now)
    assert since(node) == {started}
    node.clock.now += 660
    node.sync.maps.knows_connections = is_known
    node.sync.begin()

    assert since(node) == {started + (0 if is_known else 660)}
    assert not node.sync.planner.differences(node.sync.maps.read())
    node.take(Upsert(pod("late", "10.0.0.77")))
    node.sync.turn()
    assert since(node) == {0, started + (0 if is_known else 660)}, "who comes later has none that is older"


def test_what_was_adopted_has_older_connections_too_where_those_are_not_known(node):
    """As subjects are long after a first start."""
    node.list(WEB, SHOP, DENY)
    for address, value in node.sync.maps.read().subjects.items():
        identity, flags, _, device = SUBJECT.packer.unpack(value)
        node.store.maps["subjects"].update(address, SUBJECT.packer.pack(identity, flags, 0, device))
    node.start()
    node.list(WEB, SHOP, DENY)
    assert since(node) == {0}
    node.sync.begin()

    assert since(node) == {int(node.clock.now)}


@pytest.mark.parametrize("overdue", ["drift", "devices"])
def test_before_every_list_is_there_nothing_is_due_but_connections(node, overdue):
    """A turn does nothing then: what is over was due for ever, and the reconciler span."""
    node.list(WEB, SHOP, DENY, but=[Kind.NETWORK_POLICY])
    node.clock.now += 301 if overdue == "drift" else 0
    node.devices.due_at = node.clock.now - 1 if overdue == "devices" else math.inf
    assert node.sync.due_at == math.inf
    node.sync.connections.due_at = node.clock.now + 7
    assert node.sync.due_at == node.clock.now + 7

    node.take(ListStarted(Kind.NETWORK_POLICY), Upsert(DENY), ListEnded(Kind.NETWORK_POLICY))
    assert node.sync.due_at == 0
    node.sync.turn()
    assert node.sync.is_settled


def test_what_is_listed_comes_into_force_and_pods_are_looked_for(node):
    node.sync.follow(Network())
    node.list(WEB, SHOP, DENY)

    assert node.sync.maps.read().subjects.keys() == {*WEB.addresses, *SHOP.addresses}
    assert node.is_as_planned
    assert node.devices.told == [sorted([sorted(WEB.addresses), sorted(SHOP.addresses)])]
    assert node.sync.due_at > node.clock.now


def test_subjects_say_behind_which_device_they_are_and_no_verdict_is_taken_anew(node):
    node.sync.follow(Network())
    node.list(WEB, SHOP, DENY)
    revision = node.sync.maps.revision
    node.devices.places = {WEB.addresses[0]: 11}
    node.sync.follow(Network())
    node.sync.turn()

    subjects = {address: SUBJECT.packer.unpack(it) for address, it in node.sync.maps.read().subjects.items()}
    assert {address: device for address, (*_, device) in subjects.items() if device} == {WEB.addresses[0]: 11}
    assert node.sync.maps.revision == revision
    assert node.is_as_planned


def test_the_next_agent_writes_nothing_and_keeps_the_numbers(node):
    node.list(WEB, SHOP, ALLOW)
    before = node.sync.maps.read()
    node.start()
    node.list(WEB, SHOP, ALLOW)

    assert before == node.sync.maps.read()
    assert not node.store.writes


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_without_the_numbers_none_of_those_in_use_is_given_out_again(node, damage):
    node.list(WEB, SHOP, ALLOW)
    used = {*node.sync.maps.read().identities.values()}
    path = node.state_dir / FILE
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:40])
    node.start()
    node.list(WEB, SHOP, ALLOW)

    assert node.is_as_planned
    assert used.isdisjoint(node.sync.maps.read().identities.values())
    assert read_numbers(node.state_dir) == node.sync.planner.numbers


def test_numbers_are_on_disk_before_the_maps_hold_them(node):
    seen: list[bool] = []

    def note(name: str, _key: bytes, value: bytes | None) -> None:
        if name == "identities" and value:
            seen.append(int.from_bytes(value, "little") in read_numbers(node.state_dir).identities)

    node.store.note = note  # type: ignore[method-assign]
    node.list(WEB, SHOP, ALLOW)

    assert seen
    assert all(seen)


def test_numbers_that_cannot_be_written_stop_nothing(node, caplog):
    (node.state_dir / "identities.new").mkdir()
    node.list(WEB, SHOP, ALLOW)

    assert node.sync.is_settled
    assert node.is_as_planned
    assert node.read("ebproxy_errors_total", kind="numbers") >= 1
    assert "writing what identities stand for" in caplog.text
    (node.state_dir / "identities.new").rmdir()
    node.change(DENY)
    assert read_numbers(node.state_dir) == node.sync.planner.numbers


UNREADABLE = Malformed(DENY.kind, DENY.key, "spec", "no")
PART = msgspec.structs.replace(DENY, is_partial=True)


def test_a_policy_that_cannot_be_read_at_a_restart_stays_in_force(node):
    node.list(WEB, SHOP, DENY)
    node.change(ALLOW)
    node.take(UNREADABLE)
    node.sync.turn()

    for _ in range(2):
        node.start()
        node.list(WEB, SHOP, UNREADABLE)
        assert node.sync.model.policies == {(ALLOW.kind, ALLOW.key): ALLOW}
        assert node.is_as_planned
        assert dict(node.store.writes) == {}

    node.sync.take(Delete(DENY.kind, DENY.key), node.clock.now)
    node.sync.turn()
    assert node.store.maps["policy"].entries == {}
    node.start()
    node.list(WEB, SHOP, UNREADABLE)
    assert node.store.maps["policy"].entries == {}


def test_what_of_a_new_policy_can_be_read_is_in_force(node):
    node.list(WEB, SHOP, msgspec.structs.replace(UNREADABLE, partial=PART))

    assert SUBJECT.packer.unpack(node.store.maps["subjects"].entries[WEB.addresses[0]])[1] == SubjectFlag.INGRESS
    assert len(node.store.maps["policy"].entries) == 1


def test_the_status_counts_the_policies_that_the_list_has(node):
    nobody = msgspec.structs.replace(UNREADABLE, key=key("nobody"))
    node.list(WEB, SHOP, DENY, UNREADABLE, nobody, Malformed(Kind.POD, key("bad"), "spec", "no"))
    config = SimpleNamespace(network_policy=SimpleNamespace(value="standard"), map_sizes=node.sizes)

    listed = PolicyViews(node.sync.model, node.sync.planner).policies()
    counted = _policy(config, node.sync)  # type: ignore[arg-type]

    assert [it["in_force"] for it in listed] == ["former", "none"]
    assert (counted["policies"], counted["unread"]) == (2, 2)


def test_policies_that_cannot_be_written_down_stop_nothing(node, caplog):
    (node.state_dir / POLICIES).mkdir()
    node.list(WEB, SHOP, DENY)

    assert node.sync.is_settled
    assert node.read("ebproxy_errors_total", kind="policies") == 1
    assert "which policies are in force" in caplog.text

    (node.state_dir / POLICIES).rmdir()
    node.change(SHOP, pod("new", "10.0.0.9"))
    assert read_policies(node.state_dir) == [DENY]


def test_how_long_changes_took_is_told_of_changes_alone(node):
    node.list(WEB, SHOP, DENY)
    name = "ebproxy_policy_enforcement_duration_seconds"
    assert node.read(f"{name}_count") == 0
    node.change(ALLOW)
    node.change(ALLOW)

    assert node.read(f"{name}_count") == 1
    assert node.read(f"{name}_sum") == 0.25


@pytest.mark.parametrize("after", range(12))
def test_after_a_write_that_failed_everything_is_made_good(node, caplog, after):
    node.list(WEB, SHOP, DENY)
    node.store.fail_after = after
    node.change(ALLOW, pod("web", "10.0.0.9", app="web"))
    has_failed = node.store.fail_after is None

    assert has_failed == (not node.sync.is_settled) == ("trying again" in caplog.text)
    assert node.sync.is_behind == has_failed
    node.sync.turn()
    assert node.sync.is_settled != has_failed, "not before its time"
    node.clock.now = max(node.clock.now, node.sync.due_at)
    node.sync.turn()
    assert node.sync.is_settled
    assert node.is_as_planned
    assert node.store.generation % 2 == 0
    assert node.read("ebproxy_errors_total", kind="policy") == has_failed


def test_the_longer_it_fails_the_longer_it_waits(node):
    waits = []
    node.list(WEB, SHOP, DENY)
    for number in range(8):
        node.store.fail_after = 0
        node.change(pod("web", f"10.0.1.{number}", app="web"))
        waits.append(node.sync.due_at - node.clock.now)
        node.clock.now = node.sync.due_at

    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_the_longer_devices_cannot_be_written_the_longer_it_waits(node):
    """Once the policies are written that is no success yet: each turn wrote them, and began again at the floor."""
    waits = []
    node.sync.follow(Network())
    node.devices.fails = "writing map pod_devices: no"
    node.list(WEB, SHOP, DENY)
    for _ in range(7):
        waits.append(node.sync.due_at - node.clock.now)
        node.clock.now = node.sync.due_at
        node.sync.turn()
    assert waits == [0.5, 1, 2, 4, 8, 16, 30]
    assert not node.sync.is_settled

    node.devices.fails = ""
    node.clock.now = node.sync.due_at
    node.sync.turn()
    assert node.sync.is_settled
    node.store.fail_after = 0
    node.change(pod("web", "10.0.1.1", app="web"))
    assert node.sync.due_at - node.clock.now == 0.5, "from the beginning, after success alone"


def test_devices_are_told_who_has_no_room_among_the_subjects(tmp_path, clock):
    node = Node(tmp_path, clock, PolicySizes(subjects=2))
    node.sync.follow(Network())
    crowd = [pod(f"p{number}", f"10.0.2.{number}") for number in range(3)]
    node.list(*crowd)

    subjects = node.sync.maps.read().subjects
    assert len(subjects) == 2
    assert node.devices.without_room == {it.addresses[0] for it in crowd} - subjects.keys()
    for it in crowd:
        if it.addresses[0] in subjects:
            node.take(Delete(it.kind, it.key))
    node.sync.turn()
    assert not node.devices.without_room


def test_what_cannot_be_planned_is_told_and_tried_again(node, monkeypatch, caplog):
    node.list(WEB, SHOP, DENY)
    monkeypatch.setattr(node.sync.planner, "plan", lambda: {}["no such thing"])
    node.change(ALLOW)

    assert "policy cannot be planned" in caplog.text
    node.clock.now = node.sync.due_at
    node.sync.turn()
    assert node.sync.is_settled
    assert node.is_as_planned


@pytest.mark.parametrize("name", ["policy", "identities", "subjects"])
def test_drift_is_healed_and_counted(node, name):
    node.list(WEB, SHOP, ALLOW)
    entries = node.store.maps[name].entries
    del entries[next(iter(entries))]
    node.sync.turn()
    assert not node.is_as_planned, "nobody has looked"
    node.clock.now += 301
    node.sync.turn()

    assert node.is_as_planned
    assert node.read("ebproxy_drift_entries_total") == 1


def test_a_pod_whose_policy_does_not_fit_is_told_once(tmp_path, clock, caplog):
    node = Node(tmp_path, clock, PolicySizes(policy=1))
    node.list(WEB, SHOP, ALLOW)
    node.change(SHOP)

    assert [name for name, _ in node.degraded] == ["ns/web"]
    assert "policy is full" in node.degraded[0][1]
    assert node.read("ebproxy_degraded_subjects") == 1
    assert caplog.text.count("is degraded") == 1
    node.take(Delete(DENY.kind, DENY.key))
    node.sync.turn()
    assert node.read("ebproxy_degraded_subjects") == 0


@pytest.mark.parametrize("fails_open", [False, True], ids=["closed", "open"])
def test_pods_that_are_no_subjects_for_want_of_room_are_held_where_that_is_set(tmp_path, clock, fails_open):
    node = Node(tmp_path, clock, PolicySizes(subjects=1), fails_open=fails_open)

    def is_held() -> bool:
        return POLICY_STATE.packer.unpack(node.store.maps["policy_states"].entries[ONLY])[2] != 0

    node.list(WEB, SHOP, ALLOW)
    assert node.degraded
    assert is_held() is not fails_open

    for it in (WEB, SHOP):
        node.take(Delete(it.kind, it.key))
    node.sync.turn()
    assert not is_held()


def test_no_event_is_about_a_block(tmp_path, clock):
    node = Node(tmp_path, clock, PolicySizes(blocks=0))
    node.list(WEB, network_policy("blocks", egress=[rule(cidr("192.0.2.0/24"))]))

    assert {str(name) for name in node.sync.degraded} == {"IPBlock/192.0.2.0/24", "ns/web"}
    assert [name for name, _ in node.degraded] == ["ns/web"]


class TestBesideServices:
    """In the reconciler: neither waits for the other."""

    @pytest.fixture
    def agent(self, node, monkeypatch) -> SimulatedAgent:
        logging.disable()
        monkeypatch.setattr("agent.reconciler.time", CLOCK)
        made = SimulatedAgent()
        made.reconciler._drift_at = math.inf
        made.reconciler.policy = node.sync
        yield made
        logging.disable(logging.NOTSET)

    def submit(self, agent: SimulatedAgent, *events: Event) -> None:
        for event in events:
            agent.reconciler.submit(event)
        assert agent.reconciler._take_in()
        agent.reconciler._turn()

    def lists(self, *records: PolicyRecord) -> list[Event]:
        begun, ended = ([it(kind) for kind in sorted(POLICY_KINDS)] for it in (ListStarted, ListEnded))
        return [*begun, *map(Upsert, records), *ended]

    def test_what_is_not_understood_is_counted_and_told(self, agent, node, caplog):
        logging.disable(logging.NOTSET)
        kind = {"kind": "ClusterNetworkPolicy"}
        before = METRICS.registry.get_sample_value("ebproxy_malformed_objects_total", kind) or 0
        closed = TierRule(Action.DENY, Rule(), unknown="spec.ingress[0].from[0].nodes", written="Deny")
        odd = cluster_policy("odd", ingress=[closed])
        self.submit(agent, Upsert(odd, not_understood(odd)))

        assert [record.getMessage() for record in caplog.records] == [
            "ClusterNetworkPolicy odd: spec.ingress[0].from[0].nodes: not understood, so that the rule denies everybody"
        ]
        assert METRICS.registry.get_sample_value("ebproxy_malformed_objects_total", kind) == before + 1
        assert len(node.sync.model.left_out) == 1

    @pytest.mark.parametrize(
        ("before", "partial", "stands"),
        [
            pytest.param([DENY], None, "what it said before stays", id="former"),
            pytest.param([DENY], PART, "what it said before stays", id="former, though a part can be read"),
            pytest.param([], PART, "never read here before: what can be read is in force", id="part"),
            pytest.param(
                [],
                None,
                "never read here before: nothing of it is in force, its pods are not isolated by it",
                id="none",
            ),
        ],
    )
    def test_what_holds_of_a_policy_that_cannot_be_read_is_told(self, agent, caplog, before, partial, stands):
        self.submit(agent, *self.lists(WEB, *before))
        logging.disable(logging.NOTSET)
        caplog.clear()
        self.submit(agent, msgspec.structs.replace(UNREADABLE, partial=partial))

        (said,) = (it.getMessage() for it in caplog.records if it.levelno == logging.WARNING)
        assert said == f"NetworkPolicy {DENY.key}: spec: no; {stands}"

    def test_services_do_not_wait_for_policys_lists(self, agent):
        self.submit(agent, Upsert(service("web", "10.0.0.1")))

        assert agent.maps.frontends
        assert agent.reconciler.pending_since is None, "health does not suffer either"
        assert not agent.reconciler.is_settled.is_set()

    def test_policy_does_not_wait_for_services_lists(self, agent, node):
        agent.model.unsynced.add(Kind.SERVICE)
        self.submit(agent, *self.lists(WEB, DENY))

        assert node.sync.is_settled
        assert node.is_as_planned

    def test_policy_does_not_wait_while_services_cannot_be_written(self, agent, node):
        agent.maps.fail_after = 0
        self.submit(agent, Upsert(service("web", "10.0.0.1")), *self.lists(WEB, DENY))

        assert agent.reconciler._retry_at
        assert node.sync.is_settled

    def test_services_do_not_wait_while_policy_cannot_be_written(self, agent, node):
        node.store.fail_after = 0
        self.submit(agent, *self.lists(WEB, DENY), Upsert(service("web", "10.0.0.1")))

        assert agent.maps.frontends
        assert agent.reconciler.pending_since is not None, "health is to tell"
        assert not agent.reconciler.is_settled.is_set()

    def test_all_is_settled_once_both_are(self, agent):
        self.submit(agent, *self.lists(WEB, DENY), Upsert(service("web", "10.0.0.1")))

        assert agent.reconciler.is_settled.is_set()
        assert agent.reconciler.pending_since is None

    def test_what_cannot_be_read_is_counted_for_both(self, agent, node):
        self.submit(agent, *self.lists(), Malformed(Kind.NETWORK_POLICY, key("web"), "spec", "no"))

        assert list(node.sync.model.malformed) == [(Kind.NETWORK_POLICY, key("web"))]
        assert not agent.model.malformed
