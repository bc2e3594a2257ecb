"""Client of a reward server: `align serve-reward`, or any server with the protocol of docs/rewards.md."""

from __future__ import annotations

import json
import math
from typing import Any

from align.errors import UserError
from align.reward.json_http import JsonServer, NoResponse


class RewardClient:
    """Sends requests to one server. Each request returns within a bounded time or raises UserError."""

    def __init__(self, url: str, *, timeout_s: float, retries: int):
        self._server = JsonServer(url, timeout_s=timeout_s, retries=retries)
        self.url = self._server.url

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
        try:
            return self._server.request(method, path, body)
        except NoResponse as problem:
            raise UserError(
                f"reward server {self.url}: {problem}. Start it with `align serve-reward`, or set the reward's `url` "
                "to a running server."
            ) from None


def _finite(score: Any) -> float | None:
    number = isinstance(score, int | float) and not isinstance(score, bool)
    try:
        return float(score) if number and math.isfinite(score) else None
    except OverflowError:  # an integer larger than any float
        return None
