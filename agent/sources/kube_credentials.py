"""The credentials child: read a kubeconfig or a service account with the `kubernetes` package, answer, and exit.

Runs as a child (``python -m agent.sources.kube_credentials``) because that package and what it imports hold 17 to
31 MiB for as long as the agent lives, for work of a moment. It is the only importer of ``kubernetes``.

Standard input carries one ``Request`` as JSON, standard output one ``Credentials``. Exit status 1 with the reason on
standard error where there are none; what is there with exit status 0 are warnings.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

_PR_SET_PDEATHSIG = 1
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - so that inline keys, which the package puts into files, see no disk

Fingerprint = tuple[int, int, int]
"""Of a file: st_mtime_ns, st_ino, st_size."""


class Request(msgspec.Struct, frozen=True):
    """Whose credentials are wanted.

    ``kubeconfig``: absolute paths, several with a colon between them; None = the service account. ``agent_pid`` is
    who asks: nobody else is served.
    """

    kubeconfig: str | None
    api_server: str | None
    service_account_dir: str
    agent_pid: int

    @property
    def origin(self) -> str:
        """Name for messages where credentials come from."""
        return f"kubeconfig {self.kubeconfig}" if self.kubeconfig else "in-cluster configuration"


class Credentials(msgspec.Struct, frozen=True):
    """Where the API server is, and how to be known to it; certificates and keys are contents of PEM files.

    ``files``: what was read, with fingerprints from just before; None = absent. ``is_dynamic``: a plugin or provider
    made them, so files do not tell of new ones. ``expires_at``: Unix time; None = it is not known.
    """

    host: str
    authorization: str | None
    authority: bytes | None
    is_verified: bool
    server_name: str | None
    certificate: bytes | None
    key: bytes | None
    proxy: str | None
    files: dict[str, Fingerprint | None]
    is_dynamic: bool
    expires_at: float | None


class Origin(msgspec.Struct, frozen=True):
    """What is known of credentials besides the `Configuration` they went into."""

    files: dict[str, Fingerprint | None]
    is_dynamic: bool = False
    expires_at: float | None = None


class NoCredentials(Exception):
    """An exec plugin failed."""


def fingerprint(path: str) -> Fingerprint | None:
    """Tell one state of a file from another, without reading it; None where there is none."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def load(request: Request) -> Credentials:
    """Read the credentials of a target. Raises whatever the package does."""
    from kubernetes.client import Configuration  # noqa: PLC0415 - the agent imports this module, for its types

    configuration = Configuration()
    # A service account needs none, and a container's root file system is read-only.
    with _scratch() if request.kubeconfig else contextlib.nullcontext("") as scratch:
        if request.kubeconfig:
            origin = _load_kubeconfig(request.kubeconfig, configuration, scratch)
        else:
            origin = _load_service_account(request, configuration)
        if request.api_server:
            configuration.host = request.api_server.rstrip("/")
        return _credentials(configuration, origin)


def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir=_SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None)


def _load_kubeconfig(paths: str, configuration: Any, scratch: str) -> Origin:
    """Do what the package's `load_kube_config` does, and see which files it takes and who made the token."""
    from kubernetes.config.kube_config import ConfigException, KubeConfigLoader, KubeConfigMerger  # noqa: PLC0415

    # Before they are read: a file that changes meanwhile is then seen to have changed.
    files = _fingerprints(paths.split(os.pathsep))
    merged = KubeConfigMerger(paths).config
    if merged is None:
        raise ConfigException("there is no such file")
    loader = KubeConfigLoader(merged, config_base_path=None, temp_file_path=scratch)
    files |= _fingerprints(_named_files(loader))
    loader.load_and_set(configuration)
    user = loader._user or ()  # noqa: SLF001 - the package offers no other way to know
    # The package logs a plugin's failure and goes on without credentials, which would put anonymity over good ones.
    if "exec" in user and not configuration.api_key and not configuration.cert_file:
        raise NoCredentials("the exec plugin gave no credentials")
    expiry = getattr(loader, "expiry", None)
    is_dynamic = "exec" in user or "auth-provider" in user
    return Origin(files, is_dynamic, expiry.timestamp() if expiry else None)


def _named_files(loader: Any) -> Iterator[str]:
    """Yield the files a kubeconfig's cluster and user name, relative to what the package takes them to be."""
    cluster, user = loader._cluster, loader._user  # noqa: SLF001
    for node, of, field in (
        (cluster, cluster, "certificate-authority"),
        (user, user, "tokenFile"),
        (user, cluster, "client-certificate"),
        (user, cluster, "client-key"),
    ):
        name = node.safe_get(field) if node else None
        if isinstance(name, str):
            yield str(Path(of.path).parent / name)


def _load_service_account(request: Request, configuration: Any) -> Origin:
    from kubernetes.config.incluster_config import InClusterConfigLoader  # noqa: PLC0415

    environment = dict(os.environ)
    if request.api_server:
        environment.setdefault("KUBERNETES_SERVICE_HOST", "replaced")
        environment.setdefault("KUBERNETES_SERVICE_PORT", "443")
    token, authority = (str(Path(request.service_account_dir) / name) for name in ("token", "ca.crt"))
    files = _fingerprints((token, authority))
    InClusterConfigLoader(
        token_filename=token, cert_filename=authority, try_refresh_token=False, environ=environment
    ).load_and_set(configuration)
    return Origin(files)


def _fingerprints(paths: Iterable[str]) -> dict[str, Fingerprint | None]:
    return {path: fingerprint(path) for path in paths if path}


def _credentials(configuration: Any, origin: Origin) -> Credentials:
    from kubernetes.client.rest import should_bypass_proxies  # noqa: PLC0415

    # It would put the address of the file back, and ask an exec plugin once more.
    configuration.refresh_api_key_hook = None
    token = configuration.get_api_key_with_prefix("BearerToken")
    has_proxy = configuration.proxy and not should_bypass_proxies(configuration.host, configuration.no_proxy or "")
    return Credentials(
        host=configuration.host,
        authorization=token.strip() if token else None,
        authority=_content(configuration.ssl_ca_cert),
        is_verified=bool(configuration.verify_ssl),
        server_name=configuration.tls_server_name,
        certificate=_content(configuration.cert_file),
        key=_content(configuration.key_file),
        proxy=configuration.proxy if has_proxy else None,
        files=origin.files,
        is_dynamic=origin.is_dynamic,
        expires_at=origin.expires_at,
    )


def _content(path: str | None) -> bytes | None:
    return Path(path).read_bytes() if path else None


def _end_with(agent_pid: int) -> bool:
    """End once the agent does, with any plugin that is running; False if the agent is gone already."""
    # A plugin is in this session's only process group, and would outlive a mere SIGKILL of its parent.
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == agent_pid and os.getpgrp() == os.getpid()


def main() -> int:
    """Serve one request from standard input."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    if not _end_with(request.agent_pid):
        return 1
    # Plugins inherit what is left: neither the request, nor the channel of the answer, nor a terminal.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        credentials = load(request)
    except Exception as error:  # noqa: BLE001 - of YAML, of JSON, of plugins, of providers; the agent gets the words
        print(str(error) or type(error).__name__, file=sys.stderr)
        return 1
    answer.write(msgspec.json.encode(credentials))
    answer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
