"""Events become flows with names, and a history that readers follow at their own pace."""

from __future__ import annotations

import itertools
import threading

import msgspec
import pytest

from agent.core.abi import FLOW_EVENT, PEER_WORLD, TUPLE, Direction, Reason
from agent.core.addresses import parse_address
from agent.core.events import Upsert
from agent.core.policy import ADMIN, KIND_NAMES, RuleName
from agent.core.policy_records import Tier
from agent.core.records import Kind, ObjectKey, Protocol
from agent.observe.flow_log import FlowFilter, FlowLog
from agent.observe.flows import FlowEvent, FlowNamer, PolicyNames, flow_document, time_text
from tests.builders import key
from tests.policy_builders import (
    PolicyNode,
    cidr,
    cluster_policy,
    deny,
    namespace,
    network_policy,
    pod,
    pods,
    rule,
    selector,
    tcp,
)

WEB, SHOPPER, REMOTE, STRANGER, BLOCKED = "10.1.0.1", "10.1.0.2", "10.1.1.1", "203.0.113.5", "192.0.2.77"
BOOT_NS, NOW_NS = 1_000, 1_700_000_000_000_000_000
EGRESS, INGRESS = Direction.EGRESS, Direction.INGRESS
NO_MAIL = msgspec.structs.replace(deny(ports=[tcp(25)]), name="no-mail")
GUARD = KIND_NAMES[ADMIN], ObjectKey("", "guard"), EGRESS


@pytest.fixture
def node() -> PolicyNode:
    return PolicyNode(
        namespace("shop", team="a"),
        pod("shop/web", WEB, "fd00::1", app="web"),
        pod("shop/shopper", SHOPPER, app="shopper"),
        pod("lab/far", REMOTE, local=False, app="far"),
        network_policy("shop/deny", ingress=[], egress=[]),
        network_policy("shop/web", selector(app="web"), ingress=[rule(pods(app="shopper"), ports=[tcp(80)])]),
        network_policy("shop/out", selector(app="shopper"), egress=[rule(cidr("192.0.2.0/24"))]),
        cluster_policy("guard", egress=[NO_MAIL, deny(ports=[tcp(26)])]),
    )


@pytest.fixture
def namer(node: PolicyNode) -> FlowNamer:
    return FlowNamer(PolicyNames(node.model, lambda: node.planner), lambda: NOW_NS, lambda: BOOT_NS)


def identity(node: PolicyNode, ip: str) -> int:
    return node.planner.identity_of(parse_address(ip))


def raw(
    source: str,
    destination: str,
    *,
    ports: tuple[int, int] = (40_000, 80),
    protocol: int = Protocol.TCP,
    direction: Direction = EGRESS,
    allowed: bool = False,
    reason: Reason = Reason.POLICY,
    rule: int = 0,
    who: tuple[int, int] = (0, 0),
    time_ns: int = BOOT_NS,
    device: int = 1,
    flags: int = 0x02,
) -> bytes:
    """An event as a program writes it; ``who``: subject and peer."""
    ends = TUPLE.packer.pack(
        *map(parse_address, (source, destination)), *(it.to_bytes(2, "big") for it in ports), protocol, bytes(3)
    )
    return FLOW_EVENT.packer.pack(time_ns, ends, *who, rule, device, allowed, direction, reason, flags, 0)


def test_an_event_is_read() -> None:
    record = raw(
        "fd00::1",
        "fd00::2",
        ports=(40_000, 53),
        protocol=17,
        direction=INGRESS,
        allowed=True,
        rule=9,
        who=(16, 1),
        time_ns=7,
        device=3,
    )

    assert FlowEvent.unpack(record) == FlowEvent(
        time_ns=7,
        source=parse_address("fd00::1"),
        destination=parse_address("fd00::2"),
        source_port=40_000,
        destination_port=53,
        protocol=17,
        subject=16,
        peer=1,
        rule=9,
        device=3,
        is_allowed=True,
        direction=INGRESS,
        reason=Reason.POLICY,
        flags=2,
    )


def test_a_denial_names_both_ends_and_who_isolates(node: PolicyNode, namer: FlowNamer) -> None:
    who = identity(node, WEB), identity(node, REMOTE)

    said = flow_document(namer.name(FlowEvent.unpack(raw(WEB, REMOTE, who=who, time_ns=BOOT_NS + 5_000))))

    assert said == {
        "time": "2023-11-14T22:13:20.000005Z",
        "verdict": "dropped",
        "direction": "egress",
        "protocol": "TCP",
        "source": {
            "address": WEB,
            "port": 40_000,
            "namespace": "shop",
            "pod": "web",
            "identity": who[0],
            "labels": {
                "kind": "pods",
                "namespace": "shop",
                "namespace_labels": {},
                "labels": {"app": "web"},
                "ports": [],
                "block": None,
            },
        },
        "destination": {
            "address": REMOTE,
            "port": 80,
            "namespace": "lab",
            "pod": "far",
            "identity": who[1],
            "labels": {
                "kind": "pods",
                "namespace": "",
                "namespace_labels": {},
                "labels": {"app": "far"},
                "ports": [],
                "block": None,
            },
        },
        "tcp_flags": ["SYN"],
        "reason": "policy",
        "why": "no rule allows it; isolated by NetworkPolicy shop/deny",
        "policy": None,
        "isolated_by": ["shop/deny"],
        "device": "",
    }


def test_an_allowance_names_the_rule(node: PolicyNode, namer: FlowNamer) -> None:
    number = rule_number(node, RuleName(Kind.NETWORK_POLICY.value, key("shop/web"), INGRESS, 0))
    who = identity(node, WEB), identity(node, SHOPPER)

    said = flow_document(
        namer.name(FlowEvent.unpack(raw(SHOPPER, WEB, who=who, direction=INGRESS, allowed=True, rule=number)))
    )

    assert (said["verdict"], said["why"]) == ("forwarded", "NetworkPolicy shop/web, ingress rule 0")
    assert said["policy"] == {"kind": "NetworkPolicy", "namespace": "shop", "name": "web", "rule": 0, "rule_name": ""}
    assert [said[end]["identity"] for end in ("destination", "source")] == list(who)


@pytest.mark.parametrize(
    ("rule", "name", "why"),
    [(0, "no-mail", 'egress rule 0 "no-mail"'), (1, "", "egress rule 1")],
    ids=["has a name", "has none"],
)
def test_a_rule_is_told_by_its_own_name_too(node: PolicyNode, namer: FlowNamer, rule: int, name: str, why: str) -> None:
    number = rule_number(node, RuleName(*GUARD, rule))

    said = flow_document(namer.name(FlowEvent.unpack(raw(WEB, REMOTE, rule=number))))

    assert said["why"] == f"ClusterNetworkPolicy guard, {why}"
    policy = {"kind": "ClusterNetworkPolicy", "namespace": "", "name": "guard"}
    assert said["policy"] == {**policy, "rule": rule, "rule_name": name}


@pytest.mark.parametrize(
    "changed",
    [cluster_policy("guard"), cluster_policy("guard", tier=Tier.BASELINE, egress=[NO_MAIL])],
    ids=["fewer rules", "another tier"],
)
def test_a_rule_that_changed_meanwhile_has_no_name(node: PolicyNode, namer: FlowNamer, changed) -> None:
    """The model is ahead of what is planned."""
    number = rule_number(node, RuleName(*GUARD, 0))
    node.model.apply(Upsert(changed))

    assert namer.name(FlowEvent.unpack(raw(WEB, REMOTE, rule=number))).rule_name == ""


@pytest.mark.parametrize(
    ("ends", "direction"),
    [((WEB, REMOTE), EGRESS), ((REMOTE, WEB), INGRESS), ((REMOTE, WEB), EGRESS), ((WEB, REMOTE), INGRESS)],
    ids=["asks", "is asked", "is answered", "answers"],
)
def test_whoever_sent_the_packet_each_end_has_its_identity(
    node: PolicyNode, namer: FlowNamer, ends: tuple[str, str], direction: Direction
) -> None:
    """The direction is the connection's: an answer goes the other way."""
    who = identity(node, WEB), identity(node, REMOTE)

    flow = namer.name(FlowEvent.unpack(raw(*ends, who=who, direction=direction)))

    assert [flow.source.identity, flow.destination.identity] == [identity(node, end) for end in ends]


def test_what_is_no_pod_is_named_by_its_block(node: PolicyNode, namer: FlowNamer) -> None:
    who = identity(node, SHOPPER), identity(node, BLOCKED)

    said = flow_document(namer.name(FlowEvent.unpack(raw(SHOPPER, BLOCKED, who=who))))

    assert said["destination"]["pod"] == ""
    assert said["destination"]["labels"]["block"] == "192.0.2.0/24"


def test_the_world_is_called_that(node: PolicyNode, namer: FlowNamer) -> None:
    who = identity(node, SHOPPER), PEER_WORLD

    assert flow_document(namer.name(FlowEvent.unpack(raw(SHOPPER, STRANGER, who=who))))["destination"]["labels"][
        "kind"
    ] == ("world")


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        (Reason.SPOOFED, "not an address of the pod"),
        (Reason.HELD, "not been applied yet"),
        (Reason.OVERFLOW, "does not fit"),
        (Reason.UNREADABLE, "contradict"),
        (Reason.UNTRACKED, "could not be entered"),
    ],
    ids=lambda it: it.name.lower() if isinstance(it, Reason) else "",
)
def test_every_reason_is_said(namer: FlowNamer, reason: Reason, why: str) -> None:
    said = flow_document(namer.name(FlowEvent.unpack(raw(STRANGER, REMOTE, reason=reason))))

    assert (said["reason"], said["policy"], said["isolated_by"]) == (reason.name.lower(), None, [])
    assert why in said["why"]
    assert said["device"] == ("lo" if reason in (Reason.SPOOFED, Reason.HELD, Reason.UNREADABLE) else "")


def test_numbers_that_are_no_more_are_no_error(namer: FlowNamer) -> None:
    said = flow_document(namer.name(FlowEvent.unpack(raw(WEB, REMOTE, who=(4_000, 4_001), rule=9_999))))

    assert (said["source"]["labels"], said["destination"]["labels"]) == (None, None)
    assert (said["policy"], said["why"]) == (None, "a rule that is no more")


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [(0, "1970-01-01T00:00:00.000000Z"), (1_700_000_000_123_456_789, "2023-11-14T22:13:20.123456Z")],
)
def test_times_are_written_as_rfc_3339(time_ns: int, text: str) -> None:
    assert time_text(time_ns) == text


FLOWS = {
    "web drops": (raw(WEB, REMOTE), {"": True, "dropped": True, "shop/web": True, "lab/far": True, "lab": True}),
    "passes": (raw(SHOPPER, STRANGER, allowed=True), {"": True, "forwarded": True, "shop/shopper": True, "shop": True}),
    "strangers": (raw(STRANGER, BLOCKED), {"": True, "dropped": True}),
}
FILTERS = {
    "": FlowFilter(),
    "dropped": FlowFilter(verdict="dropped"),
    "forwarded": FlowFilter(verdict="forwarded"),
    "shop/web": FlowFilter(pod="shop/web"),
    "shop/shopper": FlowFilter(pod="shop/shopper"),
    "lab/far": FlowFilter(pod="lab/far"),
    "shop": FlowFilter(namespace="shop"),
    "lab": FlowFilter(namespace="lab"),
}


@pytest.mark.parametrize(("flow", "wanted"), list(itertools.product(FLOWS, FILTERS)))
def test_a_filter_leaves_out_what_is_not_asked_for(namer: FlowNamer, flow: str, wanted: str) -> None:
    record, by_filter = FLOWS[flow]
    expected = by_filter.get(wanted, False) or (wanted == "shop" and flow == "web drops")

    assert FILTERS[wanted].wants(namer.name(FlowEvent.unpack(record))) is expected


def said_ports(parts: list[dict | None]) -> list[int | str]:
    """Write what a reader got: source ports, and losses."""
    return [part["flow"]["source"]["port"] if "flow" in part else f"lost {part['lost']}" for part in parts if part]


def events(*ports: int, **more) -> list[bytes]:
    return [raw(WEB, REMOTE, ports=(port, 80), **more) for port in ports]


@pytest.fixture
def log(namer: FlowNamer) -> FlowLog:
    return FlowLog(namer, limit=4, heartbeat_s=0.01)


def test_history_is_bounded_and_in_order(log: FlowLog) -> None:
    log.take(events(1, 2, 3), 0)
    log.take(events(4, 5, 6), 0)

    assert said_ports(list(log.read(FlowFilter()))) == [3, 4, 5, 6]


def test_losses_stand_where_they_came(namer: FlowNamer) -> None:
    log = FlowLog(namer)
    log.take(events(1), 3)
    log.take([], 4)
    log.take(events(2), 0)

    assert said_ports(list(log.read(FlowFilter()))) == [1, "lost 7", 2]


def test_since_leaves_out_what_is_older(log: FlowLog) -> None:
    log.take([*events(1), *events(2, time_ns=BOOT_NS + 10)], 0)

    assert said_ports(list(log.read(FlowFilter(since_ns=NOW_NS + 10)))) == [2]


def test_what_no_program_writes_is_left_out(log: FlowLog, caplog: pytest.LogCaptureFixture) -> None:
    log.take([b"short", *events(1), raw(WEB, REMOTE)[:-8] + bytes([0, 7, 0, 0]) + bytes(4)], 0)

    assert said_ports(list(log.read(FlowFilter()))) == [1]
    assert len(caplog.records) == 2


def test_who_follows_gets_what_comes(log: FlowLog) -> None:
    log.take(events(1), 0)
    follower = log.read(FlowFilter(), follow=True)
    assert said_ports([next(follower)]) == [1]

    threading.Thread(target=log.take, args=(events(2), 0)).start()
    assert said_ports([next(part for part in follower if part)]) == [2]
    log.close()
    assert said_ports(list(follower)) == []


def test_who_follows_without_history_gets_only_that(log: FlowLog) -> None:
    log.take(events(1), 0)
    follower = log.read(FlowFilter(), follow=True, history=False)
    assert next(follower) is None
    log.take(events(2), 0)

    assert said_ports([next(follower)]) == [2]


def test_who_is_too_slow_is_told_what_was_overwritten(log: FlowLog) -> None:
    follower = log.read(FlowFilter(), follow=True)
    log.take(events(1), 0)
    assert said_ports([next(follower)]) == [1]
    log.take(events(2, 3, 4, 5, 6, 7), 5)

    got = list(itertools.takewhile(lambda part: part is not None, follower))

    assert said_ports(got) == ["lost 3", 5, 6, 7, "lost 5"]


def test_a_silent_log_lets_its_followers_look_whether_they_are_wanted(log: FlowLog) -> None:
    assert next(log.read(FlowFilter(), follow=True)) is None


def rule_number(node: PolicyNode, wanted: RuleName) -> int:
    return next(number for number, name in node.planner.numbers.rules.items() if name == wanted)
