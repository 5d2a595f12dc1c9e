"""Who else translates Services here: reading what /proc and the iptables commands print."""

from __future__ import annotations

import pytest

from agent.cli import checks
from agent.kernel import rivals

IP_VS = """\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:01BB rr
  -> C0000201:192B      Masq    1      0          0
UDP  [2001:0db8:0000:0000:0000:0000:0000:0001]:0035 rr
"""
TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:2809 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:9C41 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
"""
TCP6 = """\
  sl  local_address                         remote_address                        st tx_queue rx_queue
   0: 00000000000000000000000000000000:2810 00000000000000000000000000000000:0000 0A 00000000:00000000
"""


def test_virtual_servers_are_counted(tmp_path):
    (tmp_path / "ip_vs").write_text(IP_VS)

    assert rivals.virtual_servers(tmp_path / "ip_vs") == 2
    assert rivals.virtual_servers(tmp_path / "absent") == 0


def test_listening_ports_are_those_in_state_listen_of_both_families(tmp_path):
    (tmp_path / "tcp").write_text(TCP)
    (tmp_path / "tcp6").write_text(TCP6)

    assert frozenset({10249, 10256}) == rivals.listening_ports(tmp_path)


def test_processes_are_found_by_name(tmp_path):
    for pid, name in (("12", "kube-proxy"), ("7", "kube-proxy"), ("9", "kube-proxy-else"), ("self", "kube-proxy")):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "comm").write_text(f"{name}\n")

    assert rivals.processes("kube-proxy", tmp_path) == (7, 12)


@pytest.mark.parametrize(
    ("rules", "chains"),
    [
        (
            ":KUBE-SERVICES - [0:0]\n:KUBE-SVC-ABCDEFGH23456789 - [0:0]\n",
            ("KUBE-SERVICES", "KUBE-SVC-ABCDEFGH23456789"),
        ),
        ("*nat\n:KUBE-SERVICES - [0:0]\nCOMMIT\n*filter\n:KUBE-SERVICES - [0:0]\n", ("KUBE-SERVICES",)),
        (":KUBE-FIREWALL - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n", ()),
        (":KUBE-PROXY-CANARY - [0:0]\n", ("KUBE-PROXY-CANARY",)),
        (":KUBE-SEPARATE - [0:0]\n:MY-KUBE-SERVICES - [0:0]\n-A OUTPUT -j KUBE-SERVICES\n", ()),
        ("", ()),
    ],
    ids=["services", "in two tables", "the kubelet's", "canary", "names alike", "nothing"],
)
def test_chains_of_kube_proxy_are_told_from_others(monkeypatch, rules, chains):
    monkeypatch.setattr(rivals, "_output", lambda _: rules)

    assert chains == rivals.kube_chains("iptables-nft-save")


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"iptables-save", "iptables-nft-save", "iptables-legacy-save"}, ("iptables-legacy-save", "iptables-nft-save")),
        ({"iptables-save", "ip6tables-save"}, ("iptables-save", "ip6tables-save")),
        (set(), ()),
    ],
    ids=["both variants", "one of unknown kind", "none"],
)
def test_every_variant_that_is_installed_is_asked(monkeypatch, installed, expected):
    monkeypatch.setattr(rivals, "_command", lambda name: name if name in installed else None)

    assert expected == rivals.save_commands()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("\n", set()), ("80\n", {80}), ("80,443-445\n", {80, 443, 444, 445})],
    ids=["none", "one", "a range"],
)
def test_reserved_ports_are_read(text, expected):
    assert expected == checks._ports(text)
