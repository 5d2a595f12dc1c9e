"""The lab: nodes joined by a fabric, pods on nodes, and nothing of it left at the end.

    fabric (namespace, bridge 172.30.0.254)
      ├─ eth0 node-1 (namespace, cgroup) ─ bridge ─ eth0 pods 10.180.1.0/24   "bridge"
      ├─ eth0 node-2 (namespace, cgroup) ─ a veth each, host routes ─ pods    "routed"
      └─ eth0 outsider (namespace, cgroup) 172.30.0.101

A node is a network namespace, a cgroup and a directory; a pod is a namespace connected by a veth and a cgroup below its
node's. Nodes reach each other's pods by routes, or in an overlay through a VXLAN device each. The fabric is their
default gateway, and swallows what it gets: an address that is nobody's does not answer. An outsider is a client that is
no node and knows no routes but those to its own network. Everything is dual stack. Names carry a random word, so
several labs exist side by side; the addresses are the same in each, since none sees another.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from tests.lab import cgroups, manifests, netns
from tests.lab.leftovers import LOCK, PREFIX, clear
from tests.lab.processes import Place, end, program
from tests.lab.traffic import Client

POD_RANGES = ("10.180.0.0/16", "fd00:10:180::/48")
GATEWAYS = ("172.30.0.254", "fd00:172:30::254")
_FIRST_POD = 10
_FIRST_OUTSIDER = 101
_VXLAN = 42
_OVERLAY_MTU = 1450


class Lab:
    """A cluster; a context manager. ``directory`` holds a directory for each node."""

    def __init__(self, nodes: int = 1, *, overlay: bool = False) -> None:
        self.overlay = overlay
        self.outsiders: list[Outsider] = []
        self.directory, self._lock = _claim_directory()
        self.word = self.directory.name
        atexit.register(self.close)
        try:
            self.cgroup = cgroups.mount_point() / self.word
            self.cgroup.mkdir()
            self.fabric = self._make_fabric()
            self.nodes = [Node(self, number) for number in range(1, nodes + 1)]
            for node in self.nodes:
                node.route_to([other for other in self.nodes if other is not node])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take everything down; safe to repeat."""
        atexit.unregister(self.close)
        clear(self.directory)
        self._lock.close()

    def outsider(self) -> Outsider:
        """Make a client on the fabric that is no node."""
        self.outsiders.append(Outsider(self, _FIRST_OUTSIDER + len(self.outsiders)))
        return self.outsiders[-1]

    def join(self, name: str, port: str, number: int) -> tuple[str, str]:
        """Connect a namespace to the fabric, by its eth0; returns its addresses."""
        addresses = (f"172.30.0.{number}", f"fd00:172:30::{number}")
        netns.configure(self.fabric.netns, [f"link add {port} type veth peer name eth0 netns {name}"])
        netns.configure(self.fabric.netns, [f"link set {port} master br0 up"])
        lines = ["link set eth0 up", f"addr add {addresses[0]}/24 dev eth0"]
        netns.configure(name, [*lines, f"addr add {addresses[1]}/64 dev eth0 nodad"])
        return addresses

    def _make_fabric(self) -> Place:
        name = f"{self.word}-fabric"
        netns.add(name)
        lines = ["link add br0 type bridge", "link set br0 up", f"addr add {GATEWAYS[0]}/24 dev br0"]
        lines += [f"addr add {GATEWAYS[1]}/64 dev br0 nodad"]
        netns.configure(name, [*lines, "route add blackhole 0.0.0.0/0", "route add blackhole ::/0"])
        (self.cgroup / "fabric").mkdir()
        return Place(name, self.cgroup / "fabric")


class Node:
    """A node: ``name`` as Kubernetes knows it; ``addresses`` and ``pod_ranges``, IPv4 first."""

    def __init__(self, lab: Lab, number: int) -> None:
        self.lab = lab
        self.number = number
        self.name = f"node-{number}"
        self.netns = f"{lab.word}-n{number}"
        self.cgroup = lab.cgroup / self.name
        self.directory = lab.directory / self.name
        self.pod_ranges = (f"10.180.{number}.0/24", f"fd00:10:180:{number}::/64")
        self.pods: dict[str, Pod] = {}
        self.is_bridged = number % 2 == 1
        self.directory.mkdir()
        self.cgroup.mkdir()
        netns.add(self.netns)
        self.addresses = lab.join(self.netns, f"n{number}", number)
        self._connect()
        self.host = self.place("host")

    def place(self, cgroup: str) -> Place:
        """Make a cgroup for processes of the node's own namespace."""
        (self.cgroup / cgroup).mkdir(exist_ok=True)
        return Place(self.netns, self.cgroup / cgroup)

    def client(self) -> Client:
        """Start a client among the node's own processes."""
        return Client(self.host)

    def serve(self, name: str, *ports: int) -> subprocess.Popen[str]:
        """Start a server among the node's own processes."""
        return serve(self.host, name, self.addresses, ports)

    def add_pod(self, name: str, *ports: int) -> Pod:
        """Make a pod with a server that answers with its name on these ports, TCP, UDP and SCTP."""
        pod = Pod(self, name, _FIRST_POD + len(self.pods))
        self.pods[name] = pod
        if ports:
            pod.serve(*ports)
        return pod

    def manifest(self, zone: str = "") -> manifests.Object:
        """Describe the node as Kubernetes does."""
        return manifests.node(self.name, self.addresses, self.pod_ranges, zone)

    def route_to(self, others: list[Node]) -> None:
        """Route to the pods of the other nodes."""
        if self.lab.overlay:
            self._tunnel_to(others)
            return
        pairs = [(net, via) for other in others for net, via in zip(other.pod_ranges, other.addresses, strict=True)]
        if pairs:
            netns.configure(self.netns, [f"route add {net} via {via}" for net, via in pairs])

    @property
    def _tunnel_mac(self) -> str:
        return f"02:00:5e:00:00:{self.number:02x}"

    @property
    def _bridge_mac(self) -> str:
        return f"02:00:5e:00:01:{self.number:02x}"

    def _tunnel_to(self, others: list[Node]) -> None:
        """Reach the other nodes' pods through VXLAN, as flannel does: a range's first address is its tunnel's."""
        ends = f"local {self.addresses[0]} dev eth0"
        lines = [
            f"link add vxlan0 address {self._tunnel_mac} type vxlan id {_VXLAN} dstport 4789 nolearning {ends}",
            f"link set vxlan0 mtu {_OVERLAY_MTU} up",
        ]
        lines += [f"addr add {net.split('/')[0]}/{bits} dev vxlan0" for net, bits in self._tunnel_ranges()]
        for other in others:
            for net, _ in other._tunnel_ranges():
                via = net.split("/")[0]
                lines.append(f"neigh add {via} lladdr {other._tunnel_mac} nud permanent dev vxlan0")
                lines.append(f"route add {net} via {via} dev vxlan0 onlink")
        netns.configure(self.netns, lines)
        for other in others:
            command = ["bridge", "-n", self.netns, "fdb", "append", other._tunnel_mac, "dev", "vxlan0"]
            subprocess.run([*command, "dst", other.addresses[0]], check=True, timeout=10)

    def _tunnel_ranges(self) -> list[tuple[str, int]]:
        return list(zip(self.pod_ranges, (32, 128), strict=True))

    def _connect(self) -> None:
        """Lay the node's own side of its uplink and pods."""
        lines = [f"route add default via {gateway} dev eth0" for gateway in GATEWAYS]
        if self.is_bridged:
            # An address of its own: else it is that of some port, and another one as pods come and go.
            lines += [f"link add br0 address {self._bridge_mac} {self._mtu()} type bridge", "link set br0 up"]
            lines += [f"addr add {gateway}/{bits} dev br0 {nodad}" for gateway, bits, nodad in self._gateways()]
        netns.configure(self.netns, lines)

    def _mtu(self) -> str:
        return f"mtu {_OVERLAY_MTU}" if self.lab.overlay else ""

    def _gateways(self) -> list[tuple[str, int, str]]:
        if self.is_bridged:
            return [(f"10.180.{self.number}.1", 24, ""), (f"fd00:10:180:{self.number}::1", 64, "nodad")]
        return [("169.254.1.1", 32, ""), ("fe80::1", 64, "nodad")]

    def plug(self, pod: Pod) -> None:
        """Connect a pod's namespace: to the bridge, or point to point with host routes."""
        veth = f"v{pod.number}"
        gateways = self._gateways()
        lines = [f"link add {veth} {self._mtu()} type veth peer name eth0 {self._mtu()} netns {pod.netns}"]
        if self.is_bridged:
            lines += [f"link set {veth} master br0 up"]
            bits = [bits for _, bits, _ in gateways]
        else:
            lines += [f"link set {veth} up"]
            lines += [f"addr add {gateway}/{bits} dev {veth} {nodad}" for gateway, bits, nodad in gateways]
            sources = zip(pod.addresses, self.addresses, strict=True)
            lines += [f"route add {address} dev {veth} src {source}" for address, source in sources]
            bits = [32, 128]
        netns.configure(self.netns, lines)
        inside = ["link set eth0 up", f"addr add {pod.addresses[0]}/{bits[0]} dev eth0"]
        inside += [f"addr add {pod.addresses[1]}/{bits[1]} dev eth0 nodad"]
        if not self.is_bridged:
            inside += [f"route add {gateways[0][0]} dev eth0"]
        inside += [f"route add default via {gateway} dev eth0" for gateway, _, _ in gateways]
        netns.configure(pod.netns, inside)


class Pod:
    """A pod: a namespace and a cgroup below its node's, as the kubelet has them."""

    def __init__(self, node: Node, name: str, number: int) -> None:
        self.node = node
        self.name = name
        self.number = number
        self.netns = f"{node.netns}-p{number}"
        self.addresses = (f"10.180.{node.number}.{number}", f"fd00:10:180:{node.number}::{number}")
        cgroup = node.cgroup / "kubepods" / f"pod{number}"
        cgroup.mkdir(parents=True)
        self.place = Place(self.netns, cgroup)
        self.server: subprocess.Popen[str] | None = None
        netns.add(self.netns)
        node.plug(self)

    @property
    def v4(self) -> str:
        """The IPv4 address."""
        return self.addresses[0]

    @property
    def v6(self) -> str:
        """The IPv6 address."""
        return self.addresses[1]

    def client(self) -> Client:
        """Start a client in the pod."""
        return Client(self.place)

    def serve(self, *ports: int) -> None:
        """Start the pod's server."""
        self.server = serve(self.place, self.name, self.addresses, ports)

    def endpoint(self, family: int = 4, **conditions: bool) -> manifests.Endpoint:
        """Describe the pod as an EndpointSlice does."""
        return manifests.Endpoint(self.v6 if family == 6 else self.v4, self.node.name, **conditions)

    def manifest(self, app: str) -> manifests.Object:
        """Describe the pod as Kubernetes does."""
        return manifests.pod(self.name, self.node.name, self.addresses, app)


class Outsider:
    """A client on the fabric that is no node: it reaches nodes by their addresses, and nothing else."""

    def __init__(self, lab: Lab, number: int) -> None:
        self.name = f"outsider-{number}"
        self.netns = f"{lab.word}-o{number}"
        netns.add(self.netns)
        cgroup = lab.cgroup / self.name
        cgroup.mkdir()
        self.place = Place(self.netns, cgroup)
        self.addresses = lab.join(self.netns, f"o{number}", number)

    def client(self) -> Client:
        """Start a client here."""
        return Client(self.place)

    def serve(self, *ports: int) -> subprocess.Popen[str]:
        """Start a server here."""
        return serve(self.place, self.name, self.addresses, ports)

    def route(self, address: str, node: Node) -> None:
        """Reach an address by way of a node, as a router that a load balancer has told does."""
        via = node.addresses[":" in address]
        netns.configure(self.netns, [f"route replace {address} via {via}"])


def _claim_directory() -> tuple[Path, TextIO]:
    """Make a lab's directory, and hold the lock that says it is no leftover."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        with contextlib.suppress(FileNotFoundError):
            lock = (directory / LOCK).open("w", encoding="ascii")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (directory / LOCK).exists():  # else somebody's sweep was quicker
                return directory, lock


def serve(place: Place, name: str, addresses: tuple[str, ...], ports: tuple[int, ...]) -> subprocess.Popen[str]:
    """Start a server and wait until it listens."""
    command = (*program("servers"), name, ",".join(addresses), *map(str, ports))
    process = place.start(*command, stdout=subprocess.PIPE)
    assert process.stdout
    if process.stdout.readline() != "ready\n":
        raise RuntimeError(f"server {name} ended with status {end(process)}")
    return process
