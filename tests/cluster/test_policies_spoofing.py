"""What a pod sends in the name of others is dropped, counted and told, behind a bridge and behind a device alone."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest

from tests.cluster.policy_cluster import PolicyCluster
from tests.lab import forged
from tests.lab.agents import Agent
from tests.lab.polling import until

pytestmark = pytest.mark.timeout(300)  # the first test of each mode starts the agents

PORT = 9000
SENDERS = {"bridged": "x/a", "routed": "x/b"}
NEIGHBOURS = {"x/a": "x/c", "x/b": "y/a"}
FOREIGN = ("192.0.2.77", "2001:db8::77")
_PLACE_LIMIT_S = 30.0


@pytest.fixture(params=SENDERS)
def sender(request: pytest.FixtureRequest, policies: PolicyCluster) -> str:
    """Give a pod whose device its node's agent knows."""
    agent = agent_of(policies, SENDERS[request.param])
    until(lambda: agent.metric("ebproxy_policy_unplaced_pods") == 0, "every pod's device is known", _PLACE_LIMIT_S)
    return SENDERS[request.param]


def agent_of(cluster: PolicyCluster, pod: str) -> Agent:
    """Find the agent of a pod's node."""
    return next(it for it in cluster.agents if it.node is cluster.pods[pod].node)


def sources(cluster: PolicyCluster, pod: str, family: int) -> dict[str, str]:
    """Say in whose names a pod may try to speak."""
    made = cluster.pods[pod]
    return {
        "a pod of the same node": cluster.pods[NEIGHBOURS[pod]].addresses[family],
        "a pod of another node": cluster.pods["z/a" if pod == "x/b" else "z/b"].addresses[family],
        "its node": made.node.addresses[family],
        "somebody outside": FOREIGN[family],
    }


def spoofed(agent: Agent) -> float:
    return agent.metric("ebproxy_policy_dropped_packets_total", reason="spoofed")


def told(agent: Agent, since: str) -> list[dict[str, Any]]:
    """List the drops of what was sent in others' names."""
    read = agent.cli("flows", "-o", "json", "--verdict", "dropped", "--since", since).stdout.splitlines()
    return [it for it in map(json.loads, read) if it.get("reason") == "spoofed"]


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("target", ["y/c", "z/c"], ids=["to a routed pod", "to a bridged pod"])
def test_a_pod_speaks_for_itself_alone(policies: PolicyCluster, sender: str, target: str, family: int) -> None:
    made, agent, there = policies.pods[sender], agent_of(policies, sender), policies.pods[target]
    address, names = there.addresses[family], sources(policies, sender, family)
    before, now = spoofed(agent), dt.datetime.now(dt.UTC).isoformat()
    with forged.listener(there.netns, address, PORT) as heard:
        for source in names.values():
            forged.send(made.netns, forged.datagram(source, address, PORT, b"forged"), address)
        until(lambda: spoofed(agent) == before + len(names), "each is counted")
        until(lambda: len(told(agent, now)) >= len(names), "each is told")
        flows = told(agent, now)
        assert [it["source"]["address"] for it in flows] == list(names.values())
        for flow in flows:
            assert (flow["direction"], flow["device"]) == ("egress", f"v{made.number}")
            assert flow["destination"]["address"] == address

        own = made.addresses[family]
        forged.send(made.netns, forged.datagram(own, address, PORT, b"own"), address)
        said, (source, *_) = heard.recvfrom(100)
        assert (said, source) == (b"own", own), "the first that has come"
