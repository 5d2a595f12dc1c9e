"""The step of NetworkPolicy: connections that are denied, who says why, and how soon one is allowed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from agent.cli.flows import row
from agent.observe.flows import time_text
from tests.demo.cluster import PORT, WEB_IPS, Cluster
from tests.demo.screen import Screen, check
from tests.lab.agents import Agent
from tests.lab.lab import Pod
from tests.lab.manifests import WEB
from tests.lab.polling import until

_PORT = WEB[0].target
_ENFORCED = "ebproxy_policy_enforcement_duration_seconds"
_CLIENT = "pod on node-1"
_OTHER = "host node-2"


def deny_and_allow(screen: Screen, cluster: Cluster) -> str:
    """Isolate the web pods, find out from the flows who denies it, allow one client, and time that."""
    try:
        _deny(screen, cluster)
        reply_ms = _allow(screen, cluster)
    finally:
        cluster.open()
    other, web = cluster.clients[_OTHER], cluster.web[0]
    until(lambda: other.ask("tcp", web.v4, _PORT, 0.3).name == web.name, "everybody is let in")
    return f"the drop names shop/web; from the file's write to the first connection that it allows: {reply_ms:.0f} ms"


def _deny(screen: Screen, cluster: Cluster) -> None:
    client = cluster.clients[_CLIENT]
    cluster.let_in()
    until(lambda: all(client.is_unanswered("tcp", pod.v4, _PORT) for pod in _pods(cluster)), "the pods are isolated")
    asked_ns = time.time_ns()
    for address in WEB_IPS:
        error = client.ask("tcp", address, PORT, 0.3).error
        screen.say(f"web lets nobody in: {_CLIENT} connects to {address} port {PORT}: {error}")
        check(error == "timeout", f"{address} answers with {error or 'its name'} though no policy allows it")
    dropped = _told(cluster, asked_ns, "dropped", len(WEB_IPS))
    _show(screen, dropped)
    check(all(flow["isolated_by"] == ["shop/web"] for _, flow in dropped), "a flow does not name the policy")


def _allow(screen: Screen, cluster: Cluster) -> float:
    """Allow the client; returns milliseconds from the file's write to its first connection."""
    client, pods = cluster.clients[_CLIENT], _pods(cluster)
    before = {agent.node.name: _enforced(agent) for agent in cluster.agents}
    written_ns = time.time_ns()
    written = time.monotonic()
    cluster.let_in("shopper")
    reply_ms = 1000 * (client.first_reply(WEB_IPS[0], PORT, [pod.name for pod in pods]) - written)
    until(lambda: all(client.ask("tcp", pod.v4, _PORT, 0.3).name == pod.name for pod in pods), "every web pod answers")
    _show(screen, _told(cluster, written_ns, "forwarded", 1))
    for agent in cluster.agents:
        count, total_s = (after - was for after, was in zip(_enforced(agent), before[agent.node.name], strict=True))
        check(count > 0, f"{agent.node.name} does not say how long it took")
        screen.say(f"{agent.node.name}: {1000 * total_s / count:.1f} ms from the event to verdicts in the maps")
    is_denied = cluster.clients[_OTHER].is_unanswered("tcp", cluster.web[0].v4, _PORT)
    check(is_denied, f"{_OTHER} is let in too")
    return reply_ms


def _pods(cluster: Cluster) -> list[Pod]:
    return cluster.web[:3]


def _told(cluster: Cluster, since_ns: int, verdict: str, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Wait until both nodes have told so much since then of what shopper asked the web pods; by the node's name."""

    def told() -> list[tuple[str, dict[str, Any]]]:
        found = [(agent.node.name, flow) for agent in cluster.agents for flow in _flows(agent, since_ns, verdict)]
        return found if len(found) >= count else []

    return until(told, f"{count} flows are told")


def _flows(agent: Agent, since_ns: int, verdict: str) -> Iterator[dict[str, Any]]:
    wanted = ("--verdict", verdict, "--pod", "shop/shopper", "--since", time_text(since_ns))
    ran = agent.cli("flows", "-o", "json", *wanted)
    check(ran.returncode == 0, ran.stderr)
    for line in ran.stdout.splitlines():
        flow = json.loads(line)
        if flow.get("direction") == "ingress" and flow["destination"]["port"] == _PORT:
            yield flow


def _show(screen: Screen, told: list[tuple[str, dict[str, Any]]]) -> None:
    """Print the first flow of each pair of addresses, as `ebproxy flows` does but for what is equal in all of them.

    So an IPv6 address and its port are not broken in two.
    """
    rows = {(flow["source"]["address"], flow["destination"]["address"]): (node, row(flow)) for node, flow in told[::-1]}
    cells = [(node, shown[1], *shown[4:]) for node, shown in rows.values()]
    screen.table(("node", "verdict", "source", "destination", "why"), cells)


def _enforced(agent: Agent) -> tuple[float, float]:
    """Read how many changes of policy an agent has enforced, and how long they took altogether, in seconds."""
    return agent.metric(f"{_ENFORCED}_count"), agent.metric(f"{_ENFORCED}_sum")
