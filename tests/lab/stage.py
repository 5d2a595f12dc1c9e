"""What tests of whole agents have in common: agents that start together, and an end to everything on every way out."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

from tests.lab.agents import Agent
from tests.lab.lab import Pod
from tests.lab.manifests import WEB, Endpoint, Object, Port, endpoint_slice

Backend = Pod | Endpoint


class Stage(ABC):
    """A context manager: its agents run within. ``agents`` and ``close`` are the subclass's."""

    START_LIMIT_S = 60.0
    agents: Sequence[Agent]

    def __enter__(self) -> Self:
        with self.closed_on_failure():
            for agent in self.agents:
                agent.start()
            for agent in self.agents:
                agent.wait(self.START_LIMIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def closed_on_failure(self) -> Iterator[None]:
        """Take everything down where what is done within fails."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def close(self) -> None:
        """Take everything down."""


def slice_of(
    service: str, backends: Sequence[Backend], ports: Sequence[Port] = WEB, family: int = 4, name: str = ""
) -> Object:
    """Build an EndpointSlice of one family, 4 or 6: pods in their address of it, endpoints where they are of it."""
    endpoints = [backend.endpoint(family) if isinstance(backend, Pod) else backend for backend in backends]
    fitting = [endpoint for endpoint in endpoints if (":" in endpoint.address) == (family == 6)]
    return endpoint_slice(service, fitting, ports, name=name, ipv6=family == 6)
