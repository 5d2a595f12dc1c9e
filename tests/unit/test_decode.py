"""What objects of the API come to: records, deletions, and faults that name their field."""

import json

import pytest

from agent.core.addresses import AddressRange, parse_address
from agent.core.events import Delete, Malformed, Upsert
from agent.core.records import (
    Algorithm,
    External,
    Family,
    Forwarding,
    Kind,
    NodeRecord,
    ObjectKey,
    Protocol,
    ServicePort,
    ServiceRecord,
    SlicePort,
    SliceRecord,
    Traits,
)
from agent.errors import SourceError
from agent.sources.decode import UNNAMED, Decoder

PROXY_NAME = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"
SERVICE_NAME = "kubernetes.io/service-name"
CHANGED_AT = "endpoints.kubernetes.io/last-change-trigger-time"
KEY = ObjectKey("shop", "web")


def addresses(*texts):
    return b"".join(parse_address(text) for text in texts)


def service(labels=None, **spec):
    return {
        "metadata": {"name": "web", "namespace": "shop", "resourceVersion": "7", "labels": labels or {}},
        "spec": {"clusterIP": "10.96.0.1", "ports": [port()], **spec},
    }


def port(number=80, **tweaks):
    return {"name": "http", "port": number, "protocol": "TCP", **tweaks}


def affinity(timeout_s):
    return {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": timeout_s}}}


def ingress(*entries):
    return {"status": {"loadBalancer": {"ingress": list(entries)}}}


def at(*texts):
    return tuple(parse_address(text) for text in texts)


def ranges(*texts):
    return tuple(AddressRange.parse(text) for text in texts)


# How a Service is reached from outside: the type counts for the policy alone.
EXTERNALS = [
    pytest.param(service(), None, id="ClusterIP"),
    pytest.param(service(externalTrafficPolicy="Local"), None, id="ClusterIP that is not reached from outside"),
    pytest.param(service(type="NodePort"), External(), id="NodePort"),
    pytest.param(service(type="NodePort", externalTrafficPolicy="Local"), External(is_local=True), id="NodePort Local"),
    pytest.param(service(type="NodePort", externalTrafficPolicy=""), External(), id="NodePort without a policy"),
    pytest.param(service(ports=[port(nodePort=30080)]), External(), id="a node port is one whatever the type"),
    pytest.param(
        service(externalIPs=["192.0.2.9", "2001:db8::9", "192.0.2.9"], externalTrafficPolicy="Local"),
        External(at("192.0.2.9", "2001:db8::9"), is_local=True),
        id="ClusterIP with externalIPs has the policy",
    ),
    pytest.param(
        service(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=32000)
        | ingress({"ip": "198.51.100.1"}),
        External((), at("198.51.100.1"), is_local=True, health_check_node_port=32000),
        id="LoadBalancer Local",
    ),
    pytest.param(
        service(type="LoadBalancer", healthCheckNodePort=32000),
        External(),
        id="a health check is only for the Local policy",
    ),
    pytest.param(
        service(type="NodePort", externalTrafficPolicy="Local", healthCheckNodePort=32000),
        External(is_local=True),
        id="a health check is only for load balancers",
    ),
    pytest.param(
        service(type="LoadBalancer")
        | ingress(
            {"ip": "198.51.100.1"},
            {"ip": "198.51.100.2", "ipMode": "VIP"},
            {"ip": "198.51.100.3", "ipMode": "Proxy"},
            {"ip": "198.51.100.4", "ipMode": None},
            {"ip": "198.51.100.5", "ipMode": "Other"},
            {"hostname": "lb.example"},
            {"ip": "", "hostname": "lb.example"},
            {"ip": "2001:db8:2::1", "hostname": "lb.example"},
            {"ip": "198.51.100.1"},
        ),
        External((), at("198.51.100.1", "198.51.100.2", "198.51.100.4", "2001:db8:2::1")),
        id="ingress addresses that packets arrive with",
    ),
    pytest.param(service(type="LoadBalancer") | {"status": None}, External(), id="null status"),
    pytest.param(service(type="LoadBalancer") | {"status": {"loadBalancer": {}}}, External(), id="no ingress yet"),
    pytest.param(
        service(
            type="LoadBalancer", loadBalancerSourceRanges=[" 10.0.0.0/8", "fd00::/8 ", "\t192.0.2.7/24\n", "10.0.0.0/8"]
        ),
        External(source_ranges=ranges("10.0.0.0/8", "fd00::/8", "192.0.2.0/24")),
        id="source ranges, trimmed, once each, host bits cut",
    ),
    pytest.param(
        service(type="LoadBalancer", externalIPs=["192.000.02.9"], loadBalancerSourceRanges=["010.0.0.0/08"])
        | ingress({"ip": "198.051.100.1"}),
        External(at("192.0.2.9"), at("198.51.100.1"), ranges("10.0.0.0/8")),
        id="leading zeros",
    ),
    pytest.param(service(type="ExternalName", externalIPs=["192.0.2.9"]), None, id="ExternalName with an address left"),
    pytest.param(service(clusterIP="None", externalIPs=["192.0.2.9"]), None, id="headless"),
    pytest.param(service({PROXY_NAME: "x"}, externalIPs=["192.0.2.9"]), None, id="another proxy's"),
]


def endpoint_slice(*endpoints, ports=({"name": "http", "port": 8080},), labels=None, annotations=None, **tweaks):
    return {
        "metadata": {
            "name": "web",
            "namespace": "shop",
            "labels": {SERVICE_NAME: "web"} if labels is None else labels,
            "annotations": annotations,
        },
        "addressType": "IPv4",
        "endpoints": list(endpoints),
        "ports": list(ports),
        **tweaks,
    }


def endpoint(address="10.0.0.1", **tweaks):
    return {"addresses": [address], **tweaks}


def node(labels=None, spec=None, addresses=(), **metadata):
    return {
        "metadata": {"name": "here", "labels": labels, **metadata},
        "spec": spec,
        "status": {"addresses": [{"type": kind, "address": address} for kind, address in addresses]},
    }


def zones(*names):
    return {"hints": {"forZones": [{"name": name} for name in names]}}


def nodes(*names):
    return {"hints": {"forNodes": [{"name": name} for name in names]}}


@pytest.fixture
def decoder():
    return Decoder("here")


def event_of(decoder, kind, value):
    """Decode both from JSON and from builtin values, which must agree."""
    from_json = decoder.decode(kind, json.dumps(value).encode()).event
    assert decoder.decode_object(kind, value) == from_json
    return from_json


def record_of(decoder, kind, value):
    event = event_of(decoder, kind, value)
    assert isinstance(event, Upsert), event
    return event.record


def fault_of(decoder, kind, value):
    event = event_of(decoder, kind, value)
    assert isinstance(event, Malformed), event
    return event.key, event.field, event.reason


class TestService:
    def test_whole_record(self, decoder):
        value = service(
            clusterIPs=["10.96.0.1", "fd00::1"],
            ports=[port(53, name="dns", protocol="UDP"), port(53, name="dns-tcp")],
            internalTrafficPolicy="Local",
        )
        value["metadata"]["creationTimestamp"] = "2024-05-01T10:00:00Z"

        assert record_of(decoder, Kind.SERVICE, value) == ServiceRecord(
            KEY,
            (addresses("10.96.0.1"), addresses("fd00::1")),
            (ServicePort("dns", Protocol.UDP, 53), ServicePort("dns-tcp", Protocol.TCP, 53)),
            internal_local=True,
            created="2024-05-01T10:00:00Z",
        )

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            pytest.param(service(), ("10.96.0.1",), id="clusterIP alone"),
            pytest.param(service(clusterIPs=[]), ("10.96.0.1",), id="empty clusterIPs"),
            pytest.param(service(clusterIP=None, clusterIPs=["fd00::1"]), ("fd00::1",), id="clusterIPs alone"),
            pytest.param(service(clusterIP="010.096.0.01"), ("10.96.0.1",), id="leading zeros"),
            pytest.param(service(clusterIP=""), (), id="empty clusterIP"),
            pytest.param(service(clusterIP=None), (), id="no clusterIP"),
            pytest.param(service(clusterIP="None", clusterIPs=["None"]), (), id="headless"),
            pytest.param(service(clusterIP=None, clusterIPs=["None"]), (), id="headless by clusterIPs"),
            pytest.param(service(type="ExternalName"), (), id="ExternalName with an address left"),
            pytest.param(service({PROXY_NAME: "other"}), (), id="another proxy's"),
            pytest.param(service({PROXY_NAME: ""}), (), id="another proxy's, unnamed"),
            pytest.param(service({HEADLESS: ""}), ("10.96.0.1",), id="headless label does not filter"),
        ],
    )
    def test_cluster_ips(self, decoder, value, expected):
        record = record_of(decoder, Kind.SERVICE, value)

        assert record.cluster_ips == tuple(addresses(text) for text in expected)

    @pytest.mark.parametrize(
        ("tweaks", "expected"),
        [
            ({}, Protocol.TCP),
            ({"protocol": None}, Protocol.TCP),
            ({"protocol": "UDP"}, Protocol.UDP),
            ({"protocol": "SCTP"}, Protocol.SCTP),
        ],
        ids=str,
    )
    def test_protocol(self, decoder, tweaks, expected):
        record = record_of(decoder, Kind.SERVICE, service(ports=[{"port": 1, **tweaks}]))

        assert record.ports == (ServicePort("", expected, 1),)

    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            pytest.param({}, 0, id="none"),
            pytest.param({"sessionAffinity": "None", "sessionAffinityConfig": None}, 0, id="None"),
            pytest.param({"sessionAffinity": "None", **affinity(60)}, 0, id="a timeout alone says nothing"),
            pytest.param({"sessionAffinity": "ClientIP"}, 10_800, id="default"),
            pytest.param({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {}}, 10_800, id="nothing configured"),
            pytest.param({"sessionAffinity": "ClientIP", **affinity(None)}, 10_800, id="null"),
            pytest.param({"sessionAffinity": "ClientIP", **affinity(60)}, 60, id="configured"),
            pytest.param({"sessionAffinity": "ClientIP", **affinity(86_400)}, 86_400, id="the longest"),
        ],
    )
    def test_affinity(self, decoder, spec, expected):
        assert record_of(decoder, Kind.SERVICE, service(**spec)).affinity_timeout_s == expected

    @pytest.mark.parametrize(("value", "expected"), EXTERNALS)
    def test_external(self, decoder, value, expected):
        assert record_of(decoder, Kind.SERVICE, value).external == expected

    @pytest.mark.parametrize(
        ("annotations", "expected"),
        [
            pytest.param(None, (None, None), id="none"),
            pytest.param({"ebproxy.io/forwarding-mode": "dsr"}, (Forwarding.DSR, None), id="dsr"),
            pytest.param({"ebproxy.io/forwarding-mode": "snat"}, (Forwarding.SNAT, None), id="snat"),
            pytest.param({"ebproxy.io/algorithm": "maglev"}, (None, Algorithm.MAGLEV), id="maglev"),
            pytest.param({"ebproxy.io/algorithm": "random"}, (None, Algorithm.RANDOM), id="random"),
            pytest.param({"ebproxy.io/algorithm": "best", "ebproxy.io/forwarding-mode": 3}, (None, None), id="unknown"),
            pytest.param({"other": {}}, (None, None), id="another's"),
        ],
    )
    def test_annotations(self, decoder, annotations, expected):
        value = service(type="NodePort")
        value["metadata"]["annotations"] = annotations
        external = record_of(decoder, Kind.SERVICE, value).external

        assert (external.forwarding, external.algorithm) == expected

    @pytest.mark.parametrize(
        ("value", "expected", "left_out"),
        [
            pytest.param(
                service(externalIPs=["x", "192.0.2.1", "::ffff:1.2.3.4", ""]),
                External(at("192.0.2.1")),
                {
                    "spec.externalIPs[0]": "'x' is not an IPv4 or IPv6 address",
                    "spec.externalIPs[2]": "'::ffff:1.2.3.4' is not an IPv4 or IPv6 address",
                    "spec.externalIPs[3]": "'' is not an IPv4 or IPv6 address",
                },
                id="externalIPs",
            ),
            pytest.param(
                service(type="LoadBalancer") | ingress({"hostname": "lb"}, {"ip": "x"}, {"ip": "198.51.100.1"}),
                External((), at("198.51.100.1")),
                {"status.loadBalancer.ingress[1].ip": "'x' is not an IPv4 or IPv6 address"},
                id="ingress",
            ),
            pytest.param(
                service(type="LoadBalancer", loadBalancerSourceRanges=["10.0.0.0/8", "10.0.0.0/33", " "]),
                External(source_ranges=ranges("10.0.0.0/8"), lacks_ranges=True),
                {
                    "spec.loadBalancerSourceRanges[1]": "'10.0.0.0/33' is not an address range",
                    "spec.loadBalancerSourceRanges[2]": "' ' is not an address range",
                },
                id="source ranges",
            ),
            pytest.param(
                service(type="LoadBalancer", loadBalancerSourceRanges=["::ffff:10.0.0.0/104"]),
                External(lacks_ranges=True),
                {"spec.loadBalancerSourceRanges[0]": "'::ffff:10.0.0.0/104' is not an address range"},
                id="a source range of IPv4 in the form of IPv6",
            ),
            pytest.param(
                service(type="LoadBalancer", externalIPs=["x"], loadBalancerSourceRanges=["y"]) | ingress({"ip": "z"}),
                External(lacks_ranges=True),
                {
                    "spec.externalIPs[0]": "'x' is not an IPv4 or IPv6 address",
                    "status.loadBalancer.ingress[0].ip": "'z' is not an IPv4 or IPv6 address",
                    "spec.loadBalancerSourceRanges[0]": "'y' is not an address range",
                },
                id="of each",
            ),
        ],
    )
    def test_what_cannot_be_read_is_left_out_and_named(self, decoder, value, expected, left_out):
        event = event_of(decoder, Kind.SERVICE, value)

        assert event.record.external == expected
        assert dict(event.left_out) == left_out

    def test_node_ports(self, decoder):
        ports = [port(nodePort=30080), port(81, name="b", nodePort=0), port(82, name="c", nodePort=None)]

        record = record_of(decoder, Kind.SERVICE, service(type="NodePort", ports=ports))

        assert [port.node_port for port in record.ports] == [30080, 0, 0]

    @pytest.mark.parametrize(
        ("value", "field", "reason"),
        [
            pytest.param(service(clusterIP="10.96.0.300"), "spec.clusterIP", "'10.96.0.300' is not", id="octet"),
            pytest.param(service(clusterIP="fe80::1%eth0"), "spec.clusterIP", "'fe80::1%eth0' is not", id="zone"),
            pytest.param(service(clusterIP="::ffff:10.0.0.1"), "spec.clusterIP", "is not an IPv4 or", id="mapped"),
            pytest.param(service(clusterIP="10.0.0.1\0"), "spec.clusterIP", "is not an IPv4 or", id="NUL"),
            pytest.param(service(clusterIP=1), "spec.clusterIP", "got `int`", id="address of a wrong type"),
            pytest.param(
                service(clusterIPs=["10.96.0.1", "x"]), "spec.clusterIPs[1]", "'x' is not", id="second address"
            ),
            pytest.param(
                service(clusterIPs=["10.96.0.1", "10.96.0.2"]), "spec.clusterIPs[1]", "repeats", id="family twice"
            ),
            pytest.param(
                service(clusterIPs=["10.96.0.2"]), "spec.clusterIPs[0]", "is not spec.clusterIP", id="contradiction"
            ),
            pytest.param(service(ports=[port(), port(0, name="b")]), "spec.ports[1].port", ">= 1", id="port 0"),
            pytest.param(service(ports=[port(65536)]), "spec.ports[0].port", "<= 65535", id="port 65536"),
            pytest.param(service(ports=[port("80")]), "spec.ports[0].port", "got `str`", id="port as text"),
            pytest.param(service(ports=[{"name": "a"}]), "spec.ports[0].port", "missing", id="no port"),
            pytest.param(service(ports=[port(protocol="ICMP")]), "spec.ports[0].protocol", "'ICMP'", id="protocol"),
            pytest.param(service(ports=[port(), port(81)]), "spec.ports[1].name", "repeats", id="name twice"),
            pytest.param(
                service(ports=[port(), port(name="b")]), "spec.ports[1].port", "repeats", id="port and protocol twice"
            ),
            pytest.param(service(ports=3), "spec.ports", "got `int`", id="ports of a wrong type"),
            pytest.param(service(internalTrafficPolicy="local"), "spec.internalTrafficPolicy", "'local'", id="iTP"),
            pytest.param(service(externalTrafficPolicy="x"), "spec.externalTrafficPolicy", "'x'", id="eTP"),
            pytest.param(service(sessionAffinity="clientip"), "spec.sessionAffinity", "'clientip'", id="affinity"),
            pytest.param(
                service(**affinity(0)),
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                ">= 1",
                id="affinity of no time",
            ),
            pytest.param(
                service(**affinity(86_401)),
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                "<= 86400",
                id="affinity for too long",
            ),
            pytest.param(service(ports=[port(nodePort=65536)]), "spec.ports[0].nodePort", "<= 65535", id="nodePort"),
            pytest.param(service(healthCheckNodePort=-1), "spec.healthCheckNodePort", ">= 0", id="healthCheckNodePort"),
            pytest.param(service({PROXY_NAME: 1}), f"metadata.labels.{PROXY_NAME}", "got `int`", id="label"),
            pytest.param(service() | {"spec": None}, "spec", "got `null`", id="null spec"),
            pytest.param({"metadata": {"name": "web", "namespace": "shop"}}, "spec", "missing", id="no spec"),
        ],
    )
    def test_malformed(self, decoder, value, field, reason):
        key, actual_field, actual_reason = fault_of(decoder, Kind.SERVICE, value)

        assert (key, actual_field) == (KEY, field)
        assert reason in actual_reason


class TestIdentity:
    def test_namespace_defaults(self, decoder):
        value = service()
        del value["metadata"]["namespace"]

        assert record_of(decoder, Kind.SERVICE, value).key == ObjectKey("default", "web")

    @pytest.mark.parametrize(
        ("metadata", "field", "reason"),
        [
            ({}, "metadata.name", "missing"),
            ({"name": ""}, "metadata.name", "empty"),
            ({"name": 3}, "metadata.name", "Expected `str`, got `int`"),
            ({"name": None}, "metadata.name", "Expected `str`, got `null`"),
            ([], "metadata", "Expected `object`, got `array`"),
        ],
        ids=str,
    )
    def test_unnamed(self, decoder, metadata, field, reason):
        assert fault_of(decoder, Kind.SERVICE, service() | {"metadata": metadata}) == (UNNAMED, field, reason)

    @pytest.mark.parametrize("value", [None, [], 3, "text", {}], ids=str)
    def test_not_an_object(self, decoder, value):
        assert fault_of(decoder, Kind.ENDPOINT_SLICE, value)[0] == UNNAMED

    @pytest.mark.parametrize(
        "raw",
        [b"", b"{", b"\xff", b'{"metadata": {"name": "\xff"}}', b"[" * 100_000, b'{"metadata":' * 100_000],
        ids=["empty", "cut", "binary", "not UTF-8", "deep array", "deep object"],
    )
    def test_not_json(self, decoder, raw):
        event, version = decoder.decode(Kind.SERVICE, raw)

        assert (event.key, version) == (UNNAMED, "")
        assert event.reason

    def test_resource_version(self, decoder):
        bad = service(clusterIP="x")

        assert decoder.decode(Kind.SERVICE, json.dumps(service()).encode()).resource_version == "7"
        assert decoder.decode(Kind.SERVICE, json.dumps(bad).encode()).resource_version == "7"


class TestSlice:
    def test_whole_record(self, decoder):
        value = endpoint_slice(
            endpoint("10.0.0.1", nodeName="here"),
            endpoint("10.0.0.2", nodeName="there"),
            endpoint("10.0.0.3", nodeName="here"),
            ports=[{"name": "http", "port": 8080}, {"name": "dns", "port": 53, "protocol": "UDP"}],
            annotations={CHANGED_AT: "1970-01-01T00:01:00.5Z"},
        )

        assert record_of(decoder, Kind.ENDPOINT_SLICE, value) == SliceRecord(
            KEY,
            KEY,
            Family.IPV4,
            (SlicePort("http", Protocol.TCP, 8080), SlicePort("dns", Protocol.UDP, 53)),
            ((Traits(local=True), addresses("10.0.0.1", "10.0.0.3")), (Traits(), addresses("10.0.0.2"))),
            60.5,
        )

    def test_ipv6(self, decoder):
        value = endpoint_slice(endpoint("fd00::1"), endpoint("fd00::2"), addressType="IPv6")
        record = record_of(decoder, Kind.ENDPOINT_SLICE, value)

        assert (record.family, record.runs) == (Family.IPV6, ((Traits(), addresses("fd00::1", "fd00::2")),))

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            pytest.param({}, Traits(), id="nothing"),
            pytest.param({"conditions": None, "hints": None, "nodeName": None}, Traits(), id="null"),
            pytest.param(
                {"conditions": {"ready": None, "serving": None, "terminating": None}}, Traits(), id="null conditions"
            ),
            pytest.param({"conditions": {"ready": False}}, Traits(ready=False), id="not ready"),
            pytest.param({"conditions": {"serving": False}}, Traits(serving=False), id="not serving"),
            pytest.param(
                {"conditions": {"ready": False, "serving": True, "terminating": True}},
                Traits(ready=False, terminating=True),
                id="serving while terminating",
            ),
            pytest.param(
                {"conditions": {"ready": True, "terminating": True}}, Traits(terminating=True), id="publishNotReady"
            ),
            pytest.param({"nodeName": "here"}, Traits(local=True), id="local"),
            pytest.param({"nodeName": "there"}, Traits(), id="remote"),
            pytest.param(zones("a", "b"), Traits(zones=frozenset("ab")), id="zones"),
            pytest.param(zones(), Traits(), id="no zones"),
            pytest.param(nodes("there", "here"), Traits(node_hint=True), id="this node"),
            pytest.param(nodes("there"), Traits(node_hint=False), id="another node"),
            pytest.param(nodes(), Traits(), id="no nodes"),
        ],
    )
    def test_traits(self, decoder, said, expected):
        record = record_of(decoder, Kind.ENDPOINT_SLICE, endpoint_slice(endpoint(**said)))

        assert record.runs == ((expected, addresses("10.0.0.1")),)

    def test_equal_traits_make_one_run(self, decoder):
        value = endpoint_slice(
            endpoint("10.0.0.1", **zones("a", "b")),
            endpoint("10.0.0.2", **zones("b", "a"), conditions={"ready": None}),
        )

        assert record_of(decoder, Kind.ENDPOINT_SLICE, value).runs == (
            (Traits(zones=frozenset("ab")), addresses("10.0.0.1", "10.0.0.2")),
        )

    def test_equal_parts_are_shared(self, decoder):
        one, other = (
            record_of(decoder, Kind.ENDPOINT_SLICE, endpoint_slice(endpoint(address, **zones("a"))))
            for address in ("10.0.0.1", "10.0.0.2")
        )

        assert one.ports is other.ports
        assert one.runs[0][0] is other.runs[0][0]
        assert one.service.name is other.service.name

    @pytest.mark.parametrize(
        "value",
        [
            pytest.param(endpoint_slice() | {"endpoints": None, "ports": None}, id="null"),
            pytest.param(endpoint_slice({"addresses": []}, {"addresses": None}, {}, ports=[]), id="empty"),
        ],
    )
    def test_nothing_in_it(self, decoder, value):
        record = record_of(decoder, Kind.ENDPOINT_SLICE, value)

        assert (record.runs, record.ports) == ((), ())

    def test_leading_zeros(self, decoder):
        """Decimal numbers, as kube-proxy reads them; what Kubernetes refuses today may stand in old objects."""
        value = endpoint_slice(endpoint("010.000.0.08"), endpoint("10.0.0.10"), endpoint("0010.0.0.011"))

        assert record_of(decoder, Kind.ENDPOINT_SLICE, value).runs == (
            (Traits(), addresses("10.0.0.8", "10.0.0.10", "10.0.0.11")),
        )

    def test_only_the_first_address_counts(self, decoder):
        value = endpoint_slice({"addresses": ["10.0.0.1", "nonsense"]})

        assert record_of(decoder, Kind.ENDPOINT_SLICE, value).runs == ((Traits(), addresses("10.0.0.1")),)

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            pytest.param({"name": "a", "port": 1}, (SlicePort("a", Protocol.TCP, 1),), id="plain"),
            pytest.param({"port": 1}, (SlicePort("", Protocol.TCP, 1),), id="no name is the empty name"),
            pytest.param({"name": None, "port": 1}, (), id="null name"),
            pytest.param({"name": "a", "port": 0}, (), id="port 0"),
            pytest.param({"name": "a", "port": None}, (), id="null port"),
            pytest.param({"name": "a"}, (), id="no port"),
        ],
    )
    def test_ports(self, decoder, said, expected):
        assert record_of(decoder, Kind.ENDPOINT_SLICE, endpoint_slice(ports=[said])).ports == expected

    @pytest.mark.parametrize(
        "value",
        [
            pytest.param(endpoint_slice(labels={}), id="no service"),
            pytest.param(endpoint_slice(labels={SERVICE_NAME: ""}), id="empty service"),
            pytest.param(endpoint_slice(labels={SERVICE_NAME: "web", HEADLESS: ""}), id="headless"),
            pytest.param(endpoint_slice(endpoint("example.org"), addressType="FQDN"), id="FQDN"),
            pytest.param(endpoint_slice(endpoint("1:2"), addressType="IPv5"), id="an address type of the future"),
            pytest.param(endpoint_slice(addressType=""), id="no address type"),
        ],
    )
    def test_says_nothing_to_us(self, decoder, value):
        assert event_of(decoder, Kind.ENDPOINT_SLICE, value) == Delete(Kind.ENDPOINT_SLICE, KEY)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("1970-01-01T00:00:01Z", 1.0),
            ("1970-01-01T01:00:01+01:00", 1.0),
            ("1970-01-01T00:00:01", None),
            ("yesterday", None),
            ("", None),
            (5, None),
            (None, None),
        ],
    )
    def test_changed_at(self, decoder, text, expected):
        value = endpoint_slice(annotations={CHANGED_AT: text})

        assert record_of(decoder, Kind.ENDPOINT_SLICE, value).changed_at == expected

    @pytest.mark.parametrize(
        ("value", "field", "reason"),
        [
            pytest.param(
                endpoint_slice(endpoint(), endpoint("10.0.0")), "endpoints[1].addresses[0]", "'10.0.0' is", id="short"
            ),
            pytest.param(endpoint_slice(endpoint("10..0.1")), "endpoints[0].addresses[0]", "'10..0.1'", id="no octet"),
            pytest.param(endpoint_slice(endpoint("010.0.0.256")), "endpoints[0].addresses[0]", ".256", id="octet"),
            pytest.param(endpoint_slice(endpoint("0x0a.0.0.1")), "endpoints[0].addresses[0]", "0x0a", id="hexadecimal"),
            pytest.param(
                endpoint_slice(endpoint(), endpoint("fd00::1", nodeName="here")),
                "endpoints[1].addresses[0]",
                "'fd00::1' is not an IPv4 address",
                id="IPv6 among IPv4",
            ),
            pytest.param(
                endpoint_slice(endpoint("fd00::1"), endpoint("10.0.0.1"), addressType="IPv6"),
                "endpoints[1].addresses[0]",
                "'10.0.0.1' is not an IPv6 address",
                id="IPv4 among IPv6",
            ),
            pytest.param(
                endpoint_slice(endpoint("::ffff:10.0.0.1"), addressType="IPv6"),
                "endpoints[0].addresses[0]",
                "is not an IPv6 address",
                id="mapped",
            ),
            pytest.param(
                endpoint_slice(endpoint("fe80::1%1"), addressType="IPv6"), "endpoints[0].addresses[0]", "%1", id="zone"
            ),
            pytest.param(endpoint_slice(addressType=4), "addressType", "got `int`", id="address type"),
            pytest.param(endpoint_slice(ports=[{"name": "a", "port": 70000}]), "ports[0].port", "<= 65535", id="port"),
            pytest.param(
                endpoint_slice(ports=[{"name": "a", "port": -1}]), "ports[0].port", ">= 0", id="negative port"
            ),
            pytest.param(endpoint_slice(ports=[{"port": 1}, {"port": 2}]), "ports[1].name", "repeats", id="name twice"),
            pytest.param(endpoint_slice(labels=[]), "metadata.labels", "got `array`", id="labels"),
            pytest.param(
                endpoint_slice(labels={SERVICE_NAME: True}), f"metadata.labels.{SERVICE_NAME}", "got `bool`", id="label"
            ),
            pytest.param(
                endpoint_slice(endpoint(conditions={"ready": "yes"})),
                "endpoints[0].conditions.ready",
                "got `str`",
                id="condition",
            ),
            pytest.param(
                endpoint_slice(endpoint(hints={"forZones": [{}]})),
                "endpoints[0].hints.forZones[0].name",
                "missing",
                id="unnamed zone",
            ),
        ],
    )
    def test_malformed(self, decoder, value, field, reason):
        key, actual_field, actual_reason = fault_of(decoder, Kind.ENDPOINT_SLICE, value)

        assert (key, actual_field) == (KEY, field)
        assert reason in actual_reason


class TestNode:
    def test_whole_record(self, decoder):
        value = node(
            {"topology.kubernetes.io/zone": "a"},
            {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd01::/64"]},
            [("Hostname", "here"), ("ExternalIP", "1.2.3.4"), ("InternalIP", "10.0.0.9"), ("InternalIP", "fd00::9")],
        )

        assert record_of(decoder, Kind.NODE, value) == NodeRecord(
            "here", "a", ("10.0.0.9", "fd00::9", "1.2.3.4"), ("10.1.0.0/24", "fd01::/64")
        )

    def test_bare(self, decoder):
        assert record_of(decoder, Kind.NODE, {"metadata": {"name": "here"}}) == NodeRecord("here")

    def test_what_is_no_address(self, decoder):
        said = [("InternalIP", "here.example"), ("InternalIP", "010.0.0.9"), ("InternalIP", ""), ("ExternalIP", "x")]

        assert record_of(decoder, Kind.NODE, node(addresses=said)).addresses == ("10.0.0.9",)

    def test_pod_cidr_alone(self, decoder):
        assert record_of(decoder, Kind.NODE, node(spec={"podCIDR": "10.1.0.0/24"})).pod_cidrs == ("10.1.0.0/24",)

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            pytest.param(node(), False, id="staying"),
            pytest.param(node(deletionTimestamp="2024-05-01T10:00:00Z"), True, id="deletion timestamp"),
            pytest.param(node(spec={"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}), True, id="tainted"),
            pytest.param(node(spec={"taints": [{"key": "other", "effect": "NoSchedule"}]}), False, id="other taint"),
        ],
    )
    def test_deleting(self, decoder, value, expected):
        assert record_of(decoder, Kind.NODE, value).deleting is expected

    @pytest.mark.parametrize(
        ("value", "field"),
        [
            (node(spec={"podCIDRs": ["10.1.0.0/24", "10.1.0.0/33"]}), "spec.podCIDRs[1]"),
            (node(spec={"podCIDR": "x"}), "spec.podCIDR"),
        ],
        ids=["podCIDRs", "podCIDR"],
    )
    def test_malformed(self, decoder, value, field):
        assert fault_of(decoder, Kind.NODE, value)[:2] == (ObjectKey("", "here"), field)


class TestList:
    def test_page(self, decoder):
        body = {"metadata": {"resourceVersion": "9", "continue": "next"}, "items": [service()]}
        page = decoder.decode_list(Kind.SERVICE, json.dumps(body).encode())

        assert page == ([decoder.decode_object(Kind.SERVICE, service())], "9", "next")

    @pytest.mark.parametrize("items", [[], None])
    def test_empty(self, decoder, items):
        body = {"metadata": {"resourceVersion": "9"}, "items": items}

        assert decoder.decode_list(Kind.NODE, json.dumps(body).encode()) == ([], "9", "")

    def test_a_malformed_item_costs_only_itself(self, decoder):
        items = [service(), service(clusterIP=3), "nonsense", service(clusterIP="None")]
        body = json.dumps({"metadata": {}, "items": items}).encode()

        assert [type(event) for event in decoder.decode_list(Kind.SERVICE, body).events] == [
            Upsert,
            Malformed,
            Malformed,
            Upsert,
        ]

    @pytest.mark.parametrize("body", [b"", b"[]", b'{"metadata": {}, "items": [', b'{"items": []}', b"\xff"], ids=repr)
    def test_not_a_list(self, decoder, body):
        with pytest.raises(SourceError, match="not a list of Service"):
            decoder.decode_list(Kind.SERVICE, body)


class TestChange:
    """A watch event and its object in one pass."""

    @pytest.mark.parametrize("kind", ["ADDED", "MODIFIED"])
    def test_an_object_that_exists(self, kind):
        raw = json.dumps(service()).encode()
        line = b'{"type": "%s", "object": %s}' % (kind.encode(), raw)

        assert Decoder("here").decode_change(Kind.SERVICE, line) == Decoder("here").decode(Kind.SERVICE, raw)

    @pytest.mark.parametrize(
        "line",
        [
            b'{"type": "DELETED", "object": {"metadata": {"name": "web"}, "spec": {}}}',
            b'{"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "7"}}}',
            b'{"type": "ADDED", "object": {"metadata": {"name": "web"}, "spec": {"ports": 1}}}',
            b'{"type": "ADDED"',
            b"<html>",
        ],
        ids=["deleted", "bookmark", "malformed", "cut", "garbage"],
    )
    def test_what_is_left_to_the_longer_way(self, line):
        assert Decoder("here").decode_change(Kind.SERVICE, line) is None
