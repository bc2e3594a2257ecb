"""The adapters that a server holds: loading, replacing and unloading them while requests run.

Every request keeps its adapter until its response is complete. An adapter that was unloaded or replaced takes no new
requests, and leaves the engine after its last one.
"""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.serve.proof import COMPLETION, Probed, difference
from align.serve.settings import ServeSettings, require_name
from align.serve.staging import Base, check_adapter, stage_adapter

LOAD_SECONDS = 600.0
"""Seconds after which loading an adapter counts as failed."""


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter in the engine.

    folder: The user's folder.
    request: vLLM's `LoRARequest`.
    moves: False if its B is zero.
    running: Number of requests that use it.
    idle: Set while no request uses it.
    """

    name: str
    folder: Path
    request: Any
    moves: bool
    running: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def key(self) -> str:
        """Name in vLLM's table of models, which clients cannot send: their names have no control characters."""
        return f"{self.name}\x1f{self.request.lora_int_id}"

    def acquire(self) -> None:
        self.running += 1
        self.idle.clear()

    def release(self) -> None:
        self.running -= 1
        if not self.running:
            self.idle.set()


class Shelf:
    """Adapters of one engine, by name.

    engine: vLLM's engine client.
    models: vLLM's table of models, from which its routes take an adapter by `LoadedAdapter.key`.
    scratch: Folder of the copies that vLLM loads.
    probe: Token ids of the prompt that each loaded adapter scores first.
    """

    def __init__(self, settings: ServeSettings, base: Base, engine: Any, models: Any, scratch: Path, probe: list[int]):
        self.settings, self.base, self.engine, self.models, self.scratch = settings, base, engine, models, scratch
        self.probe = probe
        self.loaded: dict[str, LoadedAdapter] = {}
        self.leaving: set[LoadedAdapter] = set()
        self.base_probed: Probed | None = None
        self._numbers = count(1)
        self._probes = count(1)
        self._lock = asyncio.Lock()

    async def load_by_name(self, name: str, folder_name: str | None, *, replace: bool) -> LoadedAdapter:
        """Load an adapter from `adapters_dir`. folder_name: Its folder there, by default its name."""
        return await self.load(name, self.folder_of(folder_name or name), replace=replace)

    def folder_of(self, name: str) -> Path:
        """The folder with this name in `adapters_dir`. Other folders, also behind links, are refused."""
        root = self.settings.adapters_dir
        if root is None:
            raise UserError("the server loads no adapters while it runs; start it with --adapters-dir.")
        require_name(name, "lora_path")
        folder = root / name
        if not folder.resolve().is_relative_to(root.resolve()):
            raise UserError(f"lora_path: '{name}' is a link out of the adapters' folder; copy the adapter into it.")
        if not folder.is_dir():
            raise UserError(f"lora_path: the adapters' folder has no '{name}'; copy the adapter into it.")
        return folder

    async def load(self, name: str, folder: Path, *, replace: bool = False) -> LoadedAdapter:
        """Check an adapter and load it into the engine; UserError if it cannot be served or there is no room."""
        require_name(name, "lora_name")
        if name == self.settings.name:
            raise UserError(f"lora_name: '{name}' is the base model; give the adapter another name.")
        async with self._lock:
            before = self.loaded.get(name)
            if before is not None and not replace:
                raise UserError(f"lora_name: '{name}' is loaded; unload it first, or send load_inplace: true.")
            if before is None and len(self.loaded) >= self.settings.max_adapters:
                raise UserError(
                    f"lora_name: the server holds {len(self.loaded)} adapters, the maximum (--max-adapters); unload "
                    "one first."
                )
            if len(self.loaded) + len(self.leaving) > self.settings.max_adapters:
                raise UserError("lora_name: requests still use an adapter that was unloaded; try again later.")
            async with asyncio.timeout(LOAD_SECONDS):
                adapter = await self._into_engine(name, folder)
            self.loaded[name] = adapter
            self.models.lora_requests[adapter.key] = adapter.request
            if before is not None:
                self.leaving.add(before)
        if before is not None:
            await asyncio.shield(asyncio.ensure_future(self._leave(before)))
        return adapter

    async def _into_engine(self, name: str, folder: Path) -> LoadedAdapter:
        from vllm.lora.request import LoRARequest

        number = next(self._numbers)
        staged = self.scratch / str(number)
        try:
            moves = await asyncio.to_thread(self._prepare, folder, staged)
            # Each copy has a path of its own, which is part of the prefix cache's key.
            request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(staged))
            adapter = LoadedAdapter(name, folder, request, moves)
            try:
                await self.engine.add_lora(request)
                self._require_effect(adapter, await self.probed(adapter))
            except BaseException:
                await self.engine.remove_lora(number)
                raise
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        return adapter

    def _prepare(self, folder: Path, staged: Path) -> bool:
        try:
            return stage_adapter(check_adapter(folder, self.base, self.settings.max_rank), self.base, staged)
        except OSError as error:
            raise UserError(f"{folder}: it cannot be read or copied ({error.strerror}); check the files.") from error

    def _require_effect(self, adapter: LoadedAdapter, probed: Probed) -> None:
        """Raise UserError unless the engine computes finite values that differ from the base model's."""
        if not probed.is_finite:
            raise UserError(f"{adapter.folder}: the model's log-probabilities with it are not finite; use another one.")
        if self.base_probed is None or not adapter.moves or self.base.dtype.itemsize < 4:
            return
        if difference(self.base_probed, probed)[0] == 0:
            raise UserError(
                f"{adapter.folder}: the engine loaded it, but its log-probabilities are the base model's; report this."
            )

    async def unload(self, name: str) -> None:
        """Remove an adapter; returns after its last request."""
        async with self._lock:
            adapter = self.loaded.pop(name, None)
            if adapter is None:
                held = ", ".join(sorted(self.loaded)) or "none"
                raise UserError(f"lora_name: '{name}' is not loaded; loaded adapters: {held}.")
            self.leaving.add(adapter)
        await asyncio.shield(asyncio.ensure_future(self._leave(adapter)))

    async def _leave(self, adapter: LoadedAdapter) -> None:
        await adapter.idle.wait()
        self.models.lora_requests.pop(adapter.key, None)
        async with self._lock:
            await self.engine.remove_lora(adapter.request.lora_int_id)
            self.leaving.discard(adapter)
        shutil.rmtree(adapter.request.lora_path, ignore_errors=True)

    async def probed(self, adapter: LoadedAdapter | None) -> Probed:
        """Log-probabilities of the probe prompt and its greedy completion; None: of the base model."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        sampling = SamplingParams(
            max_tokens=COMPLETION, temperature=0, logprobs=0, prompt_logprobs=0, ignore_eos=True, detokenize=False
        )
        prompt, request = TokensPrompt(prompt_token_ids=self.probe), adapter.request if adapter else None
        number = f"probe-{next(self._probes)}"
        outputs = [output async for output in self.engine.generate(prompt, sampling, number, lora_request=request)]
        if not outputs:
            raise RuntimeError("the engine ended a probe without a result")
        # vLLM returns the prompt's log-probabilities with the first output, and all tokens so far with each.
        last = outputs[-1]
        (sampled,) = last.outputs
        prompt_logprobs = [at[token].logprob for at, token in zip(last.prompt_logprobs[1:], self.probe[1:])]
        completion = [at[token].logprob for at, token in zip(sampled.logprobs, sampled.token_ids)]
        return Probed(prompt_logprobs, list(sampled.token_ids), completion)
