"""What can go wrong between an API server and us, and how long to wait after it."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable

import msgspec

from agent.errors import SourceError


class Cause(enum.StrEnum):
    """Why a request or stream failed; the label of the error counter."""

    CONNECT = "connect"
    TIMEOUT = "timeout"
    CUT = "cut"
    GONE = "gone"
    THROTTLED = "throttled"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    INVALID = "invalid"
    SERVER = "server"
    GARBAGE = "garbage"
    OVERSIZE = "oversize"
    REWOUND = "rewound"
    INTERNAL = "internal"


class Status(msgspec.Struct):
    """What an API server says of a failure. Source: meta/v1 Status."""

    code: int = 0
    reason: str = ""
    message: str = ""


_BY_CODE = {
    400: Cause.INVALID,
    401: Cause.UNAUTHORIZED,
    403: Cause.FORBIDDEN,
    410: Cause.GONE,
    422: Cause.INVALID,
    429: Cause.THROTTLED,
}
_BY_REASON = {"Expired": Cause.GONE, "Gone": Cause.GONE}
_status = msgspec.json.Decoder(Status)


class ApiFailure(SourceError):
    """One request or stream failed."""

    def __init__(self, cause: Cause, message: str, *, code: int = 0, retry_after_s: float = 0.0) -> None:
        self.cause = cause
        self.code = code
        self.retry_after_s = retry_after_s
        super().__init__(message)

    @classmethod
    def of_status(cls, code: int, body: bytes | msgspec.Raw, retry_after_s: float = 0.0) -> ApiFailure:
        """Read a Status, or whatever came in its place, as a proxy's HTML does; ``code`` 0 means the Status's own."""
        try:
            status = _status.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            status = Status()
        code = code or status.code
        cause = _BY_REASON.get(status.reason) or _BY_CODE.get(code, Cause.SERVER)
        words = status.message or bytes(body)[:200].decode("utf-8", "replace")
        message = f"HTTP {code} {status.reason}: {words}"
        return cls(cause, message, code=code, retry_after_s=retry_after_s)


class Backoff:
    """Delays that double from ``first_s`` to ``last_s``, each drawn from its upper half so that nodes spread out."""

    def __init__(self, first_s: float, last_s: float, draw: Callable[[], float] = random.random) -> None:
        self._first_s = first_s
        self._last_s = last_s
        self._draw = draw
        self._next_s = first_s

    def next_s(self, at_least_s: float = 0.0) -> float:
        """Return the next delay; ``at_least_s`` is what the server asked for."""
        delay_s = self._next_s * (0.5 + self._draw() / 2)
        self._next_s = min(self._next_s * 2, self._last_s)
        return max(delay_s, at_least_s * (1 + self._draw() / 10))

    def reset(self) -> None:
        """Start again from the first delay."""
        self._next_s = self._first_s
