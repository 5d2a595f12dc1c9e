"""Hypothesis strategies for pods, namespaces and policies, over a universe small enough that they meet."""

from __future__ import annotations

from hypothesis import strategies as st

from agent.core.abi import Direction
from agent.core.addresses import family_of, parse_address
from agent.core.events import Delete, Upsert
from agent.core.policy_records import (
    Action,
    ClusterPolicyRecord,
    IpBlock,
    NamedPort,
    NamespaceRecord,
    NetworkPolicyRecord,
    Operator,
    Peer,
    PodRecord,
    PortRange,
    Requirement,
    Rule,
    Selector,
    Tier,
    TierRule,
)
from agent.core.records import Kind, ObjectKey, Protocol
from tests.policy_builders import prefix

NAMESPACES = ("x", "y")
PODS = [ObjectKey(namespace, name) for namespace in NAMESPACES for name in ("a", "b", "c")]
POD_ADDRESSES = [parse_address(text) for text in ("10.1.0.1", "10.1.0.2", "10.1.1.1", "10.1.1.2", "fd01::1", "fd01::2")]
ADDRESSES = [*POD_ADDRESSES, *map(parse_address, ("10.1.2.9", "192.0.2.1", "2001:db8::1"))]
"""Of pods, of nobody within blocks, and of the world outside."""
SAMPLED = [
    *((protocol, port) for protocol in (6, 17) for port in (0, 79, 80, 81, 82, 1023, 1024, 8080, 65535)),
    (132, 80),
    (1, 0),
]
QUESTIONS = [
    (subject, peer, direction)
    for subject in POD_ADDRESSES
    for peer in ADDRESSES
    if family_of(subject) is family_of(peer)
    for direction in Direction
]

_values = st.sampled_from(["1", "2"])
_keys = st.sampled_from(["app", "tier"])
_labels = st.dictionaries(_keys, _values, max_size=2).map(lambda it: tuple(sorted(it.items())))
_requirements = st.one_of(
    st.builds(
        Requirement,
        _keys,
        st.sampled_from([Operator.IN, Operator.NOT_IN]),
        st.frozensets(_values, min_size=1),
    ),
    st.builds(Requirement, _keys, st.sampled_from([Operator.EXISTS, Operator.DOES_NOT_EXIST])),
)
_namespace_names = st.builds(
    Requirement,
    st.just("kubernetes.io/metadata.name"),
    st.just(Operator.IN),
    st.sampled_from(NAMESPACES).map(lambda it: frozenset({it})),
)
_selectors = st.builds(Selector, st.lists(_requirements, max_size=2).map(tuple))
_namespace_selectors = st.builds(Selector, st.lists(_requirements | _namespace_names, max_size=1).map(tuple))
_blocks = st.sampled_from(
    [
        IpBlock(prefix("0.0.0.0/0")),
        IpBlock(prefix("0.0.0.0/0"), (prefix("10.1.0.0/16"),)),
        IpBlock(prefix("10.1.0.0/16"), (prefix("10.1.0.0/24"), prefix("10.1.1.2/32"))),
        IpBlock(prefix("10.1.0.0/24")),
        IpBlock(prefix("10.1.0.1/32")),
        IpBlock(prefix("::/0")),
        IpBlock(prefix("::/0"), (prefix("fd01::/64"),)),
        IpBlock(prefix("fd01::2/128")),
    ]
)
_protocols = st.sampled_from([Protocol.TCP, Protocol.TCP, Protocol.UDP, Protocol.SCTP])
_ports = st.one_of(
    st.builds(lambda protocol, port: PortRange(protocol, port, port), _protocols, st.sampled_from([80, 81])),
    st.builds(PortRange, _protocols),
    st.builds(PortRange, _protocols, st.sampled_from([80, 1024]), st.sampled_from([1024, 65535])),
    st.builds(lambda protocol, name: PortRange(protocol, name=name), _protocols, st.sampled_from(["http", "dns"])),
)
_network_peers = st.one_of(
    st.builds(Peer, st.none() | _namespace_selectors, st.none() | _selectors),
    st.builds(Peer, block=_blocks),
)
_cluster_peers = st.one_of(
    st.builds(Peer, _namespace_selectors, st.none() | _selectors),
    st.builds(Peer, block=_blocks),
)


def _rules(peers: st.SearchStrategy[Peer]) -> st.SearchStrategy[Rule]:
    some = st.lists(peers, max_size=2).map(tuple)
    return st.builds(Rule, st.none() | some, st.none() | st.lists(_ports, max_size=2).map(tuple))


_network_rules = st.none() | st.lists(_rules(_network_peers), max_size=2).map(tuple)
_tier_rules = st.lists(st.builds(TierRule, st.sampled_from(Action), _rules(_cluster_peers)), max_size=2).map(tuple)
_named_ports = st.lists(
    st.builds(
        NamedPort,
        st.sampled_from(["http", "dns"]),
        st.sampled_from([Protocol.TCP, Protocol.UDP]),
        st.sampled_from([80, 81, 8080]),
    ),
    max_size=2,
    unique_by=lambda port: (port.name, port.protocol),
).map(tuple)

pods = st.builds(
    PodRecord,
    st.sampled_from(PODS),
    st.lists(st.sampled_from(POD_ADDRESSES), max_size=2, unique_by=lambda it: it[:1]).map(tuple),
    _labels,
    _named_ports,
    st.sampled_from([True, True, False]),
    st.sampled_from([False, False, True]),
    st.sampled_from(["2020", "2021"]),
)
namespaces = st.builds(
    lambda name, labels: NamespaceRecord(
        ObjectKey("", name), tuple(sorted((*labels, ("kubernetes.io/metadata.name", name))))
    ),
    st.sampled_from(NAMESPACES),
    _labels,
)
network_policies = st.builds(
    NetworkPolicyRecord,
    st.builds(ObjectKey, st.sampled_from(NAMESPACES), st.sampled_from(["p", "q"])),
    _selectors,
    _network_rules,
    _network_rules,
)
cluster_policies = st.builds(
    ClusterPolicyRecord,
    st.sampled_from(["r", "s"]).map(lambda name: ObjectKey("", name)),
    st.sampled_from(Tier),
    st.sampled_from([0, 1]),
    _namespace_selectors,
    st.none() | _selectors,
    _tier_rules,
    _tier_rules,
)
records = st.one_of(pods, pods, namespaces, network_policies, network_policies, cluster_policies)
_keys_of_all = st.one_of(
    st.tuples(st.just(Kind.POD), st.sampled_from(PODS)),
    st.tuples(st.just(Kind.NAMESPACE), st.sampled_from(NAMESPACES).map(lambda name: ObjectKey("", name))),
    st.tuples(
        st.just(Kind.NETWORK_POLICY), st.builds(ObjectKey, st.sampled_from(NAMESPACES), st.sampled_from(["p", "q"]))
    ),
    st.tuples(st.just(Kind.CLUSTER_NETWORK_POLICY), st.sampled_from(["r", "s"]).map(lambda name: ObjectKey("", name))),
)
events = st.one_of(*[records.map(Upsert)] * 4, _keys_of_all.map(lambda it: Delete(*it)))


def _settled(labels: list[tuple[tuple[str, str], ...]], policies: list[NetworkPolicyRecord]) -> list[Upsert]:
    """Every pod with an address of its own, and policies about them."""
    own = zip(PODS, POD_ADDRESSES, labels, strict=True)
    return [Upsert(PodRecord(key, (address,), said, is_local=True)) for key, address, said in own] + [
        Upsert(policy) for policy in policies
    ]


populations = st.builds(
    _settled,
    st.lists(_labels, min_size=len(PODS), max_size=len(PODS)),
    st.lists(network_policies | cluster_policies, min_size=1, max_size=4),
)
