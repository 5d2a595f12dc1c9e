"""The kernel's maps of policy: the maps in memory do what they do, and a former layout's are taken over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.abi import SUBJECT, map_specs
from agent.core.policy_plan import PolicyPlan
from agent.errors import DataplaneError
from agent.kernel.maps import MapStore
from agent.kernel.policy_maps import PolicyMaps, PolicySwitches
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


class TestAdoption:
    @pytest.fixture
    def filled(self, store) -> PolicyMaps:
        maps = PolicyMaps(store)
        maps.open(PolicySwitches())
        for plan in plans():
            maps.apply(plan)
        return maps

    def other(self, directory: Path, **sizes: int) -> tuple[MapStore, PolicyMaps]:
        specs = map_specs(replace(SIZES, identities=64, blocks=64, policy=1024, subjects=64, **sizes))
        opened = MapStore.open(directory / "next", specs)
        return opened, PolicyMaps(opened)

    @pytest.fixture
    def directory(self, bpf_mount, tmp_path) -> Path:
        return bpf_mount / tmp_path.name

    def test_everything_is_copied(self, filled, directory):
        opened, maps = self.other(directory)

        assert not maps.adopt([directory / "nothing", directory / "now"]), "nothing is lacking"
        assert maps.read() == filled.read()
        opened.close()

    def test_what_is_there_already_stays(self, filled, directory):
        opened, maps = self.other(directory)
        maps.apply(PolicyPlan(subjects={bytes(16): bytes(SUBJECT.size)}))

        assert maps.adopt([directory / "now"]), "it may be a part"
        assert maps.read().policy == {}
        opened.close()

    def test_what_does_not_fit_is_left(self, filled, directory):
        specs = map_specs(replace(SIZES, identities=64, blocks=64, policy=1, subjects=64))
        opened = MapStore.open(directory / "next", specs)
        maps = PolicyMaps(opened)

        assert maps.adopt([directory / "now"])
        assert maps.read().subjects == {}
        assert not maps.adopt([directory / "nothing"])
        opened.close()
