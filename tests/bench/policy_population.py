"""What policy is made of in a bench: pods, namespaces and NetworkPolicies, as JSON and as events."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agent.core.events import Event, ListEnded, ListStarted
from agent.core.records import POLICY_KINDS, Kind
from agent.sources.decode import Decoder
from tests.bench import lines
from tests.bench.population import NODE, POD_PORT, dump, managed, uid

CLIENT, SERVER = 0, 1
"""The pods at the ends of a line; each may speak to the other."""
OTHER_PORT = POD_PORT + 1
_FIRST_POD = int(ipaddress.IPv4Address("10.160.0.0"))
_NAMESPACES = 10
_CONTROLLER = "kube-controller-manager"


@dataclass(frozen=True, slots=True)
class PolicyPopulation:
    """``pods`` pods of so many ``identities``, the first ``local`` of them on this node; ``policies`` NetworkPolicies.

    Pods of one identity are of one app, in one namespace. Each policy isolates the pods of an app both ways, and lets
    them speak with those of ``peers`` others, at one TCP port.
    """

    pods: int
    identities: int
    local: int
    policies: int
    peers: int

    @property
    def entries(self) -> int:
        """How many entries policy has on this node: for each local app and direction, everybody's and two a peer."""
        return min(self.local, self.identities, self.policies) * 2 * (1 + 2 * self.peers)

    def address(self, number: int) -> str:
        """The address of a pod; the first one is where the client of a line is, the others where its backends are."""
        return lines.CLIENT_POD if number == CLIENT else str(ipaddress.IPv4Address(_FIRST_POD + number))

    def app(self, number: int) -> int:
        """The number of a pod's app, and so of its identity."""
        return number % self.identities

    def namespace(self, app: int) -> str:
        """The namespace of an app."""
        return f"team-{app % _NAMESPACES:02}"

    def neighbours(self, app: int) -> list[int]:
        """The apps that an app may speak with: those around it, so that each may speak with whoever may with it."""
        half = self.peers // 2
        return [(app + step) % self.identities for step in range(-half, half + 1) if step]

    def objects(self) -> dict[Kind, list[bytes]]:
        """Every object as JSON."""
        return {
            Kind.POD: [self.pod(number) for number in range(self.pods)],
            Kind.NAMESPACE: [_namespace(self.namespace(number)) for number in range(_NAMESPACES)],
            Kind.NETWORK_POLICY: [self.policy(number, 1) for number in range(self.policies)],
            Kind.CLUSTER_NETWORK_POLICY: [],
        }

    def events(self) -> Iterator[Event]:
        """Full lists of every kind, as a source would hand them to the model."""
        decoder = Decoder(NODE, policy=True)
        objects = self.objects()
        for kind in POLICY_KINDS:
            yield ListStarted(kind)
            for source in objects[kind]:
                yield decoder.decode(kind, source).event
            yield ListEnded(kind)

    def policy(self, number: int, version: int, ports: Sequence[int] = (POD_PORT,)) -> bytes:
        """The policy about an app as JSON."""
        app = number % self.identities
        wanted = [f"app-{it:04}" for it in self.neighbours(app)]
        selector = {"matchExpressions": [{"key": "app", "operator": "In", "values": wanted}]}
        peers = [{"namespaceSelector": {}, "podSelector": selector}]
        allowed = {"ports": [{"port": port, "protocol": "TCP"} for port in ports]}
        return dump(
            {
                "apiVersion": "networking.k8s.io/v1",
                "kind": "NetworkPolicy",
                "metadata": {
                    **_metadata(f"policy-{number:04}", self.namespace(app), number, version),
                    "managedFields": [managed("kubectl-client-side-apply", {"f:spec": {"f:ingress": {}}})],
                },
                "spec": {
                    "egress": [{"to": peers, **allowed}],
                    "ingress": [{"from": peers, **allowed}],
                    "podSelector": {"matchLabels": {"app": f"app-{app:04}"}},
                    "policyTypes": ["Ingress", "Egress"],
                },
            }
        )

    def pod(self, number: int) -> bytes:
        """A pod as JSON, with the fields that one of a Deployment carries."""
        app = self.app(number)
        name = f"app-{app:04}-7d9c8b6f5-{number:05}"
        labels = {"app": f"app-{app:04}", "pod-template-hash": "7d9c8b6f5", "version": "v3"}
        owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": name.rpartition("-")[0], "uid": uid(app)}
        return dump(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    **_metadata(name, self.namespace(app), number, 1),
                    "generateName": f"app-{app:04}-7d9c8b6f5-",
                    "labels": labels,
                    "managedFields": [managed(_CONTROLLER, _SPEC_FIELDS), managed("kubelet", _STATUS_FIELDS)],
                    "ownerReferences": [{**owner, "blockOwnerDeletion": True, "controller": True}],
                },
                "spec": _spec(NODE if number < self.local else f"node-{number % 97:04}"),
                "status": _status(self.address(number), number),
            }
        )


def _metadata(name: str, namespace: str, number: int, version: int) -> dict[str, Any]:
    return {
        "creationTimestamp": "2025-06-01T12:00:00Z",
        "name": name,
        "namespace": namespace,
        "resourceVersion": str(version),
        "uid": uid(number),
    }


def _namespace(name: str) -> bytes:
    labels = {"kubernetes.io/metadata.name": name, "team": name}
    metadata = {"name": name, "labels": labels, "resourceVersion": "1", "uid": uid(0)}
    return dump({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata, "status": {"phase": "Active"}})


_SPEC_FIELDS = {
    "f:metadata": {
        "f:generateName": {},
        "f:labels": {".": {}, "f:app": {}, "f:pod-template-hash": {}, "f:version": {}},
    },
    "f:spec": {
        "f:containers": {
            'k:{"name":"server"}': {".": {}, "f:env": {}, "f:image": {}, "f:ports": {}, "f:resources": {}}
        },
        "f:dnsPolicy": {},
        "f:restartPolicy": {},
        "f:schedulerName": {},
        "f:terminationGracePeriodSeconds": {},
    },
}
_STATUS_FIELDS = {
    "f:status": {
        "f:conditions": {'k:{"type":"Ready"}': {".": {}, "f:lastTransitionTime": {}, "f:status": {}, "f:type": {}}},
        "f:containerStatuses": {},
        "f:hostIP": {},
        "f:phase": {},
        "f:podIP": {},
        "f:podIPs": {".": {}},
        "f:startTime": {},
    }
}


def _spec(node_name: str) -> dict[str, Any]:
    return {
        "containers": [
            {
                "env": [{"name": "REGION", "value": "eu-1"}, {"name": "LOG_LEVEL", "value": "info"}],
                "image": "registry.example/team/server:3.2.1",
                "imagePullPolicy": "IfNotPresent",
                "name": "server",
                "ports": [{"containerPort": POD_PORT, "name": "http", "protocol": "TCP"}],
                "readinessProbe": {
                    "httpGet": {"path": "/ready", "port": "http", "scheme": "HTTP"},
                    "periodSeconds": 10,
                },
                "resources": {"limits": {"memory": "256Mi"}, "requests": {"cpu": "100m", "memory": "256Mi"}},
                "terminationMessagePath": "/dev/termination-log",
                "volumeMounts": [{"mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "name": "token"}],
            }
        ],
        "dnsPolicy": "ClusterFirst",
        "nodeName": node_name,
        "restartPolicy": "Always",
        "schedulerName": "default-scheduler",
        "serviceAccountName": "default",
        "tolerations": [{"effect": "NoExecute", "key": "node.kubernetes.io/not-ready", "operator": "Exists"}],
        "volumes": [{"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}],
    }


def _status(address: str, number: int) -> dict[str, Any]:
    at = "2025-06-01T12:00:05Z"
    conditions = ("Initialized", "Ready", "ContainersReady", "PodScheduled")
    return {
        "conditions": [{"lastTransitionTime": at, "status": "True", "type": condition} for condition in conditions],
        "containerStatuses": [
            {
                "containerID": f"containerd://{number:064x}",
                "image": "registry.example/team/server:3.2.1",
                "name": "server",
                "ready": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": at}},
            }
        ],
        "hostIP": "192.0.2.10",
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "qosClass": "Burstable",
        "startTime": at,
    }
