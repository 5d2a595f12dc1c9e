"""ClientIP affinity at the packet path: kept, refreshed, ended, chosen anew when the backend is gone."""

from __future__ import annotations

import time

import pytest
from scapy.layers.l2 import Ether

from agent.core.abi import AFFINITY
from tests.bpf import packet_path as at
from tests.bpf.packet_path import PacketPath, to
from tests.bpf.packets import End, packet
from tests.bpf.talk import TARGET


def _chosen(path: PacketPath, client: End, frontend: End, device: str = "one") -> str:
    return str(Ether(path.ingress(device, packet("tcp", client, frontend)).packet)[1].dst)


@pytest.fixture
def sticky(path) -> tuple[PacketPath, list[End]]:
    """A service with affinity for 100 s: a ClusterIP and a NodePort, eight backends."""
    backends = [End(f"10.180.1.{10 + number}", TARGET) for number in range(8)]
    frontends = [End("10.96.0.10", 80), End("198.51.100.10", 80)]
    path.serve("tcp", *frontends, inside=to(*backends), affinity_s=100)
    return path, frontends


def test_a_client_with_affinity_keeps_its_backend(sticky):
    path, frontends = sticky
    clients = [f"10.180.2.{number}" for number in range(10, 30)]

    chosen = {
        client: {_chosen(path, End(client, port), frontend) for port in range(5000, 5010) for frontend in frontends}
        for client in clients
    }

    assert all(len(backends) == 1 for backends in chosen.values())
    assert len(set.union(*chosen.values())) > 1


@pytest.mark.parametrize(
    ("silent_s", "is_kept"),
    [
        pytest.param(98, True, id="not over"),
        pytest.param(102, False, id="over"),
        pytest.param(-2, True, id="another CPU was ahead"),
    ],
)
def test_affinity_ends_after_its_timeout(sticky, silent_s, is_kept):
    path, frontends = sticky
    hosts = [f"10.180.2.{number}" for number in range(10, 40)]
    before = [_chosen(path, End(host, 5000), frontends[0]) for host in hosts]
    known = path.store.maps["affinity"]
    for key, value in list(known.items()):
        fields = list(AFFINITY.packer.unpack(value))
        fields[-1] -= silent_s
        known.update(key, AFFINITY.packer.pack(*fields))

    after = [_chosen(path, End(host, 5001), frontends[0]) for host in hosts]

    assert (before == after) == is_kept


def test_affinity_is_refreshed_by_each_connection(sticky):
    path, frontends = sticky
    client = at.POD_ONE[0]
    _chosen(path, End(client, 5000), frontends[0])
    ((key, value),) = path.store.maps["affinity"].items()
    fields = list(AFFINITY.packer.unpack(value))
    fields[-1] -= 50
    path.store.maps["affinity"].update(key, AFFINITY.packer.pack(*fields))

    _chosen(path, End(client, 5001), frontends[0])

    seen = AFFINITY.packer.unpack(path.store.maps["affinity"].lookup(key))[-1]
    assert abs(seen - time.monotonic()) < 3


@pytest.mark.parametrize("count", [1, 3])
def test_affinity_to_a_backend_that_is_gone_chooses_anew(path, count):
    frontend, gone = End("10.96.0.10", 80), End(at.REMOTE_POD[0], TARGET)
    path.serve("tcp", frontend, inside=to(gone), affinity_s=100)
    assert _chosen(path, End(at.POD_ONE[0], 5000), frontend) == gone.address
    others = [End(f"10.180.1.{20 + number}", TARGET) for number in range(count)]
    path.rewrite(frontend, "tcp", to(*others))

    again = {_chosen(path, End(at.POD_ONE[0], port), frontend) for port in range(5001, 5009)}

    assert len(again) == 1
    assert again < {other.address for other in others} | {""}


def test_affinity_follows_a_backend_that_moved_in_its_segment(path):
    frontend = End("10.96.0.10", 80)
    backends = [End(f"10.180.1.{10 + number}", TARGET) for number in range(6)]
    path.serve("tcp", frontend, inside=to(*backends), affinity_s=100)
    hosts = [f"10.180.2.{number}" for number in range(10, 30)]
    before = [_chosen(path, End(host, 5000), frontend) for host in hosts]

    path.rewrite(frontend, "tcp", to(*backends[::-1]))

    assert [_chosen(path, End(host, 5001), frontend) for host in hosts] == before
