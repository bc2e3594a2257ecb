"""ASGI middleware in front of vLLM's OpenAI server: token, routes, checks of requests, adapters, health.

vLLM's own server has more routes than a service should offer, guards only some of them by its key, and loads adapters
from any path. Here a request passes only if its route is listed.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from align.errors import UserError
from align.serve.service import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    TOKENIZE,
    RequestError,
    Service,
    json_object,
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MODELS, LOAD, UNLOAD = "/v1/models", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PASSED = {("GET", "/metrics"), ("GET", "/version")}
"""Routes of vLLM that need no check but the token."""
CHECKED = (CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE)
"""Routes of vLLM that take POST requests for a model."""
MAX_BODY = 32 * 2**20
"""Bytes that the body of a request may have."""
LOAD_FIELDS, UNLOAD_FIELDS = {"lora_name", "lora_path", "load_inplace"}, {"lora_name"}

_service: Service | None = None


def install(service: Service) -> None:
    """Set the service of the `Gate` that vLLM creates next. vLLM creates middleware without arguments."""
    global _service
    _service = service


class Gate:
    """The middleware. All of its requests run in one event loop."""

    def __init__(self, app: App):
        assert _service is not None
        self.app, self.service = app, _service
        self.metrics = Metrics()
        token = self.service.settings.token
        self._digest = None if token is None else hashlib.sha256(token.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Report the start as complete only after the proof, so that no request is accepted before it."""

        async def send_after_proof(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self.service.start(scope["app"].state)
                if self.service.failure is not None:
                    message = {"type": "lifespan.startup.failed", "message": self.service.failure}
            await send(message)

        await self.app(scope, receive, send_after_proof)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        try:
            if path == "/health" and method in ("GET", "HEAD"):
                healthy = await self.service.is_healthy()
                await respond(send, 200 if healthy else 503, {"status": "ok" if healthy else "not serving"})
                return
            self._require_token(scope)
            if (method, path) in PASSED:
                await self.app(scope, receive, send)
            elif method == "GET" and (path == MODELS or path.startswith(f"{MODELS}/")):
                await self._models(path, send)
            elif method == "POST" and path in (LOAD, UNLOAD):
                await self._adapters(path, await self._body(scope, receive), send)
            elif method == "POST" and path in CHECKED:
                await self._run(scope, await self._body(scope, receive), receive, send)
            else:
                raise RequestError(404, f"{method} {path}: the server has no such route; docs/serving.md lists them.")
        except RequestError as error:
            await respond_error(send, error)

    def _require_token(self, scope: Scope) -> None:
        if self._digest is None:
            return
        scheme, _, token = _header(scope, b"authorization").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            hashlib.sha256(token.strip().encode()).digest(), self._digest
        ):
            raise RequestError(401, "Authorization: the bearer token is missing or wrong; send the server's token.")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body of a request with JSON. Browsers send JSON to other sites only after asking the server."""
        if _header(scope, b"content-type").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "Content-Type: the server takes JSON only; send application/json.")
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError(400, "the body is incomplete; send the whole request.")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MAX_BODY:
                raise RequestError(413, f"the body has more than {MAX_BODY} bytes; send a smaller request.")
            if not message.get("more_body"):
                return b"".join(parts)

    async def _models(self, path: str, send: Send) -> None:
        cards = self.service.model_cards()
        if path == MODELS:
            await respond(send, 200, {"object": "list", "data": cards})
            return
        name = path.removeprefix(f"{MODELS}/")
        card = next((card for card in cards if card["id"] == name), None)
        if card is None:
            raise RequestError(404, f"model: '{name}' is not served; GET {MODELS} lists the models.", "model")
        await respond(send, 200, card)

    async def _adapters(self, path: str, body: bytes, send: Send) -> None:
        """Load or unload an adapter by name."""
        values = json_object(body)
        known = LOAD_FIELDS if path == LOAD else UNLOAD_FIELDS
        if unknown := sorted(set(values) - known):
            raise RequestError(400, f"{unknown[0]}: the route does not know this field; remove it.", unknown[0])
        name, folder = values.get("lora_name"), values.get("lora_path")
        if not isinstance(name, str) or not (folder is None or isinstance(folder, str)):
            raise RequestError(400, "lora_name: it must be a text; send the adapter's name.", "lora_name")
        shelf = self.service.shelf
        try:
            if path == LOAD:
                await shelf.load_by_name(name, folder, replace=values.get("load_inplace") is True)
            else:
                await shelf.unload(name)
        except UserError as error:
            self.metrics.adapter(path, "refused")
            raise RequestError(400, str(error), "lora_name") from None
        except TimeoutError:
            self.metrics.adapter(path, "failed")
            raise RequestError(504, "lora_name: the engine did not load the adapter in time; try again.") from None
        except Exception as error:  # vLLM raises many types
            self.metrics.adapter(path, "failed")
            raise RequestError(500, f"lora_name: the engine failed ({error}); see the server's output.") from error
        self.metrics.adapter(path, "done")
        self.metrics.loaded.set(len(shelf.loaded))
        done = "loaded" if path == LOAD else "unloaded"
        await respond(send, 200, {"object": "adapter", "id": name, "status": done})

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Pass a checked request to vLLM, and keep its adapter until the response is complete."""
        admitted = self.service.admit(scope["path"], body)
        status = 500

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(with_length(scope, len(admitted.body)), once(admitted.body, receive), counted)
        finally:
            if admitted.adapter is not None:
                admitted.adapter.release()
            self.metrics.requests.labels(admitted.label, str(status)).inc()


class Metrics:
    """Prometheus metrics beside vLLM's, at GET /metrics."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge

        self.requests = Counter("align_requests", "Requests by model and HTTP status", ["model", "status"])
        self.changes = Counter("align_adapter_changes", "Adapters loaded and unloaded", ["change", "result"])
        self.loaded = Gauge("align_adapters", "Adapters that are loaded")

    def adapter(self, path: str, result: str) -> None:
        self.changes.labels("load" if path == LOAD else "unload", result).inc()


def once(body: bytes, receive: Receive) -> Receive:
    """Messages of a request whose body has been read: the body, then what the client sends later."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return next_message


def with_length(scope: Scope, length: int) -> Scope:
    """The scope with another content length."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


async def respond(send: Send, status: int, values: dict[str, Any]) -> None:
    body = json.dumps(values).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def respond_error(send: Send, error: RequestError) -> None:
    """An error in OpenAI's format."""
    kinds = {401: "authentication_error", 404: "not_found_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    values = {"message": error.message, "type": kind, "param": error.parameter, "code": error.status}
    with contextlib.suppress(ConnectionError):
        await respond(send, error.status, {"error": values})


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")
