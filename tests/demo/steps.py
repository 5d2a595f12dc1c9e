"""The steps of the demo. Each shows something, checks what it shows, and returns its result in a line."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from rich.text import Text

from tests.demo.cluster import EMPTY_IPS, PORT, WEB_IPS, Cluster
from tests.demo.policy import deny_and_allow
from tests.demo.screen import Screen, bars, check
from tests.lab.agents import Agent
from tests.lab.traffic import MODES, Answer, Churn, churning

Step = Callable[[Screen, Cluster], str]

HOW = {"tcp": "TCP", "udp": "UDP, connected", "udp-unconnected": "UDP, unconnected"}
_ASKED = 200
_SIGMAS = 6
_CONVERGE_LIMIT_S = 5.0


def start_agents(screen: Screen, cluster: Cluster) -> str:
    """Start an agent a node and wait until each has programmed everything listed."""
    started = time.monotonic()
    for agent in cluster.agents:
        agent.start()
    for agent in cluster.agents:
        agent.wait()
    took = time.monotonic() - started
    rows = []
    for agent in cluster.agents:
        status, node = agent.status(), agent.node
        rows.append((node.name, node.addresses[0], status["services"], status["backends"], status["layout"]))
    screen.table(("node", "address", "services", "backends", "map layout"), rows)
    return f"both nodes programmed {took:.1f} s after the start, compiling included"


def spread(screen: Screen, cluster: Cluster) -> str:
    """TCP and UDP through the ClusterIPs, from a pod and from a host."""
    names = [pod.name for pod in cluster.web[:2]]
    rows, total = [], 0
    for place, client in cluster.clients.items():
        for address in WEB_IPS:
            for mode in MODES:
                counted = client.spread(mode, address, PORT, _ASKED)
                rows.append((place, HOW[mode], address, bars(counted, names)))
                total += counted.total()
                _check_even(counted, names, f"{mode} to {address} from {place}")
    screen.table(("from", "how", "ClusterIP", f"who answered, of {_ASKED}"), rows)
    return f"{total} connections and datagrams, all answered, spread evenly"


def _check_even(counted: Counter[str], names: list[str], what: str) -> None:
    check(set(counted) == set(names), f"{what}: {dict(counted)}")
    share = 1 / len(names)
    deviation = (_ASKED * share * (1 - share)) ** 0.5
    is_even = all(abs(counted[name] - _ASKED * share) < _SIGMAS * deviation for name in names)
    check(is_even, f"{what} is uneven: {dict(counted)}")


def peers(screen: Screen, cluster: Cluster) -> str:
    """What applications are told about who they speak to: the ClusterIP they asked for."""
    client = cluster.clients["pod on node-1"]
    rows = []
    for address in (*WEB_IPS, f"::ffff:{WEB_IPS[0]}"):
        for mode in MODES:
            answer = client.ask(mode, address, PORT)
            call = "recvfrom" if mode == "udp-unconnected" else "getpeername"
            told = answer.source if mode == "udp-unconnected" else answer.peer
            rows.append((HOW[mode], address, call, _endpoint(told), answer.name or answer.error))
            check(told == (address, PORT), f"{call} of {mode} to {address}: {told} {answer.error}")
    screen.table(("how", "asked for", "call", "says", "who answered"), rows)
    return "getpeername and recvfrom report the ClusterIP, for IPv4, IPv6 and IPv4-mapped sockets"


def _endpoint(pair: tuple[str, int] | None) -> str:
    return f"{pair[0]} port {pair[1]}" if pair else "-"


def scale(screen: Screen, cluster: Cluster) -> str:
    """Edit the Service's manifest, and time the way from the file to the first connection."""
    up, names = [], [pod.name for pod in cluster.web]
    client = cluster.clients["pod on node-1"]
    with ThreadPoolExecutor() as pool:
        for count in (4, 2, 3):
            before = len(cluster.agents[0].backends(_frontend()) or ())
            check(before > 0, "the maps do not say what the Service had before")
            in_maps = [pool.submit(_when, agent, count) for agent in cluster.agents]
            written = time.monotonic()
            cluster.scale(count)
            replied = client.first_reply(WEB_IPS[0], PORT, names[before:count]) if count > before else None
            maps_ms = max(1000 * (seen.result() - written) for seen in in_maps)
            reply_ms = 1000 * (replied - written) if replied else 0.0
            up.append((f"{before} -> {count}", f"{maps_ms:.0f} ms", f"{reply_ms:.0f} ms" if replied else "-"))
            answered = client.spread("tcp", WEB_IPS[0], PORT, 100)
            check(set(answered) == set(names[:count]), f"scaled to {count}, yet {dict(answered)} answered")
    screen.table(("backends", "in the maps of both nodes", "first connection to a new one"), up)
    return f"from the file's write to a new backend's first connection: {up[0][2]} and {up[2][2]}"


def _frontend() -> str:
    return f"{WEB_IPS[0]}:{PORT}/TCP"


def _when(agent: Agent, count: int) -> float:
    """Wait until the maps hold so many backends; returns the monotonic time."""
    agent.wait_for(_frontend(), count, _CONVERGE_LIMIT_S)
    return time.monotonic()


def refusal(screen: Screen, cluster: Cluster) -> str:
    """A Service without endpoints refuses at once."""
    rows = []
    for place, client in cluster.clients.items():
        for address in EMPTY_IPS:
            for mode in MODES:
                started = time.monotonic()
                answer = client.ask(mode, address, PORT)
                rows.append((place, HOW[mode], address, answer.error, f"{1000 * (time.monotonic() - started):.1f} ms"))
                check(answer == Answer(error="ECONNREFUSED"), f"{mode} to {address} from {place}: {answer}")
    screen.table(("from", "how", "ClusterIP", "result", "after"), rows)
    return "ECONNREFUSED at once, on connect() and on sendto()"


def trace(screen: Screen, cluster: Cluster) -> str:
    """Ask ``ebproxy trace`` what would happen, and see that it does."""
    rows = []
    for address, verdict in ((WEB_IPS[0], "forward"), (EMPTY_IPS[0], "reject"), (cluster.web[0].v4, "pass")):
        port = PORT if address != cluster.web[0].v4 else 8080
        said = cluster.agents[0].json("trace", "--from", "host", "--to", f"{address}:{port}")
        backends = " ".join(said["backends"])
        rows.append((f"{address}:{port}", said["verdict"], said["reason"], backends or "-"))
        check(said["verdict"] == verdict, f"trace to {address} says {said['verdict']}, not {verdict}")
    screen.table(("to", "verdict", "reason", "backends"), rows)
    return "the maps the kernel uses say what the steps above saw"


def kill(screen: Screen, cluster: Cluster) -> str:
    """End the agent as kill -9 does, under traffic, and start it again."""
    agent = cluster.agents[0]
    targets = [(mode, address, PORT) for mode in MODES for address in WEB_IPS]
    places = (cluster.lab.nodes[0].host, cluster.lab.nodes[0].pods["shopper"].place)
    with churning(places[0], targets) as host, churning(places[1], targets) as pod, screen.live() as live:

        def show(phase: str, more: int) -> None:
            goal = host.tally.made + more
            while host.tally.made < goal and not host.tally.failed:
                host.wait_for(10)
                live.update(_counted(phase, host, pod))
            screen.say(_counted(phase, host, pod))

        show("agent runs", 200)
        agent.kill()
        show("agent killed with -9", 300)
        dead = host.tally.made
        started = time.monotonic()
        agent.start().wait()
        ready_s = time.monotonic() - started
        writes = agent.map_writes()
        show("agent started again", 200)
        tallies = [host.stop(), pod.stop()]
        screen.say(_counted("in all", host, pod))
    made, failed = (sum(getattr(tally, what) for tally in tallies) for what in ("made", "failed"))
    held = sum(tally.held for tally in tallies)
    check(failed == 0, f"{failed} of {made + failed} failed: {[tally.errors for tally in tallies]}")
    check(writes == 0, f"the new agent wrote {writes:.0f} map entries where nothing had changed")
    check(host.tally.made > dead, "no connection was made after the restart")
    return f"{made} made, {held} exchanges on held ones, {failed} failed; ready again in {ready_s:.1f} s, 0 map writes"


def _counted(phase: str, *churns: Churn) -> Text:
    made, failed = (sum(getattr(churn.tally, what) for churn in churns) for what in ("made", "failed"))
    style = "red" if failed else "green"
    return Text(f"{phase:22} {made:6} connections made, ").append(f"{failed} failed", style)


def cleanup(screen: Screen, cluster: Cluster) -> str:
    """Stop the agents, take everything away with ``ebproxy cleanup``, and look."""
    removed = 0
    for agent in cluster.agents:
        agent.stop()
        ran = agent.cli("cleanup")
        check(ran.returncode == 0, ran.stderr)
        check(not agent.state_dir.exists(), f"{agent.state_dir} is still there")
        left = list(agent.bpffs.glob("*"))
        check(not left, f"{left} is still there")
        removed += 1
    is_gone = cluster.clients["host node-2"].is_unanswered("tcp", WEB_IPS[0], PORT)
    check(is_gone, "the Service still answers")
    return f"{removed} nodes clean; the ClusterIP is nobody's address again"


STEPS: tuple[tuple[str, Step], ...] = (
    ("An agent on each node, on one directory of Kubernetes YAML", start_agents),
    ("TCP and UDP through the ClusterIPs, IPv4 and IPv6", spread),
    ("Who the applications think they speak to", peers),
    ("A Service scaled by editing its manifest", scale),
    ("A Service without endpoints", refusal),
    ("ebproxy trace", trace),
    ("A NetworkPolicy: who is denied, which policy it is, and how soon it allows", deny_and_allow),
    ("kill -9 of the agent under traffic, and its restart", kill),
    ("ebproxy cleanup", cleanup),
)
