"""How our vLLM engines are set up, in the trainer's process and as servers alike."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from align.config.rollout import Rollout
from align.errors import UserError, missing_dependency
from align.rollout.base import SamplingSettings

# vLLM silently raises smaller temperatures to this one and so samples from another distribution than asked.
LOWEST_TEMPERATURE = 0.01
CPU_BLOCK = 32
CPU_BATCH_TOKENS = 4096


def prepare_vllm() -> None:
    """Environment, plugin and model class; vLLM reads the environment when it is imported or started.

    A user who sets VLLM_LOGGING_LEVEL sees its log.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # This variable holds whole GiB only and would override `cache_gib`.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    quiet = "VLLM_LOGGING_LEVEL" not in os.environ
    if quiet:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    try:
        from vllm.plugins import load_general_plugins
    except ImportError as error:
        raise missing_dependency("vllm", "the rollout engine 'vllm'", "pip install .[cpu]") from error
    if quiet:
        logging.getLogger("vllm").setLevel(logging.ERROR)
    from align.models.family import FAMILIES

    load_general_plugins()
    for family in FAMILIES.values():
        family.prepare_vllm()


def engine_options(checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's engine; call `prepare_vllm` first."""
    from vllm.platforms import current_platform

    has_gpu = not current_platform.is_cpu()
    options: dict[str, Any] = {
        "model": str(checkpoint),
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "seed": seed,
        "max_model_len": rollout.max_model_length,
        "max_num_seqs": rollout.max_sequences,
        "kv_cache_memory_bytes": int(rollout.cache_gib * 2**30),
        "enforce_eager": True,
        "enable_prefix_caching": rollout.prefix_caching,
        # The log-probabilities of the distribution that is sampled: after the temperature.
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "weight_transfer_config": {"backend": "align_host"},
    }
    if not has_gpu:
        # vLLM's default on a CPU is 128, so that shorter prompts would share nothing; its kernel wants multiples of 32.
        options["block_size"] = CPU_BLOCK
        # A prompt computed in pieces draws a token that is thrown away after each, and vLLM 0.32 then rewinds the
        # request's generator, which it can on a GPU only ("CPU Generator does not use offset").
        options |= {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCH_TOKENS, rollout.max_model_length),
        }
    if rollout.sleep and has_gpu:
        options["enable_sleep_mode"] = True
    if rollout.return_routing and has_gpu:
        # vLLM's own capture, which only its second model runner has and which stores routing beside cached prefixes.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        options |= {"enable_return_routed_experts": True, "enable_prefix_caching": True}
    return options


def sampling_options(sampling: SamplingSettings, seed: int) -> dict[str, Any]:
    """vLLM's `SamplingParams` for one completion, the same in the process and over HTTP."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": seed,
        "stop_token_ids": list(sampling.stop_token_ids),
        # Only our stop tokens count, not those of the checkpoint's configuration.
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }


def check_temperature(temperature: float) -> None:
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise UserError(
            f"temperature {temperature} is below vLLM's lowest, {LOWEST_TEMPERATURE}: use 0 for greedy decoding."
        )


def check_checkpoint(checkpoint: Path, rollout: Rollout) -> None:
    """Refuse what vLLM would refuse later and less clearly."""
    path = checkpoint / "config.json"
    if not path.exists():
        raise UserError(f"'{checkpoint}' is not a checkpoint: it has no config.json.")
    longest = json.loads(path.read_text(encoding="utf-8")).get("max_position_embeddings")
    if longest is not None and rollout.max_model_length > longest:
        raise UserError(
            f"rollout.max_model_length {rollout.max_model_length} exceeds the model's "
            f"max_position_embeddings {longest}."
        )
    # Without an index vLLM reads every safetensors file of the folder as part of the model.
    stray = sorted(file.name for file in checkpoint.glob("*.safetensors") if file.name != "model.safetensors")
    if stray and not (checkpoint / "model.safetensors.index.json").exists():
        raise UserError(f"'{checkpoint}' holds {stray[0]} beside the model: keep it in a folder of its own.")
