"""The life of a connection that policy looks at: its replies, its end, verdicts that are taken back, and guesses."""

from __future__ import annotations

import time
from itertools import product
from typing import NamedTuple

import pytest

from agent.core.abi import PEER_ANY, PEER_WORLD, Direction, FlowFlag, Reason, SubjectFlag
from tests.bpf import packet_path as at
from tests.bpf.harness import Ran
from tests.bpf.packets import PROTOCOLS, End, echo_request, fragments, icmp_error, packet, reply_to, settle
from tests.bpf.policy_path import ISOLATED, NUMBERS, ONE, REMOTE, TWO, PolicyPath, fault_of_pass, is_dropped
from tests.bpf.talk import NUMBERS as FAMILIES

CLIENT_PORT, SERVER_PORT = 40_000, 8080
SOME_S = 3600


class Pair(NamedTuple):
    """The isolated pod and a peer, one of which is the client; packets of either go past the pod's device."""

    policy: PolicyPath
    protocol: str
    family: int
    is_client: bool
    ports: tuple[int, int] = (CLIENT_PORT, SERVER_PORT)

    @property
    def direction(self) -> Direction:
        return Direction.EGRESS if self.is_client else Direction.INGRESS

    @property
    def ends(self) -> tuple[End, End]:
        """The client and the server."""
        own, peer = at.POD_ONE[self.family], at.REMOTE_POD[self.family]
        client, server = (own, peer) if self.is_client else (peer, own)
        return End(client, self.ports[0]), End(server, self.ports[1])

    def allow(self, number: int = 7) -> None:
        self.policy.rule(self.direction, REMOTE, self.protocol, self.ports[1], number=number)

    def deny(self, *, moves: bool = True) -> None:
        port = self.ports[1]
        self.policy.rule(self.direction, REMOTE, self.protocol, port, allowed=False, number=0, moves=moves)

    def ask(self, flags: str = "S") -> bool:
        """Whether a packet of the client's passes, unchanged."""
        return self._passes(packet(self.protocol, *self.ends, flags=flags), self.is_client)

    def answer(self, flags: str = "SA") -> bool:
        """Whether a packet of the server's does."""
        client, server = self.ends
        return self._passes(packet(self.protocol, server, client, flags=flags), not self.is_client)

    def _passes(self, sent, is_own: bool) -> bool:
        ran = self.policy.from_pod(sent) if is_own else self.policy.to_pod(sent)
        assert is_dropped(ran) or not fault_of_pass(ran, sent)
        return not is_dropped(ran)


PAIRS = pytest.mark.parametrize(
    ("protocol", "family", "is_client"),
    [
        pytest.param(protocol, family, is_client, id=f"{protocol}-IPv{(4, 6)[family]}-{role}")
        for protocol, family, (is_client, role) in product(PROTOCOLS, (0, 1), ((True, "client"), (False, "server")))
    ],
)


@pytest.fixture
def pair(policy, protocol, family, is_client) -> Pair:
    return Pair(policy, protocol, family, is_client)


def now() -> int:
    return int(time.clock_gettime(time.CLOCK_MONOTONIC))


@PAIRS
def test_both_ways_of_an_allowed_connection_pass_though_nothing_else_is_allowed(pair):
    pair.allow()

    assert pair.ask()
    assert pair.answer()
    assert pair.ask("A")
    assert pair.answer("A")

    (known,) = pair.policy.connections()
    assert known[:3] == (*pair.ends, NUMBERS[pair.protocol])
    now = pair.policy.generation
    generations = {Direction.EGRESS: (0, now), Direction.INGRESS: (now, 0)}[pair.direction]
    assert (known.ingress, known.egress) == generations
    assert known.flags & FlowFlag.REPLIED
    assert pair.policy.judged() == {(pair.direction, Reason.POLICY, True): 1}, "counted once a connection"
    assert [told.rule for told in pair.policy.told()] == [7], "told once"


@PAIRS
def test_what_is_denied_leaves_nothing_behind_and_is_told_each_time(pair):
    assert not pair.ask()
    assert not pair.ask()

    assert pair.policy.connections() == []
    assert pair.policy.judged() == {(pair.direction, Reason.POLICY, False): 2}
    assert [(told.allowed, told.rule) for told in pair.policy.told()] == [(False, 0)] * 2


@PAIRS
def test_what_is_taken_back_stops_a_connection_both_ways_and_what_is_given_back_revives_it(pair):
    pair.allow()
    assert pair.ask()
    assert pair.answer()
    assert pair.ask("A")

    pair.deny(moves=False)
    assert pair.ask("A"), "not before the generation moves"
    pair.policy.raise_generation()
    before = pair.policy.connections()
    assert not pair.ask("A")
    assert not pair.answer("A")
    assert pair.policy.connections() == before, "what is denied is not forgotten"
    assert pair.policy.judged()[pair.direction, Reason.POLICY, False] == 2

    pair.allow()
    pair.policy.raise_generation()
    assert pair.answer("A")
    assert pair.ask("A")


@PAIRS
def test_what_is_allowed_besides_breaks_nothing(pair):
    pair.allow()
    assert pair.ask()
    assert pair.answer()
    pair.policy.judged()

    pair.policy.rule(Direction.EGRESS, TWO)
    pair.policy.rule(Direction.INGRESS, PEER_ANY, "tcp", 1)
    for _ in range(3):
        pair.policy.raise_generation()
        assert pair.answer("A")
        assert pair.ask("A")
    assert pair.policy.judged() == {}, "it is no new connection"


@PAIRS
def test_a_pod_that_becomes_isolated_keeps_what_is_allowed_and_loses_the_rest(pair):
    pair.policy.subject(at.POD_ONE, ONE, SubjectFlag(0))
    assert pair.ask()
    assert pair.answer()

    # Isolated in the other direction, which this connection does not ask.
    other = SubjectFlag.INGRESS if pair.is_client else SubjectFlag.EGRESS
    pair.policy.subject(at.POD_ONE, ONE, other)
    pair.policy.raise_generation()
    assert pair.ask("A")
    assert pair.answer("A")

    pair.policy.subject(at.POD_ONE, ONE, ISOLATED)
    pair.policy.raise_generation()
    assert not pair.ask("A")
    assert not pair.answer("A")


@PAIRS
def test_the_other_end_begins_nothing_by_the_name_of_an_allowed_connection(pair):
    """A SYN is judged by who sends it; if it is denied, the connection that is there goes on."""
    pair.allow()
    assert pair.ask()
    assert pair.answer()

    if pair.protocol != "udp":  # whose packets all look alike
        assert not pair.answer("S")
    assert pair.answer("A")
    assert pair.ask("A")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("end", [pytest.param(("FA", "FA"), id="closed"), pytest.param(("RA", "A"), id="reset")])
def test_a_stream_that_is_over_is_begun_anew_by_whoever_opens(policy, end, family):
    pair = Pair(policy, "tcp", family, is_client=True)
    pair.allow()
    assert pair.ask()
    assert pair.answer()
    assert pair.ask(end[0])
    if end[0] == "FA":
        assert pair.answer(end[1])
        assert pair.ask("A"), "the last packet of a stream is no beginning"

    assert not pair.answer("S"), "the server may not begin"
    assert pair.ask()
    assert policy.judged()[Direction.EGRESS, Reason.POLICY, True] == 2

    policy.rule(Direction.INGRESS, REMOTE, "tcp", CLIENT_PORT)
    assert pair.answer("S"), "now it may"
    (known,) = policy.connections()
    assert known.began == pair.ends[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_after_a_silence_are_a_beginning(policy, family):
    pair = Pair(policy, "udp", family, is_client=True)
    pair.allow()
    assert pair.ask()
    policy.age(31)
    assert not pair.answer(), "30 s without an answer"

    assert pair.ask()
    assert pair.answer()
    policy.age(119)
    assert pair.answer()
    policy.age(122)
    assert not pair.answer()


def test_a_packet_says_when_its_connection_was_last_seen(policy):
    pair = Pair(policy, "tcp", 0, is_client=True)
    pair.allow()
    assert [pair.ask(), pair.answer(), pair.ask("A")] == [True] * 3
    policy.age(SOME_S)
    assert pair.answer("A")
    (known,) = policy.connections()
    assert 0 <= now() - known.seen <= 1


class Midst(NamedTuple):
    """Ports of the pod and of its peer, in which direction something is allowed, and at which port."""

    own: int
    peer: int
    direction: Direction
    port: int
    passes: bool


MIDST = {
    "client": Midst(40_000, 8080, Direction.EGRESS, 8080, True),
    "client-not-allowed": Midst(40_000, 8080, Direction.INGRESS, 40_000, False),
    "server": Midst(8080, 40_000, Direction.INGRESS, 8080, True),
    "server-not-allowed": Midst(8080, 40_000, Direction.EGRESS, 40_000, False),
    "both-low-client": Midst(9000, 80, Direction.EGRESS, 80, True),
    "both-low-server": Midst(9000, 80, Direction.INGRESS, 9000, True),
    "both-high-client": Midst(50_000, 40_000, Direction.EGRESS, 40_000, True),
    "both-high-server": Midst(50_000, 40_000, Direction.INGRESS, 50_000, True),
    "both-low-neither": Midst(9000, 80, Direction.EGRESS, 81, False),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("is_own", [True, False], ids=["out", "in"])
@pytest.mark.parametrize("midst", MIDST.values(), ids=MIDST)
def test_in_the_midst_of_a_connection_who_began_it_is_guessed(policy, midst, is_own, protocol, family):
    policy.subject(at.POD_ONE, ONE, ISOLATED, since=now() - 60)
    policy.rule(midst.direction, REMOTE, protocol, midst.port)
    own, peer = End(at.POD_ONE[family], midst.own), End(at.REMOTE_POD[family], midst.peer)
    sent = packet(protocol, *((own, peer) if is_own else (peer, own)), flags="A")

    ran = policy.from_pod(sent) if is_own else policy.to_pod(sent)

    assert (not fault_of_pass(ran, sent)) == midst.passes
    if midst.passes:
        (known,) = policy.connections()
        assert known.began == (own if midst.direction is Direction.EGRESS else peer)
        back = packet(protocol, *((peer, own) if is_own else (own, peer)), flags="A")
        assert not fault_of_pass(policy.to_pod(back) if is_own else policy.from_pod(back), back)


class Window(NamedTuple):
    """How long a pod has been there at the first start of the agent, 0 = it was not; and what may still be older."""

    since: int
    datagrams: bool
    streams: bool


WINDOWS = {
    "new-pod": Window(0, False, False),
    "at-first": Window(100, True, True),
    "later": Window(125, False, True),
    "nearly-over": Window(590, False, True),
    "over": Window(605, False, False),
    "long-after": Window(SOME_S, False, False),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("is_own", [True, False], ids=["out", "in"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_who_began_is_guessed_at_first_alone(policy, window, is_own, protocol, family):
    """Answers of what may be older than the agent; afterwards they are judged as begun by whoever sends them."""
    policy.subject(at.POD_ONE, ONE, ISOLATED, since=window.since and now() - window.since)
    own, peer = (
        End(at.POD_ONE[family], 8080 if is_own else 40_000),
        End(at.REMOTE_POD[family], 40_000 if is_own else 80),
    )
    policy.rule(Direction.INGRESS if is_own else Direction.EGRESS, REMOTE, protocol, 8080 if is_own else 80)
    answer = packet(protocol, *((own, peer) if is_own else (peer, own)), flags="A")
    asked = packet(protocol, *((peer, own) if is_own else (own, peer)), flags="A")
    there, back = (policy.from_pod, policy.to_pod) if is_own else (policy.to_pod, policy.from_pod)

    assert is_dropped(there(answer)) != (window.datagrams if protocol == "udp" else window.streams)

    assert not fault_of_pass(back(asked), asked), "whoever has asked goes on"
    assert not fault_of_pass(there(answer), answer), "and is answered again"


@pytest.mark.parametrize("flags", ["A", "PA", "SA", "FA", "R", ""])
@pytest.mark.parametrize("ports", [(80, 40_000), (40_000, 50_000), (443, 80), (40_000, 80)])
@pytest.mark.parametrize("is_own", [True, False], ids=["out", "in"])
def test_no_port_and_no_flag_makes_a_packet_an_answer(policy, is_own, ports, flags):
    """The direction that is not isolated lets nothing pass that the other denies."""
    policy.subject(at.POD_ONE, ONE, SubjectFlag.EGRESS if is_own else SubjectFlag.INGRESS, device="one")
    source, destination = (at.POD_ONE[0], at.FAR[0]) if is_own else (at.FAR[0], at.POD_ONE[0])
    sent = packet("tcp", End(source, ports[0]), End(destination, ports[1]), flags=flags)

    assert is_dropped(policy.from_pod(sent) if is_own else policy.to_pod(sent))
    assert policy.connections() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_pings_answer_one_way_only(policy, family):
    policy.rule(Direction.EGRESS, REMOTE)
    own, peer = at.POD_ONE[family], at.REMOTE_POD[family]
    asked, other = echo_request(own, peer), echo_request(peer, own)
    answers = [_echo_reply(peer, own), _echo_reply(own, peer)]

    assert is_dropped(policy.to_pod(answers[0])), "an answer that nobody asked for"
    assert not fault_of_pass(policy.from_pod(asked), asked)
    assert not fault_of_pass(policy.to_pod(answers[0]), answers[0])
    assert is_dropped(policy.to_pod(other)), "its own questions are another matter"
    assert not fault_of_pass(policy.to_pod(answers[0]), answers[0])


def _echo_reply(source: str, destination: str):
    made = echo_request(source, destination)
    made[2].type = 129 if ":" in source else 0
    return settle(made)


@PAIRS
@pytest.mark.parametrize("kind", ["too-big", "port-unreachable", "ttl-exceeded"])
def test_errors_about_an_allowed_connection_pass_whoever_sends_them(pair, kind):
    pair.allow()
    sent = packet(pair.protocol, *pair.ends)
    answer = packet(pair.protocol, *pair.ends[::-1], flags="SA")
    own, peer = (sent, answer) if pair.is_client else (answer, sent)
    router = at.GATEWAY[pair.family]
    incoming, outgoing = icmp_error(own, router, kind), icmp_error(peer, at.POD_ONE[pair.family], kind)
    assert is_dropped(pair.policy.to_pod(incoming)), "there is no connection yet"
    assert is_dropped(pair.policy.from_pod(outgoing))
    told = [(told.source, told.destination, told.protocol, told.peer) for told in pair.policy.told()]
    number = NUMBERS["icmpv6" if pair.family else "icmp"]
    own_end, peer_end = End(at.POD_ONE[pair.family], 0), End(at.REMOTE_POD[pair.family], 0)
    assert told == [(End(router, 0), own_end, number, PEER_WORLD), (own_end, peer_end, number, REMOTE)]

    assert pair.ask()
    assert not fault_of_pass(pair.policy.to_pod(incoming), incoming)
    assert not fault_of_pass(pair.policy.from_pod(outgoing), outgoing)
    before = pair.policy.connections()
    pair.policy.to_pod(incoming)
    assert pair.policy.connections() == before


@PAIRS
def test_errors_about_a_connection_end_with_its_allowance(pair):
    """They belong to it: what was taken back is not reached by them either, whatever has moved since they were last."""
    pair.allow()
    sent = packet(pair.protocol, *pair.ends)
    answer = packet(pair.protocol, *pair.ends[::-1], flags="SA")
    own, peer = (sent, answer) if pair.is_client else (answer, sent)
    incoming, outgoing = icmp_error(own, at.GATEWAY[pair.family]), icmp_error(peer, at.POD_ONE[pair.family])
    assert pair.ask()
    pair.policy.raise_generation()
    before = pair.policy.connections()
    assert not fault_of_pass(pair.policy.to_pod(incoming), incoming), "still allowed, though nobody has asked since"
    assert not fault_of_pass(pair.policy.from_pod(outgoing), outgoing)
    pair.policy.judged()
    pair.policy.told()

    pair.deny()
    pair.policy.raise_generation()
    assert is_dropped(pair.policy.to_pod(incoming))
    assert is_dropped(pair.policy.from_pod(outgoing))

    assert pair.policy.connections() == before, "an error says nothing of a connection"
    assert pair.policy.judged() == {(pair.direction, Reason.POLICY, False): 2}
    assert {(told.protocol, told.peer) for told in pair.policy.told()} == {(NUMBERS[pair.protocol], REMOTE)}


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_about_a_ping_pass(policy, family):
    policy.rule(Direction.EGRESS, REMOTE)
    asked = echo_request(at.POD_ONE[family], at.REMOTE_POD[family])
    error = icmp_error(asked, at.GATEWAY[family], "ttl-exceeded")
    assert is_dropped(policy.to_pod(error))

    assert not fault_of_pass(policy.from_pod(asked), asked)
    assert not fault_of_pass(policy.to_pod(error), error)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_of_those_who_are_allowed_pass(policy, family):
    policy.rule(Direction.INGRESS, PEER_WORLD)
    stray = packet("tcp", End(at.POD_ONE[family], 1), End(at.REMOTE_POD[family], 2))
    error = icmp_error(stray, at.GATEWAY[family])

    assert not fault_of_pass(policy.to_pod(error), error)
    assert policy.connections() == [], "an error is no connection"


@PAIRS
def test_fragments_follow_their_first_one(pair):
    whole = packet(pair.protocol, *pair.ends, payload=bytes(600))
    first, second, last = fragments(whole, 240)
    cross = pair.policy.from_pod if pair.is_client else pair.policy.to_pod

    def run() -> list[Ran]:
        return [cross(piece) for piece in (first, second, last)]

    assert all(map(is_dropped, run()))
    pair.allow()
    for piece, ran in zip((first, second, last), run(), strict=True):
        assert not fault_of_pass(ran, piece)
    assert len(pair.policy.connections()) == 1


def test_both_ends_on_this_node_are_judged_each_for_itself(policy):
    """One entry has both verdicts: egress of who began it, ingress of the other."""
    policy.subject(at.POD_TWO, TWO)
    policy.device("two", at.POD_TWO)
    for direction in Direction:
        policy.rule(direction, PEER_ANY, subject=TWO, allowed=False, number=0)
    sent = packet("tcp", End(at.POD_ONE[0], CLIENT_PORT), End(at.POD_TWO[0], SERVER_PORT))
    policy.rule(Direction.EGRESS, TWO, "tcp", SERVER_PORT, number=1)
    assert not fault_of_pass(policy.from_pod(sent), sent)
    assert is_dropped(policy.to_pod(sent, "two"))
    assert [(known.ingress, known.egress) for known in policy.connections()] == [(0, policy.generation)]

    before = policy.generation
    policy.rule(Direction.INGRESS, ONE, "tcp", SERVER_PORT, subject=TWO, number=2)
    assert not fault_of_pass(policy.to_pod(sent, "two"), sent)
    assert [(known.ingress, known.egress) for known in policy.connections()] == [(policy.generation, before)]
    answer = reply_to(sent)
    assert not fault_of_pass(policy.from_pod(answer, "two"), answer)
    assert not fault_of_pass(policy.to_pod(answer), answer)
    assert policy.judged() == {
        (Direction.EGRESS, Reason.POLICY, True): 1,
        (Direction.INGRESS, Reason.POLICY, True): 1,
        (Direction.INGRESS, Reason.POLICY, False): 1,
    }
