"""JSON over HTTP to one server, with retries and a bound on the time of each request."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Seconds to wait before the first retry, doubled at each further retry, and the maximum."""
MAX_RESPONSE_BYTES = 64 * 2**20


class NoResponse(Exception):
    """A server gave no usable response in any try. The message has the last reason, the tries and the seconds."""


class _TryAgain(Exception):
    """A request failed, and a retry may succeed. The message is the reason."""


class JsonServer:
    """Sends requests to one server. Each request returns within a bounded time or raises NoResponse.

    headers: sent with each request, beside the content type.
    """

    def __init__(self, url: str, *, timeout_s: float, retries: int, headers: Mapping[str, str] | None = None):
        self.url, self.timeout_s, self.retries = url.rstrip("/"), timeout_s, retries
        parts = urlsplit(self.url)
        self._connection_class = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path
        self._headers = dict(headers or {})

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """Send a request; returns (status, parsed response), None for a response that is not JSON.

        It is sent again after a failed connection, a timeout, and status 429 or 500 to 599.
        """
        started, reason, tries = time.monotonic(), "", self.retries + 1
        for number in range(tries):
            if number:
                time.sleep(min(FIRST_PAUSE_S * 2 ** (number - 1), LONGEST_PAUSE_S))
            try:
                return self._try(method, path, body)
            except _TryAgain as problem:
                reason = str(problem)
        seconds = time.monotonic() - started
        raise NoResponse(f"no response ({reason}) in {tries} {'try' if tries == 1 else 'tries'} and {seconds:.0f} s")

    def _try(self, method: str, path: str, body: bytes | None) -> tuple[int, Any]:
        connection = self._connection_class(self._host, self._port, timeout=self.timeout_s)
        headers = self._headers | ({"Content-Type": "application/json"} if body is not None else {})
        with _closed_after(self.timeout_s, connection) as late:
            try:
                connection.connect()
                if late.is_set():  # the timer ran before there was a socket to close
                    raise TimeoutError
                connection.request(method, self._path + path, body, headers)
                response = connection.getresponse()
                raw = response.read(MAX_RESPONSE_BYTES + 1)
                whole = not response.length and len(raw) <= MAX_RESPONSE_BYTES
            except (OSError, http.client.HTTPException) as error:
                if late.is_set() or isinstance(error, TimeoutError):
                    raise _TryAgain(f"nothing arrived within {self.timeout_s:g} s") from error
                raise _TryAgain(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
        if late.is_set() or not whole:
            raise _TryAgain(f"no complete response within {self.timeout_s:g} s and {MAX_RESPONSE_BYTES:,} bytes")
        try:
            parsed = json.loads(raw)
        except ValueError:
            parsed = None
        if response.status == 429 or response.status >= 500:
            message = parsed.get("error") if isinstance(parsed, dict) else None
            raise _TryAgain(f"status {response.status}{f': {str(message)[:200]}' if message else ''}")
        return response.status, parsed


@contextmanager
def _closed_after(seconds: float, connection: http.client.HTTPConnection) -> Iterator[threading.Event]:
    """Shut the connection down after `seconds`, even if the server keeps sending, and set the yielded event.

    A socket's own timeout is not enough, since it restarts with every byte that arrives.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        if (sock := connection.sock) is not None:
            with suppress(OSError):  # the socket was closed at the same time
                sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        connection.close()
