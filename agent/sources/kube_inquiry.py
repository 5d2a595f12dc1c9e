"""Ask the credentials child, and know when to ask it again."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

import agent
from agent.errors import ConfigError
from agent.sources.kube_credentials import Credentials, Request, fingerprint

log = logging.getLogger("ebproxy.source.kube")

INQUIRY_LIMIT_S = 60.0  # an exec plugin may ask over a network
_GRACE_S = 1.0  # to take in what is there, however late it is asked for
_EXPIRY_SKEW_S = 300.0  # Source: EXPIRY_SKEW_PREVENTION_DELAY of the `kubernetes` package
_ROOT = Path(agent.__file__).resolve().parent.parent


class Inquiry:
    """One run of the credentials child; it begins at once, so that its 0.3 s pass beside other work.

    To be begun by a thread that lives until the answer: the child ends with it.
    """

    def __init__(self, request: Request, limit_s: float = INQUIRY_LIMIT_S) -> None:
        self._request = request
        self._limit_s = limit_s
        self._deadline = time.monotonic() + limit_s
        self._child = subprocess.Popen(
            [sys.executable, "-m", "agent.sources.kube_credentials"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=_ROOT,
            start_new_session=True,  # no terminal that a plugin could ask, and a group that ends as one
        )
        assert self._child.stdin  # noqa: S101 - it is a pipe
        with contextlib.suppress(BrokenPipeError), self._child.stdin as stdin:
            stdin.write(msgspec.json.encode(request))
        self._child.stdin = None  # for communicate(), which would flush it

    def answer(self) -> Credentials:
        """Wait for the answer. Raises: ConfigError."""
        try:
            output, words = self._child.communicate(timeout=max(_GRACE_S, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            self.cancel()
            self._child.communicate()
            raise self._failure(f"reading it took longer than {self._limit_s:g} s") from error
        said = "; ".join(words.decode(errors="replace").split("\n")).strip("; ")
        if self._child.returncode != 0:
            raise self._failure(said or f"the child that reads it ended with status {self._child.returncode}")
        if said:
            log.warning("%s: %s", self._request.origin, said)
        return msgspec.json.decode(output, type=Credentials)

    def cancel(self) -> None:
        """End the child, and a plugin with it, from whichever thread."""
        if self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)

    def _failure(self, words: str) -> ConfigError:
        is_named = self._request.kubeconfig or self._request.api_server
        hint = "" if is_named else "; outside a pod give --manifests DIR, --kubeconfig FILE or --api-server URL"
        return ConfigError([f"{self._request.origin}: {words.removesuffix('.')}{hint}"])


def is_outdated(credentials: Credentials) -> bool:
    """Tell whether to ask again: a file has changed, or a plugin's credentials expire soon, or nobody knows when."""
    if credentials.is_dynamic:
        expires_at = credentials.expires_at
        if expires_at is None or expires_at - time.time() < _EXPIRY_SKEW_S:
            return True
    return any(fingerprint(path) != seen for path, seen in credentials.files.items())
