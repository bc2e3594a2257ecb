"""Chat with an OpenAI-compatible server in a terminal."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from align.errors import UserError

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 600.0


@dataclass(frozen=True)
class ChatServer:
    """A server and a model on it.

    url: Address, with or without `/v1`.
    token: Bearer token, if the server needs one.
    """

    url: str
    token: str | None

    def models(self) -> list[str]:
        """Names of the models that the server lists."""
        with self._request("GET", "/models", None, CONNECT_SECONDS) as response:
            values = _json(response.read().decode("utf-8", "replace"))
        cards = values.get("data") if isinstance(values, dict) else None
        if not isinstance(cards, list):
            raise UserError(
                f"{self.url}: its list of models is not OpenAI's; pass the URL of an OpenAI-compatible server."
            )
        return [str(card["id"]) for card in cards if isinstance(card, dict) and "id" in card]

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        """Texts of an answer as they arrive."""
        with self._request("POST", "/chat/completions", {**body, "stream": True}, ANSWER_SECONDS) as response:
            for line in self._lines(response):
                data = line.decode("utf-8", "replace").strip().removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                values = _json(data)
                if not isinstance(values, dict):
                    continue
                if "error" in values:
                    raise UserError(f"{self.url}: {_message(values)}")
                for choice in values.get("choices") or []:
                    if text := choice.get("delta", {}).get("content"):
                        yield text

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            yield from response
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self.url}: the answer ended early ({error}); see the server's output.") from None

    def _request(self, method: str, path: str, body: dict[str, Any] | None, seconds: float) -> http.client.HTTPResponse:
        """The response of a request; UserError if the server cannot be reached or refuses it."""
        address = _address(self.url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(address.hostname or "", address.port, timeout=seconds)
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.token}"} if self.token is not None else {}
        )
        try:
            connection.request(method, f"{address.path}{path}", json.dumps(body) if body else None, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UserError(f"{self.url}: no answer ({reason}); start a server with `align serve`.") from None
        if response.status != 200:
            message = _message(_json(response.read().decode("utf-8", "replace")))
            raise UserError(f"{self.url}: {message or f'HTTP status {response.status}'}")
        return response


def converse(system: str | None, complete: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
    """Read lines and complete each, keeping the conversation; an empty line or the end of input stops.

    complete: Prints the assistant's next turn after these messages, and returns it as a message.
    """
    messages = [{"role": "system", "content": system}] if system else []
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            return
        messages.append({"role": "user", "content": line})
        messages.append(complete(messages))


def chat_with_server(
    server: ChatServer,
    model: str | None,
    *,
    system: str | None,
    sampling: dict[str, Any],
    variables: dict[str, Any],
) -> None:
    """Read lines and stream answers, keeping the conversation; an empty line or the end of input stops.

    model: Name of the model; None takes the server's first.
    sampling: OpenAI's fields max_tokens, temperature and seed.
    variables: Values for the chat template's own variables.
    """
    names = server.models()
    if model is not None and model not in names:
        raise UserError(f"--model {model}: {server.url} does not serve it. Pass one of: {', '.join(names)}.")
    if not names:
        raise UserError(f"{server.url}: it serves no model.")

    def complete(messages: list[dict[str, Any]]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": model or names[0], "messages": messages, **sampling}
        if variables:
            body["chat_template_kwargs"] = variables
        answer = ""
        for text in server.stream(body):
            print(text, end="", flush=True)
            answer += text
        print()
        return {"role": "assistant", "content": answer}

    converse(system, complete)


def _address(url: str) -> SplitResult:
    address = urlsplit(url.rstrip("/"))
    try:
        usable = address.scheme in ("http", "https") and bool(address.hostname) and (address.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"--url {url}: it is not a valid server URL; write it as http://HOST:PORT.")
    path = address.path if address.path.endswith("/v1") else f"{address.path}/v1"
    return address._replace(path=path)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _message(values: Any) -> str:
    found = values.get("error", values) if isinstance(values, dict) else values
    found = found.get("message", found) if isinstance(found, dict) else found
    return str(found or "").strip()[:500]
