"""Every exception ebproxy raises on purpose.

EbproxyError
├── ConfigError           the operator's configuration is wrong: all faults at once, exit status 2
├── CapacityError         a map is full for one service port: degrade it, keep the rest
├── DataplaneError        the kernel refused a write: read back what is there, and retry
├── LoaderError           the BPF programs did not compile, verify or match the agent's layout
├── UnsupportedKernel     this kernel lacks a named feature: exit and say which
├── SourceError           the source of objects failed: keep what is programmed, and retry
└── AgentUnreachable      no agent answers on the state directory's socket
"""

from __future__ import annotations

from collections.abc import Sequence


class EbproxyError(Exception):
    """The root of the tree."""


class ConfigError(EbproxyError):
    """A configuration with one or more faults, each naming its field."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))


class CapacityError(EbproxyError):
    """A map has no room for what one service port needs; names the field of the configuration that gives it more."""

    def __init__(self, map_name: str, needed: int, capacity: int) -> None:
        self.map_name = map_name
        self.needed = needed
        self.capacity = capacity
        first, *others = map_name.split("_")
        field = "mapSizes." + first + "".join(word.capitalize() for word in others)
        super().__init__(f"map {map_name} is full: {needed} more entries do not fit in {capacity} ({field})")


class DataplaneError(EbproxyError):
    """The kernel refused an operation on a map, program or link."""


class LoaderError(EbproxyError):
    """The loader child failed; the message carries the compiler's or verifier's words."""


class UnsupportedKernel(EbproxyError):
    """The running kernel lacks a feature that ebproxy needs."""

    def __init__(self, feature: str, remedy: str) -> None:
        self.feature = feature
        self.remedy = remedy
        super().__init__(f"this kernel lacks {feature}: {remedy}")


class SourceError(EbproxyError):
    """The source of objects failed; what is programmed stays."""


class AgentUnreachable(EbproxyError):
    """No agent answers on the socket of the state directory."""
