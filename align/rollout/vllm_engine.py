"""vLLM in the trainer's process: weights are replaced in place, and the trainer's torch state is preserved."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.rollout import Rollout
from align.models.family import load_config
from align.models.lora.whole import whole
from align.rollout.base import (
    SLEEP_LEVEL,
    Completion,
    GenerationReport,
    SamplingSettings,
    SyncReport,
    WeightSource,
    check_prompts,
    completion_seed,
)
from align.rollout.routing import RoutingRecorder, checked_routing, moe_layers
from align.rollout.sync.send import InProcess, send_stream
from align.rollout.vllm_options import (
    check_model,
    check_temperature,
    engine_options,
    generation_stance,
    has_gpu,
    model_options,
    prepare_vllm,
    sampling_options,
)
from align.rollout.vllm_process import GROUPS, generation_threads, preserved_torch_state

STREAMED_AT_A_TIME = 4
"""Number of requests that `stream` keeps in vLLM, as a multiple of the sequences decoded at the same time."""


class VllmEngine:
    """`RolloutEngine` on an in-process vLLM.

    checkpoint: a folder in the published layout, or an adapter beside its base.
    rollout: the recipe's section: lengths, cache size, sequences per batch.
    dtype: float32 or bfloat16; float32 is faster on a CPU without AVX-512.
    seed: seed of the engine. Completions do not depend on it, only on the seed of their sampling settings.
    detokenizes: load the checkpoint's tokenizer into vLLM, which stop strings need; without it vLLM ignores them.
    """

    def __init__(self, checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int, detokenizes: bool = False):
        self.rollout = rollout
        self.detokenizes = detokenizes
        self._numbers = count()
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.last_generation: GenerationReport | None = None
        self.last_sync: SyncReport | None = None
        self._recorder: RoutingRecorder | None = None
        with whole(checkpoint) as folder, preserved_torch_state():
            check_model(folder, rollout, dtype=dtype)
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            prepare_vllm()
            self._has_gpu = has_gpu()
            GROUPS.enter()
            try:
                self._llm: Any = _start(folder, rollout, dtype, seed, detokenizes)
            except BaseException:
                GROUPS.leave()
                raise
            self._llm.update_weight_version("0")
            self._complete = True
            if rollout.return_routing:
                self._record_routing(moe_layers(load_config(folder)))

    def generate(self, prompts: list[list[int]], sampling: SamplingSettings) -> list[list[Completion]]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        check_prompts(prompts, sampling, self.rollout.max_model_length)
        check_temperature(sampling.temperature)
        if not self._complete:
            raise RuntimeError("the engine has no complete weights; update the weights before generating")
        requests, parameters = [], []
        for index, prompt in enumerate(prompts):
            for sample in range(sampling.n):
                options = sampling_options(sampling, completion_seed(sampling.seed, index, sample))
                # Tokens served from the prefix cache are not recomputed, so their routing cannot be recorded.
                parameters.append(SamplingParams(**options, skip_reading_prefix_cache=True if self._recorder else None))
                requests.append(TokensPrompt(prompt_token_ids=list(prompt)))
        started = time.perf_counter()
        with preserved_torch_state(), generation_stance(has_gpu=self._has_gpu):
            torch.set_num_threads(generation_threads())
            outputs = self._llm.generate(requests, parameters, use_tqdm=False)
        completions = [self._completion(output) for output in outputs]
        self.last_generation = GenerationReport(
            seconds=time.perf_counter() - started,
            completions=len(completions),
            prompt_tokens=sum(len(c.prompt_ids) for c in completions),
            completion_tokens=sum(len(c.token_ids) for c in completions),
            cached_tokens=sum(output.num_cached_tokens or 0 for output in outputs),
        )
        return [completions[i : i + sampling.n] for i in range(0, len(completions), sampling.n)]

    def stream(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (index of the prompt, vLLM's output) as the requests finish.

        parameters: vLLM's `SamplingParams` of each prompt. Requests that are not finished when the iterator is closed
        are aborted.
        """
        from vllm.inputs import TokensPrompt

        engine = self._llm.llm_engine
        waiting = iter(range(len(prompts)))
        running: dict[str, int] = {}
        try:
            while True:
                finished = []
                with preserved_torch_state(), generation_stance(has_gpu=self._has_gpu):
                    torch.set_num_threads(generation_threads())
                    for index in waiting:
                        number = f"stream-{next(self._numbers)}"
                        prompt = TokensPrompt(prompt_token_ids=list(prompts[index]))
                        engine.add_request(number, prompt, parameters[index])
                        running[number] = index
                        if len(running) >= STREAMED_AT_A_TIME * self.rollout.max_sequences:
                            break
                    if not running:
                        return
                    finished = [output for output in engine.step() if output.finished]
                for output in finished:
                    yield running.pop(output.request_id), output
        finally:
            if running:
                engine.abort_request(list(running))

    def update_weights(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        self._complete = False
        # A prefix computed with the old weights must not be used with the new ones.
        self.forget_prefixes()
        with preserved_torch_state():
            report = send_stream(
                named_tensors,
                InProcess(self._llm),
                version,
                bucket_mib=self.rollout.bucket_mib,
                dtype=self.dtype,
            )
        self._complete = True
        self.last_sync = report
        return report

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        with preserved_torch_state():
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not empty its prefix cache")

    def offer_weights(self, source: WeightSource) -> None:
        """No-op: this engine never restarts without the trainer."""

    def sleep(self) -> None:
        """Drop the weights and the cache; a no-op on a CPU or without `rollout.sleep`."""
        if self._sleeps():
            self._complete = False
            self._llm.sleep(level=SLEEP_LEVEL)

    def wake(self) -> None:
        if self._sleeps():
            self._llm.wake_up()

    def close(self) -> None:
        if self._llm is None:
            return
        with preserved_torch_state(), GROUPS.kept():
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            self._recorder = None
            GROUPS.leave()

    def cache_blocks(self) -> tuple[int, int]:
        """(number of blocks of the key/value cache, tokens per block)."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks, cache.block_size

    def _sleeps(self) -> bool:
        return bool(self._llm.llm_engine.vllm_config.model_config.enable_sleep_mode)

    def _record_routing(self, top_k: list[int]) -> None:
        self._moe_layers = top_k
        if self._llm.llm_engine.vllm_config.aux_output_config.enabled:
            return  # vLLM returns the routing itself
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._recorder = RoutingRecorder(runner, self._moe_layers)

    def _completion(self, output: Any) -> Completion:
        (sampled,) = output.outputs
        tokens = list(sampled.token_ids)
        if not tokens:
            raise RuntimeError(f"vLLM returned no tokens for a prompt ({sampled.finish_reason})")
        (span,) = sampled.weight_versions
        routing = None
        if self._recorder is not None:
            routing = self._recorder.take(output.request_id, len(output.prompt_token_ids) + len(tokens) - 1)
        elif self.rollout.return_routing:
            routing = checked_routing(sampled.routed_experts, self._moe_layers)
        return Completion(
            prompt_ids=list(output.prompt_token_ids),
            token_ids=tokens,
            logprobs=[at[token].logprob for at, token in zip(sampled.logprobs, tokens, strict=True)],
            finished=sampled.finish_reason == "stop",
            weight_version=int(span.version),
            routed_experts=routing,
        )


def _start(checkpoint: Path, rollout: Rollout, dtype: str, seed: int, detokenizes: bool) -> Any:
    from vllm import LLM

    options = engine_options(checkpoint, rollout, dtype=dtype, seed=seed, in_process=True)
    if detokenizes:
        options |= {"skip_tokenizer_init": False, "tokenizer": str(checkpoint)}
    return LLM(use_tqdm_on_load=False, **(options | model_options(checkpoint, dtype=dtype)))
