"""The image, built once; a node of the lab with two pods that serve; and its agent, from the image."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.images import Builder, Image, missing_tools
from tests.image.pods import PodAgent
from tests.lab import manifests
from tests.lab.lab import Lab, Node
from tests.lab.leftovers import find
from tests.lab.manifests import Manifests
from tests.requirements import require_root

SERVICE = ("10.96.0.10", "fd00:10:96::10")
EMPTY = "10.96.0.11"


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    require_root()
    if missing := missing_tools():
        pytest.skip(f"the image layer needs {', '.join(missing)}")
    builder = Builder(tmp_path_factory.mktemp("image"))
    try:
        builder.make_base()
        builder.build()
        with builder.unpacked() as built:
            yield built
    finally:
        builder.close()


@pytest.fixture
def node() -> Iterator[Node]:
    with Lab() as lab:
        (node,) = lab.nodes
        bpffs = node.directory / "bpf"
        bpffs.mkdir()
        mount_bpffs(bpffs)
        node.add_pod("one", 8080)
        node.add_pod("two", 8080)
        yield node
    assert find(lab.directory) == []


def mount_bpffs(directory: Path) -> None:
    """Do what systemd does on a node."""
    subprocess.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", directory], check=True, timeout=10)


@pytest.fixture
def objects(node: Node) -> Manifests:
    directory = Manifests(node.directory / "manifests")
    pods = node.pods.values()
    directory.write("node", node.manifest())
    directory.write(
        "web",
        manifests.service("web", SERVICE),
        manifests.endpoint_slice("web", [pod.endpoint() for pod in pods]),
        manifests.endpoint_slice("web", [pod.endpoint(6) for pod in pods], ipv6=True),
    )
    directory.write("empty", manifests.service("empty", [EMPTY]))
    return directory


@pytest.fixture
def agent(image: Image, node: Node, objects: Manifests) -> Iterator[PodAgent]:
    with PodAgent(image, node, objects) as agent:
        yield agent


@pytest.fixture
def policed(image: Image, node: Node, objects: Manifests) -> Iterator[PodAgent]:
    """An agent that enforces policy, and knows the node's pods."""
    pods = (manifests.pod(name, node.name, pod.addresses, name) for name, pod in node.pods.items())
    objects.write("pods", manifests.namespace(), *pods)
    with PodAgent(image, node, objects, flags=("--network-policy=standard",)) as agent:
        yield agent
