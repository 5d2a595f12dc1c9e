"""Field and label selectors, as list and watch take them.

Source: https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#api
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from tests.cluster.api_store import ApiError, Version

Selector = Callable[[Version], bool]
_REQUIREMENT = re.compile(
    r"\s*(?:(?P<absent>!)\s*(?P<gone>[\w./-]+)"
    r"|(?P<key>[\w./-]+)\s*(?:(?P<set>in|notin)\s*\((?P<values>[^)]*)\)|(?P<op>==|=|!=)\s*(?P<value>[\w./-]*))?)\s*"
)

_FIELD = re.compile(r"(?P<name>[\w./-]+)(?P<op>==|=|!=)(?P<value>.*)")
_FIELDS = {"pods": ("status.phase", "spec.nodeName"), "events": ("involvedObject.",)}
_NO_FIELDS: tuple[str, ...] = ()


def selector(labels: str, fields: str, plural: str = "") -> Selector:
    """Return whether a version of an object is wanted; 400 for what is not understood."""
    wanted_labels = [_label(part) for part in _split(labels)]
    wanted_fields = [_field(part, plural) for part in _split(fields)]

    def matches(version: Version) -> bool:
        return all(label(version.labels) for label in wanted_labels) and all(field(version) for field in wanted_fields)

    return matches


def _split(text: str) -> list[str]:
    return [part for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _label(text: str) -> Callable[[Mapping[str, str]], bool]:
    found = _REQUIREMENT.fullmatch(text)
    if not found:
        raise ApiError(400, "BadRequest", f"unable to parse requirement: {text}")
    if found["absent"]:
        return lambda labels: found["gone"] not in labels
    key = found["key"]
    if found["set"]:
        values = {value.strip() for value in found["values"].split(",")}
        return lambda labels: (labels.get(key) in values) == (found["set"] == "in")
    if found["op"]:
        return lambda labels: (labels.get(key) == found["value"]) != (found["op"] == "!=")
    return lambda labels: key in labels


def _field(text: str, plural: str) -> Selector:
    found = _FIELD.fullmatch(text)
    if not found:
        raise ApiError(400, "BadRequest", f"invalid selector: '{text}'; can't understand '{text}'")
    name, value, is_wanted = found["name"], found["value"], found["op"] != "!="
    if name not in ("metadata.name", "metadata.namespace") and not name.startswith(_FIELDS.get(plural, _NO_FIELDS)):
        raise ApiError(400, "BadRequest", f"field label not supported: {name}")
    return lambda version: (_value(version, name) == value) is is_wanted


def _value(version: Version, name: str) -> str:
    if name.startswith("metadata."):
        return version.key[name == "metadata.name"]
    return version.fields.get(name, "")
