"""Generated policies: peers, ports, directions, subjects and their conflicts, gathered into tables.

Each pod is the subject of a case of its own, so that a table holds nine; all are of one direction, or what one denies
would hide what another allows. What is to come of them is for the reference to say.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, product
from typing import TypeVar

from agent.core.abi import Direction
from agent.core.policy_records import (
    ClusterPolicyRecord,
    NetworkPolicyRecord,
    Operator,
    Peer,
    PortRange,
    Rule,
    Selector,
    Tier,
    TierRule,
)
from agent.core.records import Protocol
from tests.cluster.policy_cluster import ADDRESSES
from tests.cluster.policy_tables import PODS
from tests.policy_builders import (
    accept,
    cidr,
    cluster_policy,
    deny,
    need,
    network_policy,
    rule,
    selector,
    skip,
    tcp,
    udp,
)

T = TypeVar("T")
Table = list[NetworkPolicyRecord | ClusterPolicyRecord]
Rules = tuple[Rule, ...]
IN, NOT_IN, EXISTS, ABSENT = Operator.IN, Operator.NOT_IN, Operator.EXISTS, Operator.DOES_NOT_EXIST

POD_SELECTORS = (
    selector(),
    selector(app="b"),
    selector(need("app", IN, "b", "c")),
    selector(need("app", NOT_IN, "a")),
    selector(need("app", EXISTS)),
    selector(need("app", ABSENT)),
    selector(need("tier", NOT_IN, "front")),
    selector(need("app", NOT_IN, "b"), need("app", EXISTS), need("tier", ABSENT)),
)
NAMESPACE_SELECTORS = (
    selector(),
    selector(ns="y"),
    selector(need("ns", IN, "x", "z")),
    selector(need("ns", NOT_IN, "y")),
    selector(need("kubernetes.io/metadata.name", IN, "z")),
    selector(need("kubernetes.io/metadata.name", NOT_IN, "x", "y")),
    selector(need("team", ABSENT)),
    selector(need("team", EXISTS)),
)


def of_one(pod: str) -> list[Peer]:
    """Mean a pod by its addresses."""
    v4, v6 = ADDRESSES[pod]
    return [cidr(f"{v4}/32"), cidr(f"{v6}/128")]


def but_for(pod: str) -> list[Peer]:
    """Mean everybody but for a pod."""
    v4, v6 = ADDRESSES[pod]
    return [cidr("0.0.0.0/0", f"{v4}/32"), cidr("::/0", f"{v6}/128")]


BLOCKS: tuple[list[Peer], ...] = (
    of_one("y/b"),
    but_for("x/a"),
    [cidr("0.0.0.0/0")],
    [cidr("::/0")],
    [cidr("10.180.1.0/24"), cidr("fd00:10:180:2::/64")],
    [cidr("10.180.0.0/16", "10.180.1.0/24", f"{ADDRESSES['y/a'][0]}/32")],
    [cidr("fd00:10:180::/48", "fd00:10:180:2::/64")],
    [cidr("10.180.1.8/29", f"{ADDRESSES['x/a'][0]}/32")],
    [*but_for("z/c"), *of_one("z/c")],
    [cidr("192.0.2.0/24"), cidr("2001:db8::/32")],
)
PEERS: tuple[list[Peer], ...] = (
    [],
    *([Peer(pods=one)] for one in POD_SELECTORS),
    *([Peer(namespaces=one)] for one in NAMESPACE_SELECTORS),
    *([Peer(namespaces, pods)] for namespaces, pods in product(NAMESPACE_SELECTORS[:5], POD_SELECTORS[1:4])),
    *BLOCKS,
    [Peer(pods=selector(app="b")), Peer(namespaces=selector(ns="z"))],
    [Peer(pods=selector(app="c")), *of_one("y/b")],
    [*but_for("y/b"), Peer(namespaces=selector(ns="y"), pods=selector(app="b"))],
)
"""An empty list is everybody."""


def named(name: str, protocol: Protocol = Protocol.TCP) -> PortRange:
    """Mean a port by its name."""
    return PortRange(protocol, name=name)


PORTS: tuple[list[PortRange] | None, ...] = (
    None,
    [tcp(80)],
    [udp(81)],
    [PortRange(Protocol.SCTP, 80, 80)],
    [PortRange(Protocol.TCP)],
    [PortRange(Protocol.UDP)],
    [PortRange(Protocol.SCTP)],
    [tcp(80, 81)],
    [tcp(1, 80)],
    [udp(81, 65_535)],
    [tcp(79), tcp(82, 90)],
    [tcp(80), udp(80), PortRange(Protocol.SCTP, 81, 81)],
    [named("serve-80-tcp")],
    [named("serve-81-udp", Protocol.UDP)],
    [named("web")],
    [named("web"), tcp(80)],
    [named("web", Protocol.UDP)],
    [named("nobody"), udp(80)],
)
ARCHETYPES: tuple[Rules, ...] = (
    (),
    (rule(),),
    (rule(Peer(pods=selector(app="b"))),),
    (rule(Peer(namespaces=selector(ns="y")), ports=[tcp(80)]),),
    (rule(*but_for("y/b")),),
    (rule(*of_one("y/b"), ports=[udp(1, 80)]), rule(ports=[named("web")])),
    (rule(Peer(namespaces=selector(need("ns", NOT_IN, "y"))), ports=[PortRange(Protocol.UDP), tcp(81)]),),
)
"""What conflicts: nothing, everything, and parts that overlap."""
SUBJECTS: tuple[Selector, ...] = (
    selector(),
    selector(app="a"),
    selector(need("app", IN, "a", "c")),
    selector(need("app", NOT_IN, "a")),
    selector(need("app", EXISTS)),
    selector(need("app", ABSENT)),
)


def policy(pod: str, name: str, direction: Direction, rules: Rules) -> NetworkPolicyRecord:
    """Make a policy about one pod and one direction."""
    namespace, app = pod.split("/")
    return _about(f"{namespace}/{app}-{name}", selector(app=app), direction, rules)


def _about(name: str, subject: Selector, direction: Direction, rules: Rules) -> NetworkPolicyRecord:
    if direction is Direction.INGRESS:
        return network_policy(name, subject, ingress=rules)
    return network_policy(name, subject, egress=rules)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def _gathered(title: str, cases: Iterable[Sequence[Rules]]) -> Iterator[tuple[str, Table]]:
    """Give each pod a case, which is what its policies allow, in one direction and then in the other."""
    tables = list(_batched(cases, len(PODS)))
    for direction, (number, table) in product(Direction, enumerate(tables, start=1)):
        records: Table = [
            policy(pod, str(index), direction, rules)
            for pod, case in zip(PODS, table, strict=False)
            for index, rules in enumerate(case)
        ]
        yield f"{title}, {direction.name.lower()} {number} of {len(tables)}", records


def peers() -> Iterator[tuple[str, Table]]:
    """Ask of each peer, the ports going round."""
    return _gathered("peers", [[(rule(*peer, ports=PORTS[i % 3]),)] for i, peer in enumerate(PEERS)])


def ports() -> Iterator[tuple[str, Table]]:
    """Ask of all ports, of everybody and of a peer."""
    some = [*PEERS[10:12], *BLOCKS[:2]]
    wanted = chain(
        ((rule(ports=port),) for port in PORTS),
        ((rule(*some[i % len(some)], ports=port),) for i, port in enumerate(PORTS)),
    )
    return _gathered("ports", [[rules] for rules in wanted])


def conflicts() -> Iterator[tuple[str, Table]]:
    """Have two policies about the same pods, and one of two rules."""
    pairs = [(one, other) for i, one in enumerate(ARCHETYPES) for other in ARCHETYPES[i + 1 :]]
    return _gathered("conflicts", [*pairs, *([one + other] for one, other in pairs[-6:])])


def both_directions() -> Iterator[tuple[str, Table]]:
    """Let each egress meet each ingress."""
    for turn in (0, 3):
        yield (
            f"both directions, {turn} apart",
            [
                policy(pod, direction.name.lower(), direction, ARCHETYPES[(i + turn * direction) % len(ARCHETYPES)])
                for i, pod in enumerate(PODS)
                for direction in Direction
            ],
        )


def subjects() -> Iterator[tuple[str, Table]]:
    """Mean the pods of a namespace in every way, and those of the others not."""
    for direction, (number, some) in product(Direction, enumerate(_batched(SUBJECTS, 3), start=1)):
        records: Table = [
            _about(f"{namespace}/subjects", subject, direction, ARCHETYPES[2])
            for namespace, subject in zip("xyz", some, strict=True)
        ]
        yield f"subjects, {direction.name.lower()} {number} of 2", records


def mixtures() -> Iterator[tuple[str, Table]]:
    """Mix everything, from seeds."""
    for seed in range(1, 5):
        yield f"mixture {seed}", list(mixture(random.Random(seed)))


def mixture(chance: random.Random) -> Iterator[NetworkPolicyRecord]:
    """Draw six policies, two in each namespace, whose names are always the same."""
    for number, namespace in enumerate("xxyyzz"):
        sides = {
            side: [rule(*chance.choice(PEERS), ports=chance.choice(PORTS)) for _ in range(chance.randint(0, 3))]
            for side in chance.choice((["ingress"], ["egress"], ["ingress", "egress"]))
        }
        yield network_policy(f"{namespace}/mixed-{number}", chance.choice(SUBJECTS), **sides)


ALL = Peer(namespaces=selector())
OF_Y = Peer(namespaces=selector(ns="y"))
NOT_OF_Y = Peer(namespaces=selector(need("ns", NOT_IN, "y")))
EVERY_B = Peer(namespaces=selector(), pods=selector(app="b"))
ANY_TCP, ANY_UDP, ANY_SCTP = map(PortRange, (Protocol.TCP, Protocol.UDP, Protocol.SCTP))
STACKS: tuple[tuple[list[list[TierRule]], Rules | None, list[TierRule]], ...] = (
    ([[deny(OF_Y)]], None, []),
    ([[skip(EVERY_B), deny(ALL)]], (rule(OF_Y),), [accept(ALL)]),
    ([[accept(NOT_OF_Y)]], (), []),
    ([[accept(EVERY_B, ports=[tcp(80)])], [deny(ALL)]], (rule(),), []),
    ([], None, [deny(OF_Y), accept(ALL)]),
    ([], (rule(EVERY_B),), [deny(ALL)]),
    ([[deny(ALL, ports=[tcp(80)]), accept(OF_Y, ports=[tcp(1, 1000)])], [deny(ALL, ports=[tcp(81, 90)])]], None, []),
    ([[skip(ALL, ports=[tcp(80)]), deny(ALL, ports=[ANY_UDP])]], None, [deny(OF_Y, ports=[ANY_TCP])]),
    ([[accept(ALL, ports=[ANY_SCTP])], [skip(OF_Y)], [deny(EVERY_B)]], (rule(EVERY_B), rule(OF_Y)), [deny(ALL)]),
)
"""Policies of the Admin tier by priority, a NetworkPolicy if any, and rules of the Baseline tier."""


def tiers() -> Iterator[tuple[str, Table]]:
    """Have every tier decide something, pass it on, and be overruled."""
    for direction in Direction:
        records = [it for pod, stack in zip(PODS, STACKS, strict=True) for it in _stacked(pod, direction, *stack)]
        yield f"tiers, {direction.name.lower()}", records


def _stacked(
    pod: str, direction: Direction, admin: list[list[TierRule]], network: Rules | None, baseline: list[TierRule]
) -> Iterator[NetworkPolicyRecord | ClusterPolicyRecord]:
    if network is not None:
        yield policy(pod, "network", direction, network)
    cluster = [(Tier.ADMIN, 10 - number, rules) for number, rules in enumerate(reversed(admin))]
    cluster += [(Tier.BASELINE, 0, baseline)] if baseline else []
    for tier, priority, rules in cluster:
        namespace, app = pod.split("/")
        side = direction.name.lower()
        yield cluster_policy(
            f"{side}-{namespace}-{app}-{tier.name.lower()}-{priority}",
            tier=tier,
            priority=priority,
            namespaces=selector(ns=namespace),
            pods=selector(app=app),
            **{side: rules},
        )


TABLES: dict[str, Table] = dict(
    chain(peers(), ports(), conflicts(), both_directions(), subjects(), tiers(), mixtures()),
)
