"""What a configuration costs: parameters, cache, arithmetic, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from align.models.hunyuan.configuration import HunYuanConfig, bytes_per_token
from align.models.hunyuan.modeling import HunYuanForCausalLM


@dataclass(frozen=True)
class ModelCost:
    """What a configuration costs.

    active_parameters: those that one token meets. flops_per_token: multiplications and additions of one token's forward
    pass, attention over `context` earlier tokens included; training takes three times as many. cache_bytes_per_token
    and weight_bytes are in bfloat16.
    """

    parameters: int
    active_parameters: int
    flops_per_token: int
    context: int
    cache_bytes_per_token: int
    cache_bytes_unshared: int
    cache_bytes_multi_head: int
    weight_bytes: int


def model_cost(config: HunYuanConfig, context: int = 4096) -> ModelCost:
    """Counted on a model without memory (torch's meta device)."""
    with torch.device("meta"):
        model = HunYuanForCausalLM(config)
    total = active = multiplied = 0
    for name, parameter in model.named_parameters():
        share = 1.0
        if ".experts." in name:
            layer = int(name.split("layers.")[1].split(".")[0])
            share = config.top_k_in(layer) / config.experts_in(layer)
        total += parameter.numel()
        active += round(parameter.numel() * share)
        if parameter.ndim > 1 and not _is_lookup(name, config):
            multiplied += round(parameter.numel() * share)
    heads = config.num_attention_heads * config.head_dim
    attention = 4 * config.num_hidden_layers * heads * context  # scores and their sum with the values
    unshared = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
    return ModelCost(
        parameters=total,
        active_parameters=active,
        flops_per_token=2 * multiplied + attention,
        context=context,
        cache_bytes_per_token=bytes_per_token(config),
        cache_bytes_unshared=unshared,
        cache_bytes_multi_head=unshared * config.num_attention_heads // config.num_key_value_heads,
        weight_bytes=2 * total,
    )


def _is_lookup(name: str, config: HunYuanConfig) -> bool:
    """An embedding that is only read; a tied one is the output's matrix too."""
    return name.endswith("embed_tokens.weight") and not config.tie_word_embeddings
