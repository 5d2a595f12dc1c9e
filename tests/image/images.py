"""Build the image with Debian's buildah, on a base made with debootstrap: no registry and no container engine.

Everything is kept in one directory; the builds share nothing with the machine's own images.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.processes import REPOSITORY

TOOLS = {"buildah": "buildah", "debootstrap": "debootstrap", "crun": "crun", "kubectl": "kubectl"}
"""The commands this layer needs, and the packages that have them."""
BASE_VARIABLE = "EBPROXY_IMAGE_BASE"
"""Names a directory with a Debian 13 that is there already; else one is made for each run."""
_BASE = "localhost/ebproxy-base"
_TAG = "localhost/ebproxy:test"
_LIMIT_S = 1200


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: its unpacked root file system, and what it says of itself."""

    root: Path
    config: dict[str, Any]

    @property
    def command(self) -> list[str]:
        """The entry point, which a DaemonSet's ``args`` follow."""
        return list(self.config["Entrypoint"])

    def size(self) -> int:
        """The bytes of its files, each counted once."""
        said = subprocess.run(["du", "-sxB1", self.root], capture_output=True, text=True, check=True, timeout=60)
        return int(said.stdout.split()[0])


def missing_tools() -> list[str]:
    """Name what this layer needs and the machine lacks: command and package."""
    return [f"{tool} (package {package})" for tool, package in TOOLS.items() if not shutil.which(tool)]


class Builder:
    """buildah with storage of its own below ``directory``; vfs works where overlay does not."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        storage = directory / "storage"
        self._buildah = ("buildah", "--root", str(storage), "--runroot", str(directory / "run"), "--storage-driver=vfs")

    def run(self, *arguments: str | Path) -> str:
        """Run a buildah command and return what it printed. Raises: RuntimeError with its last words."""
        return _run(*self._buildah, *arguments)

    def make_base(self) -> None:
        """Make the base image: debootstrap's, or the one that BASE_VARIABLE names."""
        root = Path(os.environ.get(BASE_VARIABLE) or self._directory / "base")
        if not root.exists():
            _run("debootstrap", "--variant=minbase", "trixie", root, *_mirror())
            shutil.rmtree(root / "var/cache/apt/archives")
        container = self.run("from", "scratch").strip()
        self.run("add", "--quiet", container, root, "/")
        self.run("commit", "--quiet", "--rm", container, _BASE)

    def build(self) -> None:
        """Build the Dockerfile as it is, on that base."""
        self.run(
            *("build", "--isolation=chroot", f"--build-arg=BASE_IMAGE={_BASE}", f"--tag={_TAG}"),
            *self._pip_secrets(),
            REPOSITORY,
        )

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[Image]:
        """Mount the image's files."""
        container = self.run("from", _TAG).strip()
        try:
            config = json.loads(self.run("inspect", "--type=image", _TAG))["OCIv1"]["config"]
            yield Image(Path(self.run("mount", container).strip()), config)
        finally:
            self.run("rm", container)

    def close(self) -> None:
        """Remove everything: containers and images first, which may be mounted."""
        self.run("rm", "--all")
        self.run("rmi", "--all", "--force")
        shutil.rmtree(self._directory)

    def _pip_secrets(self) -> list[str]:
        """Hand on how this machine's pip reaches its index: build secrets, of which nothing stays in the image."""
        settings = {"cert": "/run/secrets/pip.ca"} if _pip("cert") else {}
        settings |= {key: value for key in ("index-url", "proxy", "timeout") if (value := _pip(key))}
        file = self._directory / "pip.conf"
        file.write_text("\n".join(["[global]", *(f"{key} = {value}" for key, value in settings.items()), ""]))
        secrets = [f"--secret=id=pip.conf,src={file}"]
        return secrets + ([f"--secret=id=pip.ca,src={_pip('cert')}"] if "cert" in settings else [])


def _pip(setting: str) -> str:
    """Read one of pip's settings here: the environment wins over the files. "" = not set."""
    variable = os.environ.get(f"PIP_{setting.upper().replace('-', '_')}")
    if variable is not None:
        return variable
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{setting}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.strip()


def _mirror() -> list[str]:
    """The Debian mirror this machine's apt uses; [] where it uses none, for debootstrap's own."""
    fields = "$(ORIGIN) $(REPO_URI)"
    lines = _run("apt-get", "indextargets", "--format", fields, "Created-By: Packages").splitlines()
    found = [line.split()[1] for line in lines if line.startswith("Debian ") and "security" not in line]
    return found[:1]


def _run(*command: str | Path) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    if ran.returncode:
        last = "\n".join((ran.stdout + ran.stderr).splitlines()[-20:])
        raise RuntimeError(f"{' '.join(map(str, command))}: exit status {ran.returncode}\n{last}")
    return ran.stdout
