"""One vLLM server as its client sees it: requests with timeouts, and why it failed if it did."""

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
from align.rollout.base import Completion
from align.rollout.routing import checked_routing

MARK = "align"
"""A model name of every server that `align serve-rollout` starts; its other names are facts, `key=value`."""

QUICK_SECONDS = 10.0


class ServerFailure(Exception):
    """The server is gone, hangs, or failed by its own account: its work can be done by another."""


class Server:
    """A server's address, what it said about itself, and `failure`, None while it is usable."""

    def __init__(self, url: str):
        self.url = url
        address = urlsplit(url)
        self.host, self.port = address.hostname or "", address.port or 80
        self.facts: dict[str, str] = {}
        self.failure: str | None = "not asked yet"

    @property
    def is_local(self) -> bool:
        return self.host in ("127.0.0.1", "localhost")

    def call(self, method: str, path: str, body: Any = None, *, timeout: float = QUICK_SECONDS) -> Any:
        """The answer's JSON. A refused request (4xx) is the caller's mistake and a UserError."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
        except TimeoutError:
            raise ServerFailure(f"no answer in {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerFailure(str(error) or type(error).__name__) from None
        finally:
            connection.close()
        if answer.status == 200:
            return json.loads(text) if text else None
        message = _message(text)
        if answer.status == 404 and path != "/health":
            raise UserError(
                f"{self.url}{path.partition('?')[0]} does not exist; start the server with `align serve-rollout`."
            )
        if 400 <= answer.status < 500:
            raise UserError(f"the server at {self.url} refused a request: {message}")
        raise ServerFailure(message)

    def is_healthy(self) -> bool:
        try:
            self.call("GET", "/health", timeout=QUICK_SECONDS)
        except ServerFailure as failure:
            self.failure = str(failure)
            return False
        return True

    def read_facts(self) -> None:
        """What the server was started with; UserError if `align serve-rollout` did not start it."""
        models = self.call("GET", "/v1/models")["data"]
        names = [model["id"] for model in models]
        if MARK not in names:
            raise UserError(f"{self.url} is a server of something else; start one with `align serve-rollout`.")
        self.facts = dict(name.split("=", 1) for name in names if "=" in name)
        self.facts["max_model_length"] = str(models[0]["max_model_len"])
        self.facts["ranks"] = str(self.call("GET", "/get_world_size")["world_size"])

    def sleep(self, timeout: float) -> None:
        """Move the weights to host memory and drop the cache, where it was started for it."""
        if self.facts.get("sleeps") == "True":
            self.call("POST", "/sleep?level=1", timeout=timeout)

    def wake(self, timeout: float) -> None:
        """Take the memory back; nothing happens to one that is awake."""
        if self.facts.get("sleeps") == "True":
            self.call("POST", "/wake_up", timeout=timeout)

    def generate(
        self, prompt: list[int], sampling: dict[str, Any], label: str, *, timeout: float, top_k: list[int] | None
    ) -> Completion:
        """One completion by the weights of version `label`, RUN:VERSION; other weights are a ServerFailure.

        top_k: experts a token in each layer, where routing is wanted.
        """
        request = {"token_ids": prompt, "sampling_params": sampling}
        (choice,) = self.call("POST", "/inference/v1/generate", request, timeout=timeout)["choices"]
        if choice["finish_reason"] not in ("stop", "length") or not choice["token_ids"]:
            raise ServerFailure(f"a completion ended early ({choice['finish_reason']})")
        versions = [span["version"] for span in choice["weight_versions"]]
        if versions != [label]:
            raise ServerFailure(f"it holds weights {' and '.join(versions)} instead of {label}")
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
            weight_version=int(label.rpartition(":")[2]),
            routed_experts=routing,
        )


def everywhere(servers: Sequence[Server], action: Callable[[Server], object]) -> list[Server]:
    """Do the same on all servers at once; those that fail are marked, the others returned."""

    def attempt(server: Server) -> None:
        try:
            action(server)
        except ServerFailure as failure:
            server.failure = str(failure)

    with ThreadPoolExecutor(max_workers=max(1, len(servers))) as pool:
        list(pool.map(attempt, servers))
    return [server for server in servers if server.failure is None]


def _message(text: str) -> str:
    """The sentence in an error's body, which vLLM and FastAPI write in different places."""
    try:
        body = json.loads(text)
    except ValueError:
        return text.strip()[:500] or "no reason given"
    found = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    if isinstance(found, dict):
        found = found.get("message", found)
    return str(found)[:500]
