"""The same Services as kube-proxy programs them, by nftables and by iptables.

Shapes: kube-proxy's for ClusterIP Services, with what marks packets for masquerading.
Source: pkg/proxy/nftables/proxier.go, pkg/proxy/iptables/proxier.go.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import time
from collections.abc import Callable

from tests.bench.errors import BenchError
from tests.bench.population import POD_PORT, POD_RANGE, SERVICE_PORT, Population
from tests.bench.stage import command


def _nft_service(population: Population, number: int, addresses: list[str], protocol: str = "tcp") -> list[str]:
    """Rules of one Service's chain.

    A map of endpoints where kube-proxy has a chain for each: 100k chains take nft minutes to load, and a packet has
    one jump more to make. Both favour the peer.
    """
    choices = ", ".join(f"{index} : {address} . {POD_PORT}" for index, address in enumerate(addresses))
    return [
        (
            f"ip daddr {population.cluster_ip(number)} {protocol} dport {SERVICE_PORT} "
            f"ip saddr != {POD_RANGE} jump mark-for-masquerade"
        ),
        f"meta l4proto {protocol} dnat ip to numgen random mod {len(addresses)} map {{ {choices} }}",
    ]


def nft_rules(population: Population) -> str:
    """Write the table kube-proxy keeps in nftables mode."""
    lines = ["table ip kube-proxy {", "chain mark-for-masquerade {", "meta mark set meta mark or 0x4000", "}"]
    for number in range(population.services):
        rules = _nft_service(population, number, population.addresses(number))
        lines += [f"chain service-{population.name(number)} {{", *rules, "}"]
    middle = population.middle
    lines += ["chain service-udp {", *_nft_service(population, middle, population.addresses(middle), "udp"), "}"]
    lines += ["map service-ips {", "type ipv4_addr . inet_proto . inet_service : verdict", "elements = {"]
    lines += [
        f"{population.cluster_ip(number)} . tcp . {SERVICE_PORT} : goto service-{population.name(number)},"
        for number in range(population.services)
    ]
    lines += [f"{population.cluster_ip(middle)} . udp . {SERVICE_PORT} : goto service-udp", "}", "}"]
    lines += ["chain services {", "ip daddr . meta l4proto . th dport vmap @service-ips", "}"]
    for hook, priority in (("prerouting", "dstnat"), ("output", "-100")):
        lines += [f"chain nat-{hook} {{", f"type nat hook {hook} priority {priority};", "jump services", "}"]
    lines += [
        "chain nat-postrouting {",
        "type nat hook postrouting priority srcnat;",
        "meta mark & 0x4000 != 0 meta mark set meta mark xor 0x4000 masquerade fully-random",
        "}",
        "}",
    ]
    return "\n".join(lines) + "\n"


def nft_load(population: Population, netns: str) -> float:
    """Load the table with `nft -f`; returns seconds."""
    return _timed("nft", "-f", "-", netns=netns, text=nft_rules(population))


def nft_change(population: Population, number: int, address: str, netns: str) -> float:
    """Give a Service another first endpoint in one transaction, as a sync of kube-proxy does; returns seconds."""
    chain = f"ip kube-proxy service-{population.name(number)}"
    rules = _nft_service(population, number, [address, *population.addresses(number)[1:]])
    lines = [f"flush chain {chain}", *(f"add rule {chain} {rule}" for rule in rules)]
    return _timed("nft", "-f", "-", netns=netns, text="\n".join(lines) + "\n")


def iptables_name() -> str:
    """Which iptables is measured: the legacy one, whose rules the kernel walks natively, if there is one."""
    found = shutil.which("iptables-legacy-restore") or shutil.which("iptables-restore")
    if not found:
        raise BenchError("iptables-restore is missing; install it: apt-get install iptables")
    return found.rpartition("/")[2].removesuffix("-restore")


def iptables_chain(kind: str, *parts: object) -> str:
    """Name a chain as kube-proxy does."""
    digest = hashlib.sha256("".join(map(str, parts)).encode()).digest()
    return f"{kind}-{base64.b32encode(digest).decode()[:16]}"


def iptables_service(
    population: Population, number: int, addresses: list[str], protocol: str = "tcp"
) -> tuple[list[str], list[str]]:
    """Chains and rules of one Service, without its rule in KUBE-SERVICES."""
    name = f"{population.namespace(number)}/{population.name(number)}:{'http' if protocol == 'tcp' else 'dns'}"
    meant = f"-m {protocol} -p {protocol}"
    service = iptables_chain("KUBE-SVC", name)
    chains, rules = [service], []
    rules.append(
        f'-A {service} -m comment --comment "{name} cluster IP" {meant} -d {population.cluster_ip(number)} '
        f"--dport {SERVICE_PORT} ! -s {POD_RANGE} -j KUBE-MARK-MASQ"
    )
    for index, address in enumerate(addresses):
        endpoint = iptables_chain("KUBE-SEP", name, index)
        chains.append(endpoint)
        left = len(addresses) - index
        chance = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
        comment = f'-m comment --comment "{name} -> {address}:{POD_PORT}"'
        rules.append(f"-A {service} {comment} {chance}-j {endpoint}")
        rules.append(f"-A {endpoint} -m comment --comment {name} -s {address} -j KUBE-MARK-MASQ")
        rules.append(f"-A {endpoint} -m comment --comment {name} {meant} -j DNAT --to-destination {address}:{POD_PORT}")
    return chains, rules


def iptables_rules(population: Population) -> str:
    """Write the nat table kube-proxy keeps in iptables mode."""
    chains, rules = (
        ["KUBE-SERVICES", "KUBE-POSTROUTING", "KUBE-MARK-MASQ"],
        [
            "-A PREROUTING -j KUBE-SERVICES",
            "-A OUTPUT -j KUBE-SERVICES",
            "-A POSTROUTING -j KUBE-POSTROUTING",
            "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
            "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
            "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000",
            "-A KUBE-POSTROUTING -j MASQUERADE --random-fully",
        ],
    )
    for number in range(population.services):
        own_chains, own_rules = iptables_service(population, number, population.addresses(number))
        name = f"{population.namespace(number)}/{population.name(number)}:http"
        rules.append(
            f'-A KUBE-SERVICES -m comment --comment "{name} cluster IP" -m tcp -p tcp '
            f"-d {population.cluster_ip(number)} --dport {SERVICE_PORT} -j {own_chains[0]}"
        )
        chains += own_chains
        rules += own_rules
    return "\n".join(["*nat", *(f":{chain} - [0:0]" for chain in chains), *rules, "COMMIT"]) + "\n"


def iptables_load(population: Population, netns: str) -> float:
    """Load the table with iptables-restore; returns seconds."""
    return _timed(f"{iptables_name()}-restore", netns=netns, text=iptables_rules(population))


def iptables_change(population: Population, number: int, address: str, netns: str) -> float:
    """Give a Service another first endpoint, by a partial restore as kube-proxy does; returns seconds."""
    chains, rules = iptables_service(population, number, [address, *population.addresses(number)[1:]])
    text = "\n".join(["*nat", *(f":{chain} - [0:0]" for chain in chains), *rules, "COMMIT"]) + "\n"
    return _timed(f"{iptables_name()}-restore", "--noflush", netns=netns, text=text)


def _timed(*argv: str, netns: str, text: str) -> float:
    begun = time.monotonic()
    command(*argv, netns=netns, text=text)
    return time.monotonic() - begun


Load = Callable[[Population, str], float]
Change = Callable[[Population, int, str, str], float]
PEERS: tuple[tuple[str, Load, Change], ...] = (
    ("nft", nft_load, nft_change),
    ("iptables", iptables_load, iptables_change),
)


def repeat(change: Change, population: Population, netns: str, times: int) -> list[float]:
    """Change the first Service so many times, there and back again; returns seconds each."""
    return [change(population, 0, population.endpoint(0, turn % 2), netns) for turn in range(times)]
