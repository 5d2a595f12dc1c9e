"""`make image` takes the first builder that works, not the first that is installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import agent

SCRIPT = Path(__file__).resolve().parents[2] / ".ci/image.sh"
BUILDERS = ("docker", "podman", "buildah")
STUB = """#!/bin/sh
case $1 in
info) exit {status} ;;
*) echo "{name} $*" ;;
esac
"""


@pytest.mark.parametrize(
    ("working", "taken"),
    [
        (("docker", "podman", "buildah"), "docker"),
        (("podman", "buildah"), "podman"),
        (("buildah",), "buildah"),
        ((), ""),
    ],
    ids=["all", "no daemon of docker's", "buildah alone", "none"],
)
def test_the_first_that_works_builds(tmp_path: Path, working: tuple[str, ...], taken: str) -> None:
    for name in BUILDERS:
        (tmp_path / name).write_text(STUB.format(name=name, status=int(name not in working)), encoding="ascii")
        (tmp_path / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "IMAGE"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"

    ran = subprocess.run([SCRIPT, "--quiet"], capture_output=True, text=True, check=False, timeout=30, env=environment)

    built = f"{taken} build --tag ebproxy:{agent.__version__} --quiet .\n" if taken else ""
    assert (ran.returncode, ran.stdout) == (int(not taken), built)
    assert ("none of docker, podman and buildah" in ran.stderr) is (not taken)
