"""The documents lead to what is there: links, the list of decisions, the goals that the bench measures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.bench.run import GOALS

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
DOCUMENTS = sorted([REPOSITORY / "README.md", *DOCS.rglob("*.md")])
_LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = _HEADING.findall(path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(path: Path) -> None:
    links = _LINK.findall(path.read_text(encoding="utf-8"))
    targets = [((path.parent / file) if file else path, anchor) for file, anchor in links]

    assert [target for target, _ in targets if not target.exists()] == []
    assert [(target, anchor) for target, anchor in targets if anchor and anchor not in anchors(target)] == []


def test_every_decision_is_listed_by_its_title() -> None:
    listed = re.findall(
        r"^\| \[(\d+)\]\(([^)]+)\) \| (.+) \|$", (DOCS / "decisions/README.md").read_text("utf-8"), re.MULTILINE
    )
    titles = {
        path.name: path.read_text(encoding="utf-8").partition("\n")[0]
        for path in (DOCS / "decisions").glob("[0-9]*.md")
    }

    assert {file: f"# {number}: {title}" for number, file, title in listed} == titles


def test_the_example_has_the_node_that_it_is_run_as() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    texts = [path.read_text(encoding="utf-8") for path in (DOCS / "example").glob("*.yaml")]
    objects = [item for text in texts for item in yaml.safe_load_all(text)]
    (node,) = (item["metadata"]["name"] for item in objects if item["kind"] == "Node")

    assert f"ebproxy run --manifests docs/example --node-name {node} " in readme
    assert all(kind in readme for kind in {item["kind"] for item in objects})


def test_every_goal_that_is_measured_is_there() -> None:
    said = re.findall(r"^\| (G\d+) \|", (DOCS / "goals.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert set(said) == GOALS
    assert len(said) == len(set(said))
