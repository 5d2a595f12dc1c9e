"""Generated policies over two nodes, with real connections; what is to come of them, the reference says.

In the manner of Cyclonus: every kind of peer, port and subject, in both directions, alone and in conflict; and tiers.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable

import pytest

from agent.core.addresses import parse_address
from agent.core.policy_records import NamespaceRecord, PodRecord, PolicyRecord
from agent.core.records import Protocol
from tests.cluster.policy_cases import TABLES, mixture
from tests.cluster.policy_cluster import ADDRESSES, PolicyCluster, namespace_record, pod_record
from tests.cluster.policy_objects import as_written
from tests.cluster.policy_tables import NAMES, NAMESPACES, PODS, QUESTIONS, Allows
from tests.policy_reference import Reference

pytestmark = pytest.mark.timeout(300)  # the first test of each mode starts the agents


def as_judged(
    policies: Iterable[PolicyRecord],
    pods: Iterable[PodRecord] = (),
    namespaces: Iterable[NamespaceRecord] = (),
) -> Allows:
    """Say what the reference says, of pods and namespaces that are as they were written, or else as these say."""
    known = {it.key: it for it in (*map(pod_record, PODS), *map(namespace_record, NAMESPACES), *pods, *namespaces)}
    reference = Reference([*known.values(), *policies])

    @functools.cache
    def may_send(source: str, destination: str, protocol: str, port: int, family: int) -> bool:
        one, other = (parse_address(ADDRESSES[pod][family == 6]) for pod in (source, destination))
        return reference.may_send(one, other, Protocol[protocol.upper()], port)

    return lambda it: may_send(*it[:5])


@pytest.mark.parametrize("table", TABLES)
def test_what_the_reference_says(policies: PolicyCluster, table: str) -> None:
    records = TABLES[table]
    policies.set(*map(as_written, records))

    policies.tables.expect(as_judged(records))


@pytest.mark.parametrize("seed", [1])
def test_one_change_after_another(policies: PolicyCluster, seed: int) -> None:
    """Policies are edited, pods and namespaces relabelled, so that they come under others and are other peers."""
    chance = random.Random(seed)
    pods: dict[str, PodRecord] = {}
    namespaces: dict[str, NamespaceRecord] = {}
    for _ in range(2):
        records = list(mixture(chance))
        policies.set(*map(as_written, records))
        policies.tables.expect(as_judged(records, pods.values(), namespaces.values()))

        pod, app = chance.choice(PODS), chance.choice(NAMES)
        pods[pod] = pod_record(pod, app=app)
        policies.label_pod(pod, app=app)
        policies.tables.expect(as_judged(records, pods.values(), namespaces.values()))

        name, ns = chance.choice(NAMESPACES), chance.choice(NAMESPACES)
        namespaces[name] = namespace_record(name, ns=ns)
        policies.label_namespace(name, ns=ns)
        policies.tables.expect(as_judged(records, pods.values(), namespaces.values()))


def test_every_table_tells_something_apart() -> None:
    """Neither is everything allowed in one, nor everything denied, and no two are the same."""
    seen = {}
    for name, records in TABLES.items():
        allows = as_judged(records)
        seen[name] = frozenset(it for it in QUESTIONS if allows(it))

    assert [name for name, allowed in seen.items() if not 0 < len(allowed) < len(QUESTIONS)] == []
    assert len(set(seen.values())) == len(seen)
