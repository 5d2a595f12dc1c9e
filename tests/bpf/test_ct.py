"""`ebproxy ct list` reads the pinned map and the names beside it."""

from __future__ import annotations

import contextlib
import json
import time

import pytest

from agent.__main__ import main
from agent.core.abi import FlowFlag as F
from agent.core.abi import Frontend, FrontendKey, MapSizes, map_specs
from agent.core.addresses import parse_address
from agent.core.records import Protocol
from agent.kernel.maps import MapStore
from tests.flows import entry, pair

TCP, UDP, SCTP = Protocol
NAMES = "7\tshop/dns\tdns\tUDP\tIPv4\n8\tshop/web\thttp\tTCP\tIPv6\n"
SIZES = MapSizes(frontends=64, segments=256, socket_origins=64, peer_origins=64, conntrack=1024)


@pytest.fixture
def listed(bpffs, tmp_path, capsys):
    """Write flows, and read what the command says of them."""
    (tmp_path / "names.tsv").write_text(NAMES, encoding="utf-8")
    store = MapStore.open(bpffs / "ebproxy" / "0123456789ab", map_specs(SIZES))

    def list_flows(*flags, entries=()):
        for k, v in entries:
            store.maps["conntrack"].update(k, v)
        assert main(["ct", "list", "--bpffs", str(bpffs), "--state-dir", str(tmp_path), *flags]) == 0
        return capsys.readouterr().out

    yield list_flows
    store.close()


def ago(seconds):
    return int(time.monotonic()) - seconds


def flows():
    return [
        *pair(UDP, seen=ago(5), flags=F.REPLIED),
        *pair(
            TCP,
            "[fd00::9]:4000",
            "[fd00:96::1]:80",
            "[fd00:1::1]:8080",
            "[fd00:172::1]:20000",
            seen=ago(3),
            flags=F.REPLIED | F.ESTABLISHED | F.FIN,
            service=8,
        ),
        pair(SCTP, "10.9.0.3:1", seen=ago(1), service=99)[1],
        pair(UDP, "10.9.0.4:1", seen=ago(1), flags=F.DSR)[0],
        entry(UDP, "10.9.0.5:1", "10.1.0.1:53", "10.9.0.5:1", "10.1.0.1:53", service=0, seen=ago(1), flags=F.DSR),
        pair(UDP, "10.9.0.5:1", service=0, seen=ago(1), flags=F.DSR)[1],
    ]


def test_json(listed):
    said = json.loads(listed("-o", "json", entries=flows()))

    for flow in said:
        assert 0 <= flow.pop("idle_s") <= 7
    names = {"service": "shop/dns", "port": "dns"}
    whole = {"source": None, "dsr": False, "is_whole": True}
    assert said == [
        {
            "protocol": "UDP",
            "client": "10.9.0.5:1",
            "frontend": "10.96.0.10:53",
            "backend": "10.1.0.1:53",
            "state": "unreplied",
            "service": "",
            "port": "",
            **whole,
            "dsr": True,
        },
        {
            "protocol": "SCTP",
            "client": "10.9.0.3:1",
            "frontend": "10.96.0.10:53",
            "backend": "10.1.0.1:53",
            "state": "unreplied",
            "service": "id:99",
            "port": "",
            **whole,
            "is_whole": False,
        },
        {
            "protocol": "UDP",
            "client": "10.9.0.1:4000",
            "frontend": "10.96.0.10:53",
            "backend": "10.1.0.1:53",
            "state": "established",
            **names,
            **whole,
        },
        {
            "protocol": "UDP",
            "client": "10.9.0.4:1",
            "frontend": "10.96.0.10:53",
            "backend": "10.1.0.1:53",
            "state": "unreplied",
            **names,
            **whole,
            "dsr": True,
            "is_whole": False,
        },
        {
            "protocol": "TCP",
            "client": "[fd00::9]:4000",
            "frontend": "[fd00:96::1]:80",
            "backend": "[fd00:1::1]:8080",
            "state": "half-closed",
            "service": "shop/web",
            "port": "http",
            **whole,
            "source": "[fd00:172::1]:20000",
        },
    ]


@pytest.mark.parametrize(
    ("flags", "clients"),
    [
        pytest.param(["--service", "shop/web"], ["[fd00::9]:4000"], id="service"),
        pytest.param(["--protocol", "udp"], ["10.9.0.5:1", "10.9.0.1:4000", "10.9.0.4:1"], id="protocol"),
        pytest.param(["--protocol", "sctp", "--service", "shop/web"], [], id="both"),
    ],
)
def test_only_some(listed, flags, clients):
    said = json.loads(listed("-o", "json", *flags, entries=flows()))

    assert [flow["client"] for flow in said] == clients


def test_table(listed):
    head, *rows = listed(entries=flows()).splitlines()

    assert head.split() == ["PROTOCOL", "CLIENT", "FRONTEND", "SOURCE", "BACKEND", "STATE", "IDLE", "SERVICE", "PORT"]
    assert len(rows) == 5
    assert rows[0].split()[-2:] == ["-", "-"]
    assert "unreplied, one way" in rows[1]
    assert "unreplied, one way, dsr" in rows[3]
    masqueraded = rows[4].split()
    assert masqueraded[:5] == ["TCP", "[fd00::9]:4000", "[fd00:96::1]:80", "[fd00:172::1]:20000", "[fd00:1::1]:8080"]
    assert masqueraded[-2:] == ["shop/web", "http"]


def test_nothing(listed):
    assert json.loads(listed("-o", "json")) == []


def test_a_service_that_is_not_there(bpffs, tmp_path, capsys, listed):
    where = ["--bpffs", str(bpffs), "--state-dir", str(tmp_path)]
    listed(entries=flows())

    assert main(["ct", "list", "--service", "shop/none", *where]) == 1
    assert "shop/none is not in the maps; `ebproxy service list` shows" in capsys.readouterr().err


def test_a_service_without_flows(bpffs, tmp_path, listed):
    with contextlib.closing(MapStore.open_existing(bpffs / "ebproxy" / "0123456789ab")) as store:
        store.maps["frontends"].update(
            FrontendKey(parse_address("10.96.0.80"), 80, TCP).pack(), Frontend(9, 0, 0).pack()
        )
    with (tmp_path / "names.tsv").open("a", encoding="utf-8") as names:
        names.write("9\tshop/idle\thttp\tTCP\tIPv4\n")

    assert json.loads(listed("-o", "json", "--service", "shop/idle", entries=flows())) == []


def test_nothing_is_programmed(bpffs, tmp_path, capsys):
    assert main(["ct", "list", "--bpffs", str(bpffs), "--state-dir", str(tmp_path)]) == 1
    assert "nothing is programmed" in capsys.readouterr().err
