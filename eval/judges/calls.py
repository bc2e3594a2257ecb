"""One call of a judge at an OpenAI-compatible server."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.config.judges import Judge
from align.errors import UserError
from align.reward.json_http import JsonServer, NoResponse


@dataclass(frozen=True)
class Reply:
    """Answer of a server.

    text: the judge's text; None if the call failed.
    prompt_tokens, completion_tokens: as reported by the server; 0 if it reports none.
    problem: why the call failed, or why the text may be incomplete; "" if neither.
    """

    text: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    problem: str = ""


class JudgeClient:
    """Sends messages to a judge. A call that fails for good returns the reason instead of raising.

    Raises UserError if the environment variable with the key is not set, and, from `ask`, if the server refuses the
    key or does not have the model: then no call can succeed.
    """

    def __init__(self, judge: Judge):
        self.judge = judge
        headers = {}
        if judge.key is not None:
            value = os.environ.get(judge.key)
            if not value:
                raise UserError(
                    f"judge {judge.url}: the environment variable '{judge.key}' is not set. Export it with the API "
                    "key, or remove `key`."
                )
            headers["Authorization"] = f"Bearer {value}"
        self._server = JsonServer(judge.url, timeout_s=judge.timeout_s, retries=judge.retries, headers=headers)

    def ask(self, messages: Sequence[dict[str, str]], *, seed: int) -> Reply:
        body = {
            "model": self.judge.model,
            "messages": list(messages),
            "temperature": self.judge.temperature,
            "max_tokens": self.judge.max_tokens,
            "seed": seed,
        }
        try:
            status, response = self._server.request("POST", "/chat/completions", json.dumps(body).encode())
        except NoResponse as problem:
            return Reply(None, problem=str(problem))
        if status in (401, 403, 404):
            raise UserError(
                f"judge {self.judge.url}: the server refused the call with status {status} ({_message(response)}). "
                "Correct the judge's `url`, `model` or `key`."
            )
        if status != 200:
            return Reply(None, problem=f"status {status}: {_message(response)}")
        return _read(response)


def served_models(url: str, *, timeout_s: float = 20.0) -> list[str] | None:
    """Names of the models at a server; None if it does not list them. Raises UserError if it does not respond."""
    try:
        status, response = JsonServer(url, timeout_s=timeout_s, retries=1).request("GET", "/models")
    except NoResponse as problem:
        raise UserError(f"--judge {url}: {problem}. Start the server, or correct the URL.") from None
    try:
        return [str(model["id"]) for model in response["data"]] if status == 200 else None
    except (KeyError, TypeError):
        return None


def _read(response: Any) -> Reply:
    try:
        choice = response["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    usage = response.get("usage") if isinstance(response, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    spent = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (number if isinstance(number, int) and number > 0 else 0 for number in spent)
    if not isinstance(text, str):
        return Reply(None, prompt, completion, "the response has no text")
    truncated = choice.get("finish_reason") == "length"
    return Reply(text, prompt, completion, "the answer was truncated at max_tokens" if truncated else "")


def _message(response: Any) -> str:
    error = response.get("error") if isinstance(response, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:200] if message else "no reason given"
