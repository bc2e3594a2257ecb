"""vLLM inside the trainer's process: weights are replaced in place, the trainer's torch stays as it was."""

from __future__ import annotations

import json
import logging
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
from align.errors import UserError, missing_dependency
from align.rollout.base import Completion, SamplingSettings, SyncReport, check_prompts, completion_seed

# vLLM silently raises smaller temperatures to this one and so samples from another distribution than asked.
LOWEST_TEMPERATURE = 0.01


class VllmEngine:
    """`RolloutEngine` on an in-process vLLM.

    checkpoint: a folder in the published layout. rollout: lengths, cache and batch. dtype: float32 or
    bfloat16 (float32 is the faster one on a CPU without AVX-512). seed: vLLM's own; a completion depends on
    its settings'.
    """

    def __init__(self, checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int):
        self.max_length = rollout.max_model_length
        self.version = 0
        _check_checkpoint(checkpoint, rollout)
        with undisturbed_torch():
            self._owns_process_group = not _process_group_exists()
            self._llm: Any = _start(checkpoint, rollout, dtype, seed)

    def generate(self, prompts: list[list[int]], sampling: SamplingSettings) -> list[list[Completion]]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        check_prompts(prompts, sampling, self.max_length)
        if 0 < sampling.temperature < LOWEST_TEMPERATURE:
            raise UserError(
                f"temperature {sampling.temperature} is below vLLM's lowest, {LOWEST_TEMPERATURE}: "
                "use 0 for greedy decoding."
            )
        requests, parameters = [], []
        for index, prompt in enumerate(prompts):
            for sample in range(sampling.n):
                requests.append(TokensPrompt(prompt_token_ids=list(prompt)))
                parameters.append(
                    SamplingParams(
                        max_tokens=sampling.max_new_tokens,
                        temperature=sampling.temperature,
                        seed=completion_seed(sampling.seed, index, sample),
                        stop_token_ids=list(sampling.stop_token_ids),
                        # Only our stop tokens count, not those of the checkpoint's configuration.
                        ignore_eos=True,
                        logprobs=0,
                        detokenize=False,
                    )
                )
        # force_eager: vLLM compiles one tiny sampling function at its first use, 20 s on two cores.
        with undisturbed_torch(), torch.compiler.set_stance("force_eager"):
            torch.set_num_threads(generation_threads())
            outputs = self._llm.generate(requests, parameters, use_tqdm=False)
        completions = [self._completion(output) for output in outputs]
        return [completions[i : i + sampling.n] for i in range(0, len(completions), sampling.n)]

    def update_weights(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        start = time.perf_counter()
        size = 0

        def counted() -> Iterator[tuple[str, Tensor]]:
            nonlocal size
            for name, tensor in named_tensors:
                size += tensor.numel() * tensor.element_size()
                yield name, tensor

        # Not vLLM's `reload_weights`, which replaces and repacks parameters: ours are read live, a copy is
        # enough.
        def load(model: Any) -> None:
            model.load_weights(counted())

        with undisturbed_torch():
            self._llm.apply_model(load)
        self.version = version
        return SyncReport(size, time.perf_counter() - start, version)

    def close(self) -> None:
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        with undisturbed_torch():
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            if self._owns_process_group:
                cleanup_dist_env_and_memory()

    def cache_blocks(self) -> tuple[int, int]:
        """Blocks of the key/value cache, and tokens in a block."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks, cache.block_size

    def _completion(self, output: Any) -> Completion:
        (sampled,) = output.outputs
        tokens = list(sampled.token_ids)
        return Completion(
            prompt_ids=list(output.prompt_token_ids),
            token_ids=tokens,
            logprobs=[at[token].logprob for at, token in zip(sampled.logprobs, tokens, strict=True)],
            finished=sampled.finish_reason == "stop",
            weight_version=self.version,
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


def _start(checkpoint: Path, rollout: Rollout, dtype: Any, seed: int) -> Any:
    # Read by vLLM when it is imported or started. A user who sets VLLM_LOGGING_LEVEL sees its log.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # This variable holds whole GiB only and would override `cache_gib`.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    quiet = "VLLM_LOGGING_LEVEL" not in os.environ
    if quiet:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    try:
        from vllm import LLM, ModelRegistry
        from vllm.plugins import load_general_plugins
    except ImportError as error:
        raise missing_dependency("vllm", "the rollout engine 'vllm'", "pip install .[cpu]") from error
    if quiet:
        logging.getLogger("vllm").setLevel(logging.ERROR)
    from align.models.hunyuan import vllm_plugin
    from align.models.hunyuan.vllm import HunYuanForCausalLM

    # The plugin registers the class by name, which vLLM then inspects in a second process. Here it is at
    # hand.
    load_general_plugins()
    vllm_plugin.register()
    ModelRegistry.register_model(vllm_plugin.ARCHITECTURE, HunYuanForCausalLM)
    return LLM(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        dtype=dtype,
        seed=seed,
        max_model_len=rollout.max_model_length,
        max_num_seqs=rollout.max_sequences,
        kv_cache_memory_bytes=int(rollout.cache_gib * 2**30),
        enforce_eager=True,
        # A prefix cached under old weights would outlive an update.
        enable_prefix_caching=False,
        # The log-probabilities of the distribution that is sampled: after the temperature.
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        use_tqdm_on_load=False,
    )


def _check_checkpoint(checkpoint: Path, rollout: Rollout) -> None:
    path = checkpoint / "config.json"
    if not path.exists():
        raise UserError(f"'{checkpoint}' is not a checkpoint: it has no config.json.")
    longest = json.loads(path.read_text()).get("max_position_embeddings")
    if longest is not None and rollout.max_model_length > longest:
        raise UserError(
            f"rollout.max_model_length {rollout.max_model_length} exceeds the model's "
            f"max_position_embeddings {longest}."
        )
    # Without an index vLLM reads every safetensors file of the folder as part of the model.
    stray = sorted(file.name for file in checkpoint.glob("*.safetensors") if file.name != "model.safetensors")
    if stray and not (checkpoint / "model.safetensors.index.json").exists():
        raise UserError(f"'{checkpoint}' holds {stray[0]} beside the model: keep it in a folder of its own.")


def _process_group_exists() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
