"""Readers for the values of a configuration: each turns what YAML or a flag gave into a typed value.

A reader raises ValueError whose text says what is accepted; the caller adds the field's path.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Reader = Callable[[object], object]
E = TypeVar("E", bound=enum.StrEnum)

_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "a mapping"}
_HIGHEST_PORT = 65535
_LOWEST_SOURCE_PORT = 1024
_FEWEST_SOURCE_PORTS = 1024
_DEVICE_PATTERN = re.compile(r"[^\s/:]+")
_DEVICE_NAME = re.compile(r"[^\s/:]{1,15}")
PRIMARY = "primary"


class BindAddress(NamedTuple):
    """Where a server listens: an IP address as text, without brackets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class PortRange(NamedTuple):
    """Ports from ``first`` to ``last``, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


def seconds(text: str) -> float:
    """Parse a Go duration ("30s", "1h0m0s", "1.5h", "0") into seconds.

    Raises ValueError.
    Source: Go time.ParseDuration; metav1.Duration.
    """
    body, sign = (text[1:], -1.0 if text[0] == "-" else 1.0) if text[:1] in ("-", "+") else (text, 1.0)
    if body == "0":
        return 0.0
    parts = list(_DURATION_PART.finditer(body))
    if not parts or "".join(part.group(0) for part in parts) != body:
        raise ValueError("is no duration; accepted: a number with a unit, like 500ms, 30s or 1h0m0s")
    return sign * sum(float(part.group(1)) * _UNITS_S[part.group(2)] for part in parts)


def go_duration(duration_s: float) -> str:
    """Write seconds the way Go does: 30s, 1m30s, 1h0m0s, 500ms."""
    if 0 < duration_s < 1:
        return f"{duration_s * 1000:g}ms"
    minutes, rest_s = divmod(duration_s, 60)
    hours, minutes = divmod(int(minutes), 60)
    head = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{head}{round(rest_s, 9):.15g}s"


def text(value: object) -> str:
    """Read a string."""
    if not isinstance(value, str):
        raise ValueError(f"is {_kind(value)}; accepted: a string")
    return value.strip()


def boolean(value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"is {_kind(value)}; accepted: true or false")
    return value


def integer(low: int, high: int) -> Callable[[object], int]:
    """Make a reader of a whole number from ``low`` to ``high``."""

    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"is {_shown(value)}; accepted: a whole number from {low} to {high}")
        return value

    return read


def power_of_two(low: int, high: int) -> Callable[[object], int]:
    """Make a reader of a power of two from ``low`` to ``high``."""

    def read(value: object) -> int:
        number = integer(low, high)(value)
        if number & (number - 1):
            raise ValueError(f"is {number}; accepted: a power of two, like {1 << number.bit_length()}")
        return number

    return read


def number(value: object) -> float:
    """Read a number, whole or not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"is {_shown(value)}; accepted: a number")
    return float(value)


def choice(*accepted: str) -> Callable[[object], str]:
    """Make a reader of one of some words."""

    def read(value: object) -> str:
        # YAML 1.1 reads a bare `off` as false.
        word = "off" if value is False else value
        if not isinstance(word, str) or word not in accepted:
            why = " (YAML reads on, off, yes and no as booleans: quote the word)" if isinstance(value, bool) else ""
            raise ValueError(f"is {_shown(value)}{why}; accepted: {', '.join(accepted)}")
        return word

    return read


def member(kind: type[E]) -> Callable[[object], E]:
    """Make a reader of a member of an enumeration, by its value."""
    word = choice(*(item.value for item in kind))
    return lambda value: kind(word(value))


def duration(value: object) -> float:
    """Read a Go duration, as seconds, zero or more."""
    found_s = seconds(value) if isinstance(value, str) else -1.0
    if found_s < 0:
        raise ValueError(f"is {_shown(value)}; accepted: a duration of zero or more, like 30s or 1h0m0s")
    return found_s


def timeout(value: object) -> float:
    """Read a Go duration, as seconds: 0, or a second and more, since flows are timed in seconds."""
    found_s = duration(value)
    if 0 < found_s < 1:
        raise ValueError(f"is {_shown(value)}; accepted: 1s or more, or 0 for the default")
    return found_s


def period(value: object) -> float:
    """Read a Go duration, as seconds, more than zero."""
    found_s = duration(value)
    if found_s == 0:
        raise ValueError("is 0; accepted: a duration of more than zero, like 30s")
    return found_s


def path(value: object) -> Path:
    """Read a path of the file system; a relative one is of the directory the agent is started in."""
    return Path(text(value)).absolute()


def address(value: object) -> str:
    """Read an IP address."""
    try:
        return str(ipaddress.ip_address(text(value)))
    except ValueError as error:
        raise ValueError(f"is {_shown(value)}; accepted: an IP address") from error


def bind_address(default_port: int) -> Callable[[object], BindAddress | None]:
    """Make a reader of IP:PORT, of [IPv6]:PORT, or of an IP alone, which gets ``default_port``.

    None = do not listen: an empty value, or port 0.
    Source: kube-proxy's --metrics-bind-address ("Set empty to disable") and --healthz-port ("Use 0 to disable").
    """

    def read(value: object) -> BindAddress | None:
        written = text(value)
        if not written:
            return None
        try:
            host, port = _split(written, default_port)
        except ValueError as error:
            raise ValueError(f"is {written!r}; accepted: IP:PORT, [IPv6]:PORT or IP; port 0 = do not listen") from error
        return BindAddress(host, port) if port else None

    return read


def _split(written: str, default_port: int) -> tuple[str, int]:
    try:
        return str(ipaddress.ip_address(written.removeprefix("[").removesuffix("]"))), default_port
    except ValueError:
        host, _, port = written.rpartition(":")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(written)
    if not port.isdecimal() or int(port) > _HIGHEST_PORT:
        raise ValueError(written)
    return str(ipaddress.ip_address(host.strip("[]"))) if host or int(port) else "", int(port)


def networks(value: object) -> tuple[Network, ...]:
    """Read prefixes: a list, or text with commas between them."""
    return tuple(map(_network, _strings(value)))


def _network(text: str) -> Network:
    accepted = "accepted: prefixes like 10.244.0.0/16, a list or with commas"
    try:
        found = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ValueError(f"holds {text!r}; {accepted}") from error
    if isinstance(found, ipaddress.IPv6Network) and found.network_address.ipv4_mapped is not None:
        raise ValueError(f"holds {text!r}, IPv4 in the form of IPv6; {accepted}")
    return found


def ranges(most: int) -> Callable[[object], tuple[Network, ...]]:
    """Make a reader of at most ``most`` prefixes."""

    def read(value: object) -> tuple[Network, ...]:
        found = networks(value)
        if len(found) > most:
            raise ValueError(f"holds {len(found)} prefixes; accepted: at most {most}")
        return found

    return read


def node_port_addresses(value: object) -> tuple[Network, ...] | str:
    """Read where NodePorts answer: prefixes, or the word ``primary`` alone.

    Source: kube-proxy's --nodeport-addresses.
    """
    items = _strings(value)
    if items == [PRIMARY]:
        return PRIMARY
    if PRIMARY in items:
        raise ValueError("holds 'primary' among others; accepted: prefixes, or 'primary' alone")
    return networks(items)


def port_range(value: object) -> PortRange:
    """Read ``FIRST-LAST``: ports that any user may bind, and enough of them."""
    first, _, last = text(value).partition("-")
    if first.isdecimal() and last.isdecimal():
        found = PortRange(int(first), int(last))
        is_bound = found.first >= _LOWEST_SOURCE_PORT and found.last <= _HIGHEST_PORT
        if is_bound and found.last - found.first + 1 >= _FEWEST_SOURCE_PORTS:
            return found
    accepted = f"FIRST-LAST, from {_LOWEST_SOURCE_PORT} to {_HIGHEST_PORT}, {_FEWEST_SOURCE_PORTS} ports or more"
    raise ValueError(f"is {_shown(value)}; accepted: {accepted}")


def device(value: object) -> str:
    """Read the name of a network device, or the beginning of one."""
    name = text(value)
    if not _DEVICE_NAME.fullmatch(name):
        raise ValueError(f"is {name!r}; accepted: the name of a network device, at most 15 characters")
    return name


def device_patterns(value: object) -> tuple[str, ...]:
    """Read shell patterns of device names: a list, or text with commas between them."""
    items = _strings(value)
    for item in items:
        if not _DEVICE_PATTERN.fullmatch(item):
            raise ValueError(f"holds {item!r}; accepted: patterns of device names, like eth* or ens?")
    return tuple(items)


def node_name(value: object) -> str:
    """Read the name of a Node: what Kubernetes accepts, in lower case as kube-proxy makes it."""
    name = text(value).lower()
    if not _NODE_NAME.fullmatch(name):
        raise ValueError(f"is {name!r}; accepted: the name of a Node: letters, digits, '-' and '.', at most 253")
    return name


def url(value: object) -> str:
    """Read the URL of an API server; a bare HOST:PORT is https."""
    written = text(value)
    whole = written if "://" in written else f"https://{written}"
    try:
        parts = urlsplit(whole)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise ValueError(f"is {written!r}; accepted: a URL like https://192.0.2.1:6443")
    return whole.rstrip("/")


def anything(value: object) -> object:
    """Read what is accepted and never looked at."""
    return value


def _strings(value: object) -> list[str]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"is {_kind(value)}; accepted: a list of strings, or a string with commas")
    return [item.strip() for item in items if item.strip()]


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str | int | float) else _kind(value)
