"""A NodePort beside the Services of a population, as kube-proxy programs it: by nftables, by iptables.

With it come the filter chains that kube-proxy has on the way of everything forwarded, which ClusterIPs can do without.
Source: pkg/proxy/nftables/proxier.go, pkg/proxy/iptables/proxier.go.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.bench import peers
from tests.bench.population import SERVICE_PORT, Population
from tests.bench.stage import command

_NEW = "-m conntrack --ctstate NEW"


def nft_load(population: Population, netns: str, node_address: str) -> None:
    """Load the Services and the NodePort."""
    peers.nft_load(population, netns)
    command("nft", "-f", "-", netns=netns, text=_nft_rules(population.node_port, node_address))


def _nft_rules(node_port: int, node_address: str) -> str:
    lines = [
        "table ip kube-proxy {",
        f"set nodeport-ips {{ type ipv4_addr; elements = {{ {node_address} }}; }}",
        "chain external-udp { jump mark-for-masquerade; goto service-udp; }",
        "map service-nodeports {",
        "type inet_proto . inet_service : verdict",
        f"elements = {{ udp . {node_port} : goto external-udp }}",
        "}",
        "chain services { ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports; }",
    ]
    checked = {"firewall-check": "firewall-ips", "service-endpoints-check": "no-endpoint-services"}
    for chain, refused in checked.items():
        lines += [f"map {refused} {{ type ipv4_addr . inet_proto . inet_service : verdict; }}"]
        lines += [f"chain {chain} {{ ip daddr . meta l4proto . th dport vmap @{refused}; }}"]
    hooks = {
        "prerouting-pre-dnat": ("prerouting", "-110", ("firewall-check",)),
        "output-pre-dnat": ("output", "-110", ("firewall-check",)),
        "input": ("input", "0", ("service-endpoints-check",)),
        "forward": ("forward", "0", ("service-endpoints-check",)),
        "output": ("output", "0", ("service-endpoints-check",)),
    }
    for name, (hook, priority, chains) in hooks.items():
        jumps = "; ".join(f"ct state new jump {chain}" for chain in chains)
        lines += [f"chain filter-{name} {{ type filter hook {hook} priority {priority}; {jumps}; }}"]
    return "\n".join([*lines, "}"]) + "\n"


def iptables_load(population: Population, netns: str, node_address: str) -> None:
    """Load the Services and the NodePort, which answers on every address of the node."""
    del node_address
    peers.iptables_load(population, netns)
    command(f"{peers.iptables_name()}-restore", "--noflush", netns=netns, text=_iptables_rules(population))


def _iptables_rules(population: Population) -> str:
    number = population.middle
    chains, rules = peers.iptables_service(population, number, population.addresses(number), "udp")
    node_ports, external = "KUBE-NODEPORTS", peers.iptables_chain("KUBE-EXT", population.name(number), "udp")
    nat = [
        *rules,
        f"-A KUBE-SERVICES -m udp -p udp -d {population.cluster_ip(number)} --dport {SERVICE_PORT} -j {chains[0]}",
        f"-A {external} -j KUBE-MARK-MASQ",
        f"-A {external} -j {chains[0]}",
        f"-A {node_ports} -m udp -p udp --dport {population.node_port} -j {external}",
        f"-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j {node_ports}",
    ]
    firewall, services, forward = "KUBE-PROXY-FIREWALL", "KUBE-EXTERNAL-SERVICES", "KUBE-FORWARD"
    filters = [
        *(f"-A {chain} {_NEW} -j {firewall}" for chain in ("INPUT", "FORWARD", "OUTPUT")),
        f"-A INPUT {_NEW} -j {services}",
        f"-A FORWARD -j {forward}",
        *(f"-A {chain} {_NEW} -j KUBE-SERVICES" for chain in ("FORWARD", "OUTPUT")),
        f"-A FORWARD {_NEW} -j {services}",
        f"-A {forward} -m conntrack --ctstate INVALID -j DROP",
        f"-A {forward} -m mark --mark 0x4000/0x4000 -j ACCEPT",
        f"-A {forward} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    ]
    own = [f":{chain} - [0:0]" for chain in (*chains, node_ports, external)]
    filter_chains = [f":{chain} - [0:0]" for chain in (firewall, services, forward, "KUBE-SERVICES")]
    return "\n".join(["*nat", *own, *nat, "COMMIT", "*filter", *filter_chains, *filters, "COMMIT"]) + "\n"


Load = Callable[[Population, str, str], None]
PEERS: dict[str, Load] = {"nft": nft_load, "iptables": iptables_load}
