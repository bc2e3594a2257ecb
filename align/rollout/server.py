"""Client of one rollout server: HTTP requests with timeouts, and the reason for the server's failure, if any."""

from __future__ import annotations

import base64
import http.client
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy

from align.errors import UserError
from align.rollout.base import SLEEP_LEVEL, Completion
from align.rollout.routing import checked_routing

MARK = "align"
"""Model name of every server of `align serve-rollout`. Its other model names state its settings as `key=value`."""

QUICK_SECONDS = 10.0
"""Timeout in seconds of requests that need no computation."""


class ServerFailure(Exception):
    """The server is unreachable, hangs or reports an internal error; another server can take over its requests."""


class Server:
    """One rollout server.

    url: address, http://HOST:PORT.
    facts: the server's settings as it reports them, such as dtype and transfer.
    failure: reason why the server cannot be used; None while it can.
    connections: number of times that the client has connected to it. After a new connection, an NCCL communicator must
        be created again, because the server may have been restarted.
    """

    def __init__(self, url: str):
        self.url = url
        address = urlsplit(url)
        self.host, self.port = address.hostname or "", address.port or 80
        self.facts: dict[str, str] = {}
        self.failure: str | None = "not connected yet"
        self.connections = 0

    @property
    def is_local(self) -> bool:
        return self.host in ("127.0.0.1", "localhost")

    @property
    def sleeps(self) -> bool:
        """True if it was started with `--sleep`, on a GPU."""
        return self.facts.get("sleeps") == "True"

    def call(self, method: str, path: str, body: Any = None, *, timeout: float = QUICK_SECONDS) -> Any:
        """Send a request and return the JSON of the response.

        A refused request (4xx) is the caller's mistake and raises UserError; every other fault raises ServerFailure.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        except TimeoutError:
            raise ServerFailure(f"no response within {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerFailure(getattr(error, "strerror", None) or str(error) or type(error).__name__) from None
        finally:
            connection.close()
        if response.status == 200:
            return json.loads(text) if text else None
        message = _error_message(text)
        if response.status == 404 and path != "/health":
            raise UserError(
                f"{self.url}: it has no {path.partition('?')[0]}, so it is not an align rollout server. Start one with "
                "`align serve-rollout`."
            )
        if 400 <= response.status < 500:
            raise UserError(f"{self.url}: the rollout server refused a request: {message}")
        raise ServerFailure(message)

    def is_healthy(self) -> bool:
        try:
            self.call("GET", "/health", timeout=QUICK_SECONDS)
        except ServerFailure as failure:
            self.failure = str(failure)
            return False
        return True

    def read_facts(self) -> None:
        """Read the server's settings into `facts`; raises UserError if it is not an align rollout server."""
        models = self.call("GET", "/v1/models")["data"]
        names = [model["id"] for model in models]
        if MARK not in names:
            raise UserError(f"{self.url}: it is not an align rollout server. Start one with `align serve-rollout`.")
        self.facts = dict(name.split("=", 1) for name in names if "=" in name)
        self.facts["max_model_length"] = str(models[0]["max_model_len"])
        self.facts["ranks"] = str(self.call("GET", "/get_world_size")["world_size"])

    def sleep(self, timeout: float) -> None:
        """Drop the weights and the cache; a no-op for a server started without `--sleep`."""
        if self.sleeps:
            self.call("POST", f"/sleep?level={SLEEP_LEVEL}", timeout=timeout)

    def wake(self, timeout: float) -> None:
        """Allocate the GPU memory again; a no-op for a server that is awake or was started without `--sleep`."""
        if self.sleeps:
            self.call("POST", "/wake_up", timeout=timeout)

    def generate(
        self, prompt: list[int], sampling: dict[str, Any], version: str, *, timeout: float, top_k: list[int] | None
    ) -> Completion:
        """Generate one completion; raises ServerFailure if the server's weights are not `version` (RUN:NUMBER).

        top_k: experts per token in each layer; None if the routing is not needed.
        """
        request = {"token_ids": prompt, "sampling_params": sampling}
        (choice,) = self.call("POST", "/inference/v1/generate", request, timeout=timeout)["choices"]
        if choice["finish_reason"] not in ("stop", "length") or not choice["token_ids"]:
            raise ServerFailure(f"a completion ended early ({choice['finish_reason']})")
        versions = [span["version"] for span in choice["weight_versions"]]
        if versions != [version]:
            raise ServerFailure(f"it has weights {' and '.join(versions)} instead of {version}")
        routing = None
        if top_k is not None:
            array = choice["routed_experts"]
            returned = None if array is None else numpy.load(io.BytesIO(base64.b64decode(array)), allow_pickle=False)
            routing = checked_routing(returned, top_k)
        return Completion(
            prompt_ids=prompt,
            token_ids=choice["token_ids"],
            logprobs=[entry["logprob"] for entry in choice["logprobs"]["content"]],
            finished=choice["finish_reason"] == "stop",
            weight_version=int(version.rpartition(":")[2]),
            routed_experts=routing,
        )


def on_all(servers: Sequence[Server], action: Callable[[Server], object]) -> list[Server]:
    """Run `action` on all servers in parallel, mark those that fail, and return the others."""

    def attempt(server: Server) -> None:
        try:
            action(server)
        except ServerFailure as failure:
            server.failure = str(failure)

    with ThreadPoolExecutor(max_workers=max(1, len(servers))) as pool:
        list(pool.map(attempt, servers))
    return [server for server in servers if server.failure is None]


def _error_message(text: str) -> str:
    """The message in an error response, for which vLLM and FastAPI use different keys."""
    try:
        body = json.loads(text)
    except ValueError:
        return text.strip()[:500] or "no reason given"
    found = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    if isinstance(found, dict):
        found = found.get("message", found)
    return str(found)[:500]
