"""The model of policy: the latest record of every pod, namespace and policy, and what changed since it was asked.

Work per event is O(what the event changes): a pod's addresses, a namespace's pods, a policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum

import msgspec

from agent.core.addresses import family_of
from agent.core.events import Delete, Event, ListEnded, ListStarted, Malformed, Upsert
from agent.core.policy_records import (
    ClusterPolicyRecord,
    Labels,
    NamedPort,
    NamespaceRecord,
    NetworkPolicyRecord,
    PodRecord,
    PolicyRecord,
)
from agent.core.records import POLICIES, POLICY_KINDS, Fault, Kind, ObjectKey

PolicyName = tuple[Kind, ObjectKey]
NAME_LABEL = "kubernetes.io/metadata.name"
_SHARED_LIMIT = 1_024


class Standing(StrEnum):
    """What of a policy there is to be in force."""

    WHOLE = "whole"
    FORMER = "former"
    """What it said when it could last be read as a whole."""
    PART = "part"
    """It never could, and this is what can be read."""
    NONE = "none"


class PolicyModel:
    """Objects by kind and key; ``dirty_addresses`` and ``dirty_policies`` are taken out by whoever plans.

    Until every kind has delivered its first full list (``is_synced``) the model is not to be believed.
    """

    def __init__(self, node_name: str, formers: Iterable[NetworkPolicyRecord | ClusterPolicyRecord] = ()) -> None:
        """``formers``: the policies as a former agent knew them; the first lists say which of them there still are."""
        self.node_name = node_name
        self.pods: dict[str, dict[str, PodRecord]] = {}
        """By namespace and name."""
        self.namespaces: dict[str, Labels] = {}
        self.policies: dict[PolicyName, NetworkPolicyRecord | ClusterPolicyRecord] = {
            (it.kind, it.key): it for it in formers
        }
        self.pods_by_address: dict[bytes, ObjectKey] = {}
        self.dirty_addresses: set[bytes] = set()
        self.dirty_policies: set[PolicyName] = set()
        self.unkept_policies: set[PolicyName] = set()
        """Policies that changed since they were last written down, by whoever does."""
        self.malformed: dict[tuple[Kind, ObjectKey], Malformed] = {}
        self.left_out: dict[PolicyName, tuple[Fault, ...]] = {}
        """What is not understood of objects that are in force otherwise; none of them is malformed."""
        self.unsynced: set[Kind] = set(POLICY_KINDS)
        self.incomplete: set[Kind] = set()
        """Kinds of whose latest list a part could not be read: what is missing may well exist."""
        self.pod_count = 0
        self._contested: dict[bytes, set[ObjectKey]] = {}
        """Addresses that several pods say they have."""
        self._mentioned: dict[Kind, set[ObjectKey]] = {}
        self._shared_labels: dict[Labels, Labels] = {}
        self._shared_ports: dict[tuple[NamedPort, ...], tuple[NamedPort, ...]] = {}

    @property
    def is_synced(self) -> bool:
        """Whether every kind has delivered its first full list."""
        return not self.unsynced

    def apply(self, event: Event) -> None:
        """Take in one event; those of other kinds are left alone."""
        match event:
            case Upsert(
                PodRecord() | NamespaceRecord() | NetworkPolicyRecord() | ClusterPolicyRecord() as record, left_out
            ):
                self._note_left_out(record.kind, record.key, left_out)
                self._mention(record.kind, record.key)
                self._put(self._as_before(record, left_out) if isinstance(record, PodRecord) and left_out else record)
            case Delete(kind, key) if kind in POLICY_KINDS:
                self.malformed.pop((kind, key), None)
                if kind in self._mentioned:
                    self._mentioned[kind].discard(key)
                self._remove(kind, key)
            case Malformed(kind, key) if kind in POLICY_KINDS:
                self.malformed[kind, key] = event
                self.left_out.pop((kind, key), None)
                self._mention(kind, key)
                self._put_partial(event)
            case ListStarted(kind) if kind in POLICY_KINDS:
                self._mentioned[kind] = set()
            case ListEnded(kind, is_complete):
                self._end_list(kind, is_complete=is_complete)

    @property
    def unread_policies(self) -> dict[PolicyName, Malformed]:
        """List the policies that cannot be read, or not all of them."""
        return {name: fault for name, fault in self.malformed.items() if name[0] in POLICIES}

    def in_force(self, name: PolicyName) -> Standing:
        """Tell what of a policy that there is is in force."""
        record = self.policies.get(name)
        if record is None:
            return Standing.NONE
        if name not in self.malformed:
            return Standing.WHOLE
        return Standing.PART if record.is_partial else Standing.FORMER

    def pod(self, key: ObjectKey) -> PodRecord | None:
        """Look up a pod."""
        return self.pods.get(key.namespace, {}).get(key.name)

    def owner(self, address: bytes) -> PodRecord | None:
        """Look up whose an address is."""
        key = self.pods_by_address.get(address)
        return None if key is None else self.pod(key)

    def namespace_labels(self, namespace: str) -> Labels:
        """Look up a namespace's labels; of one that is not known yet, its name is."""
        return self.namespaces.get(namespace) or ((NAME_LABEL, namespace),)

    def take_dirty(self) -> tuple[set[bytes], set[PolicyName]]:
        """Take out what changed since it was last taken."""
        addresses, policies = self.dirty_addresses, self.dirty_policies
        self.dirty_addresses, self.dirty_policies = set(), set()
        return addresses, policies

    def _note_left_out(self, kind: Kind, key: ObjectKey, left_out: tuple[Fault, ...]) -> None:
        """Forget what was wrong with an object, and note what of its latest version is not understood."""
        self.malformed.pop((kind, key), None)
        self.left_out.pop((kind, key), None)
        if left_out:
            self.left_out[kind, key] = left_out

    def _mention(self, kind: Kind, key: ObjectKey) -> None:
        if kind in self._mentioned:
            self._mentioned[kind].add(key)

    def _as_before(self, record: PodRecord, left_out: tuple[Fault, ...]) -> PodRecord:
        """Give a pod back the labels and addresses it had that cannot be read any more: it is isolated by them."""
        before = self.pod(record.key)
        if before is None:
            return record
        fields = {fault.field for fault in left_out}
        families = set(map(family_of, record.addresses))
        labels, addresses = dict(record.labels), record.addresses
        if any(field.startswith("status.podIP") for field in fields):
            addresses += tuple([it for it in before.addresses if family_of(it) not in families])
        for key, value in before.labels:
            if not fields.isdisjoint({"metadata.labels", f"metadata.labels.{key}"}):
                labels.setdefault(key, value)
        return msgspec.structs.replace(record, addresses=addresses, labels=tuple(sorted(labels.items())))

    def _put(self, record: PolicyRecord) -> None:
        match record:
            case PodRecord():
                self._put_pod(record)
            case NamespaceRecord():
                self._put_namespace(record.key.name, record.labels)
            case NetworkPolicyRecord() | ClusterPolicyRecord():
                if self.policies.get((record.kind, record.key)) != record:
                    self.policies[record.kind, record.key] = record
                    self._touch((record.kind, record.key))

    def _put_partial(self, event: Malformed) -> None:
        """Have what can be read of a policy in force, unless all of a former version is."""
        record = event.partial
        before = self.policies.get((event.kind, event.key))
        if isinstance(record, NetworkPolicyRecord | ClusterPolicyRecord) and (before is None or before.is_partial):
            self._put(record)

    def _put_namespace(self, name: str, labels: Labels) -> None:
        before = self.namespace_labels(name)
        if labels:
            self.namespaces[name] = labels
        else:
            self.namespaces.pop(name, None)
        if self.namespace_labels(name) != before:
            for pod in self.pods.get(name, {}).values():
                self.dirty_addresses.update(pod.addresses)

    def _put_pod(self, record: PodRecord) -> None:
        pods = self.pods.setdefault(record.key.namespace, {})
        before = pods.get(record.key.name)
        if before == record:
            return
        pods[record.key.name] = self._share(record)
        self.pod_count += before is None
        for address in set(before.addresses if before else ()) - set(record.addresses):
            self._unclaim(address, record.key)
        for address in record.addresses:
            self._claim(address, record.key)
            self.dirty_addresses.add(address)

    def _share(self, record: PodRecord) -> PodRecord:
        """Have pods that say the same share what they say: most are replicas."""
        if len(self._shared_labels) > _SHARED_LIMIT + 2 * self.pod_count:
            self._shared_labels.clear()
            self._shared_ports.clear()
        labels = self._shared_labels.setdefault(record.labels, record.labels)
        ports = self._shared_ports.setdefault(record.ports, record.ports)
        if labels is record.labels and ports is record.ports:
            return record
        return msgspec.structs.replace(record, labels=labels, ports=ports)

    def _remove_pod(self, key: ObjectKey) -> None:
        pods = self.pods.get(key.namespace, {})
        record = pods.pop(key.name, None)
        if record is None:
            return
        self.pod_count -= 1
        if not pods:
            del self.pods[key.namespace]
        for address in record.addresses:
            self._unclaim(address, key)

    def _claim(self, address: bytes, key: ObjectKey) -> None:
        owner = self.pods_by_address.setdefault(address, key)
        claimants = self._contested.get(address)
        if owner != key or claimants is not None:
            claimants = self._contested.setdefault(address, {owner})
            claimants.add(key)
            self._settle(address, claimants)

    def _unclaim(self, address: bytes, key: ObjectKey) -> None:
        self.dirty_addresses.add(address)
        claimants = self._contested.get(address)
        if claimants is None:
            del self.pods_by_address[address]
            return
        claimants.discard(key)
        self._settle(address, claimants)
        if len(claimants) == 1:
            del self._contested[address]

    def _settle(self, address: bytes, claimants: Iterable[ObjectKey]) -> None:
        pods = [pod for pod in map(self.pod, claimants) if pod is not None]
        self.pods_by_address[address] = max(pods, key=_claim_of).key

    def _remove(self, kind: Kind, key: ObjectKey) -> None:
        self.left_out.pop((kind, key), None)
        match kind:
            case Kind.POD:
                self._remove_pod(key)
            case Kind.NAMESPACE:
                self._put_namespace(key.name, ())
            case _:
                if self.policies.pop((kind, key), None):
                    self._touch((kind, key))

    def _touch(self, policy: PolicyName) -> None:
        self.dirty_policies.add(policy)
        self.unkept_policies.add(policy)

    def _end_list(self, kind: Kind, *, is_complete: bool) -> None:
        mentioned = self._mentioned.pop(kind, None)
        if mentioned is None:
            return
        self.unsynced.discard(kind)
        if not is_complete:
            self.incomplete.add(kind)
            return
        self.incomplete.discard(kind)
        for key in set(self._known(kind)) - mentioned:
            self.malformed.pop((kind, key), None)
            self._remove(kind, key)

    def _known(self, kind: Kind) -> Iterator[ObjectKey]:
        yield from (key for fault, key in self.malformed if fault is kind)
        match kind:
            case Kind.POD:
                yield from (pod.key for pods in self.pods.values() for pod in pods.values())
            case Kind.NAMESPACE:
                yield from (ObjectKey("", name) for name in self.namespaces)
            case _:
                yield from (key for policy, key in self.policies if policy is kind)


def _claim_of(pod: PodRecord) -> tuple[bool, str, ObjectKey]:
    """Rank claims to an address: the younger has it, unless it is the one that is about to go."""
    return (not pod.is_terminating, pod.created, pod.key)
