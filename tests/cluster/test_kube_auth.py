"""Credentials on the wire: TLS, client certificates, exec plugins, rotation."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.core.events import Event
from agent.sources import kube_client
from agent.sources.kube import KubeSource
from agent.sources.kube_client import HttpTimeouts, KubeClient, KubeTarget
from agent.sources.kube_credentials import Request
from agent.sources.kube_failures import ApiFailure, Cause
from agent.sources.kube_inquiry import Inquiry
from tests.cluster.api_driver import until
from tests.cluster.api_faults import Do, Fault
from tests.cluster.apiserver import ApiServer, Options
from tests.cluster.followed import QUICK

CONFIG = """
apiVersion: v1
kind: Config
current-context: test
contexts: [{{name: test, context: {{cluster: test, user: test}}}}]
clusters: [{{name: test, cluster: {cluster}}}]
users: [{{name: test, user: {user}}}]
"""


@dataclass(frozen=True)
class Authority:
    """A certificate authority of one test run."""

    directory: Path

    @property
    def certificate(self) -> Path:
        return self.directory / "ca.crt"

    def issue(self, name: str) -> tuple[Path, Path]:
        """Return certificate and key of a server on loopback, or of a client."""
        key, request, made = (self.directory / f"{name}.{end}" for end in ("key", "csr", "crt"))
        extensions = self.directory / "san.cnf"
        extensions.write_text("subjectAltName=IP:127.0.0.1\nkeyUsage=digitalSignature\n")
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        signer = ("-CA", self.certificate, "-CAkey", self.directory / "ca.key", "-CAcreateserial")
        openssl("x509", "-req", "-in", request, *signer, "-out", made, "-days", "2", "-extfile", extensions)
        return made, key


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("ca"))
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    key = made.directory / "ca.key"
    openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", made.certificate, "-days", "2",
        "-subj", "/CN=test", *usage,
    )  # fmt: skip
    return made


@pytest.fixture
def server(authority: Authority) -> Iterator[ApiServer]:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*authority.issue("server"))
    made = ApiServer(Options(tls=tls)).start()
    yield made
    made.stop()


def kubeconfig(path: Path, server: ApiServer, authority: Authority, user: dict[str, object], **cluster: object) -> Path:
    cluster = {"server": server.url, "certificate-authority": str(authority.certificate)} | cluster
    path.write_text(CONFIG.format(cluster=json.dumps(cluster), user=json.dumps(user)))
    return path


@pytest.fixture
def inquiries(monkeypatch: pytest.MonkeyPatch) -> list[Inquiry]:
    """Every run of the credentials child."""
    begun: list[Inquiry] = []

    def begin(request: Request) -> Inquiry:
        begun.append(Inquiry(request))
        return begun[-1]

    monkeypatch.setattr(kube_client, "Inquiry", begin)
    return begun


def lists(client: KubeClient) -> bool:
    client.read("/api/v1/services", (), 5)
    return True


def test_an_unknown_authority_is_not_trusted(server: ApiServer, authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path)
    other.certificate.write_bytes(authority.issue("other")[0].read_bytes())
    client = KubeClient(KubeTarget(kubeconfig(tmp_path / "kubeconfig", server, other, {"token": "x"})))
    with pytest.raises(ApiFailure) as failed:
        lists(client)

    assert failed.value.cause == Cause.CONNECT
    assert "CERTIFICATE_VERIFY_FAILED" in str(failed.value)


def test_client_certificates_are_shown(server: ApiServer, authority: Authority, tmp_path: Path) -> None:
    assert server.options.tls
    server.options.tls.load_verify_locations(authority.certificate)
    server.options.tls.verify_mode = ssl.CERT_REQUIRED
    certificate, key = authority.issue("client")
    user: dict[str, object] = {
        "client-certificate-data": base64.b64encode(certificate.read_bytes()).decode(),
        "client-key-data": base64.b64encode(key.read_bytes()).decode(),
    }

    assert lists(KubeClient(KubeTarget(kubeconfig(tmp_path / "with", server, authority, user))))
    with pytest.raises(ApiFailure):
        lists(KubeClient(KubeTarget(kubeconfig(tmp_path / "without", server, authority, {"token": "x"}))))


def test_a_rotated_token_file_is_used_by_the_same_client(
    server: ApiServer, authority: Authority, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    server.options.tokens = {"first"}
    now = [0.0]
    target = KubeTarget(kubeconfig(tmp_path / "kubeconfig", server, authority, {"tokenFile": str(token)}))
    client = KubeClient(target, HttpTimeouts(reload_s=60), clock=lambda: now[0])
    assert lists(client)
    token.write_text("second")
    server.options.tokens = {"second"}
    with pytest.raises(ApiFailure) as failed:
        lists(client)
    now[0] = 61

    assert failed.value.cause == Cause.UNAUTHORIZED
    assert lists(client)


def test_credentials_that_cannot_be_read_leave_those_in_use(
    server: ApiServer, authority: Authority, tmp_path: Path
) -> None:
    path = kubeconfig(tmp_path / "kubeconfig", server, authority, {"token": "first"})
    client = KubeClient(KubeTarget(path))
    server.options.tokens = {"first"}
    client.connect()
    path.write_text("half a ")
    client.reload()

    assert lists(client)


def test_credentials_are_read_when_a_file_changes_or_they_are_refused(
    server: ApiServer, authority: Authority, tmp_path: Path, inquiries: list[Inquiry]
) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    now = [0.0]
    target = KubeTarget(kubeconfig(tmp_path / "kubeconfig", server, authority, {"tokenFile": str(token)}))
    client = KubeClient(target, HttpTimeouts(reload_s=60), clock=lambda: now[0])
    counts = []
    for step in ("first", "soon", "later", "rotated", "later", "refused"):
        now[0] += {"first": 0, "soon": 59}.get(step, 61)
        if step == "rotated":
            token.write_text("second")
        if step == "refused":
            client.reload()
        lists(client)
        counts.append(len(inquiries))

    assert counts == [1, 1, 1, 2, 2, 3]


def test_a_refusal_that_three_watches_meet_is_looked_into_once(
    server: ApiServer, authority: Authority, tmp_path: Path, inquiries: list[Inquiry]
) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    server.options.tokens = {"first"}
    target = KubeTarget(kubeconfig(tmp_path / "kubeconfig", server, authority, {"tokenFile": str(token)}))
    client = KubeClient(target)
    client.connect()
    token.write_text("second")
    server.options.tokens = {"second"}
    refused, answered = threading.Barrier(3), []

    def request() -> None:
        with pytest.raises(ApiFailure, match="401"):
            lists(client)
        refused.wait(10)
        client.reload()
        answered.append(lists(client))

    threads = [threading.Thread(target=request) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert answered == [True] * 3
    assert len(inquiries) == 2


def test_a_server_may_go_by_another_name(server: ApiServer, authority: Authority, tmp_path: Path) -> None:
    wrong = kubeconfig(tmp_path / "wrong", server, authority, {"token": "x"}, **{"tls-server-name": "other.example"})
    right = kubeconfig(tmp_path / "right", server, authority, {"token": "x"}, **{"tls-server-name": "127.0.0.1"})
    with pytest.raises(ApiFailure, match=r"other\.example"):
        lists(KubeClient(KubeTarget(wrong)))

    assert lists(KubeClient(KubeTarget(right)))


def test_a_server_need_not_be_verified(server: ApiServer, authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path)
    other.certificate.write_bytes(authority.issue("other")[0].read_bytes())
    path = kubeconfig(tmp_path / "kubeconfig", server, other, {"token": "x"}, **{"insecure-skip-tls-verify": True})

    assert lists(KubeClient(KubeTarget(path)))


def exec_plugin(directory: Path) -> dict[str, object]:
    """A user whose plugin gives what is in the file `token`; where that says "hang", it does."""
    plugin = directory / "plugin.py"
    plugin.write_text(
        "import json, pathlib, time\n"
        f"token = pathlib.Path({str(directory / 'token')!r}).read_text()\n"
        "if token == 'hang':\n"
        f"    pathlib.Path({str(directory / 'hangs')!r}).touch()\n"
        "    time.sleep(60)\n"
        "print(json.dumps({'apiVersion': 'client.authentication.k8s.io/v1', 'kind': 'ExecCredential', "
        "'status': {'token': token}}))\n"
    )
    command = {"command": sys.executable, "args": [str(plugin)], "interactiveMode": "Never"}
    return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", **command}}


def test_an_exec_plugin_is_asked_again_when_its_token_is_refused(
    server: ApiServer, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("first")
    path = kubeconfig(tmp_path / "kubeconfig", server, authority, exec_plugin(tmp_path))
    server.options.tokens = {"first"}
    client = KubeClient(KubeTarget(path))
    assert lists(client)
    (tmp_path / "token").write_text("second")
    server.options.tokens = {"second"}
    events: list[Event] = []
    source = KubeSource(client, "n1", events.append, tuning=QUICK)
    source.start()
    try:
        until(lambda: source.is_synced)
    finally:
        source.stop()


def test_stop_does_not_wait_for_an_exec_plugin_that_hangs(
    server: ApiServer, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("first")
    client = KubeClient(KubeTarget(kubeconfig(tmp_path / "kubeconfig", server, authority, exec_plugin(tmp_path))))
    source = KubeSource(client, "n1", lambda _: None, tuning=QUICK)
    client.connect()
    (tmp_path / "token").write_text("hang")
    server.options.tokens = {"second"}
    source.start()
    until((tmp_path / "hangs").exists)
    started_at = time.monotonic()
    source.stop()

    assert time.monotonic() - started_at < 1
    assert not any(thread.is_alive() for thread in source._threads)


@pytest.mark.parametrize("do", [Do.NO_ANSWER, Do.SILENT])
def test_stop_ends_blocked_reads_over_tls(server: ApiServer, authority: Authority, tmp_path: Path, do: Do) -> None:
    fault = server.faults.add(Fault(do, times=-1))
    target = KubeTarget(kubeconfig(tmp_path / "kubeconfig", server, authority, {"token": "x"}))
    source = KubeSource(KubeClient(target), "n1", lambda _: None)
    source.start()
    until(lambda: fault.hits >= 3)
    started_at = time.monotonic()
    source.stop()

    assert time.monotonic() - started_at < 1
    assert not any(thread.is_alive() for thread in source._threads)
