"""What `ebproxy trace` says of policy, over maps that were planned from records."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.cli.decision import Client, Outcome
from agent.cli.policy_decision import ALLOW, DENY, UNKNOWN, Connection, PolicyMaps
from agent.cli.policy_trace import VARIES, PolicyTrace, address_of_pod
from agent.core.abi import (
    ADDRESS_RANGE,
    POD_RANGE_OWN,
    POLICY_KEY,
    POLICY_STATE,
    U32,
    Direction,
    FrontendKey,
)
from agent.core.addresses import AddressRange, parse_address
from agent.core.policy_planner import PolicySizes
from agent.core.records import Protocol
from agent.errors import AgentUnreachable, EbproxyError
from agent.observe.control import ControlServer
from agent.observe.facts import Facts
from agent.observe.policy_views import PolicyViews
from tests.policy_builders import PolicyNode, cidr, cluster_policy, deny, network_policy, pod, pods, rule, selector, tcp

WEB, SHOPPER, MUTE, FAR = "10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.1.1"
NODE, STRANGER, FRIEND, NEW = "192.0.2.1", "203.0.113.5", "198.51.100.7", "10.1.0.99"
EGRESS, INGRESS = Direction.EGRESS, Direction.INGRESS
ON = Facts(network_policy="standard")


class Store:
    """A node's maps; lookups by longest prefix where the kernel's are."""

    def __init__(self, node: PolicyNode, *, strict: bool = False, answered: bool = False) -> None:
        self.node = node
        state = POLICY_STATE.packer.pack(2, 0, strict, answered)
        tables = {
            "subjects": node.maps.state.subjects.get,
            "identities": node.maps.state.identities.get,
            "blocks": self._block,
            "policy": self._policy,
            "node_addresses": {parse_address(NODE): b"\1"}.get,
            "policy_states": {bytes(4): state}.get,
            "pod_ranges": self._range,
        }
        self.maps = {name: Table(lookup) for name, lookup in tables.items()}

    def _block(self, key: bytes) -> bytes | None:
        _, address = ADDRESS_RANGE.packer.unpack(key)
        found = self.node.maps.peer_of(address)
        return U32.packer.pack(found) if found != 1 else None

    def _policy(self, key: bytes) -> bytes | None:
        whole = int.from_bytes(key[4:], "big")
        size = 8 * len(key[4:])
        for bits in range(size, -1, -1):
            masked = (whole >> (size - bits) << (size - bits)).to_bytes(size // 8, "big")
            value = self.node.maps.state.policy.get(bits.to_bytes(4, sys.byteorder) + masked)
            if value is not None:
                return value
        return None

    def _range(self, key: bytes) -> bytes | None:
        _, address = ADDRESS_RANGE.packer.unpack(key)
        return U32.packer.pack(1 | POD_RANGE_OWN) if AddressRange.parse("10.1.0.0/24").contains(address) else None


class Table:
    """One map."""

    def __init__(self, lookup) -> None:
        self.lookup = lookup


@pytest.fixture
def node() -> PolicyNode:
    return PolicyNode(
        pod("shop/web", WEB, app="web"),
        pod("shop/shopper", SHOPPER, app="shopper"),
        pod("shop/mute", MUTE, app="mute"),
        pod("lab/far", FAR, local=False),
        network_policy(
            "shop/web",
            selector(app="web"),
            ingress=[rule(pods(app="shopper"), ports=[tcp(80)]), rule(cidr("198.51.100.0/24"))],
        ),
        network_policy("shop/mute", selector(app="mute"), egress=[]),
    )


def explain(node: PolicyNode):
    views = PolicyViews(node.model, node.planner)
    return lambda subject, direction, rule: views.explain(subject, direction.name.lower(), rule)


def judge(node: PolicyNode, client: str | None, backend: str, port: int = 80, **switches: bool):
    maps = PolicyMaps(Store(node, **switches), explain(node))
    connection = Connection(client and parse_address(client), parse_address(backend), Protocol.TCP, port)
    return [maps.judge(connection, side) for side in (EGRESS, INGRESS)]


CASES = {
    "allowed": (SHOPPER, WEB, 80, (ALLOW, "no policy is about"), (ALLOW, "NetworkPolicy shop/web, ingress rule 0")),
    "another port": (SHOPPER, WEB, 81, (ALLOW, ""), (DENY, "isolated by NetworkPolicy shop/web")),
    "another pod": (MUTE, WEB, 80, (DENY, "isolated by NetworkPolicy shop/mute"), (DENY, "shop/web")),
    "block": (FRIEND, WEB, 81, (ALLOW, "no pod"), (ALLOW, "NetworkPolicy shop/web, ingress rule 1")),
    "world": (STRANGER, WEB, 80, (ALLOW, "no pod"), (DENY, "isolated by NetworkPolicy shop/web")),
    "own node": (NODE, WEB, 81, (ALLOW, "no pod"), (ALLOW, "own node")),
    "host": (None, WEB, 81, (ALLOW, "no pod"), (ALLOW, "own node")),
    "itself": (WEB, WEB, 81, (ALLOW, "no policy is about"), (ALLOW, "itself")),
    "another node's": (SHOPPER, FAR, 80, (ALLOW, ""), (UNKNOWN, "another node")),
    "from another node": (FAR, WEB, 80, (UNKNOWN, "another node"), (DENY, "shop/web")),
    "outside": (SHOPPER, STRANGER, 80, (ALLOW, ""), (ALLOW, "no pod")),
    "egress out": (MUTE, STRANGER, 80, (DENY, "shop/mute"), (ALLOW, "no pod")),
}


@pytest.mark.parametrize(("client", "backend", "port", "egress", "ingress"), CASES.values(), ids=CASES)
def test_both_ends_are_judged(node: PolicyNode, client, backend, port, egress, ingress) -> None:
    answers = judge(node, client, backend, port)

    assert [answer.verdict for answer in answers] == [egress[0], ingress[0]]
    for answer, (_, words) in zip(answers, (egress, ingress), strict=True):
        assert words in answer.by


def test_a_tier_is_named_by_its_kind(node: PolicyNode) -> None:
    node.apply(cluster_policy("guard", ingress=[deny(cidr("198.51.100.0/24"))]))

    _, ingress = judge(node, FRIEND, WEB)

    assert ingress == (DENY, "ClusterNetworkPolicy guard, ingress rule 0")


@pytest.mark.parametrize(("strict", "verdict"), [(True, DENY), (False, ALLOW)], ids=["strict", "standard"])
def test_a_new_pod_is_held_where_that_is_asked_for(node: PolicyNode, strict: bool, verdict: str) -> None:
    egress, _ = judge(node, NEW, STRANGER, strict=strict)

    assert (egress.verdict, "held" in egress.by) == (verdict, strict)


@pytest.mark.parametrize(("fails_open", "verdict"), [(True, ALLOW), (False, DENY)], ids=["open", "closed"])
def test_what_does_not_fit_is_judged_by_the_setting(fails_open: bool, verdict: str) -> None:
    crowded = PolicyNode(
        pod("shop/web", WEB, app="web"),
        network_policy("shop/web", ingress=[rule(cidr("198.51.100.0/24"), ports=[tcp(80)])]),
        sizes=PolicySizes(policy=1),
        fails_open=fails_open,
    )

    _, ingress = judge(crowded, FRIEND, WEB)

    assert (ingress.verdict, "does not fit" in ingress.by) == (verdict, True)


def trace(node: PolicyNode, outcome: Outcome, client: Client, facts: Facts = ON, **switches: bool):
    traced = PolicyTrace(Store(node, **switches), Path("/nonexistent"), facts)
    traced._maps._explain = explain(node)
    return traced.judge(outcome, FrontendKey(parse_address(WEB), 80, Protocol.TCP), client)


FORWARD = Outcome("forward", "at random", {"service": "shop/x"}, (f"{SHOPPER}:80", f"{WEB}:80"), source_nat=True)
ONE = replace(FORWARD, backends=(f"{WEB}:80",))
PASS = Outcome("pass", "left alone")
CLIENTS = {
    "shopper": Client("pod", parse_address(SHOPPER)),
    "mute": Client("pod", parse_address(MUTE)),
    "stranger": Client("outside", parse_address(STRANGER)),
    "host": Client("host", None),
}
TRACES = {
    "allowed": (ONE, "shopper", {}, "forward", ALLOW, ALLOW, "at random"),
    "denied at ingress": (ONE, "stranger", {}, "drop", ALLOW, DENY, "policy denies the ingress: no rule"),
    "denied at egress": (ONE, "mute", {}, "drop", DENY, DENY, "policy denies the egress: no rule"),
    "refused at egress": (ONE, "mute", {"answered": True}, "reject", DENY, DENY, "policy denies the egress"),
    "not refused at ingress": (ONE, "stranger", {"answered": True}, "drop", ALLOW, DENY, "ingress"),
    "denied by one backend": (FORWARD, "stranger", {}, "forward", ALLOW, VARIES, "policy denies 1 of 2"),
    "denied by all": (FORWARD, "mute", {}, "drop", DENY, VARIES, "policy denies the egress"),
    "no service": (PASS, "shopper", {}, "pass", ALLOW, ALLOW, "left alone"),
    "no service, denied": (PASS, "stranger", {}, "drop", ALLOW, DENY, "policy denies the ingress"),
    "goes nowhere": (Outcome("reject", "no usable endpoint"), "mute", {}, "reject", ALLOW, ALLOW, "no usable"),
    "host": (ONE, "host", {}, "forward", ALLOW, ALLOW, "at random"),
}


@pytest.mark.parametrize(
    ("outcome", "client", "switches", "verdict", "egress", "ingress", "reason"), TRACES.values(), ids=TRACES
)
def test_a_trace_takes_policy_in(node: PolicyNode, outcome, client, switches, verdict, egress, ingress, reason) -> None:
    judged = trace(node, outcome, CLIENTS[client], **switches)

    assert (judged.outcome.verdict, judged.outcome.backends) == (verdict, outcome.backends)
    assert {side: answer["verdict"] for side, answer in judged.policy.items()} == {"egress": egress, "ingress": ingress}
    assert reason in judged.outcome.reason


def crowded_node() -> PolicyNode:
    """Make a node whose verdicts do not fit."""
    ports = [rule(ports=[tcp(number)]) for number in range(1, 9, 2)]
    return PolicyNode(
        pod("shop/web", WEB, app="web"),
        pod("shop/mute", MUTE, app="mute"),
        network_policy("shop/mute", selector(app="mute"), egress=ports),
        sizes=PolicySizes(policy=1),
    )


# As deny() and policy_turn_away() in the programs: what policy denies at the egress is answered, nothing else is.
DENIED = {
    "policy": (None, MUTE, ONE, "reject", "isolated by NetworkPolicy shop/mute"),
    "overflow": (crowded_node, MUTE, ONE, "reject", "does not fit"),
    "held": (None, NEW, ONE, "drop", "held"),
    "held, to no service": (None, NEW, PASS, "drop", "held"),
    "policy, at the ingress": (None, STRANGER, ONE, "drop", "isolated by NetworkPolicy shop/web"),
}


@pytest.mark.parametrize(("make", "client", "outcome", "answered", "by"), DENIED.values(), ids=DENIED)
@pytest.mark.parametrize("is_answered", [True, False], ids=["reject", "drop"])
def test_only_what_policy_denies_at_the_egress_is_rejected(
    node: PolicyNode, make, client, outcome, answered, by, is_answered: bool
) -> None:
    asked = make() if make else node
    judged = trace(asked, outcome, Client("pod", parse_address(client)), strict=True, answered=is_answered)

    assert judged.outcome.verdict == (answered if is_answered else "drop")
    assert by in judged.outcome.reason


def test_where_policy_is_off_nothing_is_asked(node: PolicyNode) -> None:
    judged = trace(node, ONE, CLIENTS["mute"], Facts())

    assert judged.outcome is ONE
    assert {answer["by"] for answer in judged.policy.values()} == {"NetworkPolicy is not enforced"}


def test_keys_are_looked_up_whole(node: PolicyNode) -> None:
    """The tests' table takes keys as the kernel's does: whatever is behind their prefix must not matter."""
    for key in node.maps.state.policy:
        bits, *rest = POLICY_KEY.packer.unpack(key)
        assert Store(node)._policy(POLICY_KEY.packer.pack(96, *rest)) is not None, bits


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Path]:
    """Answer from a state directory which addresses a pod has."""
    known = {"shop/web": ["10.1.0.1", "fd00::1"], "shop/old": ["10.1.0.2"], "shop/ended": []}

    def addresses(pod: str) -> list[str] | None:
        return known.get(pod)

    server = ControlServer(tmp_path, {"pod_addresses": addresses})
    server.start()
    yield tmp_path
    server.stop()


@pytest.mark.parametrize(("is_ipv4", "address"), [(True, "10.1.0.1"), (False, "fd00::1")], ids=["IPv4", "IPv6"])
def test_a_pods_address_is_of_the_targets_family(agent: Path, is_ipv4: bool, address: str) -> None:
    assert address_of_pod(agent, "shop/web", ON, is_ipv4=is_ipv4) == parse_address(address)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shop/nosuch", "pod shop/nosuch is not known; `ebproxy endpoint list`"),
        ("shop/old", "pod shop/old has no IPv6 address"),
        ("shop/ended", "pod shop/ended has no IPv6 address"),
    ],
)
def test_a_pod_that_is_not_known_is_an_error(agent: Path, name: str, words: str) -> None:
    with pytest.raises(EbproxyError, match=words):
        address_of_pod(agent, name, ON, is_ipv4=False)


def test_a_pods_name_is_not_looked_up_without_policy(agent: Path) -> None:
    assert address_of_pod(agent, "shop/nosuch", Facts(), is_ipv4=True) is None


def test_a_pods_name_cannot_be_looked_up_without_an_agent(tmp_path: Path) -> None:
    with pytest.raises(AgentUnreachable, match=r"pod shop/web is not looked up, .* no agent .* `--from ADDRESS`"):
        address_of_pod(tmp_path, "shop/web", ON, is_ipv4=True)
