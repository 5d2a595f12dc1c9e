"""A client, a node and backends in network namespaces of their own, joined by veths: the node forwards.

    client 172.30.0.2 ──── 172.30.0.1 node 10.127.255.1 ──── 10.127.255.2 backends
           10.192.0.1                                                     10.128.0.0/10

The client has two addresses: one outside the cluster, and one of a pod, with which it asks for ClusterIPs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from tests.bench.errors import BenchError
from tests.bench.polling import until
from tests.bench.stage import Stage, command
from tests.lab import netns
from tests.lab.offload import Offload, switch

CLIENT = "172.30.0.2"
CLIENT_POD = "10.192.0.1"
NODE = "172.30.0.1"
NODE_INSIDE = "10.127.255.1"
_BACKENDS = "10.127.255.2"
DEVICE = "eth0"
"""The client's device, and the backends'."""
_SIOCGIFHWADDR = 0x8927
_THREAD_LIMIT_S = 5.0


class Line:
    """One client, its node and its backends; ``name`` tells it from others of the stage."""

    def __init__(self, stage: Stage, name: str, ends: contextlib.ExitStack) -> None:
        self.name = name
        self.cpus = stage.cpus
        self.client, self.node, self.backends = (
            stage.bare_netns(f"{name}-{part}", ends) for part in ("client", "node", "backends")
        )
        self.uplink, self.downlink = "up0", "down0"
        for device, place in ((self.uplink, self.client), (self.downlink, self.backends)):
            peer = ("peer", "name", DEVICE, "netns", place)
            command("ip", "link", "add", device, "netns", self.node, "type", "veth", *peer)
        self._address()

    def _address(self) -> None:
        up = [f"link set {DEVICE} up"]
        of_client = [f"addr add {CLIENT}/24 dev {DEVICE}", f"addr add {CLIENT_POD}/32 dev {DEVICE}"]
        routes = [f"route add {to} via {NODE} src {CLIENT_POD}" for to in ("10.96.0.0/12", "10.128.0.0/10")]
        netns.configure(self.client, [*up, *of_client, *routes])
        of_node = [f"addr add {NODE}/24 dev {self.uplink}", f"addr add {NODE_INSIDE}/30 dev {self.downlink}"]
        routes = [f"route add 10.128.0.0/10 via {_BACKENDS}", f"route add {CLIENT_POD}/32 via {CLIENT}"]
        netns.configure(self.node, [f"link set {self.uplink} up", f"link set {self.downlink} up", *of_node, *routes])
        routes = ["route add local 10.128.0.0/10 dev lo", f"route add default via {NODE_INSIDE}"]
        netns.configure(self.backends, [*up, f"addr add {_BACKENDS}/30 dev {DEVICE}", *routes])

    def thread(self) -> int:
        """Let kernel threads take in packets, rather than whoever sends them; returns the node's, by its process id.

        What the node does for packets, all the way into the backends' queue, is then that thread's CPU time. A veth
        has a queue where its device is to receive with GRO, and its peer does not send with TSO.
        """
        switch(self.client, DEVICE, Offload.TSO, is_on=False)
        switch(self.node, self.downlink, Offload.TSO, is_on=False)
        switch(self.node, self.uplink, Offload.GRO, is_on=True)
        switch(self.backends, DEVICE, Offload.GRO, is_on=True)
        node = _thread_of(self.node, self.uplink)
        # On the same CPU: to wake another one for every packet would cost more than all else.
        for thread in (node, _thread_of(self.backends, DEVICE)):
            os.sched_setaffinity(thread, {self.cpus.server})
        return node

    def received(self) -> int:
        """Packets that the backends' device has received so far."""
        with netns.entered(self.backends):
            lines = Path("/proc/thread-self/net/dev").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[2]) for line in lines if line.strip().startswith(f"{DEVICE}:"))

    def macs(self) -> tuple[bytes, bytes]:
        """The client's hardware address, and the node's that it sends to."""
        return _mac(self.client, DEVICE), _mac(self.node, self.uplink)


def _thread_of(place: str, device: str) -> int:
    """Give a device a thread that receives; returns its process id. Raises: BenchError."""
    before = set(_threads(device))
    # /sys shows the devices of the namespace that it was mounted in.
    write = f"mount -t sysfs sysfs /sys && echo 1 > /sys/class/net/{device}/threaded"
    command("unshare", "--mount", "sh", "-c", write, netns=place)
    found = until(lambda: set(_threads(device)) - before, _THREAD_LIMIT_S, f"a thread receives for {device}")
    if len(found) != 1:
        raise BenchError(f"{len(found)} threads receive for {device}")
    return found.pop()


def _threads(device: str) -> Iterator[int]:
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if comm.read_text(errors="replace").startswith(f"napi/{device}-"):
                yield int(comm.parent.name)


def _mac(place: str, device: str) -> bytes:
    with netns.entered(place), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        answer = fcntl.ioctl(opened, _SIOCGIFHWADDR, struct.pack("=16s24x", device.encode()))
    return bytes(answer[18:24])
