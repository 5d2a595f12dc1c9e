"""Start a real kube-apiserver and etcd, from the directory that KUBEBUILDER_ASSETS names, on loopback.

The names and the variable are those of sigs.k8s.io/controller-runtime's setup-envtest.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path

import urllib3

from tests.cluster.api_driver import ApiDriver, Refused, until

ADMIN_TOKEN = "admin-of-the-tests"
STRANGER_TOKEN = "stranger-of-the-tests"
_START_S = 60.0
_STOP_S = 15.0


def assets() -> Path | None:
    """Return the directory of the binaries, if there is one."""
    directory = Path(os.environ.get("KUBEBUILDER_ASSETS") or "/nonexistent")
    return directory if (directory / "kube-apiserver").exists() and (directory / "etcd").exists() else None


def free_port() -> int:
    """Return a port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RealApiServer:
    """etcd and kube-apiserver as child processes; `restart_empty` gives them a new, empty store."""

    token = ADMIN_TOKEN
    stranger_token = STRANGER_TOKEN

    def __init__(self, binaries: Path, directory: Path) -> None:
        self._binaries = binaries
        self._directory = directory
        self._etcd_url = f"http://127.0.0.1:{free_port()}"
        self._port = free_port()
        self._children: list[subprocess.Popen[bytes]] = []
        self._make_secrets()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"https://127.0.0.1:{self._port}"

    @property
    def ca_file(self) -> Path:
        """The certificate it signed for itself."""
        return self._directory / "certs" / "apiserver.crt"

    def start(self) -> None:
        """Start both and wait until the API server is ready."""
        self._spawn_etcd()
        self._spawn_apiserver()
        until(self._is_ready, _START_S, "kube-apiserver readiness")

    def stop(self) -> None:
        """End both, the API server first."""
        for child in reversed(self._children):
            child.terminate()
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children.clear()

    def restart_empty(self) -> None:
        """Kill both, as an outage does, and start with nothing stored."""
        for child in reversed(self._children):
            child.kill()
            child.wait()
        self._children.clear()
        shutil.rmtree(self._directory / "etcd")
        self.start()

    def compact(self) -> None:
        """Forget the past: etcd's, through its JSON gateway, and the API server's cache, by a restart of it alone."""
        revision = self._etcd("kv/range", {"key": base64.b64encode(b"x").decode()})["header"]["revision"]
        self._etcd("kv/compaction", {"revision": revision, "physical": True})
        apiserver = self._children.pop()
        apiserver.kill()
        apiserver.wait()
        self._spawn_apiserver()
        until(self._is_ready, _START_S, "kube-apiserver readiness")

    def version(self) -> str:
        """Return what the API server calls itself."""
        found = ApiDriver(self.url, self.token, self.ca_file).get("/version")
        return str(found["gitVersion"])

    def _etcd(self, call: str, body: dict[str, object]) -> dict[str, dict[str, object]]:
        request = urllib.request.Request(f"{self._etcd_url}/v3/{call}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: dict[str, dict[str, object]] = json.load(answer)
            return found

    def _is_ready(self) -> bool:
        assert all(child.poll() is None for child in self._children), self._last_words()
        if not self.ca_file.exists():
            return False
        try:
            return ApiDriver(self.url, self.token, self.ca_file).raw("/readyz") == b"ok"
        except (Refused, urllib3.exceptions.HTTPError):
            return False

    def _last_words(self) -> str:
        return "\n".join(log.read_text()[-2000:] for log in self._directory.glob("*.log"))

    def _make_secrets(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["openssl", "genrsa", "-out", str(self._directory / "sa.key"), "2048"], check=True, capture_output=True
        )
        (self._directory / "tokens.csv").write_text(
            f'{ADMIN_TOKEN},admin,admin,"system:masters"\n{STRANGER_TOKEN},stranger,stranger\n'
        )

    def _spawn(self, name: str, *arguments: str) -> None:
        with (self._directory / f"{name}.log").open("ab") as log:
            child = subprocess.Popen([self._binaries / name, *arguments], stdout=log, stderr=log)
        self._children.append(child)

    def _spawn_etcd(self) -> None:
        peer = f"http://127.0.0.1:{free_port()}"
        self._spawn(
            "etcd",
            f"--data-dir={self._directory / 'etcd'}",
            f"--listen-client-urls={self._etcd_url}",
            f"--advertise-client-urls={self._etcd_url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
        )

    def _spawn_apiserver(self) -> None:
        key = self._directory / "sa.key"
        self._spawn(
            "kube-apiserver",
            f"--etcd-servers={self._etcd_url}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self._port}",
            f"--cert-dir={self._directory / 'certs'}",
            f"--token-auth-file={self._directory / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--allow-privileged=true",  # as kubeadm and kind start it
            "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--disable-admission-plugins=ServiceAccount",
            "--endpoint-reconciler-type=none",
            "--shutdown-delay-duration=0s",
        )
