"""Credentials without a server: what the child reads, when it is asked again, and that it leaves nothing behind."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import urllib3

from agent.errors import ConfigError
from agent.sources import kube_credentials
from agent.sources.kube_client import HttpTimeouts, KubeClient, KubeTarget
from agent.sources.kube_credentials import Credentials
from agent.sources.kube_inquiry import Inquiry, is_outdated
from agent.sources.kube_pools import open_pools
from agent.sources.kube_sockets import OpenSockets
from tests.lab.polling import until

ROOT = Path(__file__).resolve().parents[2]
SERVER = "http://api.example:8080"
PLUGIN = """
import json, os, pathlib, sys
{body}
print(json.dumps({{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}}))
"""
PLAIN = Credentials(
    host="https://192.0.2.1:6443",
    authorization="Bearer x",
    authority=None,
    is_verified=True,
    server_name=None,
    certificate=None,
    key=None,
    proxy=None,
    files={},
    is_dynamic=False,
    expires_at=None,
)


def write_kubeconfig(path: Path, user: dict[str, Any], **cluster: Any) -> Path:
    config = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": SERVER} | cluster}],
        "users": [{"name": "u", "user": user}],
    }
    path.write_text(json.dumps(config))
    return path


def plugin(directory: Path, body: str) -> dict[str, Any]:
    """An exec plugin whose ``body`` makes ``status``; it notes its process id before."""
    script = directory / "plugin.py"
    note = f"pathlib.Path({str(directory / 'pid')!r}).write_text(str(os.getpid()))\n"
    script.write_text(PLUGIN.format(body=note + body))
    return {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": [str(script)],
            "interactiveMode": "IfAvailable",
        }
    }


HANGS = "import time\ntime.sleep(60)"


def read(target: KubeTarget, limit_s: float = 30) -> Credentials:
    return Inquiry(target.request(), limit_s).answer()


@pytest.fixture
def service_account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("first")
    (tmp_path / "ca.crt").write_text("certificate")
    return tmp_path


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("first\n")
    return write_kubeconfig(tmp_path / "kubeconfig", {"tokenFile": "token"})


# What is read


def test_kubeconfig_names_the_server_and_the_token(kubeconfig: Path) -> None:
    credentials = read(KubeTarget(kubeconfig))

    assert (credentials.host, credentials.authorization) == (SERVER, "Bearer first")
    assert set(credentials.files) == {str(kubeconfig), str(kubeconfig.parent / "token")}
    assert not credentials.is_dynamic


def test_a_relative_path_is_relative_to_the_agent(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kubeconfig.parent)

    assert read(KubeTarget(Path("kubeconfig"))).authorization == "Bearer first"


def test_a_password_is_basic_authentication(tmp_path: Path) -> None:
    path = write_kubeconfig(tmp_path / "kubeconfig", {"username": "a", "password": "b"})

    assert read(KubeTarget(path)).authorization == "Basic " + base64.b64encode(b"a:b").decode()


@pytest.mark.parametrize("is_inline", [True, False], ids=["inline", "files"])
def test_certificates_are_answered_as_content(tmp_path: Path, is_inline: bool) -> None:
    fields = {"certificate-authority": b"authority", "client-certificate": b"certificate", "client-key": b"key"}
    for name, content in fields.items():
        (tmp_path / name).write_bytes(content)
    written = {
        f"{name}-data" if is_inline else name: base64.b64encode(content).decode() if is_inline else name
        for name, content in fields.items()
    }
    authority = {key: written.pop(key) for key in list(written) if key.startswith("certificate-authority")}
    path = write_kubeconfig(tmp_path / "kubeconfig", written, server="https://[::1]:1", **authority)
    credentials = read(KubeTarget(path))

    assert (credentials.authority, credentials.certificate, credentials.key) == tuple(fields.values())
    assert set(credentials.files) == {str(path), *(() if is_inline else (str(tmp_path / name) for name in fields))}


def test_the_service_account_is_used_without_a_kubeconfig(
    service_account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    credentials = read(KubeTarget(service_account_dir=service_account))

    assert (credentials.host, credentials.authorization) == ("https://[fd00::1]:443", "bearer first")
    assert credentials.authority == b"certificate"
    assert set(credentials.files) == {str(service_account / "token"), str(service_account / "ca.crt")}


@pytest.mark.parametrize("has_variables", [True, False])
def test_an_explicit_address_wins_over_the_pods(
    service_account: Path, monkeypatch: pytest.MonkeyPatch, has_variables: bool
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_PORT", raising=False)
    if has_variables:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    credentials = read(KubeTarget(api_server="https://192.0.2.1:6443/", service_account_dir=service_account))

    assert (credentials.host, credentials.authorization) == ("https://192.0.2.1:6443", "bearer first")


def test_an_explicit_address_wins_over_the_kubeconfigs(kubeconfig: Path) -> None:
    assert read(KubeTarget(kubeconfig, "https://192.0.2.1:6443")).host == "https://192.0.2.1:6443"


@pytest.mark.parametrize(
    ("cluster", "environment", "wanted"),
    [
        ({"proxy-url": "http://p:1"}, {}, "http://p:1"),
        ({}, {"http_proxy": "http://e:1"}, "http://e:1"),
        ({}, {"https_proxy": "http://e:1"}, None),
        ({}, {"http_proxy": "http://e:1", "no_proxy": "other,.example"}, None),
    ],
    ids=["kubeconfig", "environment", "other-scheme", "excepted"],
)
def test_proxies(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cluster: dict[str, str],
    environment: dict[str, str],
    wanted: str | None,
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert read(KubeTarget(write_kubeconfig(tmp_path / "kubeconfig", {"token": "x"}, **cluster))).proxy == wanted


# What cannot be read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no such file"),
        ("", ""),
        ("[", ""),
        ("kind: Config", ""),
        ("current-context: x\ncontexts: []\nclusters: []\nusers: []", ""),
        ("half a ", ""),
    ],
    ids=["absent", "empty", "not-yaml", "no-context", "wrong-context", "a-word"],
)
def test_an_unusable_kubeconfig_is_a_configuration_error(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as failed:
        KubeClient(KubeTarget(path)).connect()

    assert f"kubeconfig {path}: {words}" in str(failed.value)


def test_a_token_file_that_is_missing_is_named(kubeconfig: Path) -> None:
    (kubeconfig.parent / "token").unlink()
    with pytest.raises(ConfigError) as failed:
        read(KubeTarget(kubeconfig))

    assert str(kubeconfig) in str(failed.value)
    assert str(kubeconfig.parent / "token") in str(failed.value)


def test_outside_a_pod_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match=r"in-cluster.*give --manifests DIR, --kubeconfig FILE or --api-server URL"):
        read(KubeTarget(service_account_dir=tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"authority": b"nonsense"}, "certificate authority: "),
        ({"certificate": b"nonsense"}, "client certificate: "),
        ({"proxy": "socks5://192.0.2.1:1"}, "socks5"),
    ],
    ids=["authority", "certificate", "proxy"],
)
def test_credentials_of_no_use_are_a_configuration_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"192.0.2.1:6443: .*{message}"):
        open_pools(msgspec.structs.replace(PLAIN, **changes), [], OpenSockets())


def open_files() -> set[str]:
    return {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}


def test_an_encrypted_key_is_refused_rather_than_asked_about(tmp_path: Path) -> None:
    made = tmp_path / "crt", tmp_path / "key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-subj", "/CN=x", "-passout", "pass:secret"]
    subprocess.run([*command, "-out", made[0], "-keyout", made[1]], check=True, capture_output=True)
    certificate, key = (path.read_bytes() for path in made)
    before = open_files()
    with pytest.raises(ConfigError, match="encrypted"):
        open_pools(msgspec.structs.replace(PLAIN, certificate=certificate, key=key), [], OpenSockets())

    assert open_files() == before


def test_proxies_are_used() -> None:
    pools = open_pools(
        msgspec.structs.replace(PLAIN, proxy="https://192.0.2.1:1"), HttpTimeouts().socket_options(), OpenSockets()
    )

    assert isinstance(pools, urllib3.ProxyManager)


# When to read again


def replace_by_link(token: Path) -> None:
    """As the kubelet rotates what it projects: by another target of a link."""
    (token.parent / "new").write_text("first\n")
    (token.parent / "link").symlink_to("new")
    (token.parent / "link").rename(token)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda _: None, False),
        (lambda token: token.read_text(), False),
        (lambda token: token.write_text("other\n"), True),
        (replace_by_link, True),
        (lambda token: token.unlink(), True),
    ],
    ids=["nothing", "read", "rewritten", "linked", "deleted"],
)
def test_files_tell_whether_to_read_again(kubeconfig: Path, change: Callable[[Path], None], wanted: bool) -> None:
    credentials = read(KubeTarget(kubeconfig))
    change(kubeconfig.parent / "token")

    assert is_outdated(credentials) is wanted


@pytest.mark.parametrize(
    ("in_s", "wanted"), [(None, True), (-1, True), (200, True), (400, False)], ids=["unknown", "past", "soon", "late"]
)
def test_what_a_plugin_made_is_read_again_before_it_expires(in_s: float | None, wanted: bool) -> None:
    expires_at = None if in_s is None else time.time() + in_s

    assert is_outdated(msgspec.structs.replace(PLAIN, is_dynamic=True, expires_at=expires_at)) is wanted


# Plugins


def test_a_plugin_gives_a_token_and_its_expiry(tmp_path: Path) -> None:
    user = plugin(tmp_path, 'status = {"token": "t", "expirationTimestamp": "2040-01-01T00:00:00Z"}')
    credentials = read(KubeTarget(write_kubeconfig(tmp_path / "kubeconfig", user)))

    assert credentials.authorization == "Bearer t"
    assert (credentials.is_dynamic, credentials.expires_at) == (True, 2208988800)


def test_a_plugin_gives_certificates(tmp_path: Path) -> None:
    user = plugin(tmp_path, 'status = {"clientCertificateData": "c", "clientKeyData": "k"}')
    credentials = read(KubeTarget(write_kubeconfig(tmp_path / "kubeconfig", user, server="https://[::1]:1")))

    assert (credentials.authorization, credentials.certificate, credentials.key) == (None, b"c", b"k")


def test_a_plugin_that_fails_has_its_words_passed_on(tmp_path: Path) -> None:
    path = write_kubeconfig(tmp_path / "kubeconfig", plugin(tmp_path, 'sys.exit("log in first")'))
    with pytest.raises(ConfigError, match=r"kubeconfig: .*log in first.*no credentials"):
        read(KubeTarget(path))


def test_a_plugin_finds_nobody_to_ask(tmp_path: Path) -> None:
    body = """
found = sys.stdin.read()
try:
    open("/dev/tty")
    found += "a terminal"
except OSError:
    pass
interactive = json.loads(os.environ["KUBERNETES_EXEC_INFO"])["spec"]["interactive"]
status = {"token": f"{found}-{interactive}"}
"""
    path = write_kubeconfig(tmp_path / "kubeconfig", plugin(tmp_path, body))

    assert read(KubeTarget(path)).authorization == "Bearer -False"


def plugin_pid(directory: Path) -> int:
    """Wait for the plugin, and return its process id."""
    return int(until(lambda: (directory / "pid").exists() and (directory / "pid").read_text(), "the plugin runs", 20))


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_plugin_that_hangs_is_ended(tmp_path: Path) -> None:
    path = write_kubeconfig(tmp_path / "kubeconfig", plugin(tmp_path, HANGS))
    inquiry = Inquiry(KubeTarget(path).request(), limit_s=2)
    with pytest.raises(ConfigError, match="longer than 2 s"):
        inquiry.answer()

    until(lambda: is_gone(plugin_pid(tmp_path)), "the plugin ends", 5)


def test_closing_the_client_ends_a_plugin(tmp_path: Path) -> None:
    client = KubeClient(KubeTarget(write_kubeconfig(tmp_path / "kubeconfig", plugin(tmp_path, HANGS))))
    failures: list[str] = []

    def connect() -> None:
        with pytest.raises(ConfigError) as failed:
            client.connect()
        failures.append(str(failed.value))

    waiting = threading.Thread(target=connect)
    waiting.start()
    pid = plugin_pid(tmp_path)
    client.close()
    waiting.join(5)

    assert failures
    until(lambda: is_gone(pid), "the plugin ends", 5)


def test_child_and_plugin_end_with_the_agent(tmp_path: Path) -> None:
    path = write_kubeconfig(tmp_path / "kubeconfig", plugin(tmp_path, HANGS))
    code = (
        "import sys; from pathlib import Path; from agent.sources.kube_client import KubeClient, KubeTarget;"
        "KubeClient(KubeTarget(Path(sys.argv[1]))).connect()"
    )
    agent = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
    try:
        pid = plugin_pid(tmp_path)
    finally:
        agent.kill()
        agent.wait()

    until(lambda: is_gone(pid), "the plugin ends", 5)


# The child


def test_nobody_but_the_agent_is_served(kubeconfig: Path) -> None:
    request = msgspec.structs.replace(KubeTarget(kubeconfig).request(), agent_pid=1)
    answer = subprocess.run(
        [sys.executable, "-m", kube_credentials.__name__],
        check=False,
        input=msgspec.json.encode(request),
        capture_output=True,
        cwd=ROOT,
        start_new_session=True,
    )

    assert (answer.returncode, answer.stdout) == (1, b"")


def test_the_agent_does_not_import_the_package() -> None:
    code = (
        "import sys, agent.app, agent.cli.run, agent.sources.kube, agent.sources.kube_events;"
        "print(*{'kubernetes', 'pydantic', 'requests', 'oauthlib', 'bcc'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)

    assert found.stdout.strip() == ""
