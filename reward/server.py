"""A small HTTP server for scores, built on the standard library; docs/rewards.md has the protocol."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.data.shapes import RESERVED
from align.launch.http_server import HttpServer, QuietHandler

MAX_REQUEST_BYTES = 64 * 2**20

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class PromptCompletion:
    """One completion to score, as token ids or as text.

    prompt: token ids, or the messages of a conversation.
    completion: token ids if the prompt is token ids, otherwise a text.
    finished: False if the completion was truncated and so has no end of turn.
    variables: keyword arguments for the chat template, if the prompt is messages.
    """

    prompt: Messages | list[int]
    completion: str | list[int]
    finished: bool
    variables: dict[str, Any] = field(default_factory=dict)


class BadRequest(Exception):
    """A fault of the client; the response has the message."""


Scoring = Callable[[list[PromptCompletion]], Sequence[float]]
"""f(items) -> one score per item."""


class RewardServer(HttpServer):
    """Serves the scores of `scoring` at POST /score and the description `about` at GET /health.

    Each request runs in its own thread, so `scoring` must be thread-safe. Port 0 selects a free port.
    """

    def __init__(self, host: str, port: int, scoring: Scoring, about: dict[str, Any]):
        self.scoring, self.about = scoring, about
        super().__init__(host, port, _Handler)

    @property
    def url(self) -> str:
        return f"http://{self.server_name}:{self.server_port}"


class _Handler(QuietHandler):
    server: RewardServer

    def do_GET(self) -> None:
        if self.path == "/health":
            self._respond(200, {"status": "ok", **self.server.about})
        else:
            self._respond(404, {"error": "this server has only GET /health and POST /score"})

    def do_POST(self) -> None:
        if self.path != "/score":
            self.close_connection = True  # otherwise the unread body would be parsed as the next request
            self._respond(404, {"error": "this server has only GET /health and POST /score"})
            return
        try:
            items = self._items()
            scores = [float(score) for score in self.server.scoring(items)]
        except BadRequest as problem:
            self._respond(400, {"error": str(problem)})
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            traceback.print_exc()
            self._respond(500, {"error": f"{type(error).__name__}: {error}"})
        else:
            # JSON has no NaN, so null stands for it.
            self._respond(200, {"scores": [score if math.isfinite(score) else None for score in scores]})

    def _items(self) -> list[PromptCompletion]:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal() or int(length) > MAX_REQUEST_BYTES:
            self.close_connection = True
            raise BadRequest(f"a request needs a Content-Length of at most {MAX_REQUEST_BYTES} bytes")
        body = self.rfile.read(int(length))
        try:
            return parse_request(json.loads(body))
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"not valid JSON: {error}") from error

    def _respond(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def parse_request(request: Any) -> list[PromptCompletion]:
    """Check a request and return its completions; raises BadRequest with the first fault."""
    if not isinstance(request, dict):
        raise BadRequest("the request must be an object with prompts and completions")
    prompts, completions = request.get("prompts"), request.get("completions")
    if not isinstance(prompts, list) or not isinstance(completions, list):
        raise BadRequest("prompts and completions must be lists")
    finished = request.get("finished", [True] * len(completions))
    if not isinstance(finished, list) or not len(prompts) == len(completions) == len(finished):
        raise BadRequest("prompts, completions and finished must be lists of the same length")
    variables = request.get("chat_template_kwargs", [{}] * len(completions))
    if not isinstance(variables, list) or len(variables) != len(completions):
        raise BadRequest("chat_template_kwargs must be a list with an object per completion")
    items = zip(prompts, completions, finished, variables, strict=True)
    return [_item(index, *parts) for index, parts in enumerate(items)]


def _item(index: int, prompt: Any, completion: Any, finished: Any, variables: Any) -> PromptCompletion:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(finished, bool):
        raise BadRequest(f"finished[{index}] must be true or false")
    if not isinstance(prompt, list) or not prompt:
        raise BadRequest(f"prompts[{index}] must be a text, or a list of messages or token ids that is not empty")
    if isinstance(completion, list):
        if not all(isinstance(t, int) and not isinstance(t, bool) for t in prompt + completion):
            raise BadRequest(f"prompts[{index}] and completions[{index}] must both be token ids, or both be texts")
    elif not isinstance(completion, str):
        raise BadRequest(f"completions[{index}] must be a text or a list of token ids")
    elif not all(isinstance(m, dict) and {type(m.get("role")), type(m.get("content"))} == {str} for m in prompt):
        raise BadRequest(f"prompts[{index}]: each message must have the texts role and content")
    if not isinstance(variables, dict) or RESERVED.intersection(variables) - {"tools"}:
        raise BadRequest(f"chat_template_kwargs[{index}] must be an object with variables of the chat template")
    return PromptCompletion(prompt, completion, finished, variables)
