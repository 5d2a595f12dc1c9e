"""Plans are carried out in their order; the generation tells when, also the next agent after one that was stopped."""

from __future__ import annotations

from itertools import groupby

import pytest

from agent.core.abi import POLICY_STATE, U32
from agent.core.policy_plan import PolicyPlan, PolicyState
from agent.errors import DataplaneError
from agent.kernel.policy_maps import PolicyMaps, PolicySwitches
from tests.policy_store import ONLY, FakeStore


def k(name: str, number: int) -> bytes:
    size = {"policy": 16, "blocks": 20, "identities": 16, "subjects": 16}[name]
    return number.to_bytes(size, "big")


def v(name: str, number: int) -> bytes:
    return number.to_bytes({"policy": 8, "blocks": 4, "identities": 4, "subjects": 16}[name], "big")


def entries(name: str, *numbers: int) -> dict[bytes, bytes]:
    return {k(name, number): v(name, number) for number in numbers}


def plan(*, bumps: bool = True) -> PolicyPlan:
    """Two entries for each map, and two of those that ``filled`` has removed."""
    return PolicyPlan(
        policy=list(entries("policy", 2, 1).items()),
        blocks=entries("blocks", 1, 2),
        identities=entries("identities", 1, 2),
        subjects=entries("subjects", 1, 2),
        removed_subjects=[k("subjects", 8), k("subjects", 9)],
        removed_identities=[k("identities", 8), k("identities", 9)],
        removed_blocks=[k("blocks", 8), k("blocks", 9)],
        removed_policy=[k("policy", 9), k("policy", 8)],
        bumps_generation=bumps,
    )


@pytest.fixture
def store() -> FakeStore:
    made = FakeStore()
    for name in ("policy", "blocks", "identities", "subjects"):
        made.maps[name].entries.update(entries(name, 8, 9))
    return made


def opened(store: FakeStore, switches: PolicySwitches | None = None) -> PolicyMaps:
    maps = PolicyMaps(store)  # type: ignore[arg-type]
    maps.open(switches or PolicySwitches())
    return maps


def test_a_plan_is_carried_out_in_its_order(store):
    maps = opened(store)
    store.log.clear()
    maps.apply(plan())

    assert [(name, key[-1], value is not None) for name, key, value in store.log] == [
        ("policy_states", 0, True),
        ("policy", 2, True),
        ("policy", 1, True),
        *((name, number, True) for name in ("blocks", "identities", "subjects") for number in (1, 2)),
        *((name, number, False) for name in ("subjects", "identities", "blocks") for number in (8, 9)),
        ("policy", 9, False),
        ("policy", 8, False),
        ("policy_states", 0, True),
    ]
    assert maps.read() == PolicyState(**{n: entries(n, 1, 2) for n in ("policy", "blocks", "identities", "subjects")})
    assert dict(store.writes) == {
        "policy_states": 3,
        **dict.fromkeys(("policy", "blocks", "identities", "subjects"), 4),
    }


def test_what_was_removed_by_somebody_else_is_no_fault(store):
    maps = opened(store)
    store.maps["policy"].entries.clear()
    maps.apply(plan())

    assert maps.read().policy == entries("policy", 1, 2)


class TestGeneration:
    def test_it_begins_with_a_number_that_no_connection_has(self, store):
        assert opened(store).generation == store.generation == 2

    def test_it_is_odd_while_verdicts_change_and_another_even_one_afterwards(self, store):
        maps = opened(store)
        seen = [store.generation]
        store.note = lambda *_: seen.append(store.generation)  # type: ignore[method-assign]
        maps.apply(plan())
        seen.append(store.generation)

        assert [number for number, _ in groupby(seen)] == [2, 3, 4]
        assert maps.revision == 2

    def test_it_stays_where_no_verdict_changes(self, store):
        maps = opened(store)
        maps.apply(plan(bumps=False))

        assert store.generation == 2

    def test_the_next_agent_goes_on_with_it_and_writes_nothing(self, store):
        opened(store).apply(plan())
        store.writes.clear()
        maps = opened(store)
        maps.settle()

        assert (maps.generation, store.generation) == (4, 4)
        assert not store.writes

    @pytest.mark.parametrize(("last", "then"), [((1 << 32) - 2, (2,)), (0, (4,))], ids=["around", "from none"])
    def test_it_is_never_zero(self, store, last, then):
        store.maps["policy_states"].entries[ONLY] = POLICY_STATE.packer.pack(last, 0, 0, 0)
        maps = opened(store)
        maps.unsettle()
        maps.settle()

        assert (store.generation,) == then

    @pytest.mark.parametrize("writes", range(20))
    def test_after_a_failure_at_any_write_everything_is_judged_again(self, store, writes):
        maps = opened(store)
        store.fail_after = writes
        if writes < 18:  # of the plan's 16, and the generation twice
            with pytest.raises(DataplaneError):
                maps.apply(plan())
        else:
            maps.apply(plan())
        before = store.generation
        again = opened(store)
        again.settle()

        assert again.generation == store.generation
        assert store.generation % 2 == 0
        assert store.generation > before or before == (2 if writes == 0 else 4)

    def test_a_plan_after_one_that_was_cut_short_ends_in_an_even_one(self, store):
        maps = opened(store)
        store.fail_after = 3
        with pytest.raises(DataplaneError):
            maps.apply(plan())
        assert maps.is_cut_short
        maps.apply(plan(bumps=False))

        assert store.generation == 4


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        (PolicySwitches(), (2, 0, 0, 0)),
        (PolicySwitches(sample=64), (2, 64, 0, 0)),
        (PolicySwitches(is_strict=True), (2, 0, 1, 0)),
        (PolicySwitches(is_answered=True), (2, 0, 0, 1)),
    ],
    ids=["none", "sample", "strict", "answered"],
)
def test_switches_are_what_was_asked_for_last(store, switches, expected):
    opened(store, PolicySwitches(7, is_strict=True, is_answered=True))
    opened(store, switches)

    assert POLICY_STATE.packer.unpack(store.maps["policy_states"].entries[ONLY]) == expected


def test_who_has_no_room_is_held_until_there_is_some_by_the_next_agent_too(store):
    def strictness() -> int:
        return POLICY_STATE.packer.unpack(store.maps["policy_states"].entries[ONLY])[2]

    maps = opened(store, PolicySwitches())
    maps.hold(is_full=False)
    assert strictness() == 0
    maps.hold(is_full=True)
    assert strictness() == 2

    after = opened(store, PolicySwitches())
    assert strictness() == 2, "it does not know yet"
    after.apply(PolicyPlan(bumps_generation=True))
    assert strictness() == 2
    after.hold(is_full=False)
    assert strictness() == 0


def test_counters_are_summed_over_cpus(store):
    counters = store.maps["policy_counters"].entries
    counters[U32.packer.pack(3)] = (5).to_bytes(8, "little") + (7).to_bytes(8, "little")

    assert opened(store).read_counters()[3] == 12
