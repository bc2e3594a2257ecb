"""Models that vLLM cannot run, or for which its results would differ from transformers'. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MLA_LATENT = (512, 64)
"""kv_lora_rank and qk_rope_head_dim for which vLLM has kernels of multi-head latent attention."""
REMEDY = "Set rollout.engine: huggingface."


@dataclass(frozen=True)
class Engine:
    """The properties of a vLLM engine that decide which models it can run.

    dtype: float32 or bfloat16.
    has_gpu: False if vLLM computes on a CPU.
    longest: maximum tokens of prompt and completion together.
    """

    dtype: str
    has_gpu: bool
    longest: int


def refusal(config: Any, engine: Engine) -> str | None:
    """Reason why vLLM cannot run this model in this engine, if any: a clause that follows "vLLM cannot run it: ".

    config: configuration, or an object with the values of config.json, where the family's defaults may be missing.
    """
    if config.model_type in TYPES:
        return TYPES[config.model_type]
    if not engine.has_gpu and config.model_type in SPARSE_ATTENTION:
        return "its sparse attention has no kernel on a CPU"
    checks = SETTINGS.get(config.model_type, [])
    return next((reason for check in checks if (reason := check(config, engine)) is not None), None)


Check = Callable[[Any, Engine], "str | None"]


def gated_delta_net(config: Any, engine: Engine) -> str | None:
    if engine.has_gpu or engine.dtype == "bfloat16":
        return None
    return f"on a CPU its linear attention needs bfloat16, but dtype is {engine.dtype}"


def latent_attention(config: Any, engine: Engine) -> str | None:
    if not getattr(config, "rope_interleave", True):
        return "vLLM interleaves rotary embeddings, but the checkpoint has rope_interleave: false"
    if getattr(config, "attention_bias", False):
        return "vLLM has no bias in latent attention, but the checkpoint has attention_bias: true"
    sizes = tuple(getattr(config, name, size) for name, size in zip(("kv_lora_rank", "qk_rope_head_dim"), MLA_LATENT))
    if sizes != MLA_LATENT:
        return f"its kernels need kv_lora_rank and qk_rope_head_dim of {MLA_LATENT}, but the checkpoint has {sizes}"
    return None


def unnormalised_router(config: Any, engine: Engine) -> str | None:
    if getattr(config, "norm_topk_prob", False):
        return "vLLM normalises the routers' weights for norm_topk_prob: true, transformers does not"
    return None


def tied_head(config: Any, engine: Engine) -> str | None:
    tied = getattr(config, "tie_word_embeddings", getattr(config, "tie_embedding", True))
    return None if tied else "vLLM ties its head to the embedding, the checkpoint does not"


def window_below_text(config: Any, engine: Engine) -> str | None:
    window = getattr(config, "sliding_window", 4096)
    if window is None or window >= engine.longest:
        return None
    return (
        f"vLLM attends to one token more than the sliding window {window}, which is below rollout.max_model_length "
        f"{engine.longest}"
    )


def dense_layers_first(config: Any, engine: Engine) -> str | None:
    kinds = list(getattr(config, "mlp_layer_types", None) or [])
    if kinds == sorted(kinds):
        return None
    return "vLLM has dense layers only before the layers with routed experts"


TYPES = {
    "qwen3_5_text": "vLLM loads the class with its image encoder, which needs torchvision",
    "phimoe": "vLLM replaces its router by another one",
    "minimax": "vLLM 0.23 removed its class",
}
"""{model_type: reason} for families that vLLM cannot run in any engine."""
SPARSE_ATTENTION = {"glm_moe_dsa", "hy_v4"}
"""Families that vLLM runs on a GPU only."""
SETTINGS: dict[str, list[Check]] = {
    "qwen3_next": [gated_delta_net],
    "deepseek_v2": [latent_attention, unnormalised_router],
    "deepseek_v3": [latent_attention],
    "glm4_moe_lite": [latent_attention, dense_layers_first],
    "hy_v3": [dense_layers_first],
    "lfm2": [tied_head],
    "lfm2_moe": [tied_head],
    "cohere2": [window_below_text],
}
"""Checks of the configuration, by model_type."""
