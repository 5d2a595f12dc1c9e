"""The documents lead to what is there: links, the list of decisions, the goals that the bench measures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.core.abi import Direction, Reason
from agent.core.selectors import IdentityName
from agent.observe.flows import End, Flow, flow_document
from agent.observe.policy_text import identity_document
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


@pytest.mark.parametrize(
    ("example", "document"), [("example", "README.md"), ("example-policy", "docs/policy.md")], ids=["README", "policy"]
)
def test_the_example_has_the_node_that_it_is_run_as(example: str, document: str) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    objects = objects_of(example)
    (node,) = (item["metadata"]["name"] for item in objects if item["kind"] == "Node")
    pods = [item for item in objects if item["kind"] == "Pod"]

    assert f"ebproxy run --manifests docs/{example} --node-name {node} " in text
    assert all(kind in text for kind in {item["kind"] for item in objects})
    assert {pod["spec"]["nodeName"] for pod in pods} <= {node}


def test_the_pods_of_the_example_are_those_that_are_made() -> None:
    text = (DOCS / "policy.md").read_text(encoding="utf-8")
    pods = [item for item in objects_of("example-policy") if item["kind"] == "Pod"]
    addresses = [pod["status"]["podIPs"][0]["ip"] for pod in pods]

    assert f"for pod in {' '.join(pod['metadata']['name'] for pod in pods)}; do" in text
    assert addresses == [f"10.244.0.{number}" for number in range(2, 2 + len(pods))]


def test_what_is_pasted_behind_a_new_shell_is_a_block_of_its_own() -> None:
    """What is behind it in one block waits in the first shell; a login shell forgets the PATH."""
    section = (DOCS / "policy.md").read_text(encoding="utf-8").split("## ")[1]
    blocks = re.findall(r"^```sh\n(.+?)^```$", section, re.MULTILINE | re.DOTALL)
    shells = [block for block in blocks if "unshare" in block]

    assert [re.sub(" +#.*", "", block.splitlines()[-1]).endswith(" unshare --net bash") for block in shells] == [True]
    assert blocks[blocks.index(shells[0]) + 1].startswith("PATH=$PWD/.venv/bin:$PATH\n")


FLOW = Flow(0, End(bytes(16), 1), End(bytes(16), 2), 6, 0, Direction.INGRESS, is_allowed=False, reason=Reason.POLICY)


def test_every_field_of_a_flow_is_there() -> None:
    text = (DOCS / "policy.md").read_text(encoding="utf-8")
    said = {head: fields(text, f"| {head} | |\n") for head in ("of a flow", "of an end")}
    told = flow_document(FLOW)
    of_identity = identity_document(IdentityName())

    assert said == {"of a flow": set(told), "of an end": set(told["source"])}
    assert all(f"`{name}`" in text for name in of_identity)


def fields(text: str, head: str) -> set[str]:
    """The names in the first column of the table with a head."""
    table = text.split(head, 1)[1].split("\n\n", 1)[0]
    return {name for row in table.splitlines()[1:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def objects_of(example: str) -> list[dict[str, Any]]:
    texts = [path.read_text(encoding="utf-8") for path in sorted((DOCS / example).glob("*.yaml"))]
    return [item for text in texts for item in yaml.safe_load_all(text)]


def test_every_goal_that_is_measured_is_there() -> None:
    said = re.findall(r"^\| (G\d+) \|", (DOCS / "goals.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert set(said) == GOALS
    assert len(said) == len(set(said))
