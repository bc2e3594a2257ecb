"""State of a running server: its models, the checks of requests, and the proof before it accepts them."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.rollout.vllm_options import check_temperature
from align.serve.proof import BASE, Probed, first_problem, probe_prompt, widest
from align.serve.settings import ServeSettings
from align.serve.shelf import LoadedAdapter, Shelf
from align.serve.staging import Base

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
WITHOUT_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"})
"""Fields of OpenAI's interface that are accepted although they have no effect."""


class RequestError(Exception):
    """A request that is refused. status: The HTTP status; message: One sentence; parameter: The field, if any."""

    def __init__(self, status: int, message: str, parameter: str | None = None):
        super().__init__(message)
        self.status, self.message, self.parameter = status, message, parameter


@dataclass(frozen=True)
class Admitted:
    """A request that may run.

    body: JSON for vLLM's route, with the adapter's key as the model.
    label: Name of the model for metrics.
    adapter: The adapter, acquired for this request; None for the base model.
    """

    body: bytes
    label: str
    adapter: LoadedAdapter | None


class Service:
    """One server.

    expected: Log-probabilities of the reference by model; None skips the proof.
    stop_tokens: Tokens that end an answer in a chat.
    vocabulary: Number of token ids that prompts may have.
    no_tools: Why requests with tools are refused; None if they are served.
    failure: Why the server did not start, if it did not.
    """

    def __init__(
        self,
        settings: ServeSettings,
        base: Base,
        scratch: Path,
        *,
        expected: Mapping[str, Probed] | None,
        stop_tokens: Collection[int],
        vocabulary: int,
        no_tools: str | None,
    ):
        self.settings, self.base, self.scratch, self.expected = settings, base, scratch, expected
        self.stop_tokens, self.vocabulary, self.no_tools = list(stop_tokens), vocabulary, no_tools
        self.failure: str | None = None
        self.started = False
        self.created = int(time.time())
        self._engine: Any = None
        self._shelf: Shelf | None = None
        self._fields: dict[str, frozenset[str]] = {}

    @property
    def shelf(self) -> Shelf:
        assert self._shelf is not None
        return self._shelf

    async def start(self, state: Any) -> None:
        """Load the adapters and prove the models. state: vLLM's application state. Sets `failure` if that fails."""
        self._engine = state.engine_client
        prompt = probe_prompt(self.vocabulary)
        models = state.openai_serving_models
        self._shelf = Shelf(self.settings, self.base, self._engine, models, self.scratch, prompt)
        try:
            self.shelf.base_probed = await self.shelf.probed(None)
            for name, folder in self.settings.adapters.items():
                await self.shelf.load(name, folder)
            if self.expected is not None:
                await self._prove(self.expected)
        except UserError as error:
            self.failure = str(error)
            return
        except Exception as error:  # otherwise uvicorn would serve an application without a lifespan
            traceback.print_exc()
            self.failure = (
                f"{self.settings.checkpoint}: the engine failed at the first requests ({error}). Report this."
            )
            return
        self._fields = _request_fields()
        self.started = True

    async def _prove(self, expected: Mapping[str, Probed]) -> None:
        """Compare all models with the reference, in one batch of requests."""
        served = dict(zip(expected, await asyncio.gather(*(self._probe(name) for name in expected))))
        if problem := first_problem(served, expected, self.settings.dtype):
            raise UserError(
                f"{self.settings.checkpoint}: the server computes another function than the reference. {problem}. "
                "Serve a merged model, or pass --no-proof to serve nevertheless."
            )
        print(
            f"proof: {len(expected)} models on {len(self.shelf.probe)} tokens and their completions; log-probabilities "
            f"differ from transformers' by at most {widest(served, expected):.1e}",
            flush=True,
        )

    async def _probe(self, name: str) -> Probed:
        return await self.shelf.probed(None if name == BASE else self.shelf.loaded[name])

    async def is_healthy(self) -> bool:
        if not self.started:
            return False
        try:
            await self._engine.check_health()
        except Exception:  # vLLM raises several types for a dead engine
            return False
        return True

    def model_cards(self) -> list[dict[str, Any]]:
        """The models as OpenAI's GET /v1/models lists them."""
        shared = {"object": "model", "created": self.created, "owned_by": "align"}
        length = self.settings.rollout.max_model_length
        base = {"id": self.settings.name, **shared, "max_model_len": length, "parent": None}
        adapters = [
            {"id": name, **shared, "max_model_len": length, "parent": self.settings.name}
            for name in sorted(self.shelf.loaded)
        ]
        return [base, *adapters]

    def admit(self, path: str, body: bytes) -> Admitted:
        """Check a request and acquire its adapter. The caller releases it when the response is complete."""
        values = json_object(body)
        label = values.get("model")
        if not isinstance(label, str) or (label != self.settings.name and label not in self.shelf.loaded):
            raise RequestError(404, self._no_model(label), "model")
        if path in (CHAT, COMPLETIONS):
            self._check_fields(path, values)
        if path == CHAT:
            self._check_tools(values)
            given = values.get("stop_token_ids") or []
            if self.stop_tokens and not values.get("ignore_eos") and isinstance(given, list):
                values["stop_token_ids"] = [*given, *(token for token in self.stop_tokens if token not in given)]
        adapter = self.shelf.loaded.get(label)
        if adapter is not None:
            values["model"] = adapter.key
            adapter.acquire()
        return Admitted(json.dumps(values).encode(), label, adapter)

    def _no_model(self, label: object) -> str:
        served = ", ".join([self.settings.name, *sorted(self.shelf.loaded)])
        if label is None:
            return f"model: it is missing; send one of: {served}."
        return f"model: '{label}' is not served; send one of: {served}."

    def _check_fields(self, path: str, values: dict[str, Any]) -> None:
        unknown = sorted(set(values) - self._fields[path] - WITHOUT_EFFECT)
        if unknown:
            raise RequestError(400, f"{unknown[0]}: the server does not know this field; remove it.", unknown[0])
        for field in WITHOUT_EFFECT - self._fields[path]:
            values.pop(field, None)
        temperature = values.get("temperature")
        if isinstance(temperature, int | float):
            try:
                check_temperature(temperature)
            except UserError as error:
                raise RequestError(400, str(error), "temperature") from None

    def _check_tools(self, values: dict[str, Any]) -> None:
        if values.get("tools") and self.no_tools is not None:
            raise RequestError(400, f"tools: {self.no_tools}; leave tools out.", "tools")


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body."""
    try:
        values = json.loads(body)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise RequestError(400, "the body is not a JSON object; send one.")
    return values


def _request_fields() -> dict[str, frozenset[str]]:
    """Names of the fields that vLLM's routes know, by path."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    found = {}
    for path, kind in ((CHAT, ChatCompletionRequest), (COMPLETIONS, CompletionRequest)):
        aliases = {field.alias for field in kind.model_fields.values() if field.alias}
        found[path] = frozenset(kind.model_fields) | aliases
    return found
