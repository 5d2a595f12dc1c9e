"""docs/operations.md has every field, flag, default, metric and alert there is, and none that is not."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import agent
from agent.cli.flags import FLAGS
from agent.config import describe, load
from agent.config_fields import FIELDS
from agent.config_sizes import PER_CPU
from agent.core.abi import Counter, Reason
from tests.unit.test_manifests_yaml import MANIFESTS, metric_families

TEXT = (Path(__file__).resolve().parents[2] / "docs/operations.md").read_text(encoding="utf-8")
_CODE = re.compile(r"`([^`]+)`")
# Said in the sentence below the table: they stand for syncPeriod and masqueradeAll.
IN_PROSE = {f"{mode}.syncPeriod" for mode in ("iptables", "ipvs", "nftables")}
IN_PROSE |= {"iptables.masqueradeAll", "nftables.masqueradeAll"}


def table(heading: str) -> list[list[str]]:
    """Read the rows of the first table under a heading, without its head."""
    section = TEXT.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), section.splitlines())
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


CONFIGURATION = {row[0].strip("| `"): row for row in table("Configuration")}


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        name: value
        for key, item in nested.items()
        for name, value in (
            flat(item, f"{prefix}{key}.").items() if isinstance(item, dict) else [(f"{prefix}{key}", item)]
        )
    }


def test_every_field_with_an_effect_is_there() -> None:
    assert set(CONFIGURATION) == {path for path, field in FIELDS.items() if field.is_applied} - IN_PROSE
    assert all(f"`{name}`" in TEXT for name in IN_PROSE)


def test_every_flag_is_at_its_field() -> None:
    said = {path: tuple(_CODE.findall(row[1])) for path, row in CONFIGURATION.items() if row[1]}

    assert said == {flag.field: flag.names for flag in FLAGS if flag.help and flag.field not in IN_PROSE}
    assert all(f"`{flag.names[0]}`" in TEXT for flag in FLAGS if flag.field in IN_PROSE)


def defaults(**fields: str) -> dict[str, Any]:
    return flat(describe(load(overrides=fields, environment={"NODE_NAME": "node-7"}, cpus=1)))


# Sizes of policy's maps are only told where there is policy.
DEFAULTS = defaults(networkPolicy="standard") | defaults()
# Others are told in words: "found", "in-cluster".
LITERAL = {path: said[1] for path, row in CONFIGURATION.items() if (said := _CODE.fullmatch(row[2]))}


@pytest.mark.parametrize("path", sorted(LITERAL.keys() & DEFAULTS.keys()))
def test_default_is_the_codes(path: str) -> None:
    assert DEFAULTS[path] in (LITERAL[path], yaml.safe_load(LITERAL[path]))


def test_sizes_that_follow_the_cpus_say_how() -> None:
    said = {path: re.findall(r"(\d+) a CPU", row[3]) for path, row in CONFIGURATION.items()}

    assert {path: each for path, each in said.items() if each} == {path: [str(n)] for path, n in PER_CPU.items()}


def test_defaults_in_words_are_those_without_a_value() -> None:
    assert {path for path in DEFAULTS if path not in LITERAL} == {
        path for path, default in DEFAULTS.items() if default in (None, "") or path == "nodeName"
    }


def test_every_metric_is_there() -> None:
    assert {name for row in table("Metrics") for name in _CODE.findall(row[0])} == metric_families()


def test_every_event_of_the_dataplane_is_there() -> None:
    said = TEXT.split("| `event` | counts |\n", 1)[1].split("\n\n", 1)[0]

    assert set(re.findall(r"^\| `(\w+)` \|", said, re.MULTILINE)) == {count.name.lower() for count in Counter}


def test_every_reason_of_an_event_is_there() -> None:
    sources = (Path(agent.__file__).parent / name for name in ("app.py", "sources/kube_events.py"))
    warned = {reason for source in sources for reason in re.findall(r'warn\(\w+, "(\w+)"', source.read_text("utf-8"))}

    assert warned
    assert {row[0].strip("`") for row in table("Events")} == warned


def test_every_alert_is_there() -> None:
    (rule,) = yaml.safe_load_all((MANIFESTS / "components/monitoring/alerts.yaml").read_text(encoding="utf-8"))
    alerts = {alert["alert"] for group in rule["spec"]["groups"] for alert in group["rules"]}

    assert {name for row in table("Alerts") for name in _CODE.findall(row[0])} == alerts


def test_every_reason_of_a_verdict_is_there() -> None:
    said = TEXT.split("| `reason` of a verdict | |\n", 1)[1].split("\n\n", 1)[0]

    assert re.findall(r"^\| `(\w+)` \|", said, re.MULTILINE) == [reason.name.lower() for reason in Reason]
