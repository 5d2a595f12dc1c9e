"""Fixtures of the netns layer: one node with real pods and a running agent."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.lab.scene import Scene
from tests.requirements import require_root

_serial = itertools.count()


@pytest.fixture(scope="session")
def scene() -> Iterator[Scene]:
    """One node that the session's tests share, each with Services of its own."""
    require_root()
    with Scene() as shared:
        yield shared


@pytest.fixture
def make_scene() -> Iterator[Callable[..., Scene]]:
    """Make nodes whose agents are configured as a test asks; each settles before it is handed out."""
    require_root()
    with ExitStack() as stack:

        def make(**config: Any) -> Scene:
            return stack.enter_context(Scene(**config))

        yield make


@pytest.fixture
def name() -> str:
    """A Service's name that no other test uses."""
    return f"svc-{next(_serial)}"
