"""Read the objects out of a manifest file: YAML of several documents, or JSON.

Pure functions from bytes to builtin values; `decode` makes records of those.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import yaml

from agent.core.records import Kind

KINDS = {
    ("v1", "Service"): Kind.SERVICE,
    ("discovery.k8s.io/v1", "EndpointSlice"): Kind.ENDPOINT_SLICE,
    ("v1", "Node"): Kind.NODE,
    ("v1", "Pod"): Kind.POD,
    ("v1", "Namespace"): Kind.NAMESPACE,
    ("networking.k8s.io/v1", "NetworkPolicy"): Kind.NETWORK_POLICY,
    ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy"): Kind.CLUSTER_NETWORK_POLICY,
}
_LIST = ("v1", "List")
_LISTS = {(version, f"{kind}List"): (version, kind) for version, kind in KINDS}
# What went before a kind that is read: to be silent about it would leave open what somebody closed.
_SUCCESSOR = ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy")
_FORMER = frozenset(
    ("policy.networking.k8s.io/v1alpha1", kind) for kind in ("AdminNetworkPolicy", "BaselineAdminNetworkPolicy")
)
_NESTING_LIMIT = 100
# How alike a misspelt word is, of 1. The next of Kubernetes' own kinds, PodList to List, is at 0.73.
_ALIKE = 0.75

# What the constructors of YAML raise on values that contradict their tags, besides its own errors.
_UNPARSABLE = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """A safe loader that leaves timestamps as text, which is what they are in Kubernetes' objects."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name and type are PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }


class Contents(NamedTuple):
    """What a file holds: the objects of kinds that are read, and what is wrong with the rest."""

    objects: list[tuple[Kind, Mapping[str, object]]]
    faults: list[str]


def read_contents(content: bytes, *, is_json: bool) -> Contents:
    """Find the objects in a file; objects of kinds that are not read are left out silently, but not misspelt ones.

    Raises: ValueError, when the file cannot be parsed, as when it is half written.
    """
    contents = Contents([], [])
    for number, document in enumerate(_parse_json(content) if is_json else _parse_yaml(content), start=1):
        if document is not None:
            _add(contents, document, f"document {number}")
    return contents


def _parse_json(content: bytes) -> list[object]:
    try:
        return [msgspec.json.decode(content)]
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"not JSON: {error}") from error


def _parse_yaml(content: bytes) -> list[object]:
    try:
        _refuse_deep_nesting(content)
        return list(yaml.load_all(content, _Loader))
    except _UNPARSABLE as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error


def _refuse_deep_nesting(content: bytes) -> None:
    """Refuse what would overflow the stack: the C loader recurses without looking, and takes the agent with it."""
    depth = 0
    for event in yaml.parse(content, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _NESTING_LIMIT:
            raise ValueError(f"nested more than {_NESTING_LIMIT} levels deep")


def _add(contents: Contents, document: object, where: str) -> None:
    """Add a document's objects: itself, or the items of a List, which need not repeat what the list's kind says."""
    if not isinstance(document, dict):
        contents.faults.append(f"{where} is not a mapping")
        return
    type_of = _type_of(document)
    if type_of == _LIST or type_of in _LISTS:
        item_type = _LISTS.get(type_of, ("", ""))
        for number, item in enumerate(_items_of(contents, document, where), start=1):
            _add_object(contents, item, item_type, f"{where}, item {number}")
    else:
        _add_object(contents, document, ("", ""), where)


def _add_object(contents: Contents, value: object, default: tuple[str, str], where: str) -> None:
    if not isinstance(value, dict):
        contents.faults.append(f"{where} is not a mapping")
        return
    version, kind = _type_of(value)
    type_of = version or default[0], kind or default[1]
    if not all(type_of):
        contents.faults.append(f"{where} has no {'kind' if type_of[0] else 'apiVersion'}")
    elif type_of in KINDS:
        contents.objects.append((KINDS[type_of], value))
    elif meant := _what_is_meant(type_of):
        contents.faults.append(f"{where} is {' '.join(type_of)}; did you mean {' '.join(meant)}?")


def _what_is_meant(type_of: tuple[str, str]) -> tuple[str, str] | None:
    """Find the type that another one is likely meant to be; lists are types that have just no place here."""
    if type_of == _LIST or type_of in _LISTS:
        return None
    if (type_of[0], type_of[1].removesuffix("List")) in _FORMER:
        return _SUCCESSOR
    found = [known for known in (*KINDS, _LIST) if _resembles(type_of, known)]
    return next((known for known in found if known[1] == type_of[1]), found[0] if found else None)


def _resembles(type_of: tuple[str, str], known: tuple[str, str]) -> bool:
    """Tell whether a type is likely another one misspelt, and not simply another one."""
    (version, kind), (known_version, known_kind) = type_of, known
    if kind == known_kind and "." not in version:  # the groups of others have a domain
        return True
    return _is_alike(version, known_version) and _is_alike(kind, known_kind)


def _is_alike(word: str, known: str) -> bool:
    return difflib.SequenceMatcher(None, word.casefold(), known.casefold(), autojunk=False).ratio() >= _ALIKE


def _items_of(contents: Contents, document: dict[str, object], where: str) -> Iterator[object]:
    items = document.get("items")
    if isinstance(items, list):
        yield from items
    elif items is not None:
        contents.faults.append(f"{where}: items is not a list")


def _type_of(value: dict[str, object]) -> tuple[str, str]:
    version, kind = value.get("apiVersion"), value.get("kind")
    return version if isinstance(version, str) else "", kind if isinstance(kind, str) else ""
