"""Follow the node's network: read it whole whenever netlink says that something changed.

What a message says is not looked at: a burst of them costs one reading, and messages that were lost cost nothing more.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import struct
import threading
from collections.abc import Callable

from agent.core.network import Network
from agent.kernel.netlink import GROUPS, Netlink, concerns_network, read_network

log = logging.getLogger("ebproxy.netlink")
_RETRY_S = 1.0


class NetworkFollower:
    """Tells a listener of each network that differs from the one before, the first included; a thread of its own."""

    def __init__(self, listener: Callable[[Network], None]) -> None:
        """Subscribe and read. Raises: OSError."""
        self._listener = listener
        self._told = Netlink(GROUPS)
        self._asked = Netlink()
        self._stop, self._stopping = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="netlink", daemon=True)
        # What changes from here on is told, so that nothing falls between this and the first message.
        self.network = read_network(self._asked)

    def start(self) -> None:
        """Tell of the network that was read first, and follow it."""
        self._listener(self.network)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.close()
        if self._thread.is_alive():
            self._thread.join()
        for opened in (self._told, self._asked, self._stopping):
            opened.close()

    def _run(self) -> None:
        timeout_s = None
        while self._stopping not in select.select([self._told.socket, self._stopping], [], [], timeout_s)[0]:
            timeout_s = None
            try:
                if self._has_changed():
                    self._read()
            except (OSError, struct.error) as error:
                log.error("reading the node's network: %s; trying again in %.0f s", error, _RETRY_S)
                timeout_s = _RETRY_S

    def _has_changed(self) -> bool:
        try:
            messages = self._told.drain()
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return True
        return not messages or any(map(concerns_network, messages))

    def _read(self) -> None:
        network = read_network(self._asked)
        if network != self.network:
            self.network = network
            self._listener(network)
