"""A chat server on loopback that answers as planned."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Decide = Callable[[str, dict[str, Any]], "str | int"]
"""f(text of the user's message, request) -> the judge's text, or a status to fail with."""


@contextmanager
def server(decide: Decide, models: Sequence[str] = ("stub",)) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(URL, requests) of a chat server with some models. 100 characters of a prompt are 40 tokens; a verdict is 5."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": name} for name in models]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request | {"key": self.headers.get("Authorization"), "path": self.path})
            text = request["messages"][-1]["content"]
            said = decide(text, request)
            body: dict[str, Any] = {"error": {"message": "planned"}}
            if isinstance(said, str):
                usage = {"prompt_tokens": int(0.4 * len(text)), "completion_tokens": 5}
                body = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}], "usage": usage}
            self._send(200 if isinstance(said, str) else said, body)

        def _send(self, status: int, body: dict[str, Any]) -> None:
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_port}/v1", requests
        finally:
            found.shutdown()
            thread.join()
