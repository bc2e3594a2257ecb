"""A small HTTP server for scores, on the standard library; the protocol is in docs/rewards.md."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from align.errors import UserError

LARGEST_REQUEST = 64 * 2**20
IDLE_TIMEOUT_S = 120
"""Seconds after which a client that sends nothing is hung up on."""

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """One completion to score: token ids of both sides, or a conversation and a text.

    finished: the completion ended by itself; False where it was cut and so has no end of turn.
    """

    prompt: Messages | list[int]
    completion: str | list[int]
    finished: bool


class BadRequest(Exception):
    """The client's fault; the message is sent back."""


Scoring = Callable[[list[Question]], Sequence[float]]


class RewardServer(ThreadingHTTPServer):
    """Answers POST /score with the scores of `scoring` and GET /health with `about`.

    Each request has a thread; `scoring` must keep them apart where it has to. Port 0 is any free one.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, scoring: Scoring, about: dict[str, Any]):
        self.scoring, self.about = scoring, about
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"{host}:{port}: cannot listen there ({reason}); choose another --port or --host."
            ) from error

    def server_bind(self) -> None:
        """Without the base class's look-up of the host's full name, which waits where name servers do not answer."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://{self.server_name}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no event."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_TIMEOUT_S

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {"status": "ok", **self.server.about})
        else:
            self._answer(404, {"error": "there are GET /health and POST /score"})

    def do_POST(self) -> None:
        if self.path != "/score":
            self.close_connection = True  # the body stays unread
            self._answer(404, {"error": "there are GET /health and POST /score"})
            return
        try:
            questions = self._questions()
            scores = [float(score) for score in self.server.scoring(questions)]
        except BadRequest as problem:
            self._answer(400, {"error": str(problem)})
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            traceback.print_exc()
            self._answer(500, {"error": f"{type(error).__name__}: {error}"})
        else:
            # JSON has no NaN; null says the same.
            self._answer(200, {"scores": [score if math.isfinite(score) else None for score in scores]})

    def _questions(self) -> list[Question]:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal() or int(length) > LARGEST_REQUEST:
            self.close_connection = True
            raise BadRequest(f"a request needs a Content-Length of at most {LARGEST_REQUEST} bytes")
        body = self.rfile.read(int(length))
        try:
            return parse_questions(json.loads(body))
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"not valid JSON: {error}") from error

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """No line for every request."""


def parse_questions(request: Any) -> list[Question]:
    """The completions of a request, checked; raises BadRequest with the first thing that is wrong."""
    if not isinstance(request, dict):
        raise BadRequest("the request must be an object with prompts and completions")
    prompts, completions = request.get("prompts"), request.get("completions")
    if not isinstance(prompts, list) or not isinstance(completions, list):
        raise BadRequest("prompts and completions must be lists")
    finished = request.get("finished", [True] * len(completions))
    if not isinstance(finished, list) or not len(prompts) == len(completions) == len(finished):
        raise BadRequest("prompts, completions and finished must be lists of one length")
    return [_question(index, *parts) for index, parts in enumerate(zip(prompts, completions, finished, strict=True))]


def _question(index: int, prompt: Any, completion: Any, finished: Any) -> Question:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(finished, bool):
        raise BadRequest(f"finished[{index}] must be true or false")
    if not isinstance(prompt, list) or not prompt:
        raise BadRequest(f"prompts[{index}] must be a text, a list of messages or a list of token ids, and not empty")
    if isinstance(completion, list):
        if not all(isinstance(t, int) and not isinstance(t, bool) for t in prompt + completion):
            raise BadRequest(f"prompts[{index}] and completions[{index}] must both be token ids, or neither")
    elif not isinstance(completion, str):
        raise BadRequest(f"completions[{index}] must be a text or a list of token ids")
    elif not all(isinstance(m, dict) and {type(m.get("role")), type(m.get("content"))} == {str} for m in prompt):
        raise BadRequest(f"prompts[{index}]: each message must have the texts role and content")
    return Question(prompt, completion, finished)
