"""What the packet path remembers of flows: their states, entries that are lost, source ports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.l2 import Ether

from agent.core.abi import FLOW, Counter, FlowFlag, FrontendFlag, FrontendKind
from agent.kernel.programs import ProgramOptions
from tests.bpf import packet_path as at
from tests.bpf.conftest import PACKET_SPECS
from tests.bpf.harness import TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC
from tests.bpf.packet_path import FlowEntry, PacketPath, to
from tests.bpf.packets import PROTOCOLS, End, moved, packet, reply_to
from tests.bpf.talk import NUMBERS, TARGET, Talk
from tests.bpf.test_packet_life import check

CLUSTER_IP = ("10.96.0.10", "fd00:96::10")
R, E, F, P, C = FlowFlag.REPLIED, FlowFlag.ESTABLISHED, FlowFlag.FIN, FlowFlag.PEER_FIN, FlowFlag.CLOSED
# What is sent (> by the client, < by the backend), and the state of the client's way after it.
HISTORIES = {
    "handshake": [(">S", 0), ("<SA", R), (">A", R | E)],
    "data": [(">S", 0), ("<SA", R), (">PA", R | E), ("<PA", R | E), (">A", R | E)],
    "client ends": [(">S", 0), ("<SA", R), (">A", R | E), (">FA", R | E | F), ("<FA", R | E | F | P)],
    "backend ends": [(">S", 0), ("<SA", R), (">A", R | E), ("<FA", R | E | P), (">FA", R | E | F | P)],
    "client resets": [(">S", 0), ("<SA", R), (">R", R | C)],
    "backend refuses": [(">S", 0), ("<RA", R | C)],
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("history", list(HISTORIES.values()), ids=list(HISTORIES))
def test_the_states_of_a_tcp_flow(path, history, number):
    talk = Talk(path, "tcp", number)

    for sent, state in history:
        talk.ask(sent[1:]) if sent[0] == ">" else talk.answer(sent[1:])
        seen = talk.state() & ~E if sent == ">R" else talk.state()
        assert seen == state, sent


@pytest.mark.parametrize("number", NUMBERS)
def test_both_ways_know_who_has_ended(path, number):
    talk = Talk(path, "tcp", number)
    talk.ask()
    talk.answer()
    talk.ask("FA")

    assert talk.entry().flags & (F | P) == F
    assert talk.entry(reply=True).flags & (F | P) == P


@pytest.mark.parametrize("protocol", ["udp", "sctp"])
@pytest.mark.parametrize("number", NUMBERS)
def test_the_states_of_other_flows(path, protocol, number):
    talk = Talk(path, protocol, number)
    talk.ask()
    assert talk.state() & R == 0
    talk.answer()

    assert talk.state() & R == R


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_flow_stays_with_its_backend(path, protocol, number):
    """Whatever becomes of the service: an edit, or its end."""
    talk = Talk(path, protocol, number)
    before = talk.ask().packet
    talk.answer()
    other = End(at.POD_TWO[number], TARGET)

    talk.serve(to(other))
    moved_on = Ether(talk.ask("A").packet)
    path.store.maps["frontends"].delete(next(key for key, _ in path.store.maps["frontends"].items()))
    orphaned = Ether(talk.ask("A").packet)

    for sent in (moved_on, orphaned):
        assert (sent[1].dst, sent[1].src, sent[2].sport) == _ends(before)


def _ends(raw: bytes) -> tuple[str, str, int]:
    sent = Ether(raw)
    return sent[1].dst, sent[1].src, sent[2].sport


ENDINGS = {"both ended": [">A", ">FA", "<FA", ">A"], "reset": [">A", "<R"], "reset by the client": [">A", ">R"]}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("ending", list(ENDINGS.values()), ids=list(ENDINGS))
def test_a_new_connection_from_the_same_port_chooses_anew(path, ending, number):
    """An entry of the old one must not send it to a backend that has gone (cilium issue 20382)."""
    talk = Talk(path, "tcp", number)
    talk.ask()
    talk.answer()
    for sent in ending:
        talk.ask(sent[1:]) if sent[0] == ">" else talk.answer(sent[1:])
    talk.serve(to(End(at.POD_TWO[number], TARGET)))

    ran = talk.ask("S")

    assert Ether(ran.packet)[1].dst == at.POD_TWO[number]
    assert ran.verdict == TC_ACT_REDIRECT
    assert talk.state() == 0
    answer = reply_to(Ether(ran.packet))
    check(
        path.ingress("two", answer),
        TC_ACT_REDIRECT,
        moved(answer, source=talk.frontend, destination=talk.client, ttl=63),
    )


@pytest.mark.parametrize("number", NUMBERS)
def test_a_connection_without_a_service_is_not_taken_for_a_flow_that_is_over(path, number):
    """A client closes its connection to a Service, and asks one of its backends directly from the same port."""
    client, frontend, backend = (
        End(at.POD_ONE[number], 4000),
        End(CLUSTER_IP[number], 80),
        End(at.POD_TWO[number], TARGET),
    )
    path.serve("tcp", frontend, inside=to(backend))
    for flags in ("S", "A", "R"):
        path.ingress("one", packet("tcp", client, frontend, flags=flags))
    direct = packet("tcp", client, backend, flags="S")

    check(path.ingress("one", direct), TC_ACT_UNSPEC, direct)

    answer = reply_to(direct)
    check(path.egress("one", answer), TC_ACT_UNSPEC, answer)
    assert path.flows() == []


@pytest.mark.parametrize("number", NUMBERS)
def test_a_forged_reset_does_not_end_a_connection(path, number):
    """Who goes on after it was not reset: else the entry would be swept within seconds."""
    talk = Talk(path, "tcp", number)
    talk.ask()
    talk.answer()
    talk.ask("A")
    talk.ask("R")
    assert talk.state() & C

    talk.ask("A")

    assert not talk.state() & C
    assert not talk.entry(reply=True).flags & C


@pytest.mark.parametrize("number", NUMBERS)
def test_a_forged_syn_does_not_break_a_connection(path, number):
    """Whoever guesses the ports of a client must not move its connection to another backend."""
    talk = Talk(path, "tcp", number)
    first = talk.ask().packet
    talk.answer()
    talk.ask("A")
    talk.serve(to(End(at.POD_TWO[number], TARGET)))

    assert _ends(talk.ask("S").packet) == _ends(first)
    assert _ends(talk.ask("A").packet) == _ends(first)
    assert path.counted() == {Counter.FLOWS: 1}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_syn_sent_again_is_no_new_connection(path, number):
    talk = Talk(path, "tcp", number)
    first = talk.ask().packet
    talk.serve(to(End(at.POD_TWO[number], TARGET)))

    assert _ends(talk.ask("S").packet) == _ends(first)
    talk.answer()
    assert _ends(talk.ask("S").packet) == _ends(first)
    assert path.counted() == {Counter.FLOWS: 1}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("replied", "silent_s", "is_over"), [(False, 29, False), (False, 32, True), (True, 119, False), (True, 122, True)]
)
def test_datagrams_after_a_silence(path, replied, silent_s, is_over, number):
    """As long as kube-proxy has conntrack remember a UDP flow: 30 s, and 120 s once it was answered."""
    talk = Talk(path, "udp", number)
    talk.ask()
    if replied:
        talk.answer()
    _age(path, silent_s)
    talk.serve(to(End(at.POD_TWO[number], TARGET)))

    sent = Ether(talk.ask().packet)

    assert sent[1].dst == (at.POD_TWO if is_over else at.REMOTE_POD)[number]


def _age(path: PacketPath, seconds: int) -> None:
    """Let every flow have been silent for so long."""
    flows = path.store.maps["conntrack"]
    for key, value in list(flows.items()):
        fields = list(FLOW.packer.unpack(value))
        fields[5] -= seconds
        flows.update(key, FLOW.packer.pack(*fields))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("lost", ["forward", "reply"])
def test_a_lost_entry_is_made_again_by_the_other(path, lost, protocol, number):
    """An LRU map may evict either of the two."""
    talk = Talk(path, protocol, number)
    talk.ask()
    talk.answer()
    talk.ask("A")
    before = {(flow.asked, flow.becomes, flow.flags) for flow in path.flows()}
    source = talk.source
    _age(path, 2)
    _delete(path, talk.entry(reply=lost == "reply"))

    talk.answer("A") if lost == "forward" else talk.ask("A")

    assert {(flow.asked, flow.becomes, flow.flags) for flow in path.flows()} == before
    talk.ask("A")
    assert talk.source == source
    answer = reply_to(talk.first)
    check(
        path.ingress("eth0", answer),
        TC_ACT_REDIRECT,
        moved(answer, source=talk.frontend, destination=talk.client, ttl=63),
    )


def _delete(path: PacketPath, entry: FlowEntry) -> None:
    flows = path.store.maps["conntrack"]
    for key, value in list(flows.items()):
        if at.read_flow(key, value).asked == entry.asked:
            flows.delete(key)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_clients_with_one_port_get_source_ports_of_their_own(path, protocol, number):
    clients = [End(at.OUTSIDE[number][:-3] + f"{digit}", 4000) for digit in range(3, 9)]
    talks = []
    for client in clients:
        talk = Talk(path, protocol, number)
        talk.client = client
        talk.ask()
        talks.append(talk)

    assert len({talk.source for talk in talks}) == len(clients)
    for talk in talks:
        answer = reply_to(talk.first)
        wanted = moved(answer, source=talk.frontend, destination=talk.client, ttl=63)
        check(path.ingress("eth0", answer), TC_ACT_REDIRECT, wanted)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_backend_by_two_frontends_from_one_port(path, protocol, number):
    """Both flows would look the same to the backend: one is given another source port (cilium issue 11810)."""
    client, backend = End(at.POD_ONE[number], 4000), End(at.REMOTE_POD[number], TARGET)
    frontends = [End(("10.96.0.10", "fd00:10:96::10")[number], port) for port in (80, 81)]
    path.serve(protocol, *frontends, inside=to(backend))

    sent = [Ether(path.ingress("one", packet(protocol, client, frontend)).packet) for frontend in frontends]

    sources = [End(packet_[1].src, packet_[2].sport) for packet_ in sent]
    assert sources[0] == client
    assert sources[1].address == client.address
    assert sources[1].port in at.SOURCE_PORTS
    for packet_, frontend in zip(sent, frontends, strict=True):
        answer = reply_to(packet_)
        check(path.egress("one", answer), TC_ACT_UNSPEC, moved(answer, source=frontend, destination=client))


@pytest.fixture(scope="module")
def two_ports(shared_packet_path, bpf_mount) -> Iterator[PacketPath]:
    """Give programs that have two source ports only."""
    options = ProgramOptions(source_ports=(10_000, 10_001))
    with at.opened(shared_packet_path.node, bpf_mount / "two-ports", PACKET_SPECS, options) as made:
        yield made


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_a_free_source_port_the_packet_is_dropped_and_counted(two_ports, protocol, number):
    two_ports.clear()
    talks = [Talk(two_ports, protocol, number, port) for port in (4000, 4001, 4002)]

    verdicts = [talk.ask().verdict for talk in talks]

    assert verdicts == [TC_ACT_REDIRECT, TC_ACT_REDIRECT, TC_ACT_SHOT]
    assert two_ports.counted() == {Counter.FLOWS: 2, Counter.SOURCE_NAT_EXHAUSTED: 1}
    assert len(two_ports.flows()) == 4
    assert [talk.answer().verdict for talk in talks[:2]] == [TC_ACT_REDIRECT] * 2


@pytest.mark.parametrize("number", NUMBERS)
def test_the_source_port_of_a_flow_that_is_over_is_taken(two_ports, number):
    two_ports.clear()
    talks = [Talk(two_ports, "tcp", number, port) for port in (4000, 4001, 4002)]
    for talk in talks[:2]:
        talk.ask()
    talks[0].answer("RA")

    assert talks[2].ask().verdict == TC_ACT_REDIRECT
    assert talks[2].source == talks[0].source
    assert talks[2].answer().verdict == TC_ACT_REDIRECT


def test_another_range_for_another_backend(two_ports):
    """Source ports are told apart by the backend that they lead to."""
    two_ports.clear()
    backends = [End(f"10.180.1.{10 + number}", TARGET) for number in range(4)]
    two_ports.serve("tcp", End(at.NODE[0], 30080), inside=to(*backends), kind=FrontendKind.NODE_PORT)
    talks = [Talk(two_ports, "tcp", 0, port) for port in range(4000, 4005)]

    assert [talk.ask().verdict for talk in talks] == [TC_ACT_REDIRECT] * 5


def test_flags_that_mean_masquerade_alone(path):
    """A pod's flow that is masqueraded by its service goes by route both ways."""
    client, backend = End(at.POD_ONE[0], 4000), End(at.REMOTE_POD[0], TARGET)
    frontend = End("10.96.0.10", 80)
    path.serve("tcp", frontend, inside=to(backend), flags=FrontendFlag.MASQUERADE)
    path.ingress("one", packet("tcp", client, frontend))

    forward, reply = sorted(path.flows(), key=lambda flow: flow.flags & FlowFlag.REPLY)

    assert (forward.device, reply.device) == (path.ifindex["eth0"], path.ifindex["one"])
    assert not (forward.flags | reply.flags) & FlowFlag.AT_EGRESS
