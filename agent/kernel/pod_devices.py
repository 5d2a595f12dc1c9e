"""Behind which device each of this node's pods is, as far as that can be told without entering the pod.

A route to the pod's address alone tells (point-to-point devices); behind a bridge, where the pod was last heard. Pods
may never speak to the node, so the kernel is made to ask for those that are not known, until they are. What is known
stays known while the pod and the device exist: a pod that speaks in the name of another does not take its place.
"""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Callable, Collection, Container, Mapping

from agent.core.abi import POD_DEVICE, U32
from agent.core.addresses import IPV4_PREFIX
from agent.core.network import Network
from agent.core.records import ADDRESS_SIZE
from agent.kernel.node_maps import NodeMaps

POD_KIND = "veth"
# A pod answers within a millisecond; it is not there yet, or its bridge's port does not forward yet, for longer.
_RETRY_FLOOR_S, _RETRY_CEILING_S = 0.1, 5.0

Ask = Callable[[bytes, Container[int]], tuple[int, bool] | None]
"""Finds the device of an address, given the bridges, and whether it was configured (``ask_device``)."""
Solicit = Callable[[bytes, Container[int]], None]
"""Makes the kernel find the device of an address out, given the bridges (``solicit``)."""


def pack_pod_device(addresses: Collection[bytes]) -> bytes:
    """Lay out as ``struct pod_device``."""
    none = bytes(ADDRESS_SIZE)
    ipv4 = next((it for it in addresses if it.startswith(IPV4_PREFIX)), none)
    ipv6 = next((it for it in addresses if not it.startswith(IPV4_PREFIX)), none)
    return POD_DEVICE.packer.pack(ipv4, ipv6)


class PodDevices:
    """Keeps the map ``pod_devices``; take a ``turn`` when pods or devices changed, or it is due.

    ``missing`` counts the pods whose device is not known.
    """

    def __init__(self, maps: NodeMaps, found: Mapping[bytes, bytes], ask: Ask, solicit: Solicit) -> None:
        """``found``: what the map holds, of a former agent."""
        self.missing = 0
        self.due_at = math.inf
        """When those that are missing are looked for again, in monotonic seconds."""
        self._maps = maps
        self._ask = ask
        self._solicit = solicit
        self._known = {value: U32.packer.unpack(key)[0] for key, value in found.items()}
        self._retry_s = _RETRY_FLOOR_S

    @property
    def places(self) -> dict[bytes, int]:
        """Say behind which device each address is, where that is known."""
        return {
            address: device
            for value, device in self._known.items()
            for address in POD_DEVICE.packer.unpack(value)
            if any(address)
        }

    def forget(self) -> None:
        """Read back what is there before anything is written again."""
        self._maps.forget()

    def turn(
        self,
        now: float,
        network: Network,
        pods: Collection[Collection[bytes]],
        without_room: Container[bytes],
        *,
        is_new: bool,
    ) -> None:
        """Find the devices of pods, given as the addresses of each.

        ``without_room``: addresses that are not among the subjects; a pod of which none is has no entry here either,
        as both maps are of one size. ``is_new``: something changed, and what was kept is to be compared with routes.
        Raises: DataplaneError.
        """
        devices = {device.ifindex for device in network.devices if device.kind == POD_KIND}
        bridges = {device.ifindex for device in network.devices if device.kind == "bridge"}
        by_value = {pack_pod_device(addresses): addresses for addresses in pods}
        kept = {it: at for it, at in self._known.items() if it in by_value and at in devices}
        asked = by_value if is_new else by_value.keys() - kept.keys()
        told = {value: self._locate(by_value[value], devices, bridges) for value in asked}
        routed = {value: found[0] for value, found in told.items() if found and found[1]}
        heard = {value: found[0] for value, found in told.items() if found and not found[1] and value not in kept}
        claimed = kept | routed
        taken = set(claimed.values())
        claimed |= {value: device for value, device in heard.items() if device not in taken}
        # A device with several pods behind it is that of none.
        uses = Tally(claimed.values())
        self._known = {value: device for value, device in claimed.items() if uses[device] == 1}
        placed = {
            U32.packer.pack(device): value
            for value, device in self._known.items()
            if any(address not in without_room for address in by_value[value])
        }
        self._maps.write("pod_devices", placed)
        missing = by_value.keys() - self._known.keys()
        for address in (address for value in missing for address in by_value[value]):
            self._solicit(address, bridges)
        self.missing = len(missing)
        self._retry_s = _RETRY_FLOOR_S if is_new else min(2 * self._retry_s, _RETRY_CEILING_S)
        self.due_at = now + self._retry_s if missing else math.inf

    def _locate(
        self, addresses: Collection[bytes], devices: Container[int], bridges: Container[int]
    ) -> tuple[int, bool] | None:
        """Find the one device that any of a pod's addresses is behind."""
        found = {told for told in (self._ask(address, bridges) for address in addresses) if told and told[0] in devices}
        return found.pop() if len(found) == 1 else None
