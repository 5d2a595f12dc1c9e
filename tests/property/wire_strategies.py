"""Hypothesis strategies for objects as the API writes them: valid, and with one value put out of place."""

import copy

from hypothesis import strategies as st

from agent.core.records import Kind

NODE_NAME = "here"

_names = st.sampled_from(["here", "there", "elsewhere"])
_flags = st.sampled_from([True, False])


def _maybe(**fields):
    """An object with any of these fields, each of them perhaps null."""
    return st.fixed_dictionaries({}, optional={name: st.none() | values for name, values in fields.items()})


def _hints():
    hint = st.lists(st.fixed_dictionaries({"name": _names}), max_size=2)
    return _maybe(forZones=hint, forNodes=hint)


def addresses(family):
    """Addresses as text; both ways of writing an IPv6 one, none that is mapped IPv4."""
    if family == 4:
        return st.ip_addresses(v=4).map(str)
    plain = st.ip_addresses(v=6).filter(lambda address: address.ipv4_mapped is None)
    return plain.map(str) | plain.map(lambda address: address.exploded)


def endpoints(family):
    return st.lists(
        st.fixed_dictionaries(
            {"addresses": st.lists(addresses(family), max_size=2)},
            optional={
                "conditions": st.none() | _maybe(ready=_flags, serving=_flags, terminating=_flags),
                "nodeName": st.none() | _names,
                "hints": st.none() | _hints(),
            },
        ),
        max_size=12,
    )


@st.composite
def slices(draw):
    """A valid EndpointSlice of the Service ``shop/web``."""
    family = draw(st.sampled_from([4, 6]))
    labels = {"kubernetes.io/service-name": "web", "app": "x"}
    return {
        "metadata": {"name": "web-1", "namespace": "shop", "resourceVersion": "7", "labels": labels},
        "addressType": f"IPv{family}",
        "endpoints": draw(endpoints(family)),
        "ports": [{"name": "http", "port": 8080, "protocol": draw(st.sampled_from(["TCP", "UDP", "SCTP"]))}],
    }


@st.composite
def services(draw):
    """A valid Service ``shop/web``."""
    ips = [draw(addresses(family)) for family in draw(st.permutations([4, 6]))][: draw(st.integers(1, 2))]
    return {
        "metadata": {"name": "web", "namespace": "shop", "resourceVersion": "7"},
        "spec": {
            "clusterIP": ips[0],
            "clusterIPs": ips,
            "internalTrafficPolicy": draw(st.sampled_from(["Cluster", "Local"])),
            "ports": [{"name": "a", "port": draw(st.integers(1, 65535))}, {"name": "b", "port": 1, "protocol": "UDP"}],
        },
    }


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
"""Any JSON value."""


def _places(value, path=()):
    """Every path to a part of a value, outermost first."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, part in pairs:
        yield (*path, step)
        yield from _places(part, (*path, step))


@st.composite
def spoiled(draw, objects):
    """An object in which one part, other than its name, is replaced by any value."""
    value = copy.deepcopy(draw(objects))
    spared = [("metadata",), ("metadata", "name"), ("metadata", "namespace"), ("metadata", "resourceVersion")]
    *path, last = draw(st.sampled_from([place for place in _places(value) if place not in spared]))
    inner = value
    for step in path:
        inner = inner[step]
    inner[last] = draw(values)
    return value


def _metadata(namespace="shop"):
    named = {
        "name": "web",
        "resourceVersion": "7",
        "labels": {"app": "web"},
        "creationTimestamp": "2025-01-01T00:00:00Z",
    }
    return named | ({"namespace": namespace} if namespace else {})


_SELECTOR = {
    "matchLabels": {"app": "web"},
    "matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}, {"key": "b", "operator": "Exists"}],
}
_CONTAINER = {"name": "main", "ports": [{"name": "web", "containerPort": 80, "protocol": "TCP"}]}
POLICY_OBJECTS = {
    Kind.POD: {
        "metadata": _metadata() | {"deletionTimestamp": "2025-01-01T00:00:00Z"},
        "spec": {
            "nodeName": NODE_NAME,
            "hostNetwork": False,
            "containers": [_CONTAINER],
            "initContainers": [_CONTAINER | {"restartPolicy": "Always"}],
        },
        "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
    },
    Kind.NAMESPACE: {"metadata": _metadata("")},
    Kind.NETWORK_POLICY: {
        "metadata": _metadata(),
        "spec": {
            "podSelector": _SELECTOR,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {
                    "from": [
                        {"podSelector": _SELECTOR, "namespaceSelector": {}},
                        {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
                    ],
                    "ports": [{"protocol": "UDP", "port": 80, "endPort": 90}, {"port": "web"}],
                }
            ],
            "egress": [{"to": [{"podSelector": {}}]}],
        },
    },
    Kind.CLUSTER_NETWORK_POLICY: {
        "metadata": _metadata(""),
        "spec": {
            "tier": "Admin",
            "priority": 5,
            "subject": {"pods": {"namespaceSelector": {}, "podSelector": _SELECTOR}},
            "ingress": [{"action": "Pass", "from": [{"namespaces": _SELECTOR}], "protocols": [{"tcp": {}}]}],
            "egress": [
                {
                    "name": "out",
                    "action": "Deny",
                    "to": [{"networks": ["10.0.0.0/8"]}, {"pods": {"podSelector": {}}}],
                    "protocols": [
                        {"udp": {"destinationPort": {"number": 53}}},
                        {"sctp": {"destinationPort": {"range": {"start": 1, "end": 9}}}},
                        {"destinationNamedPort": "web"},
                    ],
                }
            ],
        },
    },
}
"""One object of each kind that policy is made of, with every field that is read."""


_peers = st.lists(
    st.sampled_from(
        [
            {"podSelector": {"matchLabels": {"app": "web"}}},
            {"namespaceSelector": {}},
            {"podSelector": {}, "namespaceSelector": {"matchLabels": {"team": "a"}}},
            {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
        ]
    ),
    min_size=1,
    unique_by=str,
)
_policy_ports = st.lists(
    st.sampled_from([{"port": 80}, {"port": "web"}, {"port": 80, "endPort": 90, "protocol": "UDP"}, {}]),
    min_size=1,
    unique_by=str,
)


def _policy_rules(peers):
    return st.lists(st.fixed_dictionaries({}, optional={peers: _peers, "ports": _policy_ports}), max_size=3)


network_policies = st.builds(
    lambda ingress, egress: {
        "metadata": _metadata(),
        "spec": {
            "podSelector": _SELECTOR,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    },
    _policy_rules("from"),
    _policy_rules("to"),
)
junk = st.sampled_from([5, True, "all", ["all"], 0.5])
"""What is neither a rule, nor a peer, nor a port."""


def spoiled_policy():
    """One of those, of which a part is any value."""
    kinds = st.sampled_from(sorted(POLICY_OBJECTS))
    return kinds.flatmap(lambda kind: st.tuples(st.just(kind), spoiled(st.just(POLICY_OBJECTS[kind]))))
