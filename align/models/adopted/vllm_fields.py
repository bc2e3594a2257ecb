"""Configuration fields that vLLM's model classes read and transformers' configuration classes lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

GROUP_OF_ALL = {"n_group": 1, "topk_group": 1}


def vllm_fields(config: Any) -> dict[str, Any]:
    """The fields of this configuration's family that `config` does not set; empty for most families.

    The values state what transformers' class computes. Models that align builds have them in their configuration, so
    saved checkpoints do too; for other checkpoints they override the configuration that vLLM reads.
    """
    fields = FIELDS.get(config.model_type)
    found = fields(config) if fields is not None else {}
    return {name: value for name, value in found.items() if getattr(config, name, None) is None}


def leading_dense_layers(config: Any) -> int:
    """Number of dense layers before the first layer with routed experts."""
    kinds: list[str] = list(config.mlp_layer_types)
    return kinds.index("sparse") if "sparse" in kinds else len(kinds)


FIELDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "deepseek_v3": lambda config: {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "hy_v3": lambda config: {
        "first_k_dense_replace": leading_dense_layers(config),
        "expert_hidden_dim": config.moe_intermediate_size,
        "route_norm": True,
        "qk_norm": True,
    },
    "glm4_moe_lite": lambda config: {"first_k_dense_replace": leading_dense_layers(config)},
    "minimax_m2": lambda config: {"scoring_func": "sigmoid", "use_routing_bias": True},
    "afmoe": lambda config: {"score_func": "sigmoid", "route_norm": True, **GROUP_OF_ALL},
    "lfm2": lambda config: {"conv_dim": config.hidden_size, "block_dim": config.hidden_size},
}
"""{model_type: configuration -> fields}."""
