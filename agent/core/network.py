"""The node's network: devices and addresses as netlink tells them, and what the dataplane makes of them.

Addresses have 16 bytes (IPv4 as ``::ffff:a.b.c.d``).
"""

from __future__ import annotations

import fnmatch
import ipaddress
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntFlag
from functools import cached_property
from typing import NamedTuple

from agent.core.abi import (
    ADDRESS_RANGE,
    DEVICE,
    DEVICE_PODS,
    DEVICE_PORT,
    POD_RANGE_OWN,
    POD_RANGE_PODS,
    POD_RANGE_UNKNOWN,
    U32,
)
from agent.core.addresses import IPV4_PREFIX, parse_address
from agent.core.records import ADDRESS_SIZE

# Source: include/uapi/linux/if_arp.h, include/uapi/linux/rtnetlink.h.
ETHERNET = 1
LOOPBACK = 772
_SCOPE_LINK = 253
_V4_BITS = 96
_WHOLE = {4: "0.0.0.0/0", 6: "::/0"}
"""Every address, by family."""
_OF_OTHER_PROXIES = frozenset({"kube-ipvs0"})
"""Devices whose addresses are those of Services: kube-proxy's in IPVS mode, which it leaves behind."""
_NODE = 0
"""The key of ``devices`` that stands for the node itself."""


class AddressFlag(IntFlag):
    """What the kernel says of an address. Source: include/uapi/linux/if_addr.h."""

    SECONDARY = 0x01
    """Over IPv6: a temporary (privacy) address."""
    DAD_FAILED = 0x08
    DEPRECATED = 0x20
    TENTATIVE = 0x40


class Device(NamedTuple):
    """A device, with the ``kind`` of a virtual one (``veth``, ``bridge``), and its ARPHRD type, ``hardware``.

    ``master`` is the ifindex of what it is a port of.
    """

    ifindex: int
    name: str
    kind: str = ""
    hardware: int = ETHERNET
    master: int = 0
    master_kind: str = ""


class LocalAddress(NamedTuple):
    """An address of a device; ``prefix_bits`` of 128, ``scope`` as the kernel's RT_SCOPE, the wider the smaller."""

    address: bytes
    device: int
    prefix_bits: int
    scope: int = 0
    flags: int = 0

    @property
    def is_ipv4(self) -> bool:
        """Which family it is of."""
        return self.address.startswith(IPV4_PREFIX)

    @property
    def is_link_local(self) -> bool:
        """Whether it means nothing beyond its link, whatever its scope says. Source: RFC 3927, RFC 4291."""
        if self.is_ipv4:
            return self.address[12:14] == b"\xa9\xfe"
        return self.address[0] == 0xFE and self.address[1] & 0xC0 == 0x80


@dataclass(frozen=True)
class Network:
    """Devices and addresses in the kernel's order; what the default routes leave from, and by which devices."""

    devices: tuple[Device, ...] = ()
    addresses: tuple[LocalAddress, ...] = ()
    sources: frozenset[bytes] = frozenset()
    uplinks: frozenset[int] = frozenset()

    @cached_property
    def local(self) -> frozenset[bytes]:
        """Every address that reaches this node; of IPv6, none that only means something together with a device."""
        others = {device.ifindex for device in self.devices if device.name in _OF_OTHER_PROXIES}
        return frozenset(
            found.address
            for found in self.addresses
            if not found.flags & AddressFlag.DAD_FAILED
            and (found.is_ipv4 or not found.is_link_local)
            and found.device not in others
        )

    def masquerade_addresses(self) -> dict[int, tuple[bytes, bytes]]:
        """Choose what packets leave a device with, for each family (zero = none); ifindex 0 stands for the node."""
        best: dict[tuple[int, bool], LocalAddress] = {}
        loops = {device.ifindex for device in self.devices if device.hardware == LOOPBACK}
        usable = sorted(filter(_is_usable, self.addresses), key=_reluctance)
        for found in usable:
            best.setdefault((found.device, found.is_ipv4), found)
        # What the default routes leave from; else an address of a device that leads somewhere; else any.
        for found in sorted(usable, key=lambda it: (it.address not in self.sources, it.device in loops)):
            best.setdefault((_NODE, found.is_ipv4), found)
        none = LocalAddress(bytes(ADDRESS_SIZE), _NODE, 0)
        return {
            ifindex: (best.get((ifindex, True), none).address, best.get((ifindex, False), none).address)
            for ifindex in dict.fromkeys(ifindex for ifindex, _ in best)
        }


def _is_usable(found: LocalAddress) -> bool:
    return (
        found.scope < _SCOPE_LINK
        and not found.is_link_local
        and not found.flags & (AddressFlag.TENTATIVE | AddressFlag.DAD_FAILED)
    )


def _reluctance(found: LocalAddress) -> tuple[bool, int, bool]:
    return bool(found.flags & AddressFlag.DEPRECATED), found.scope, bool(found.flags & AddressFlag.SECONDARY)


@dataclass(frozen=True, slots=True)
class DevicePatterns:
    """Shell patterns of the names of devices that get programs; () = all that can. What is excluded wins."""

    included: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    def choose(self, devices: Iterable[Device]) -> Iterator[Device]:
        """Choose the devices that packets enter or leave the node by.

        A bridge and a bond stand for their ports: packets are seen at a bridge's ports, and at the bond itself.
        """
        for device in devices:
            is_fit = device.hardware == ETHERNET and device.kind != "bridge" and device.master_kind not in _BONDS
            is_asked_for = not self.included or _matches(device, self.included)
            if is_fit and is_asked_for and not _matches(device, self.excluded):
                yield device


_BONDS = frozenset({"bond", "team"})


def _matches(device: Device, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(device.name, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class PodDetection:
    """How packets of the cluster's pods are told: by the ``ranges`` they come from, or by the device they come in by.

    Without a device, the Node's own podCIDRs tell of a family that has no range; ``is_by_node``: as was asked for.
    """

    ranges: tuple[str, ...] = ()
    bridge: str = ""
    prefix: str = ""
    is_by_node: bool = False

    @property
    def is_by_device(self) -> bool:
        """Whether addresses are not looked at."""
        return bool(self.bridge or self.prefix)

    @property
    def needs_node(self) -> bool:
        """Whether the Node's podCIDRs are what tells, of one family at least."""
        return not self.is_by_device and not all(_of_family(self.ranges, family) for family in _WHOLE)

    def choose_ranges(self, family: int, node: Iterable[str]) -> tuple[str, ...]:
        """Choose the ranges of a family (4, 6); ``node``: the Node's podCIDRs. () = nobody knows."""
        return _of_family(self.ranges, family) or _of_family(node, family)

    def remarks(self, network: Network, node: Iterable[str]) -> Iterator[str]:
        """Say what stands in for ranges that are not configured, of each family that the node speaks."""
        for family, spoken in zip(_WHOLE, network.masquerade_addresses().get(_NODE, ()), strict=False):
            if self.is_by_device or _of_family(self.ranges, family) or not any(spoken):
                continue
            found = ", ".join(self.choose_ranges(family, node))
            if not found:
                yield (
                    f"IPv{family}: neither clusterCIDR nor this Node's podCIDRs say where pods are: "
                    "they count as outside, and what asks for a ClusterIP is not masqueraded"
                )
            elif not self.is_by_node:
                yield (
                    f"IPv{family}: clusterCIDR is not set: this Node's podCIDRs ({found}) tell its pods; "
                    "pods of other nodes count as outside"
                )

    def devices(self, devices: Iterable[Device]) -> frozenset[int]:
        """Find the devices that nothing but pods is behind, by ifindex."""
        bridges = {device.ifindex for device in devices if self.bridge and device.name == self.bridge}
        return frozenset(
            device.ifindex
            for device in devices
            if device.ifindex in bridges
            or device.master in bridges
            or (self.prefix and device.name.startswith(self.prefix))
        )


Entries = Mapping[bytes, bytes]


def address_entries(network: Network) -> Entries:
    """Write the map ``node_addresses``."""
    return dict.fromkeys(network.local, _number(1))


def device_entries(network: Network, pods: PodDetection) -> Entries:
    """Write the map ``devices``: what there is something to say of."""
    addresses = network.masquerade_addresses()
    flags = dict.fromkeys(pods.devices(network.devices), DEVICE_PODS)
    for device in network.devices:
        if device.master_kind == "bridge":
            flags[device.ifindex] = flags.get(device.ifindex, 0) | DEVICE_PORT
    none = (bytes(ADDRESS_SIZE), bytes(ADDRESS_SIZE))
    return {
        _number(ifindex): DEVICE.packer.pack(*addresses.get(ifindex, none), flags.get(ifindex, 0))
        for ifindex in addresses.keys() | flags.keys()
    }


def range_entries(pods: PodDetection, node: Iterable[str], own: Iterable[str] = ()) -> Entries:
    """Write the map ``pod_ranges``; ``node``: the Node's podCIDRs; ``own``: those of them that policy holds pods in."""
    flags = dict.fromkeys(map(_range_key, own), POD_RANGE_OWN)
    if not pods.is_by_device:
        flags = _detected_ranges(pods, node, flags)
    return {key: _number(value) for key, value in flags.items()}


def _detected_ranges(pods: PodDetection, node: Iterable[str], own: Mapping[bytes, int]) -> dict[bytes, int]:
    flags: dict[bytes, int] = {}
    for family, whole in _WHOLE.items():
        found = pods.choose_ranges(family, node)
        flags |= dict.fromkeys(map(_range_key, found), POD_RANGE_PODS) or {_range_key(whole): POD_RANGE_UNKNOWN}
    if _range_key(_WHOLE[6]) in flags:
        flags.setdefault(_range_key(_WHOLE[4]), 0)  # which lies within all of IPv6
    for key, value in own.items():
        # The longest prefix decides, so that this one says as well what the shorter ones do.
        around = max((wide for wide in flags if _holds(wide, key)), key=_bits_of, default=None)
        flags[key] = (flags[around] if around else 0) | value
    return flags


def _of_family(ranges: Iterable[str], family: int) -> tuple[str, ...]:
    return tuple(text for text in ranges if ipaddress.ip_network(text, strict=False).version == family)


def _range_key(text: str) -> bytes:
    network = ipaddress.ip_network(text, strict=False)
    bits = network.prefixlen + (_V4_BITS if network.version == 4 else 0)
    return ADDRESS_RANGE.packer.pack(bits, parse_address(str(network.network_address)))


def _bits_of(key: bytes) -> int:
    return int(ADDRESS_RANGE.packer.unpack(key)[0])


def _holds(wide: bytes, narrow: bytes) -> bool:
    bits, first = ADDRESS_RANGE.packer.unpack(wide)
    narrow_bits, inside = ADDRESS_RANGE.packer.unpack(narrow)
    shift = 8 * ADDRESS_SIZE - int(bits)
    is_wider = bool(bits <= narrow_bits)
    return is_wider and int.from_bytes(first, "big") >> shift == int.from_bytes(inside, "big") >> shift


def _number(value: int) -> bytes:
    return value.to_bytes(U32.size, sys.byteorder)
