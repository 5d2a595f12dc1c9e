"""The kernel's maps of policy: the maps in memory do what they do, and a former layout's are taken over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.core.abi import SUBJECT, U32, U64, map_specs
from agent.core.events import ListEnded, ListStarted, Upsert
from agent.core.network import Device, Network
from agent.core.policy_model import PolicyModel
from agent.core.policy_plan import PolicyPlan, PolicySizes
from agent.core.records import POLICY_KINDS
from agent.errors import DataplaneError
from agent.kernel.maps import MapStore
from agent.kernel.node_maps import NodeMaps
from agent.kernel.pod_devices import POD_KIND, PodDevices
from agent.kernel.policy_maps import PolicyMaps, PolicySwitches
from agent.kernel.takeover import Takeover
from agent.observe.metrics import Metrics
from agent.observe.numbers import NumberFile
from agent.policy_sync import PolicyOptions, PolicySync
from tests.bpf.conftest import POLICY_SPECS, SIZES
from tests.policy_builders import PolicyNode, cidr, network_policy, pod, pods, rule, selector, tcp
from tests.policy_store import ONLY, FakeStore

WEB = pod("web", "10.0.0.1", "fd00::1", app="web")
SHOP = pod("shop", "10.0.0.2", "fd00::2", app="shop")
HISTORY = [
    [network_policy("deny", selector(app="web"), ingress=[])],
    [network_policy("deny", selector(app="web"), ingress=[rule(pods(app="shop"), ports=[tcp(80, 1023)])])],
    [network_policy("blocks", ingress=[rule(cidr("10.0.0.0/8", "10.0.0.0/24")), rule(cidr("fd00::/16"))])],
    [pod("web", "10.0.0.9", app="shop")],
    [network_policy("deny", selector(app="nobody"), ingress=[])],
]


@pytest.fixture
def store(tmp_path: Path, bpf_mount: Path) -> Iterator[MapStore]:
    made = MapStore.open(bpf_mount / tmp_path.name / "now", POLICY_SPECS)
    yield made
    made.close()


def plans() -> Iterator[PolicyPlan]:
    node = PolicyNode(WEB, SHOP)
    node.maps.state = type(node.maps.state)()
    yield from node.restart()
    for change in HISTORY:
        yield from node.apply(*change)


def test_the_same_plans_end_in_the_same_maps(store):
    fake = FakeStore()
    both = [PolicyMaps(store), PolicyMaps(fake)]  # type: ignore[arg-type]
    for maps in both:
        maps.open(PolicySwitches(7, is_strict=True))
    count = 0
    for plan in plans():
        count += 1
        for maps in both:
            maps.apply(plan)

        assert both[0].read() == both[1].read()
        assert store.writes == fake.writes
        assert store.maps["policy_states"].lookup(ONLY) == fake.maps["policy_states"].lookup(ONLY)
    assert count > len(HISTORY)
    assert both[0].read_counters() == both[1].read_counters()


def test_both_refuse_what_there_is_no_room_for(store):
    many = PolicyPlan(identities={number.to_bytes(16, "big"): bytes(4) for number in range(65)})
    for maps in (PolicyMaps(store), PolicyMaps(FakeStore())):  # type: ignore[arg-type]
        with pytest.raises(DataplaneError, match="map identities"):
            maps.apply(many)
        assert len(maps.read().identities) == 64


def test_the_generation_goes_on_in_another_layout(store, bpf_mount, tmp_path):
    maps = PolicyMaps(store)
    maps.open(PolicySwitches())
    maps.unsettle()
    maps.settle()
    other = MapStore.open(bpf_mount / tmp_path.name / "next", POLICY_SPECS, (bpf_mount / tmp_path.name / "now",))
    after = PolicyMaps(other)
    after.open(PolicySwitches())

    assert after.generation == maps.generation
    other.close()


def test_pods_that_have_no_room_have_no_device_either(tmp_path, bpf_mount):
    """Both maps are of one size: a device for every pod did not fit, and nothing came into force."""
    crowd = [pod(f"p{number}", f"10.0.2.{number}") for number in range(4)]
    devices = {it.addresses[0]: 11 + number for number, it in enumerate(crowd)}
    network = Network(tuple(Device(number, f"veth{number}", POD_KIND) for number in devices.values()))
    specs = map_specs(replace(SIZES, identities=64, blocks=64, policy=64, subjects=2))
    with closing(MapStore.open(bpf_mount / tmp_path.name / "small", specs)) as store:
        maps = PolicyMaps(store)
        maps.open(PolicySwitches())
        finder = PodDevices(NodeMaps(store), {}, lambda address, _: (devices[address], True), lambda *_: None)
        sync = PolicySync(
            PolicyModel("n1"),
            maps,
            NumberFile(tmp_path),
            finder,
            SimpleNamespace(due_at=math.inf, deleted=0),  # type: ignore[arg-type]
            Metrics(),
            PolicyOptions(PolicySizes(identities=64, blocks=64, policy=64, subjects=2)),
        )
        sync.follow(network)
        lists = [[it(kind) for kind in sorted(POLICY_KINDS)] for it in (ListStarted, ListEnded)]
        for event in (*lists[0], *map(Upsert, [*crowd, network_policy("deny", ingress=[])]), *lists[1]):
            sync.take(event, 0)
        sync.turn()

        subjects = maps.read().subjects
        placed = {U32.packer.unpack(key)[0] for key, _ in store.maps["pod_devices"].items()}
        assert (len(subjects), len(sync.degraded)) == (2, 2)
        assert placed == {devices[address] for address in subjects}
        assert sync.is_settled


class TestAdoption:
    @pytest.fixture
    def filled(self, store) -> PolicyMaps:
        maps = PolicyMaps(store)
        maps.open(PolicySwitches())
        for plan in plans():
            maps.apply(plan)
        return maps

    @contextmanager
    def following(
        self, directory: Path, *names: str, keeps_connections: bool = True, **sizes: int
    ) -> Iterator[tuple[PolicyMaps, Takeover, MapStore]]:
        """Open the layout that comes after that of ``store``; without ``keeps_connections`` it has them otherwise."""
        specs = map_specs(replace(SIZES, **{"identities": 64, "blocks": 64, "policy": 1024, "subjects": 64} | sizes))
        if not keeps_connections:
            specs = tuple(replace(it, value=U64) if it.name == "connections" else it for it in specs)
        formers = tuple(directory / name for name in names or ["now"])
        with (
            closing(MapStore.open(directory / "next", specs, former=formers)) as opened,
            closing(Takeover(opened.maps, specs, formers)) as takeover,
        ):
            yield PolicyMaps(opened), takeover, opened

    @pytest.fixture
    def directory(self, bpf_mount, tmp_path) -> Path:
        return bpf_mount / tmp_path.name

    def test_everything_is_copied(self, filled, directory):
        with self.following(directory, "nothing", "now") as (maps, takeover, _):
            assert not maps.adopt(takeover), "nothing is lacking"
            assert maps.read() == filled.read()

    @pytest.mark.parametrize("is_known", [True, False])
    def test_connections_are_known_where_they_are_kept_alike(self, filled, directory, is_known):
        with self.following(directory, keeps_connections=is_known) as (maps, takeover, _):
            assert not maps.adopt(takeover)

            assert maps.knows_connections == is_known
            assert maps.read() == filled.read()

    def test_connections_are_known_where_those_of_each_former_are(self, filled, directory):
        """One was left over that never ran, and does not keep them as we do."""
        with self.following(directory, keeps_connections=False) as (maps, takeover, _):
            assert not maps.adopt(takeover)
        (directory / "next").rename(directory / "left")
        with self.following(directory, "now", "left", policy=1) as (maps, takeover, _):
            assert maps.adopt(takeover)
            assert not maps.knows_connections

    @pytest.mark.parametrize("policy", [pytest.param(1024, id="with all else"), pytest.param(1, id="alone")])
    def test_where_pods_are_is_copied(self, store, filled, directory, policy):
        places = {U32.packer.pack(number): bytes([number]) * 32 for number in (7, 8)}
        NodeMaps(store).write("pod_devices", places)
        with self.following(directory, policy=policy) as (maps, takeover, opened):
            assert maps.adopt(takeover) == (policy == 1)

            assert dict(opened.maps["pod_devices"].items()) == places

    def test_what_is_there_already_stays(self, filled, directory):
        with self.following(directory) as (maps, takeover, _):
            maps.apply(PolicyPlan(subjects={bytes(16): bytes(SUBJECT.size)}))

            assert maps.adopt(takeover), "it may be a part"
            assert maps.read().policy == {}

    def test_what_does_not_fit_is_left(self, filled, directory):
        with self.following(directory, policy=1) as (maps, takeover, _):
            assert maps.adopt(takeover)
            assert maps.read().subjects == {}
        with self.following(directory, "nothing") as (maps, takeover, _):
            assert not maps.adopt(takeover)

    def test_a_former_that_lacks_a_map_enforces_all_the_same(self, filled, directory):
        (directory / "now" / "blocks").unlink()
        with self.following(directory) as (maps, takeover, _):
            assert maps.adopt(takeover)
            assert maps.read().subjects == {}
