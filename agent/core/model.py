"""The model: the latest record of every object, and which Services changed since they were last resolved."""

from __future__ import annotations

from collections.abc import Iterator

from agent.core.addresses import family_of, parse_address
from agent.core.events import AddressesChanged, AnyRecord, Delete, Event, ListEnded, ListStarted, Malformed, Upsert
from agent.core.health import count_local_ready
from agent.core.options import ServiceOptions
from agent.core.records import (
    SERVICE_KINDS,
    Family,
    Fault,
    HealthCheck,
    Kind,
    NodeRecord,
    ObjectKey,
    ServiceRecord,
    SliceRecord,
)
from agent.core.services import DesiredPort, resolve

_DEFAULTS = ServiceOptions()


class Model:
    """Objects by kind and key. ``dirty`` holds the Services to resolve again; whoever does takes them out.

    Until every kind has delivered its first full list (``is_synced``) the model is not to be believed: what is
    missing may only not have been said yet. The same holds for the node's addresses where it ``awaits_addresses``.
    """

    def __init__(self, node_name: str, options: ServiceOptions = _DEFAULTS, *, awaits_addresses: bool = False) -> None:
        self.node = NodeRecord(node_name)
        self.options = options
        self.node_port_addresses: tuple[bytes, ...] = ()
        self.node_exists: bool | None = None
        self.node_was_seen = False
        self.services: dict[ObjectKey, ServiceRecord] = {}
        self.slices: dict[ObjectKey, tuple[SliceRecord, ...]] = {}
        self.dirty: set[ObjectKey] = set()
        self.malformed: dict[tuple[Kind, ObjectKey], Malformed] = {}
        """What is wrong with the latest versions of objects: they cannot be read, or not all of them."""
        self.unsynced: set[Kind] = set(SERVICE_KINDS)
        self.incomplete: set[Kind] = set()
        """Kinds of whose latest list a part could not be read: what is missing may well exist."""
        self._awaits_addresses = awaits_addresses
        self._addresses = AddressesChanged(frozenset())
        self._owner_of_slice: dict[ObjectKey, ObjectKey] = {}
        self._with_node_ports: set[ObjectKey] = set()
        self._health_checks: dict[ObjectKey, HealthCheck] = {}
        self._unchecked: set[ObjectKey] = set()
        """Services whose health check may have changed since it was last asked for."""
        self._mentioned: dict[Kind, set[ObjectKey]] = {}

    @property
    def is_synced(self) -> bool:
        """Whether every kind has delivered its first full list, and the node's addresses are known."""
        return not self.unsynced and not self._awaits_addresses

    def apply(self, event: Event) -> None:
        """Take in one event; the same events in the same order leave the same model."""
        match event:
            case Upsert(record, left_out):
                self._upsert(record, left_out)
            case Delete(kind, key):
                self._delete(kind, key)
            case Malformed(kind, key):
                self.malformed[kind, key] = event
                self._mention(kind, key)
            case ListStarted(kind):
                self._mentioned[kind] = set()
            case ListEnded(kind, is_complete):
                self._end_list(kind, is_complete=is_complete)
            case AddressesChanged():
                self._put_addresses(event)

    def unread(self) -> dict[ObjectKey, set[Family]]:
        """Name the Services that exist and have never been readable, and in which families.

        A family counts where the Service, or a slice of it, exists unread and no slice of the family was read: what a
        former agent programmed is then the best there is. With a slice that was read it is not: to hold all endpoints
        for another slice's sake would send clients where nobody answers any more.
        """
        unread: dict[ObjectKey, set[Family]] = {}
        for (kind, key), fault in self.malformed.items():
            if kind is Kind.SERVICE and key not in self.services:
                unread[key] = set(Family)
            elif kind is Kind.ENDPOINT_SLICE and key not in self._owner_of_slice and fault.service:
                unread.setdefault(fault.service, self._families_without_slice(fault.service))
        return {key: families for key, families in unread.items() if families}

    def _families_without_slice(self, key: ObjectKey) -> set[Family]:
        service = self.services.get(key)
        families = set(map(family_of, service.cluster_ips)) if service else set(Family)
        return families - {piece.family for piece in self.slices.get(key, ())}

    def desired(self, key: ObjectKey) -> Iterator[DesiredPort]:
        """Resolve one Service; nothing where there is none."""
        service = self.services.get(key)
        if service:
            slices = self.slices.get(key, ())
            yield from resolve(service, slices, self.node.zone, self.node_port_addresses, self.options)

    def health_checks(self) -> dict[ObjectKey, HealthCheck]:
        """Say what load balancers are to be told of each Service that they ask this node about.

        Costs what changed since it was last asked for.
        """
        for key in self._unchecked:
            service = self.services.get(key)
            port = service.external.health_check_node_port if service and service.external else 0
            if service and port and service.cluster_ips:
                self._health_checks[key] = HealthCheck(port, count_local_ready(self.slices.get(key, ())))
            else:
                self._health_checks.pop(key, None)
        self._unchecked.clear()
        return dict(self._health_checks)

    def _touch(self, key: ObjectKey) -> None:
        """Have a Service resolved again."""
        self.dirty.add(key)
        if key in self._health_checks:
            self._unchecked.add(key)

    def _put_service(self, record: ServiceRecord) -> None:
        if self.services.get(record.key) == record:
            return
        self.services[record.key] = record
        if record.external is not None and any(port.node_port for port in record.ports):
            self._with_node_ports.add(record.key)
        else:
            self._with_node_ports.discard(record.key)
        if record.external is not None and record.external.health_check_node_port:
            self._unchecked.add(record.key)
        self._touch(record.key)

    def _put_addresses(self, event: AddressesChanged) -> None:
        self._awaits_addresses = False
        self._addresses = event
        self._choose_node_port_addresses()

    def _choose_node_port_addresses(self) -> None:
        local, sources = self._addresses.local, self._addresses.primary
        primary = self.options.primary_addresses(local, map(parse_address, self.node.addresses), sources)
        addresses = self.options.node_port_addresses(local, primary)
        if addresses != self.node_port_addresses:
            self.node_port_addresses = addresses
            self.dirty |= self._with_node_ports

    def _mention(self, kind: Kind, key: ObjectKey) -> None:
        if kind in self._mentioned:
            self._mentioned[kind].add(key)

    def _upsert(self, record: AnyRecord, left_out: tuple[Fault, ...]) -> None:
        self._note_faults(record.kind, record.key, left_out)
        match record:
            case SliceRecord():
                self._put_slice(record)
            case ServiceRecord():
                self._put_service(record)
            case NodeRecord():
                self._put_node(record)

    def _note_faults(self, kind: Kind, key: ObjectKey, left_out: tuple[Fault, ...]) -> None:
        """Forget what was wrong with an object, and note what is wrong with its latest version."""
        self._mention(kind, key)
        self.malformed.pop((kind, key), None)
        if left_out:
            fields, reasons = zip(*left_out, strict=True)
            self.malformed[kind, key] = Malformed(kind, key, ", ".join(fields), "; ".join(reasons))

    def _put_node(self, record: NodeRecord) -> None:
        if record.name != self.node.name:
            return
        if record.zone != self.node.zone:
            self.dirty.update(self.services)
        self.node = record
        self.node_exists = self.node_was_seen = True
        self._choose_node_port_addresses()

    def _put_slice(self, record: SliceRecord) -> None:
        owner = self._owner_of_slice.get(record.key)
        if owner is not None and owner != record.service:
            self._drop_slice(record.key)  # its label moved it to another Service
        pieces = self.slices.get(record.service, ())
        if record in pieces:
            return
        self._owner_of_slice[record.key] = record.service
        self.slices[record.service] = (*(piece for piece in pieces if piece.key != record.key), record)
        self._touch(record.service)

    def _drop_slice(self, key: ObjectKey) -> None:
        owner = self._owner_of_slice.pop(key, None)
        if owner is None:
            return
        rest = tuple(piece for piece in self.slices[owner] if piece.key != key)
        if rest:
            self.slices[owner] = rest
        else:
            del self.slices[owner]
        self._touch(owner)

    def _delete(self, kind: Kind, key: ObjectKey) -> None:
        was_malformed = self.malformed.pop((kind, key), None)
        if kind in self._mentioned:
            self._mentioned[kind].discard(key)
        match kind:
            case Kind.SERVICE:
                self._with_node_ports.discard(key)
                if self.services.pop(key, None) or was_malformed:
                    self._touch(key)
            case Kind.ENDPOINT_SLICE:
                self._drop_slice(key)
                if was_malformed and was_malformed.service:
                    self.dirty.add(was_malformed.service)
            case Kind.NODE:
                if key.name == self.node.name:
                    self.node_exists = False

    def _end_list(self, kind: Kind, *, is_complete: bool) -> None:
        mentioned = self._mentioned.pop(kind, None)
        if mentioned is None:
            return
        self.unsynced.discard(kind)
        if not is_complete:
            self.incomplete.add(kind)
            return
        self.incomplete.discard(kind)
        for key in self._known(kind) - mentioned:
            self._delete(kind, key)
        if kind is Kind.NODE and self.node_exists is None and ObjectKey("", self.node.name) not in mentioned:
            self.node_exists = False

    def _known(self, kind: Kind) -> set[ObjectKey]:
        known = {key for fault_kind, key in self.malformed if fault_kind is kind}
        match kind:
            case Kind.SERVICE:
                known |= self.services.keys()
            case Kind.ENDPOINT_SLICE:
                known |= self._owner_of_slice.keys()
            case Kind.NODE:
                known |= {ObjectKey("", self.node.name)} if self.node_exists else set()
        return known
