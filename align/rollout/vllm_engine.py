"""vLLM inside the trainer's process: weights are replaced in place, the trainer's torch stays as it was."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from align.config.rollout import Rollout
from align.rollout.base import (
    Completion,
    GenerationReport,
    SamplingSettings,
    SyncReport,
    WeightSource,
    check_prompts,
    completion_seed,
)
from align.rollout.routing import RoutingRecorder, checked_routing, moe_layers
from align.rollout.sync.send import InProcess, send_weights
from align.rollout.vllm_options import (
    check_checkpoint,
    check_temperature,
    engine_options,
    prepare_vllm,
    sampling_options,
)


class VllmEngine:
    """`RolloutEngine` on an in-process vLLM.

    checkpoint: a folder in the published layout. rollout: lengths, cache and batch. dtype: float32 or
    bfloat16 (float32 is the faster one on a CPU without AVX-512). seed: vLLM's own; a completion depends on
    its settings'.
    """

    def __init__(self, checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int):
        self.rollout = rollout
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.last_generation: GenerationReport | None = None
        self.last_sync: SyncReport | None = None
        self._recorder: RoutingRecorder | None = None
        check_checkpoint(checkpoint, rollout)
        with undisturbed_torch():
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            prepare_vllm()
            GROUPS.enter()
            try:
                self._llm: Any = _start(checkpoint, rollout, dtype, seed)
            except BaseException:
                GROUPS.leave()
                raise
            self._llm.update_weight_version("0")
            self._complete = True
            if rollout.return_routing:
                self._record_routing()

    def generate(self, prompts: list[list[int]], sampling: SamplingSettings) -> list[list[Completion]]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        check_prompts(prompts, sampling, self.rollout.max_model_length)
        check_temperature(sampling.temperature)
        if not self._complete:
            raise RuntimeError("the last update of the weights broke off; update them before generating")
        requests, parameters = [], []
        for index, prompt in enumerate(prompts):
            for sample in range(sampling.n):
                options = sampling_options(sampling, completion_seed(sampling.seed, index, sample))
                # Tokens that are read from the cache are routed nowhere that could be recorded.
                parameters.append(SamplingParams(**options, skip_reading_prefix_cache=True if self._recorder else None))
                requests.append(TokensPrompt(prompt_token_ids=list(prompt)))
        started = time.perf_counter()
        # force_eager: vLLM compiles one tiny sampling function at its first use, 20 s on two cores.
        with undisturbed_torch(), torch.compiler.set_stance("force_eager"):
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

    def update_weights(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        self._complete = False
        with undisturbed_torch():
            # A prefix cached under the old weights must not outlive them.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not empty its prefix cache")
            report = send_weights(
                named_tensors,
                InProcess(self._llm),
                version,
                bucket_mib=self.rollout.bucket_mib,
                dtype=self.dtype,
            )
        self._complete = True
        self.last_sync = report
        return report

    def offer_weights(self, source: WeightSource) -> None:
        """Not needed: this engine lives and dies with the trainer."""

    def sleep(self) -> None:
        """Move the weights to host memory and drop the cache (GPU, with `rollout.sleep`; else nothing happens)."""
        if self._sleeps():
            self._llm.sleep(level=1)

    def wake(self) -> None:
        if self._sleeps():
            self._llm.wake_up()

    def close(self) -> None:
        if self._llm is None:
            return
        with undisturbed_torch(), GROUPS.kept():
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            self._recorder = None
            GROUPS.leave()

    def cache_blocks(self) -> tuple[int, int]:
        """Blocks of the key/value cache, and tokens in a block."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks, cache.block_size

    def _sleeps(self) -> bool:
        return bool(self._llm.llm_engine.vllm_config.model_config.enable_sleep_mode)

    def _record_routing(self) -> None:
        self._moe_layers = moe_layers(self._llm.llm_engine.vllm_config.model_config.hf_config)
        if self._llm.llm_engine.vllm_config.aux_output_config.enabled:
            return  # vLLM returns it itself
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._recorder = RoutingRecorder(runner)

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


def generation_threads() -> int:
    """OMP_NUM_THREADS, else one.

    Decoding is thousands of tiny operations, and threads that wait for each other spin: measured on two cores
    that other processes also use, a model of 5M parameters gives 1,640 tokens/s with one thread and 97 with
    two.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(value) if value.isdigit() and int(value) > 0 else 1


@contextmanager
def undisturbed_torch() -> Iterator[None]:
    """Give the trainer its torch back: thread count, random states, `torch.set_num_threads`.

    vLLM seeds the global generators and draws from them, and on a CPU changes the thread count and replaces
    `torch.set_num_threads` by a function that does nothing. (It does the same to `torch.accelerator`'s
    `synchronize` and `empty_cache`, which fail without an accelerator; those stay: vLLM calls them until the
    process ends.)
    """
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


def _start(checkpoint: Path, rollout: Rollout, dtype: str, seed: int) -> Any:
    from vllm import LLM

    return LLM(use_tqdm_on_load=False, **engine_options(checkpoint, rollout, dtype=dtype, seed=seed))


class ProcessGroups:
    """Who uses vLLM's process groups, which are the process's and not an engine's.

    An engine that ends takes all of them down, torch's own included: under torchrun the trainer's, and another
    engine's where there are two. Here the last engine takes down vLLM's, and torch's only if vLLM made it.
    """

    def __init__(self) -> None:
        self._engines = 0
        self._of_the_trainer = False

    def enter(self) -> None:
        if not self._engines:
            self._of_the_trainer = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._engines += 1

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within it, an engine that shuts down leaves the groups alone."""
        from vllm.v1.engine import core

        cleanup = core.cleanup_dist_env_and_memory
        core.cleanup_dist_env_and_memory = lambda *_, **__: None
        try:
            yield
        finally:
            core.cleanup_dist_env_and_memory = cleanup

    def leave(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory, destroy_model_parallel

        self._engines -= 1
        if self._engines:
            return
        if self._of_the_trainer:
            destroy_model_parallel()
        else:
            cleanup_dist_env_and_memory()


GROUPS = ProcessGroups()
