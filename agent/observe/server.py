"""The HTTP servers: metrics (with /proxyMode, /configz and /healthz, as kube-proxy's) and health."""

from __future__ import annotations

import http.server
import json
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from agent.observe.serving import ServingThread

log = logging.getLogger("ebproxy.http")

Answer = tuple[int, str, bytes]
"""Status code, content type, body."""
Route = Callable[[str], Answer]
"""Takes the request's Accept header."""


def json_answer(code: int, body: Any) -> Answer:
    """Answer with JSON."""
    return code, "application/json", json.dumps(body).encode()


def text_answer(text: str) -> Answer:
    """Answer 200 with plain text."""
    return 200, "text/plain; charset=utf-8", text.encode()


def metrics_route(registry: CollectorRegistry) -> Route:
    """Serve a registry in the format the client accepts."""

    def serve(accept: str) -> Answer:
        encode, content_type = choose_encoder(accept)
        return 200, content_type, encode(registry)

    return serve


class _Handler(http.server.BaseHTTPRequestHandler):
    server_version = "ebproxy"
    sys_version = ""
    timeout = 10
    routes: Mapping[str, Route]

    def do_GET(self) -> None:
        route = self.routes.get(self.path.partition("?")[0])
        code, content_type, body = (
            route(self.headers.get("Accept", "")) if route else (404, "text/plain", b"not found\n")
        )
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        log.debug(format, *args)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


class HttpServer(ServingThread):
    """Serves routes at one address in threads of its own."""

    def __init__(self, address: str, port: int, routes: Mapping[str, Route]) -> None:
        """Bind. Raises: OSError."""
        handler = type("Handler", (_Handler,), {"routes": routes})
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = type("Server", (_Server,), {"address_family": family})
        bound: http.server.ThreadingHTTPServer = server((address, port), handler)
        self.port: int = bound.server_address[1]
        super().__init__(bound, f"http:{self.port}")
