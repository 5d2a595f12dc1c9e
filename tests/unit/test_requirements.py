"""On CI a skipped test fails, unless what it lacks is optional."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ("pytester",)

_TESTS = """
import pytest
from agent.errors import UnsupportedKernel

def test_root():
    pytest.skip("needs root: for namespaces")

def test_kernel():
    raise UnsupportedKernel("cgroup links", "run a newer one")

def test_optional():
    pytest.skip("no real API server: KUBEBUILDER_ASSETS is not set")

def test_passing():
    pass

@pytest.mark.skipif(True, reason="needs root too")
def test_marked():
    pass
"""


@pytest.mark.parametrize(
    ("on_ci", "expected"),
    [
        ("", {"passed": 1, "skipped": 4}),
        ("0", {"passed": 1, "skipped": 4}),
        ("1", {"passed": 1, "skipped": 1, "failed": 3}),
    ],
    ids=["unset", "0", "1"],
)
def test_skips(pytester, monkeypatch, on_ci, expected):
    repository = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("EBPROXY_CI", on_ci)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest((repository / "tests/conftest.py").read_text())
    pytester.makepyfile(_TESTS)

    outcomes = pytester.runpytest_subprocess().parseoutcomes()

    # a marked skip has no phase of its own to fail in: it fails as an error of its setup
    assert expected == {"passed": outcomes["passed"], "skipped": outcomes["skipped"]} | (
        {"failed": outcomes.get("failed", 0) + outcomes.get("errors", 0)} if on_ci == "1" else {}
    )
