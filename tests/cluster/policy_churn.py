"""Pods that come and go under 250 policies: what is written to the API server, and whose each address was when.

A slot is an address of each family, and one pod after another has it. A pod's number says everything of it: its
namespace and its labels, and so its identity. Some pods share one, and others are the first or the last to have it.
"""

from __future__ import annotations

import bisect
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from agent.core.addresses import parse_address
from agent.core.policy_records import (
    NamespaceRecord,
    NetworkPolicyRecord,
    Operator,
    Peer,
    PodRecord,
    PortRange,
    Rule,
    Selector,
)
from tests import policy_builders as records
from tests.cluster.api_store import Resource, Store
from tests.lab.manifests import Object, pod

PORTS = (8080, 8081)
REAL = "real"
"""The namespace of the pods that have a network namespace."""
_PODS = Resource("", "v1", "pods")
_TEAMS, _GROUPS, _ZONES, _NUMBERS = 10, 25, 37, 1_400
_BLOCKS = ("10.180.1.128/25", "10.180.17.0/24", "fd00:10:180:1::80/121", "fd00:10:180:11::/64")
_EXCEPTS = {_BLOCKS[0]: ("10.180.1.144/28",), _BLOCKS[2]: ("fd00:10:180:1::90/124",)}
_WITNESS_EVERY_S = 0.1
_MOST_VACANT = 15


class Slot:
    """An address of each family, and who had it: since which change, and None for nobody."""

    def __init__(self, number: int, node: str) -> None:
        self.node = node
        third, fourth = (1, 100 + number) if node else (16 + number // 200, 10 + number % 200)
        self.addresses = (f"10.180.{third}.{fourth}", f"fd00:10:180:{third:x}::{fourth:x}")
        self.packed = tuple(map(parse_address, self.addresses))
        self._changes: list[int] = []
        self._owners: list[PodRecord | None] = []

    def note(self, change: int, owner: PodRecord | None) -> None:
        """Note whose it is from a change on."""
        self._owners.append(owner)
        self._changes.append(change)

    def owners(self, first: int, last: int) -> Sequence[PodRecord | None]:
        """Say who had it after one change, and after each until another."""
        begin = bisect.bisect_right(self._changes, first) - 1
        return self._owners[max(begin, 0) : bisect.bisect_right(self._changes, last)]

    @property
    def owner(self) -> PodRecord | None:
        """Who has it now."""
        return self._owners[-1]


def policies(chance: random.Random, count: int) -> list[NetworkPolicyRecord]:
    """Make policies about one group of one team each; those about the real pods are among the count."""
    made = [_about_server(), _about_friend(), _about_mute()]
    for number in range(count - len(made)):
        ingress = [_by_zone(chance), _by_app(chance)]
        egress = [_by_zone(chance), _by_app(chance)] if number % 2 else None
        if number % 5 == 0:
            ingress.append(records.rule(*(records.cidr(it, *_EXCEPTS.get(it, ())) for it in _BLOCKS)))
        name, group = f"{_team(number)}/policy-{number}", f"g{number // _TEAMS}"
        made.append(records.network_policy(name, records.selector(group=group), ingress, egress))
    return made


def _anywhere(key: str, *values: str) -> Peer:
    return Peer(namespaces=Selector(), pods=records.selector(records.need(key, Operator.IN, *values)))


def _by_zone(chance: random.Random) -> Rule:
    zones = [f"z{it}" for it in chance.sample(range(_ZONES), 3)]
    return records.rule(_anywhere("zone", *zones), ports=[records.tcp(PORTS[0])])


def _by_app(chance: random.Random) -> Rule:
    apps = [f"a{it}" for it in chance.sample(range(_NUMBERS), 10)]
    ports: list[PortRange] = [records.tcp(PORTS[0], PORTS[1] + 2)]
    return records.rule(_anywhere("app", *apps), ports=ports)


def _about_server() -> NetworkPolicyRecord:
    """Let in friends, the mute, who may not speak, and some who come and go."""
    peers = [records.pods(app="friend"), records.pods(app="mute"), _anywhere("zone", "z1", "z2", "z3")]
    return records.network_policy(f"{REAL}/server", records.selector(app="server"), [records.rule(*peers)])


def _about_friend() -> NetworkPolicyRecord:
    peers = [records.pods(app="server"), _anywhere("zone", "z3", "z4")]
    return records.network_policy(f"{REAL}/friend", records.selector(app="friend"), egress=[records.rule(*peers)])


def _about_mute() -> NetworkPolicyRecord:
    peers = [_anywhere("zone", "z5", "z6", "z7")]
    return records.network_policy(f"{REAL}/mute", records.selector(app="mute"), egress=[records.rule(*peers)])


def namespaces() -> list[NamespaceRecord]:
    """Describe the namespaces."""
    return [records.namespace(name) for name in (*map(_team, range(_TEAMS)), REAL)]


def _team(number: int) -> str:
    return f"team-{number % _TEAMS}"


def _labels(number: int) -> dict[str, str]:
    group = number // _TEAMS % _GROUPS
    return {"app": f"a{number}", "group": f"g{group}", "zone": f"z{number % _ZONES}"}


class Population:
    """The slots, and the writes to a store by which pods take them up and leave them."""

    def __init__(self, store: Store, chance: random.Random, node: str, local: int, count: int) -> None:
        self.local = [Slot(number, node) for number in range(local)]
        self.slots = [*self.local, *(Slot(number, "") for number in range(count - local))]
        self.busy = self.slots[: 2 * local]
        """Those that change: the node's own, and as many elsewhere."""
        self.written = 0
        """How many changes of who has an address were written so far, or are about to be."""
        self.recent: deque[Slot] = deque(maxlen=12)
        self.replaced = 0
        self._store = store
        self._chance = chance
        self._serial = 0
        self._vacant: deque[Slot] = deque()
        self._numbers: dict[Slot, int] = {}
        self._names: dict[Slot, str] = {}
        for slot in self.slots:
            self._begin(slot)

    def replace(self) -> None:
        """Have another pod take up an address, or none, or be another to policy, in one of the ways that are."""
        self.replaced += 1
        if len(self._vacant) > _MOST_VACANT:
            self._begin(self._vacant.popleft())
            return
        slot = self._chance.choice([it for it in self.busy if it.owner])
        self._chance.choice((self._hand_over, self._leave, self._end_first, self._relabel))(slot)

    def _hand_over(self, slot: Slot) -> None:
        """The new pod is there without an address while the old one terminates, whose address it gets."""
        old = self._key(slot)
        name = self._take_up(slot)
        source = self._object(slot, name)
        self._store.create(_PODS, _team(self._numbers[slot]), {**source, "status": {"phase": "Pending"}})
        self._store.merge(_PODS, old, {"metadata": {"deletionTimestamp": "2030-01-01T00:00:00Z"}})
        self._note(slot, self._record(slot))
        self._store.merge(_PODS, self._key(slot), {"status": source["status"]})
        self._store.delete(_PODS, old)

    def _leave(self, slot: Slot) -> None:
        """The pod is gone, and nobody has its address for a while."""
        self._note(slot, None)
        self._store.delete(_PODS, self._key(slot))
        self._vacant.append(slot)

    def _end_first(self, slot: Slot) -> None:
        """The old pod has ended, and is still there when the new one has its address."""
        old = self._key(slot)
        self._note(slot, None)
        self._store.merge(_PODS, old, {"status": {"phase": "Succeeded"}})
        self._begin(slot)
        self._store.delete(_PODS, old)

    def _relabel(self, slot: Slot) -> None:
        """The same pod has other labels, in the same namespace."""
        team = self._numbers[slot] % _TEAMS
        self._numbers[slot] = other = self._chance.randrange(team, _NUMBERS, _TEAMS)
        self._note(slot, self._record(slot))
        self._store.merge(_PODS, self._key(slot), {"metadata": {"labels": _labels(other)}})

    def _begin(self, slot: Slot) -> None:
        """Have a new pod with an address at once."""
        name = self._take_up(slot)
        self._note(slot, self._record(slot))
        self._store.create(_PODS, _team(self._numbers[slot]), self._object(slot, name))

    def _take_up(self, slot: Slot) -> str:
        self._serial += 1
        self._numbers[slot] = self._chance.randrange(_NUMBERS)
        self._names[slot] = f"pod-{self._serial}"
        return self._names[slot]

    def _note(self, slot: Slot, owner: PodRecord | None) -> None:
        """Note a change before it is written, so that whoever sees it in force finds it noted."""
        slot.note(self.written + 1, owner)
        self.written += 1
        self.recent.append(slot)

    def _key(self, slot: Slot) -> tuple[str, str]:
        return _team(self._numbers[slot]), self._names[slot]

    def _record(self, slot: Slot) -> PodRecord:
        namespace, name = self._key(slot)
        labels = _labels(self._numbers[slot])
        return records.pod(f"{namespace}/{name}", *slot.addresses, local=bool(slot.node), **labels)

    def _object(self, slot: Slot, name: str) -> Object:
        labels = _labels(self._numbers[slot])
        return pod(name, slot.node or "elsewhere", slot.addresses, namespace=_team(self._numbers[slot]), **labels)


class Witnesses:
    """Pods that nobody asks, written one after the other: once one is in force, so is what was written before it."""

    def __init__(self, store: Store, population: Population) -> None:
        self.in_force = population.written
        """How many changes are in force for certain."""
        self.longest_s = 0.0
        """How long it took at most until what was written was seen to be."""
        self._store = store
        self._population = population
        self._count = 0
        self._waiting: deque[tuple[bytes, int, float]] = deque()

    @property
    def is_waiting(self) -> bool:
        """Whether one was written that is not in force yet."""
        return bool(self._waiting)

    @property
    def lag_s(self) -> float:
        """How long the next one has been waited for."""
        return time.monotonic() - self._waiting[0][2] if self._waiting else 0.0

    def write(self) -> None:
        """Write another one."""
        self._count += 1
        name, address = self._name(self._count)
        self._waiting.append((parse_address(address), self._population.written, time.monotonic()))
        self._store.create(_PODS, REAL, pod(name, "elsewhere", [address], "witness", namespace=REAL))

    def look(self, is_in_force: Callable[[bytes], bool]) -> None:
        """Look whether the next ones are in force."""
        while self._waiting and is_in_force(self._waiting[0][0]):
            _, self.in_force, began = self._waiting.popleft()
            self.longest_s = max(self.longest_s, time.monotonic() - began)

    def records(self) -> list[PodRecord]:
        """Describe them all."""
        named = map(self._name, range(1, self._count + 1))
        return [records.pod(f"{REAL}/{name}", address, local=False, app="witness") for name, address in named]

    def _name(self, number: int) -> tuple[str, str]:
        """Give the name and the address of one."""
        return f"witness-{number}", f"10.250.{number // 250}.{1 + number % 250}"


class Churn(threading.Thread):
    """Replaces pods at a rate for some seconds; ``error`` is what ended it early."""

    def __init__(self, population: Population, witnesses: Witnesses, rate: float, seconds: float) -> None:
        super().__init__(name="churn", daemon=True)
        self.error: BaseException | None = None
        self._population = population
        self._witnesses = witnesses
        self._rate = rate
        self._count = int(rate * seconds)
        self._is_over = threading.Event()

    def run(self) -> None:
        """Go on until everything is replaced, and let a last witness come behind it."""
        try:
            for number, due_at in enumerate(self._times()):
                self._is_over.wait(max(0.0, due_at - time.monotonic()))
                if self._is_over.is_set():
                    return
                self._population.replace()
                if number % int(self._rate * _WITNESS_EVERY_S) == 0:
                    self._witnesses.write()
            self._witnesses.write()
        except BaseException as error:
            self.error = error
            raise

    def end(self) -> None:
        """Stop it, wherever it is."""
        self._is_over.set()
        self.join()

    def _times(self) -> Iterator[float]:
        began = time.monotonic()
        return (began + number / self._rate for number in range(self._count))
