"""Decoding agrees with a plain reading of the API's rules, and nothing in an object makes it raise."""

import copy
import json

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agent.core.addresses import parse_address
from agent.core.events import Delete, Malformed, Upsert
from agent.core.policy_records import Rule
from agent.core.records import ADDRESS_SIZE, Family, Kind, ObjectKey, Traits
from agent.sources.convert import pack
from agent.sources.decode import UNNAMED, Decoder
from tests.property import wire_strategies as wire

decoder = Decoder(wire.NODE_NAME, policy=True)
kinds = st.sampled_from(list(Kind))
any_object = st.one_of(
    st.tuples(st.just(Kind.SERVICE), wire.services()), st.tuples(st.just(Kind.ENDPOINT_SLICE), wire.slices())
)
any_spoiled = st.one_of(
    st.tuples(st.just(Kind.SERVICE), wire.spoiled(wire.services())),
    st.tuples(st.just(Kind.ENDPOINT_SLICE), wire.spoiled(wire.slices())),
)


def encode(value):
    return json.dumps(value).encode()


def verdict(event):
    """Leave out the wording of a fault: JSON's reader calls an integer of more than 64 bits a float."""
    return (event.kind, event.key, event.field, event.partial) if isinstance(event, Malformed) else event


def plain_traits(endpoint):
    """Read an endpoint's traits as the API documents them, one field at a time."""
    conditions = endpoint.get("conditions") or {}
    hints = endpoint.get("hints") or {}
    ready, serving = conditions.get("ready"), conditions.get("serving")
    for_zones, for_nodes = hints.get("forZones"), hints.get("forNodes")
    return Traits(
        ready=True if ready is None else ready,
        serving=True if serving is None else serving,
        terminating=bool(conditions.get("terminating")),
        local=endpoint.get("nodeName") == wire.NODE_NAME,
        zones=frozenset(zone["name"] for zone in for_zones) if for_zones else None,
        node_hint=wire.NODE_NAME in [node["name"] for node in for_nodes] if for_nodes else None,
    )


def plain_runs(value):
    runs = {}
    for endpoint in value["endpoints"]:
        for text in endpoint["addresses"][:1]:
            runs.setdefault(plain_traits(endpoint), []).append(parse_address(text))
    return {traits: sorted(addresses) for traits, addresses in runs.items()}


def unpack(run):
    return [run[start : start + ADDRESS_SIZE] for start in range(0, len(run), ADDRESS_SIZE)]


@given(wire.slices())
def test_runs_hold_each_endpoint_once_under_its_traits(value):
    record = decoder.decode(Kind.ENDPOINT_SLICE, encode(value)).event.record

    assert len({traits for traits, _ in record.runs}) == len(record.runs)
    assert {traits: sorted(unpack(run)) for traits, run in record.runs} == plain_runs(value)


@given(wire.slices())
def test_what_was_decoded_before_does_not_matter(value):
    assert decoder.decode_object(Kind.ENDPOINT_SLICE, value) == Decoder(wire.NODE_NAME).decode_object(
        Kind.ENDPOINT_SLICE, value
    )


@given(wire.services())
def test_cluster_ips(value):
    record = decoder.decode(Kind.SERVICE, encode(value)).event.record

    assert record.cluster_ips == tuple(parse_address(text) for text in value["spec"]["clusterIPs"])


@given(any_object | any_spoiled)
def test_one_bad_value_never_raises_and_never_hides_which_object_it_is_in(pair):
    kind, value = pair
    event, version = decoder.decode(kind, encode(value))

    assert verdict(event) == verdict(decoder.decode_object(kind, value))
    assert version == "7"
    match event:
        case Upsert(record=record):
            assert record.key == ObjectKey("shop", value["metadata"]["name"])
        case Malformed() | Delete():
            assert event.key == ObjectKey("shop", value["metadata"]["name"])


@given(wire.spoiled_policy())
def test_one_bad_value_of_policy_never_raises_and_never_hides_which_object_it_is_in(pair):
    kind, value = pair
    event, version = decoder.decode(kind, encode(value))

    assert verdict(event) == verdict(decoder.decode_object(kind, value))
    assert version == "7"
    key = event.record.key if isinstance(event, Upsert) else event.key
    assert key == ObjectKey(value["metadata"].get("namespace", ""), "web")


@given(wire.network_policies, st.data())
def test_what_cannot_be_read_of_a_policys_rules_is_left_out_and_nothing_else(value, data):
    whole = decoder.decode_object(Kind.NETWORK_POLICY, value).record
    spoiled, wanted = copy.deepcopy(value), {}
    for direction, word in (("ingress", "from"), ("egress", "to")):
        rules = []
        for index, said in enumerate(spoiled["spec"][direction]):
            peers, ports = (spoil(data, said[name]) if name in said else None for name in (word, "ports"))
            is_spoiled = data.draw(st.booleans())
            if is_spoiled:
                spoiled["spec"][direction][index] = data.draw(wire.junk)
            rule = getattr(whole, direction)[index]
            left = Rule(kept(rule.peers, peers), kept(rule.ports, ports))
            rules.append(Rule(peers=()) if is_spoiled else left)
        wanted[direction] = tuple(rules)

    event = decoder.decode_object(Kind.NETWORK_POLICY, spoiled)

    if spoiled == value:
        assert event == Upsert(whole)
    else:
        assert event.partial == msgspec.structs.replace(whole, **wanted, is_partial=True)
        assert event.field.count(", ") == event.reason.count("; ")


def spoil(data, parts):
    """Put what is nothing in the place of some; returns which are left."""
    left = []
    for index in range(len(parts)):
        if data.draw(st.booleans()):
            parts[index] = data.draw(wire.junk)
        else:
            left.append(index)
    return left


def kept(parts, indexes):
    return None if indexes is None else tuple(parts[index] for index in indexes)


@given(kinds, wire.values)
def test_any_value_at_all(kind, value):
    event = decoder.decode(kind, encode(value)).event

    assert isinstance(event, Malformed)
    assert event.key == UNNAMED
    assert verdict(event) == verdict(decoder.decode_object(kind, value))


@given(kinds, st.binary(max_size=200))
def test_any_bytes_at_all(kind, raw):
    assert isinstance(decoder.decode(kind, raw).event, Malformed)


@given(kinds, st.lists(any_object | any_spoiled, max_size=4))
def test_a_list_is_its_items(kind, pairs):
    items = [value for _, value in pairs]
    page = decoder.decode_list(kind, encode({"metadata": {}, "items": items}))

    assert page.events == [decoder.decode(kind, encode(item)).event for item in items]


def without_zeros(text):
    return ".".join(str(int(octet)) for octet in text.split("."))


@given(st.text(alphabet="0123456789abcdef.:%x ", max_size=20) | st.from_regex(r"(\d{1,4}\.){3}\d{1,4}", fullmatch=True))
def test_no_address_is_accepted_that_the_core_refuses(text):
    for family in Family:
        try:
            packed = pack(family, (text,))
        except (OSError, ValueError):
            continue
        assert packed == parse_address(without_zeros(text) if family is Family.IPV4 else text)


@given(st.data(), st.sampled_from([4, 6]))
def test_every_address_the_core_accepts_is_accepted(data, version):
    texts = data.draw(st.lists(wire.addresses(version), min_size=1, max_size=4))

    assert pack(Family(version), texts) == b"".join(parse_address(text) for text in texts)
