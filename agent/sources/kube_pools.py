"""Make urllib3's connection pools from credentials."""

from __future__ import annotations

import contextlib
import os
import ssl
from typing import Any

import urllib3
from urllib3.util.ssl_ import create_urllib3_context

from agent.errors import ConfigError
from agent.sources.kube_credentials import Credentials
from agent.sources.kube_sockets import OpenSockets, tracked_pools

_MOST_IDLE = 4  # connections kept for the next request
SocketOptions = list[tuple[int, int, int]]


def open_pools(credentials: Credentials, options: SocketOptions, sockets: OpenSockets) -> urllib3.PoolManager:
    """Prepare to connect as the credentials say; nothing is connected yet.

    Raises:
        ConfigError: a certificate, a key or the proxy's address is not one.
    """
    try:
        pools = _open(credentials, _pool_arguments(credentials, options))
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError([f"credentials of {credentials.host}: {error}"]) from error
    pools.pool_classes_by_scheme = tracked_pools(sockets)
    return pools


def _pool_arguments(credentials: Credentials, options: SocketOptions) -> dict[str, Any]:
    # urllib3's own retries would sleep on Retry-After, deaf to close().
    arguments: dict[str, Any] = {"retries": False, "socket_options": options, "maxsize": _MOST_IDLE}
    if credentials.host.startswith("https:"):
        arguments["ssl_context"] = _tls(credentials)
        if credentials.server_name:
            arguments["server_hostname"] = credentials.server_name
    return arguments


def _open(credentials: Credentials, arguments: dict[str, Any]) -> urllib3.PoolManager:
    if not credentials.proxy:
        return urllib3.PoolManager(**arguments)
    if credentials.proxy.startswith("https:"):
        arguments["proxy_ssl_context"] = _tls(credentials, is_proxy=True)
    return urllib3.ProxyManager(credentials.proxy, **arguments)


def _tls(credentials: Credentials, *, is_proxy: bool = False) -> ssl.SSLContext:
    """Trust whom the credentials trust, and show the client's certificate to the server, not to a proxy."""
    context = create_urllib3_context(cert_reqs=ssl.CERT_REQUIRED if credentials.is_verified else ssl.CERT_NONE)
    with contextlib.ExitStack() as ends:
        if credentials.authority:
            _named("certificate authority", context.load_verify_locations, _path(credentials.authority, ends))
        else:
            context.load_default_certs()
        if credentials.certificate and not is_proxy:
            certificate = _path(credentials.certificate, ends)
            key = _path(credentials.key, ends) if credentials.key else None
            _named("client certificate", context.load_cert_chain, certificate, key, _no_password)
    return context


def _named(what: str, load: Any, *arguments: Any) -> None:
    """Load something, and name it where that fails: OpenSSL says little more than its own line number."""
    try:
        load(*arguments)
    except ssl.SSLError as error:
        raise ValueError(f"{what}: {error}") from error


def _no_password() -> str:
    """Refuse, where OpenSSL would ask at the terminal."""
    raise ValueError("client key: it is encrypted")


def _path(content: bytes, ends: contextlib.ExitStack) -> str:
    """Give content a path, as OpenSSL asks, but no file: it lives in memory until ``ends``."""
    fd = os.memfd_create("ebproxy-credentials", os.MFD_CLOEXEC)
    ends.callback(os.close, fd)
    with os.fdopen(os.dup(fd), "wb") as memory:
        memory.write(content)
    return f"/proc/self/fd/{fd}"
