"""Named model sizes, and the configuration keys that a recipe may use."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

DEFAULT_FAMILY = "hunyuan"
"""The `model_type` of a configuration that names none."""

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
    "hy3": {
        "model_type": "hy_v3",
        "vocab_size": 120_832,
        "hidden_size": 4096,
        "intermediate_size": 13_312,
        "num_hidden_layers": 80,
        "mlp_layer_types": ["dense"] + 79 * ["sparse"],
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts": 192,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 1536,
        "router_scaling_factor": 2.826,
        "max_position_embeddings": 131_072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 11_158_840.0},
        "tie_word_embeddings": False,
    },
}
"""{preset: keys of the configuration, which is a `HunYuanConfig` unless `model_type` names another family}.
hunyuan-large is the published instruct model, and hy3 the published Hy3. The others are smaller models of HunYuan's
architecture."""

GROWN = {"llama": DEFAULT_FAMILY, "qwen3": "qwen3_moe"}
"""{`model_type` of a dense model: `model_type` of the mixture of experts that a hot start makes of it}."""

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


COMMON_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "pad_token_id",
    "rope_scaling",
    "rope_theta",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "tie_word_embeddings",
)
"""Keys that every family of transformers has, whether or not its class lists them."""


def unknown_keys(config: Mapping[str, Any], model_type: str = DEFAULT_FAMILY) -> list[str]:
    """One error message per key that the family's configuration does not have.

    Loads transformers for families other than `DEFAULT_FAMILY`.
    """
    name, keys = ("HunYuanConfig", CONFIG_KEYS) if model_type == DEFAULT_FAMILY else _keys_of(model_type)
    if name is None:
        return [f"model: transformers has no model_type '{model_type}'; check its spelling"]
    found = []
    for key in config:
        if key not in keys:
            near = get_close_matches(key, keys, n=1, cutoff=0.5)
            fix = f"write '{near[0]}', or remove it" if near else "remove it"
            found.append(f"model.config: '{key}' is not a key of {name}; {fix}")
    return found


def _keys_of(model_type: str) -> tuple[str | None, tuple[str, ...]]:
    """(class, keys) of a family's configuration in transformers; None if there is no such class."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return None, ()
    family = CONFIG_MAPPING[model_type]
    own = [key for key in family.__dataclass_fields__ if key not in PreTrainedConfig.__dataclass_fields__]
    return family.__name__, (*own, *family.attribute_map, *COMMON_KEYS)


PUBLISHED = {
    **{f"hunyuan-a52b-{name}": "hunyuan-large" for name in ("pretrain", "instruct", "instruct-fp8")},
    "hy3": "hy3",
}
"""{folder name of a published checkpoint, in lower case: the preset with its sizes}."""
