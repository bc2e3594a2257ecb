"""The client of a reward server: `align serve-reward`, or any that speaks the protocol of docs/rewards.md."""

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
LARGEST_ANSWER = 64 * 2**20


class _TryAgain(Exception):
    """No usable answer, but another try may bring one; the message is the reason."""


class RewardClient:
    """Asks one server. Every request ends: with an answer, or with a UserError that says what is the matter."""

    def __init__(self, url: str, *, timeout_s: float, retries: int):
        self.url, self.timeout_s, self.retries = url.rstrip("/"), timeout_s, retries
        parts = urlsplit(self.url)
        self._connection_class = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path

    def health(self) -> dict[str, Any]:
        """What the server says of itself; {} of one that has no /health."""
        status, answer = self._request("GET", "/health", None)
        return answer if status == 200 and isinstance(answer, dict) else {}

    def score(self, request: dict[str, Any]) -> list[float | None]:
        """Scores of a request's completions; None for null and whatever is not a finite number."""
        count = len(request["completions"])
        status, answer = self._request("POST", "/score", json.dumps(request, default=str).encode())
        if status != 200:
            reason = answer.get("error") if isinstance(answer, dict) else None
            raise UserError(
                f"reward server {self.url}: it refused the request with status {status} ({str(reason)[:200]}); "
                "mend the server, or correct the reward's `url`."
            )
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != count:
            found = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
            raise UserError(
                f"reward server {self.url}: it answered with {found} for {count} completions; mend the server."
            )
        return [_finite(score) for score in scores]

    def _request(self, method: str, path: str, body: bytes | None) -> tuple[int, Any]:
        """(status, parsed answer) of the first try that the server does not ask to repeat."""
        started, reason = time.monotonic(), ""
        for number in range(self.retries + 1):
            if number:
                time.sleep(min(FIRST_PAUSE_S * 2 ** (number - 1), LONGEST_PAUSE_S))
            try:
                return self._try(method, path, body)
            except _TryAgain as problem:
                reason = str(problem)
        raise UserError(
            f"reward server {self.url}: no answer ({reason}) in {self.retries + 1} tries and "
            f"{time.monotonic() - started:.0f} s; start it (`align serve-reward`), or correct the reward's `url`."
        )

    def _try(self, method: str, path: str, body: bytes | None) -> tuple[int, Any]:
        connection = self._connection_class(self._host, self._port, timeout=self.timeout_s)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        with _ended_after(self.timeout_s, connection) as late:
            try:
                connection.connect()
                if late.is_set():  # the timer found no socket to close
                    raise TimeoutError
                connection.request(method, self._path + path, body, headers)
                response = connection.getresponse()
                raw = response.read(LARGEST_ANSWER + 1)
                whole = not response.length and len(raw) <= LARGEST_ANSWER
            except (OSError, http.client.HTTPException) as error:
                if late.is_set() or isinstance(error, TimeoutError):
                    raise _TryAgain(f"nothing within {self.timeout_s:g} s") from error
                raise _TryAgain(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
        if late.is_set() or not whole:
            raise _TryAgain(f"not the whole answer within {self.timeout_s:g} s and {LARGEST_ANSWER:,} bytes")
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = None
        if response.status == 429 or response.status >= 500:
            said = answer.get("error") if isinstance(answer, dict) else None
            raise _TryAgain(f"status {response.status}{f': {str(said)[:200]}' if said else ''}")
        return response.status, answer


@contextmanager
def _ended_after(seconds: float, connection: http.client.HTTPConnection) -> Iterator[threading.Event]:
    """Close the connection after that time, even of a server that sends a byte now and then.

    A socket's own timeout begins again with every byte.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        if (sock := connection.sock) is not None:
            with suppress(OSError):  # it was closed in this moment
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
    except OverflowError:  # a whole number beyond any float
        return None
