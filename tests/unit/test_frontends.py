"""Which frontends a service port has in each family, and what clients inside and outside the cluster get of them."""

from __future__ import annotations

import pytest

from agent.core.abi import FrontendFlag, FrontendKey, FrontendKind
from agent.core.addresses import AddressRange, format_address, parse_address
from agent.core.options import ServiceOptions
from agent.core.records import Algorithm, Forwarding, Protocol, Traits
from agent.core.services import DesiredPort, resolve
from tests.builders import READY, endpoint_text, external, piece, service

TCP, UDP = Protocol.TCP, Protocol.UDP
HERE = Traits(local=True)
GOING_HERE = Traits(ready=False, terminating=True, local=True)
NOT_READY = Traits(ready=False, serving=False)
NODE = tuple(map(parse_address, ("127.0.0.1", "192.0.2.1", "2001:db8::1")))
PLAIN = ServiceOptions()


def resolved(record, *pieces, options=PLAIN) -> list[DesiredPort]:
    return list(resolve(record, pieces, "", NODE, options))


def kinds(*wants: DesiredPort) -> list[str]:
    """Frontends as ``kind address port``."""
    said = []
    for want in wants:
        for raw, role in zip(want.frontends, want.roles, strict=True):
            asked = FrontendKey.unpack(raw)
            said.append(f"{FrontendKind(role.kind).name} {format_address(asked.address)} {asked.port}")
    return said


def gets(want: DesiredPort, kind: FrontendKind) -> str:
    """What clients inside and outside get of the first frontend of a kind."""
    role = next(role for role in want.roles if role.kind == kind)
    segments = [None, want.cluster, want.local]
    sides = []
    for segment in (segments[role.inside], segments[role.outside]):
        if segment is None:
            sides.append("NOTHING")
            continue
        backends = " ".join(endpoint_text(slot).removesuffix(":8080") for slot in segment.slots)
        sides.append(backends or ("SILENT" if segment.is_silent else "REFUSED"))
    return " | ".join(sides)


FRONTENDS = [
    pytest.param(service(), ["CLUSTER_IP 10.0.0.1 80", "RESERVED 10.0.0.1 0"], id="cluster-ip"),
    pytest.param(
        service(ports=[("http", 80), ("admin", 81)]),
        ["CLUSTER_IP 10.0.0.1 80", "CLUSTER_IP 10.0.0.1 81", "RESERVED 10.0.0.1 0"],
        id="the-first-port-by-name-stands-in-for-the-cluster-ip",
    ),
    pytest.param(
        service(ports=[("http", 80, TCP, 30080)], reached=external()),
        [
            "CLUSTER_IP 10.0.0.1 80",
            "RESERVED 10.0.0.1 0",
            "NODE_PORT 127.0.0.1 30080",
            "NODE_PORT 192.0.2.1 30080",
            "RESERVED 0.0.0.0 30080",
        ],
        id="node-port",
    ),
    pytest.param(
        service("web", "fd00::1", ports=[("http", 80, TCP, 30080)], reached=external()),
        [
            "CLUSTER_IP fd00::1 80",
            "RESERVED fd00::1 0",
            "NODE_PORT 2001:db8::1 30080",
            "RESERVED :: 30080",
        ],
        id="node-port-of-ipv6",
    ),
    pytest.param(
        service(reached=external("192.0.2.9", "2001:db8::9", load_balancer=["198.51.100.1", "2001:db8:2::1"])),
        [
            "CLUSTER_IP 10.0.0.1 80",
            "RESERVED 10.0.0.1 0",
            "LOAD_BALANCER 198.51.100.1 80",
            "EXTERNAL_IP 192.0.2.9 80",
        ],
        id="addresses-of-another-family-are-left-out",
    ),
    pytest.param(
        service(reached=external("192.0.2.9", load_balancer=["192.0.2.9"])),
        ["CLUSTER_IP 10.0.0.1 80", "RESERVED 10.0.0.1 0", "LOAD_BALANCER 192.0.2.9 80"],
        id="an-address-twice",
    ),
    pytest.param(
        service(ports=[("http", 80, TCP, 80)], reached=external("192.0.2.1")),
        [
            "CLUSTER_IP 10.0.0.1 80",
            "RESERVED 10.0.0.1 0",
            "EXTERNAL_IP 192.0.2.1 80",
            "NODE_PORT 127.0.0.1 80",
            "RESERVED 0.0.0.0 80",
        ],
        id="the-nodes-own-address-as-an-external-ip-on-the-same-port",
    ),
    pytest.param(
        service(reached=external()), ["CLUSTER_IP 10.0.0.1 80", "RESERVED 10.0.0.1 0"], id="without-a-node-port"
    ),
]


@pytest.mark.parametrize(("record", "expected"), FRONTENDS)
def test_frontends_of_a_service(record, expected):
    assert sorted(kinds(*resolved(record))) == sorted(expected)


def test_two_protocols_of_one_port_are_two_frontends():
    wants = resolved(service(ports=[("a", 53, UDP, 30053), ("b", 53, TCP, 30053)], reached=external()))
    keys = [key for want in wants for key in want.frontends]

    assert len(keys) == len(set(keys)) == 2 * (1 + 2 + 1) + 1


ENDPOINTS = {
    "both": [(HERE, ["10.1.0.1"]), (READY, ["10.1.0.2"])],
    "elsewhere": [(READY, ["10.1.0.2"])],
    "terminating": [(GOING_HERE, ["10.1.0.1"]), (READY, ["10.1.0.2"])],
    "not ready": [(NOT_READY, ["10.1.0.2"])],
    "none": [],
}
POLICIES = [
    # internal, external, endpoints, ClusterIP inside | outside, external frontends inside | outside
    ("Cluster", "Cluster", "both", "10.1.0.1 10.1.0.2 | 10.1.0.1 10.1.0.2", "10.1.0.1 10.1.0.2 | 10.1.0.1 10.1.0.2"),
    ("Cluster", "Local", "both", "10.1.0.1 10.1.0.2 | 10.1.0.1 10.1.0.2", "10.1.0.1 10.1.0.2 | 10.1.0.1"),
    ("Local", "Cluster", "both", "10.1.0.1 | 10.1.0.1", "10.1.0.1 10.1.0.2 | 10.1.0.1 10.1.0.2"),
    ("Local", "Local", "both", "10.1.0.1 | 10.1.0.1", "10.1.0.1 10.1.0.2 | 10.1.0.1"),
    ("Cluster", "Local", "elsewhere", "10.1.0.2 | 10.1.0.2", "10.1.0.2 | SILENT"),
    ("Local", "Cluster", "elsewhere", "SILENT | SILENT", "10.1.0.2 | 10.1.0.2"),
    ("Local", "Local", "elsewhere", "SILENT | SILENT", "10.1.0.2 | SILENT"),
    ("Local", "Local", "terminating", "10.1.0.1 | 10.1.0.1", "10.1.0.2 | 10.1.0.1"),
    ("Cluster", "Cluster", "terminating", "10.1.0.2 | 10.1.0.2", "10.1.0.2 | 10.1.0.2"),
    ("Cluster", "Cluster", "not ready", "REFUSED | REFUSED", "REFUSED | REFUSED"),
    ("Local", "Local", "not ready", "REFUSED | REFUSED", "REFUSED | REFUSED"),
    ("Local", "Local", "none", "REFUSED | REFUSED", "REFUSED | REFUSED"),
]


@pytest.mark.parametrize(
    ("internal", "policy", "endpoints", "cluster_ip", "others"),
    POLICIES,
    ids=[f"internal-{it[0]}-external-{it[1]}-{it[2].replace(' ', '-')}" for it in POLICIES],
)
def test_both_policies_and_both_sides(internal, policy, endpoints, cluster_ip, others):
    reached = external("192.0.2.9", load_balancer=["198.51.100.1"], local=policy == "Local")
    record = service(ports=[("http", 80, TCP, 30080)], local=internal == "Local", reached=reached)
    (want,) = resolved(record, piece("s", *ENDPOINTS[endpoints]))

    assert gets(want, FrontendKind.CLUSTER_IP) == cluster_ip
    for kind in (FrontendKind.NODE_PORT, FrontendKind.EXTERNAL_IP, FrontendKind.LOAD_BALANCER):
        assert gets(want, kind) == others
    assert gets(want, FrontendKind.RESERVED) == "NOTHING | NOTHING"


@pytest.mark.parametrize(
    ("record", "has_cluster", "has_local"),
    [
        pytest.param(service(), True, False, id="cluster"),
        pytest.param(service(local=True), False, True, id="local"),
        pytest.param(service(reached=external(local=True)), True, False, id="an-external-policy-that-nobody-meets"),
        pytest.param(service(local=True, reached=external("192.0.2.9")), True, True, id="both"),
    ],
)
def test_only_segments_that_a_frontend_uses_are_there(record, has_cluster, has_local):
    (want,) = resolved(record, piece("s", (HERE, ["10.1.0.1"])))

    assert (want.cluster is not None, want.local is not None) == (has_cluster, has_local)


F = FrontendFlag
FLAGS = [
    pytest.param(external("192.0.2.9"), PLAIN, F(0), F(0), id="none"),
    pytest.param(external("192.0.2.9", local=True), PLAIN, F(0), F.EXTERNAL_LOCAL, id="local"),
    pytest.param(external("192.0.2.9"), ServiceOptions(masquerade_all=True), F.MASQUERADE, F(0), id="masquerade-all"),
    pytest.param(external("192.0.2.9", forwarding=Forwarding.DSR), PLAIN, F(0), F.DSR, id="dsr"),
    pytest.param(external("192.0.2.9", algorithm=Algorithm.MAGLEV), PLAIN, F(0), F.MAGLEV, id="maglev"),
    pytest.param(
        external("192.0.2.9"),
        ServiceOptions(forwarding=Forwarding.DSR, algorithm=Algorithm.MAGLEV),
        F(0),
        F.DSR | F.MAGLEV,
        id="as-the-cluster-does",
    ),
    pytest.param(
        external("192.0.2.9", forwarding=Forwarding.SNAT, algorithm=Algorithm.RANDOM),
        ServiceOptions(forwarding=Forwarding.DSR, algorithm=Algorithm.MAGLEV),
        F(0),
        F(0),
        id="other-than-the-cluster-does",
    ),
    pytest.param(external("192.0.2.9", ranges=["10.0.0.0/8"]), PLAIN, F(0), F(0), id="ranges-are-of-load-balancers"),
]


@pytest.mark.parametrize(("reached", "options", "cluster_ip", "others"), FLAGS)
def test_flags(reached, options, cluster_ip, others):
    (want,) = resolved(service(reached=reached), options=options)
    flags = {role.kind: F(role.flags & ~role.kind) for role in want.roles}

    assert flags == {
        FrontendKind.CLUSTER_IP: cluster_ip,
        FrontendKind.EXTERNAL_IP: others,
        FrontendKind.RESERVED: F(0),
    }


@pytest.mark.parametrize(
    ("ranges", "ipv4", "ipv6"),
    [
        pytest.param([], (), (), id="none"),
        pytest.param(["10.0.0.0/8"], ("10.0.0.0/8",), (), id="of-ipv4"),
        pytest.param(["fd00::/8"], (), ("fd00::/8",), id="of-ipv6"),
        pytest.param(["10.0.0.0/8", "fd00::/8"], ("10.0.0.0/8",), ("fd00::/8",), id="of-both"),
        pytest.param(["10.0.0.0/8", "0.0.0.0/0", "fd00::/8"], (), ("fd00::/8",), id="all-of-ipv4"),
        pytest.param(["::/0", "10.0.0.0/8"], ("10.0.0.0/8",), (), id="all-of-ipv6"),
    ],
)
def test_source_ranges_limit_the_load_balancer_of_their_family(ranges, ipv4, ipv6):
    reached = external(load_balancer=["198.51.100.1", "2001:db8:2::1"], ranges=ranges)
    wants = resolved(service("web", "10.0.0.1", "fd00::1", reached=reached))

    for want, expected in zip(wants, (ipv4, ipv6), strict=True):
        assert tuple(str(AddressRange(*it)) for it in want.source_ranges) == expected
        limited = {role.kind for role in want.roles if role.flags & FrontendFlag.SOURCE_RANGES}
        assert limited == ({FrontendKind.LOAD_BALANCER} if expected else set())


@pytest.mark.parametrize(
    ("ranges", "limited"),
    [
        pytest.param([], [True, True], id="no-other"),
        pytest.param(["10.0.0.0/8"], [True, True], id="one-of-ipv4-is-left"),
        pytest.param(["0.0.0.0/0", "fd00::/8"], [False, True], id="one-that-is-everybody"),
    ],
)
def test_a_source_range_that_cannot_be_read_opens_no_family(ranges, limited):
    """Nobody may, rather than everybody, where the only range of a family may be the one that cannot be read."""
    reached = external(load_balancer=["198.51.100.1", "2001:db8:2::1"], ranges=ranges, lacks_ranges=True)
    wants = resolved(service("web", "10.0.0.1", "fd00::1", reached=reached))

    assert [any(role.flags & FrontendFlag.SOURCE_RANGES for role in want.roles) for want in wants] == limited


def test_source_ranges_without_a_load_balancer_are_nobodys():
    (want,) = resolved(service(reached=external("192.0.2.9", ranges=["10.0.0.0/8"])))

    assert want.source_ranges == ()


def test_external_ips_that_are_not_allowed_are_left_out():
    options = ServiceOptions(allowed_external_ips=(AddressRange.parse("192.0.2.0/28"),))
    reached = external("192.0.2.9", "192.0.2.99", "2001:db8::9")
    wants = resolved(service("web", "10.0.0.1", "fd00::1", reached=reached), options=options)

    assert [it for it in kinds(*wants) if it.startswith("EXTERNAL")] == ["EXTERNAL_IP 192.0.2.9 80"]


def test_affinity_is_the_services():
    assert [want.affinity_timeout_s for want in resolved(service(affinity_s=60, ports=[("a", 1), ("b", 2)]))] == [
        60,
        60,
    ]
