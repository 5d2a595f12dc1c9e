"""Remember the sockets in use, so that a read blocked in one thread can be ended from another.

A response knows its socket only once its headers have come, and a server that stalls before them would hold `stop`
for the whole read timeout. So the connections themselves report their socket, before they wait for an answer.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref

from urllib3 import HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection


class OpenSockets:
    """The sockets of one client; once closed, new ones are closed as they come."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._by_thread: dict[int, weakref.ref[socket.socket]] = {}
        self._is_closed = False

    def add(self, connected: socket.socket | None) -> None:
        """Remember a socket, and that this thread uses it; None is a connection that is closed again already."""
        if connected is None:
            return
        with self._lock:
            self._sockets.add(connected)
            self._by_thread[threading.get_ident()] = weakref.ref(connected)
            if self._is_closed:
                _shut_down(connected)

    def set_timeout_of_thread(self, timeout_s: float) -> None:
        """Change the timeout of the socket this thread used last."""
        with self._lock:
            reference = self._by_thread.get(threading.get_ident())
        if reference and (connected := reference()):
            with contextlib.suppress(OSError):
                connected.settimeout(timeout_s)

    def close(self) -> None:
        """End every blocked read, now and from now on."""
        with self._lock:
            self._is_closed = True
            for connected in list(self._sockets):
                _shut_down(connected)


def _shut_down(connected: socket.socket) -> None:
    """Shut the transport itself: SSLSocket's own shutdown would pull the TLS state from under its reader."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def tracked_pools(sockets: OpenSockets) -> dict[str, type[HTTPConnectionPool]]:
    """Return urllib3 pool classes, by scheme, whose connections report to ``sockets``."""

    class TrackedHttp(HTTPConnection):
        def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as urllib3's own
            sockets.add(self.sock)
            return super().getresponse()

    class TrackedHttps(HTTPSConnection):
        def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as urllib3's own
            sockets.add(self.sock)
            return super().getresponse()

    class HttpPool(HTTPConnectionPool):
        ConnectionCls = TrackedHttp

    class HttpsPool(HTTPSConnectionPool):
        ConnectionCls = TrackedHttps

    return {"http": HttpPool, "https": HttpsPool}
