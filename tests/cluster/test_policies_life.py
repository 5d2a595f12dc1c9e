"""What becomes of policy over the life of a pod: it terminates, ends, gives its address to another; and hostNetwork.

Objects come and go on the API server while the network namespace stays: who answers at the address is always the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.api_driver import PODS
from tests.cluster.policy_cluster import ADDRESSES, PolicyCluster, asked
from tests.cluster.policy_tables import Allows
from tests.lab.manifests import Object, network_policy, pod
from tests.lab.polling import until
from tests.lab.traffic import RemoteError, RemoteSocket

pytestmark = pytest.mark.timeout(300)  # the first test of each mode starts the agents

GUESTS = {"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "a"}}}]}
"""Pods x/a, y/a and z/a."""
LOCKED = network_policy("locked", "a", namespace="x", policyTypes=["Ingress", "Egress"])
BY_LABEL = network_policy("by-label", "b", namespace="y", ingress=[GUESTS], policyTypes=["Ingress"])
A_IS_LOCKED_AND_KNOWN: Allows = lambda it: "x/a" not in it[:2] and (it.destination != "y/b" or it.source[-1] == "a")  # noqa: E731
A_IS_NOBODY: Allows = lambda it: it.destination != "y/b" or it.source in {"y/a", "z/a"}  # noqa: E731


@pytest.fixture
def locked(policies: PolicyCluster) -> PolicyCluster:
    """Have x/a isolated, and y/b open to those who are called as x/a is."""
    policies.set(LOCKED, BY_LABEL)
    policies.tables.expect(A_IS_LOCKED_AND_KNOWN)
    return policies


@pytest.fixture
def held(policies: PolicyCluster) -> Iterator[dict[str, RemoteSocket]]:
    """Connections from x/a to y/b, by protocol."""
    client = policies.pods["x/a"].client()
    made = {protocol: client.open(protocol, 4) for protocol in ("tcp", "udp")}
    for sock in made.values():
        sock.connect(ADDRESSES["y/b"][0], 80)
        assert sock.ask() == "y/b"
        client.call(sock._number, "settimeout", 0.3)
    yield made
    client.close()


def test_a_terminating_pod_keeps_its_policy_until_it_is_gone(locked: PolicyCluster) -> None:
    locked.api.delete(PODS.format("x"), "a")
    assert "deletionTimestamp" in locked.api.get(f"{PODS.format('x')}/a")["metadata"]
    locked.sync()
    locked.tables.expect(A_IS_LOCKED_AND_KNOWN)

    locked.end_pod("x", "a")
    locked.tables.expect(A_IS_NOBODY)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_ends_loses_its_policy_at_once(locked: PolicyCluster, phase: str) -> None:
    locked.end_pod("x", "a")
    locked.tables.expect(A_IS_NOBODY)
    locked.write_pod("x", "a", locked.describe("x/a"))
    locked.tables.expect(A_IS_LOCKED_AND_KNOWN)

    locked.api.set_status(PODS.format("x"), "a", {"phase": phase})
    locked.tables.expect(A_IS_NOBODY)


def test_an_address_is_its_next_pods_with_nothing_of_the_one_before(
    policies: PolicyCluster, held: dict[str, RemoteSocket]
) -> None:
    """Its connections neither: they were another pod's."""
    policies.set(BY_LABEL)
    policies.tables.expect(lambda it: it.destination != "y/b" or it.source[-1] == "a")
    assert [sock.ask() for sock in held.values()] == ["y/b"] * 2
    heir = policies.describe("x/a")
    heir["metadata"] |= {"name": "heir", "labels": {"app": "heir"}}

    policies.api.delete(PODS.format("x"), "a")
    policies.write_pod("x", "heir", heir)

    policies.tables.expect(lambda it: it.destination != "y/b" or it.source in {"y/a", "z/a"})
    for sock in held.values():
        with pytest.raises(RemoteError, match="timeout"):
            sock.ask()
    policies.end_pod("x", "a")
    policies.tables.expect(lambda it: it.destination != "y/b" or it.source in {"y/a", "z/a"})


def test_a_pod_of_its_nodes_network_is_the_node(policies: PolicyCluster) -> None:
    """No policy about it holds its node's own processes, and no rule that means it lets them in elsewhere."""
    node, host = policies.lab.nodes[1], policies.hosts[1]
    source = pod("agent", node.name, node.addresses, "guest", namespace="x")
    source["spec"]["hostNetwork"] = True
    policies.write_pod("x", "agent", source)
    to_guests: list[Object] = [{"from": [{"podSelector": {"matchLabels": {"app": "guest"}}}]}]
    policies.set(
        network_policy("mute", "guest", namespace="x", policyTypes=["Ingress", "Egress"]),
        network_policy("to-guests", "a", namespace="x", ingress=to_guests),
    )
    policies.tables.expect(lambda it: it.destination != "x/a")

    assert asked(host, "z/a") == asked(host, "x/b") == {"answered"}
    assert asked(host, "x/a") == {""}
    until(
        lambda: "x/agent" not in {it["pod"] for it in policies.agents[1].json("endpoint", "list")}, "it is no subject"
    )
