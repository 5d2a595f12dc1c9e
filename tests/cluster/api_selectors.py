"""Field and label selectors, as list and watch take them.

Source: https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#api
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import msgspec

from tests.cluster.api_store import ApiError, Version

Selector = Callable[[Version], bool]
_REQUIREMENT = re.compile(
    r"\s*(?:(?P<absent>!)\s*(?P<gone>[\w./-]+)"
    r"|(?P<key>[\w./-]+)\s*(?:(?P<set>in|notin)\s*\((?P<values>[^)]*)\)|(?P<op>==|=|!=)\s*(?P<value>[\w./-]*))?)\s*"
)


def selector(labels: str, fields: str) -> Selector:
    """Return whether a version of an object is wanted; 400 for what is not understood."""
    wanted_labels = [_label(part) for part in _split(labels)]
    wanted_fields = [_field(part) for part in _split(fields)]

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


def _field(text: str) -> Selector:
    name, _, value = text.partition("=")
    value = value.removeprefix("=")
    if name == "metadata.name":
        return lambda version: version.key[1] == value
    if name == "metadata.namespace":
        return lambda version: version.key[0] == value
    if name.startswith("involvedObject."):  # of Events
        field = name.removeprefix("involvedObject.")
        return lambda version: msgspec.json.decode(version.bare).get("involvedObject", {}).get(field) == value
    raise ApiError(400, "BadRequest", f"field label not supported: {name}")
