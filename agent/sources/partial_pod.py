"""Read what can be read of a pod that as a whole cannot be: a bad port is not to cost the pod its isolation.

A label, an address, a port or a container that cannot be read is left out by itself. Whether the pod is this node's,
whether it uses its node's network, and whether it has ended has to be read, else nobody knows whose the addresses are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from agent.core.addresses import family_of
from agent.core.records import Family, Fault
from agent.sources import convert_policy as convert
from agent.sources.convert import fault
from agent.sources.parts import Parts, mapping, sequence, shaped
from agent.sources.wire_policy import (
    Container,
    ContainerPort,
    InitContainer,
    PodIP,
    PodMetadata,
    PodSpec,
    PodStatus,
    WirePod,
)


def readable(value: object) -> tuple[WirePod, list[Fault]]:
    """Read a pod from builtin values, and say what of it cannot be. Raises: one of UNREADABLE."""
    pod, parts = mapping(value, ""), _Parts()
    metadata, spec, status = (mapping(pod.get(name) or {}, name) for name in ("metadata", "spec", "status"))
    read = WirePod(parts.metadata(metadata), parts.spec(spec), parts.status(status))
    if read.spec and not read.spec.host_network and read.status and not convert.is_over(read.status):
        read = msgspec.structs.replace(
            read, status=msgspec.structs.replace(read.status, pod_ips=parts.addresses(status))
        )
    return read, parts.faults


class _Parts(Parts):
    """Reads the parts of pods."""

    def metadata(self, said: Mapping[str, Any]) -> PodMetadata:
        created = said.get("creationTimestamp")
        return PodMetadata(
            name=shaped(said.get("name"), str, "metadata.name"),
            creation_timestamp=self.part(shaped, created, str | None, "metadata.creationTimestamp"),
            labels=self._labels(said.get("labels")),
            deletion_timestamp=said.get("deletionTimestamp"),
        )

    def _labels(self, said: object) -> dict[str, str]:
        labels = self.part(mapping, said or {}, "metadata.labels") or {}
        found = {key: self.part(shaped, value, str, f"metadata.labels.{key}") for key, value in labels.items()}
        return {key: value for key, value in found.items() if value is not None}

    def spec(self, said: Mapping[str, Any]) -> PodSpec:
        return PodSpec(
            node_name=shaped(said.get("nodeName"), str | None, "spec.nodeName"),
            host_network=shaped(said.get("hostNetwork"), bool | None, "spec.hostNetwork"),
            containers=tuple(
                [Container(ports=self._ports(it, field)) for field, it in self._containers(said, "containers")]
            ),
            init_containers=tuple(
                [
                    InitContainer(
                        ports=self._ports(it, field),
                        restart_policy=self.part(shaped, it.get("restartPolicy"), str | None, f"{field}.restartPolicy"),
                    )
                    for field, it in self._containers(said, "initContainers")
                ]
            ),
        )

    def _containers(self, spec: Mapping[str, Any], name: str) -> list[tuple[str, Mapping[str, Any]]]:
        return self._mappings(spec.get(name), f"spec.{name}")

    def _mappings(self, said: object, field: str) -> list[tuple[str, Mapping[str, Any]]]:
        """Read the objects of a list, with the field of each."""
        listed = [(f"{field}[{index}]", it) for index, it in enumerate(self.part(sequence, said, field) or [])]
        found = [(place, self.part(mapping, it, place)) for place, it in listed]
        return [(place, it) for place, it in found if it is not None]

    def _ports(self, container: Mapping[str, Any], field: str) -> tuple[ContainerPort, ...]:
        said = self._mappings(container.get("ports"), f"{field}.ports")
        found = [self.part(shaped, it, ContainerPort, place) for place, it in said]
        return tuple([it for it in found if it is not None])

    def status(self, said: Mapping[str, Any]) -> PodStatus:
        return PodStatus(phase=shaped(said.get("phase"), str | None, "status.phase"))

    def addresses(self, said: Mapping[str, Any]) -> tuple[PodIP, ...]:
        """Read the addresses of a pod that has its own."""
        listed = [(f"{place}.ip", it.get("ip")) for place, it in self._mappings(said.get("podIPs"), "status.podIPs")]
        addresses: dict[Family, str] = {}
        for field, text in listed or [("status.podIP", said.get("podIP"))]:
            self.part(_take_address, addresses, text, field)
        return tuple([PodIP(text) for text in addresses.values()])


def _take_address(addresses: dict[Family, str], said: object, field: str) -> None:
    """Take an address in, the first of its family. Raises: one of UNREADABLE."""
    text = shaped(said, str | None, field)
    if not text:
        return
    family = family_of(convert.pod_address(text, field))
    if addresses.setdefault(family, text) != text:
        raise fault(field, "two addresses of one family")
