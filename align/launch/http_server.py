"""Base of the small HTTP servers that are built on the standard library."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from align.errors import UserError

IDLE_TIMEOUT_S = 120
"""Seconds after which the connection of a client that sends nothing is closed."""


class HttpServer(ThreadingHTTPServer):
    """Listens on an address; each request runs in its own thread. Port 0 selects a free port.

    Raises `UserError` if the address cannot be used.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]):
        try:
            super().__init__((host, port), handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{host}:{port}: cannot listen there ({reason}). Pass another --port or --host.") from error

    def server_bind(self) -> None:
        """Bind without the base class's look-up of the host's full name, which hangs if name servers do not respond."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors, except those of a client that closes its connection."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class QuietHandler(BaseHTTPRequestHandler):
    """Request handler for HTTP/1.1 that does not log requests."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_TIMEOUT_S

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing: the base class prints a line per request."""
