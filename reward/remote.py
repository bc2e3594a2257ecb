"""Client of a reward server: `align serve-reward`, or any server with the protocol of docs/rewards.md."""

from __future__ import annotations

import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from align.errors import UserError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Seconds to wait before the first retry, doubled at each further retry, and the maximum."""
MAX_RESPONSE_BYTES = 64 * 2**20


class _TryAgain(Exception):
    """A request failed, and a retry may succeed. The message is the reason."""


class RewardClient:
    """Sends requests to one server. Each request returns within a bounded time or raises UserError."""

    def __init__(self, url: str, *, timeout_s: float, retries: int):
        self.url, self.timeout_s, self.retries = url.rstrip("/"), timeout_s, retries
        parts = urlsplit(self.url)
        self._connection_class = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path

    def health(self) -> dict[str, Any]:
        """The server's description of itself, {} if it has no /health."""
        status, response = self._request("GET", "/health", None)
        return response if status == 200 and isinstance(response, dict) else {}

    def score(self, request: dict[str, Any]) -> list[float | None]:
        """Scores of a request's completions; None for null and for anything that is not a finite number."""
        count = len(request["completions"])
        status, response = self._request("POST", "/score", json.dumps(request, default=str).encode())
        if status != 200:
            reason = response.get("error") if isinstance(response, dict) else None
            raise UserError(
                f"reward server {self.url}: it refused the request with status {status} ({str(reason)[:200]}). "
                "Fix the server, or set the reward's `url` to another one."
            )
        scores = response.get("scores") if isinstance(response, dict) else None
        if not isinstance(scores, list) or len(scores) != count:
            found = f"{len(scores)} instead of {count} scores" if isinstance(scores, list) else "no list of scores"
            raise UserError(f"reward server {self.url}: it returned {found}. Let it return one score per completion.")
        return [_finite(score) for score in scores]

    def _request(self, method: str, path: str, body: bytes | None) -> tuple[int, Any]:
        """Send a request, with retries; returns (status, parsed response)."""
        started, reason, tries = time.monotonic(), "", self.retries + 1
        for number in range(tries):
            if number:
                time.sleep(min(FIRST_PAUSE_S * 2 ** (number - 1), LONGEST_PAUSE_S))
            try:
                return self._try(method, path, body)
            except _TryAgain as problem:
                reason = str(problem)
        raise UserError(
            f"reward server {self.url}: no response ({reason}) in {tries} {'try' if tries == 1 else 'tries'} and "
            f"{time.monotonic() - started:.0f} s. Start it with `align serve-reward`, or set the reward's `url` to a "
            "running server."
        )

    def _try(self, method: str, path: str, body: bytes | None) -> tuple[int, Any]:
        connection = self._connection_class(self._host, self._port, timeout=self.timeout_s)
        headers = {"Content-Type": "application/json"} if body is not None else {}
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


def _finite(score: Any) -> float | None:
    number = isinstance(score, int | float) and not isinstance(score, bool)
    try:
        return float(score) if number and math.isfinite(score) else None
    except OverflowError:  # an integer larger than any float
        return None
