"""Named model sizes, and the configuration keys that a recipe may use."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

_FAMILY: dict[str, Any] = {"num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_cla": True, "use_qk_norm": True}

PRESETS: dict[str, dict[str, Any]] = {
    "hunyuan-large": _FAMILY
    | {
        "vocab_size": 128_512,
        "hidden_size": 6400,
        "intermediate_size": 18_304,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "num_experts": 16,
        "moe_topk": 1,
        "max_position_embeddings": 131_072,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "medium": _FAMILY
    | {
        "vocab_size": 128_512,
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "attention_head_dim": 64,
        "num_experts": 16,
        "moe_topk": 1,
        "max_position_embeddings": 32_768,
    },
    "small": _FAMILY
    | {
        "vocab_size": 49_152,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "moe_topk": 1,
        "max_position_embeddings": 8192,
    },
    "tiny": _FAMILY
    | {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "moe_topk": 1,
        "max_position_embeddings": 512,
    },
}
"""{preset: keys of `HunYuanConfig`}. hunyuan-large is the published instruct model. The others are smaller models of
the same architecture."""

CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "attention_head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "rope_theta",
    "rope_scaling",
    "rope_inv_freq_dtype",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "hidden_dropout",
    "use_qk_norm",
    "use_cla",
    "cla_share_factor",
    "num_experts",
    "moe_topk",
    "use_mixed_mlp_moe",
    "num_shared_expert",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "capacity_factor",
    "moe_drop_tokens",
    "moe_random_routing_dropped_token",
    "output_router_logits",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""The fields of `HunYuanConfig`, listed here so that a recipe is validated without loading transformers."""


def unknown_keys(config: dict[str, Any]) -> list[str]:
    """One error message per key that `HunYuanConfig` does not have."""
    found = []
    for key in config:
        if key not in CONFIG_KEYS:
            near = get_close_matches(key, CONFIG_KEYS, n=1, cutoff=0.5)
            fix = f"write '{near[0]}', or remove it" if near else "remove it"
            found.append(f"model.config: '{key}' is not a key of HunYuanConfig; {fix}")
    return found


PUBLISHED = {f"hunyuan-a52b-{name}": "hunyuan-large" for name in ("pretrain", "instruct", "instruct-fp8")}
"""{folder name of a published checkpoint, in lower case: the preset with its sizes}."""
