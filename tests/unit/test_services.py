"""A Service and its slices become service ports: frontends and backends."""

from __future__ import annotations

import pytest

from agent.core.records import Family, Protocol, Traits
from agent.core.services import PortName, resolve
from tests.builders import READY, endpoint_text, frontend, piece, service

LOCAL = Traits(local=True)
NOT_READY = Traits(ready=False, serving=False)
TERMINATING = Traits(ready=False, terminating=True)
UDP, TCP = Protocol.UDP, Protocol.TCP


def resolved(record, *slices, zone=""):
    """Backends by ``port name/protocol/family``, sorted; SILENT or REFUSED where there are none."""
    return {
        str(want.port): " ".join(sorted(map(endpoint_text, (want.cluster or want.local).slots)))
        or ("SILENT" if (want.cluster or want.local).is_silent else "REFUSED")
        for want in resolve(record, slices, zone)
    }


V4 = "http/TCP/IPv4"
CASES = [
    pytest.param(service(), [], {V4: "REFUSED"}, id="no-slices"),
    pytest.param(service(), [piece("s", (READY, ["10.1.0.1"]))], {V4: "10.1.0.1:8080"}, id="one-endpoint"),
    pytest.param(
        service(),
        [piece("s1", (READY, ["10.1.0.1"])), piece("s2", (READY, ["10.1.0.2"]))],
        {V4: "10.1.0.1:8080 10.1.0.2:8080"},
        id="several-slices",
    ),
    pytest.param(
        service(),
        [piece("s1", (READY, ["10.1.0.1", "10.1.0.2"])), piece("s2", (READY, ["10.1.0.2"]))],
        {V4: "10.1.0.1:8080 10.1.0.2:8080"},
        id="duplicate-over-slices",
    ),
    pytest.param(
        service(),
        [piece("s1", (READY, ["10.1.0.1"])), piece("s2", (READY, ["10.1.0.1"]), ports=[("http", 9090)])],
        {V4: "10.1.0.1:8080 10.1.0.1:9090"},
        id="port-numbers-of-a-slice-are-its-own",
    ),
    pytest.param(
        service(ports=[("http", 80), ("admin", 81)]),
        [piece("s", (READY, ["10.1.0.1"]), ports=[("admin", 8081), ("http", 8080)])],
        {V4: "10.1.0.1:8080", "admin/TCP/IPv4": "10.1.0.1:8081"},
        id="ports-by-name",
    ),
    pytest.param(
        service(ports=[("http", 80), ("admin", 81)]),
        [piece("s", (READY, ["10.1.0.1"]))],
        {V4: "10.1.0.1:8080", "admin/TCP/IPv4": "REFUSED"},
        id="port-no-slice-has",
    ),
    pytest.param(
        service(ports=[("", 80)]),
        [piece("s", (READY, ["10.1.0.1"]), ports=[("", 8080)])],
        {"-/TCP/IPv4": "10.1.0.1:8080"},
        id="unnamed-port",
    ),
    pytest.param(
        service(ports=[("dns", 53, UDP), ("dns", 53, TCP)]),
        [piece("s", (READY, ["10.1.0.1"]), ports=[("dns", 5353, UDP), ("dns", 5354, TCP)])],
        {"dns/UDP/IPv4": "10.1.0.1:5353", "dns/TCP/IPv4": "10.1.0.1:5354"},
        id="one-name-two-protocols",
    ),
    pytest.param(
        service(ports=[("sig", 9, Protocol.SCTP)]),
        [piece("s", (READY, ["10.1.0.1"]), ports=[("sig", 9, TCP)])],
        {"sig/SCTP/IPv4": "REFUSED"},
        id="protocol-differs",
    ),
    pytest.param(
        service("web", "10.0.0.1", "fd00::1"),
        [
            piece("s4", (READY, ["10.1.0.1"])),
            piece("s6", (READY, ["fd01::1"]), family=Family.IPV6, ports=[("http", 8086)]),
        ],
        {V4: "10.1.0.1:8080", "http/TCP/IPv6": "[fd01::1]:8086"},
        id="dual-stack",
    ),
    pytest.param(
        service("web", "fd00::1"),
        [piece("s4", (READY, ["10.1.0.1"]))],
        {"http/TCP/IPv6": "REFUSED"},
        id="slices-of-another-family",
    ),
    pytest.param(
        service(local=True),
        [piece("s", (READY, ["10.1.0.1"]), (LOCAL, ["10.1.0.2"]))],
        {V4: "10.1.0.2:8080"},
        id="local-policy",
    ),
    pytest.param(
        service(local=True), [piece("s", (READY, ["10.1.0.1"]))], {V4: "SILENT"}, id="local-policy-endpoints-elsewhere"
    ),
    pytest.param(
        service(local=True),
        [piece("s", (TERMINATING, ["10.1.0.1"]))],
        {V4: "SILENT"},
        id="local-policy-terminating-only",
    ),
    pytest.param(
        service(local=True), [piece("s", (NOT_READY, ["10.1.0.1"]))], {V4: "REFUSED"}, id="local-policy-none-usable"
    ),
    pytest.param(service(), [piece("s", (NOT_READY, ["10.1.0.1"]))], {V4: "REFUSED"}, id="none-ready"),
    pytest.param(
        service(),
        [piece("s", (TERMINATING, ["10.1.0.1"]))],
        {V4: "10.1.0.1:8080"},
        id="terminating-is-better-than-none",
    ),
    pytest.param(
        service(),
        [piece("s1", (TERMINATING, ["10.1.0.1"])), piece("s2", (READY, ["10.1.0.2"]))],
        {V4: "10.1.0.2:8080"},
        id="readiness-is-judged-over-all-slices",
    ),
    pytest.param(
        service(ports=[("http", 80), ("admin", 81)]),
        [
            piece("s1", (TERMINATING, ["10.1.0.1"]), ports=[("http", 1), ("admin", 2)]),
            piece("s2", (READY, ["10.1.0.2"]), ports=[("http", 1)]),
        ],
        {V4: "10.1.0.2:1", "admin/TCP/IPv4": "10.1.0.1:2"},
        id="readiness-is-judged-for-each-port",
    ),
    pytest.param(
        service(),
        [
            piece("s1", (Traits(zones=frozenset("a")), ["10.1.0.1"])),
            piece("s2", (Traits(zones=frozenset("b")), ["10.1.0.2"])),
        ],
        {V4: "10.1.0.1:8080"},
        id="hints-are-judged-over-all-slices",
    ),
    pytest.param(
        service(),
        [piece("s1", (Traits(zones=frozenset("a")), ["10.1.0.1"])), piece("s2", (READY, ["10.1.0.2"]))],
        {V4: "10.1.0.1:8080 10.1.0.2:8080"},
        id="a-slice-without-hints",
    ),
    pytest.param(service(ports=[]), [piece("s", (READY, ["10.1.0.1"]))], {}, id="no-ports"),
]


@pytest.mark.parametrize(("record", "slices", "expected"), CASES)
def test_a_service_resolves(record, slices, expected):
    assert resolved(record, *slices, zone="a") == expected


def test_a_headless_service_has_nothing_to_program():
    headless = service()

    assert not list(resolve(type(headless)(headless.key, (), headless.ports), [], ""))


def test_a_frontend_is_the_cluster_ip_and_the_service_port():
    (want,) = resolve(service("web", "fd00::1", ports=[("dns", 53, UDP)]), [], "")

    assert want.port == PortName("dns", UDP, Family.IPV6)
    assert want.frontends == (frontend("fd00::1", 53, UDP), frontend("fd00::1", 0, 0))


@pytest.mark.parametrize(
    ("traits", "keeps"),
    [
        pytest.param(READY, True, id="ready"),
        pytest.param(Traits(ready=False, serving=True, terminating=True), True, id="serving-terminating"),
        pytest.param(Traits(ready=False, serving=False, terminating=True), False, id="terminating"),
        pytest.param(Traits(ready=False, serving=True), True, id="serving-not-ready"),
        pytest.param(Traits(ready=True, serving=False, terminating=True), True, id="published-though-not-ready"),
        pytest.param(NOT_READY, False, id="not-ready"),
        pytest.param(Traits(zones=frozenset({"elsewhere"})), True, id="hinted-elsewhere"),
    ],
)
@pytest.mark.parametrize("local", [False, True], ids=["cluster", "local"])
def test_who_keeps_flows_is_no_matter_of_policy(traits, keeps, local):
    ports = [("dns", 5353, UDP), ("dns", 5354, TCP)]
    record = service(ports=[("dns", 53, UDP), ("dns", 53, TCP)], local=local)
    pieces = [piece("s1", (READY, ["10.1.0.1"]), ports=ports), piece("s2", (traits, ["10.1.0.2"]), ports=ports)]

    serving = {want.port.protocol: want.serving for want in resolve(record, pieces, "here")}

    assert serving[TCP] is None
    assert sorted(map(endpoint_text, serving[UDP])) == ["10.1.0.1:5353"] + ["10.1.0.2:5353"] * keeps
