"""Settings of vLLM engines, the same in the trainer's process and in a server."""

from __future__ import annotations

import json
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from align.config.rollout import CPU_CACHE_GIB, Rollout
from align.errors import UserError, missing_dependency
from align.models.adopted.vllm_fields import vllm_fields
from align.rollout.base import SamplingSettings
from align.rollout.refusals import REMEDY, Engine, refusal
from align.rollout.vllm_plugin import register

LOWEST_TEMPERATURE = 0.01
"""vLLM silently raises lower temperatures to this value, which changes the sampled distribution."""
CPU_BLOCK = 32
"""Tokens per cache block on a CPU; vLLM's kernel needs a multiple of 32."""
CPU_BATCH_TOKENS = 4096
STATEFUL = {"conv", "linear_attention"}
"""Kinds of layers with a state of fixed size instead of a key/value cache."""
LEAST_UTILIZATION = 0.01
"""Value of gpu_memory_utilization that is small enough to pass vLLM's check of the free memory."""
BESIDE_TRAINER, ALONE = 0.5, 0.9
"""Share of the free GPU memory that an engine in this process takes: BESIDE_TRAINER if torch has reserved GPU memory in
the process, otherwise ALONE."""


def prepare_vllm() -> None:
    """Set vLLM's environment variables and register our plugin and model classes.

    vLLM reads the environment when it is imported and when an engine starts. Its log is hidden unless the user sets
    VLLM_LOGGING_LEVEL.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # This variable takes whole GiB only and would override `cache_gib`.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    quiet = "VLLM_LOGGING_LEVEL" not in os.environ
    if quiet:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    try:
        from vllm.plugins import load_general_plugins
    except ImportError as error:
        raise missing_dependency("vllm", "the rollout engine 'vllm'", "pip install 'align-moe[cpu]'") from error
    if quiet:
        logging.getLogger("vllm").setLevel(logging.ERROR)
    load_general_plugins()
    register()  # vLLM finds the plugin only where align is installed


def has_gpu() -> bool:
    """True unless vLLM computes on the CPU."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def engine_options(
    checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int, in_process: bool = False
) -> dict[str, Any]:
    """Arguments of vLLM's engine. Call `prepare_vllm` first.

    in_process: the engine runs in the trainer's process.
    """
    gpu = has_gpu()
    options: dict[str, Any] = {
        "model": str(checkpoint),
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "seed": seed,
        "max_model_len": rollout.max_model_length,
        "max_num_seqs": rollout.max_sequences,
        "enforce_eager": True,
        "enable_prefix_caching": rollout.prefix_caching,
        # Log-probabilities of the sampled distribution, that is, after the temperature.
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "weight_transfer_config": {"backend": "align_host"},
        **cache_options(rollout, has_gpu=gpu, in_process=in_process),
    }
    if not gpu:
        # vLLM's default on a CPU is 128 tokens. Smaller blocks share more of a prompt, because only whole blocks are
        # shared.
        options["block_size"] = CPU_BLOCK
        # With chunked prefill, vLLM 0.32 draws and discards a token after each chunk of a prompt and then rewinds the
        # request's generator, which works only on a GPU ("CPU Generator does not use offset").
        options |= {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCH_TOKENS, rollout.max_model_length),
        }
    if rollout.sleep and gpu:
        options["enable_sleep_mode"] = True
    if rollout.return_routing and gpu:
        # Only vLLM's V2 model runner records the routing. It also keeps the routing of cached prefixes.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        options |= {"enable_return_routed_experts": True, "enable_prefix_caching": True}
    return options


def cache_options(rollout: Rollout, *, has_gpu: bool, in_process: bool) -> dict[str, Any]:
    """Options for the size of the key/value cache.

    Empty if vLLM's default applies: 92 % of the GPU for weights and cache.
    """
    if not has_gpu:
        return {"kv_cache_memory_bytes": int((rollout.cache_gib or CPU_CACHE_GIB) * 2**30)}
    if rollout.cache_gib is not None:
        # vLLM refuses to start unless the share gpu_memory_utilization of the GPU is free (0.92 by default), even if
        # the cache size is set. On a GPU of the trainer, less is free.
        return {"kv_cache_memory_bytes": int(rollout.cache_gib * 2**30), "gpu_memory_utilization": LEAST_UTILIZATION}
    if not in_process:
        return {}
    free, total = torch.cuda.mem_get_info()
    share = BESIDE_TRAINER if torch.cuda.memory_reserved() else ALONE
    return {"gpu_memory_utilization": share * free / total}


def generation_stance(*, has_gpu: bool) -> AbstractContextManager[Any]:
    """Context for generation in the trainer's process.

    On a CPU nothing is compiled: vLLM would compile one tiny sampling function at its first use, 20 s on two cores. On
    a GPU some attention kernels must be compiled.
    """
    return nullcontext() if has_gpu else torch.compiler.set_stance("force_eager")


def sampling_options(sampling: SamplingSettings, seed: int) -> dict[str, Any]:
    """vLLM's `SamplingParams` for one completion, the same in-process and over HTTP."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": seed,
        "stop_token_ids": list(sampling.stop_token_ids),
        # Only `stop_token_ids` end a completion, not the end-of-sequence tokens of the checkpoint's configuration.
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }


def check_temperature(temperature: float) -> None:
    """Raise UserError for a temperature that vLLM would silently change."""
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise UserError(
            f"temperature {temperature}: it is below vLLM's lowest, {LOWEST_TEMPERATURE}. Set it to 0 for greedy "
            f"decoding, or to at least {LOWEST_TEMPERATURE}."
        )


def model_options(checkpoint: Path, *, dtype: str) -> dict[str, Any]:
    """Arguments of vLLM's engine that depend on the checkpoint's family."""
    config = _config(checkpoint)
    options: dict[str, Any] = {}
    if fields := vllm_fields(config):
        options["hf_overrides"] = fields
    if dtype == "float32" and getattr(config, "kv_lora_rank", None) and not has_gpu():
        # On a CPU with AMX vLLM would choose kernels of latent attention that have no float32.
        options["attention_backend"] = "CPU_MLA"
    if STATEFUL & set(getattr(config, "layer_types", None) or ()) and not has_gpu():
        # vLLM caches prefixes of such layers only with chunked prefill, which `engine_options` turns off.
        options["enable_prefix_caching"] = False
    return options


def check_model(checkpoint: Path, rollout: Rollout, *, dtype: str, remedy: str = REMEDY) -> None:
    """Raise UserError for a checkpoint that vLLM cannot run, or a context length that it would refuse later.

    remedy: what to do if vLLM cannot run it.
    """
    check_context(checkpoint, rollout)
    config = _config(checkpoint)
    reason = refusal(config, Engine(dtype, torch.cuda.is_available(), rollout.max_model_length))
    if reason is not None:
        raise UserError(f"{checkpoint}: vLLM cannot run this {config.model_type} model: {reason}. {remedy}")


def check_context(checkpoint: Path, rollout: Rollout) -> None:
    """Raise UserError for a checkpoint or context length that vLLM would refuse later and less clearly."""
    path = checkpoint / "config.json"
    if not path.exists():
        raise UserError(f"{checkpoint}: it is not a checkpoint, because it has no config.json. Pass a model folder.")
    longest = json.loads(path.read_text(encoding="utf-8")).get("max_position_embeddings")
    if longest is not None and rollout.max_model_length > longest:
        raise UserError(
            f"rollout.max_model_length: {rollout.max_model_length} exceeds the model's max_position_embeddings "
            f"{longest}. Set it to at most {longest}."
        )
    # Without an index, vLLM reads every safetensors file of the folder as part of the model.
    stray = sorted(file.name for file in checkpoint.glob("*.safetensors") if file.name != "model.safetensors")
    if stray and not (checkpoint / "model.safetensors.index.json").exists():
        raise UserError(
            f"{checkpoint}: it contains {stray[0]} beside the model, and vLLM would load both. Move it to another "
            "folder."
        )


def _config(checkpoint: Path) -> Any:
    """The checkpoint's configuration, of transformers' class."""
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except ValueError:
        kind = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("model_type")
        raise UserError(
            f"{checkpoint}: its model_type '{kind}' is not known to transformers. Pass a checkpoint of another family."
        ) from None
