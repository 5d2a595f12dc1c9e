"""What a test may lack, and what becomes of it then: skipped with a typed reason; on CI, failed.

On CI (``EBPROXY_CI=1``) a skip means that a layer was not tested, so only what is optional may be skipped there.
"""

from __future__ import annotations

import os

import pytest

ROOT = "needs root"
KERNEL = "this kernel lacks"
# What a machine may lack without anything of ours being untested.
OPTIONAL = (
    "no real API server",  # the tests' own is held to the same contract
    "no kubectl",  # what kustomize makes of the manifests; the files themselves are tested without it
    f"{KERNEL} legacy iptables",  # it is looked for as somebody else's leftovers
)


def require_root() -> None:
    """Skip the test unless it runs as root."""
    if os.geteuid() != 0:
        pytest.skip(f"{ROOT}: it makes namespaces and cgroups, and loads BPF programs")


def fails_on_ci(reason: str) -> bool:
    """Whether a test that is skipped for this reason fails here."""
    return os.environ.get("EBPROXY_CI", "") not in ("", "0") and not reason.startswith(OPTIONAL)
