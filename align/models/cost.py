"""Cost of a configuration: parameters, key/value cache, arithmetic, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from align.models.family import FamilyConfig, family_of


@dataclass(frozen=True)
class ModelCost:
    """Cost of a configuration.

    parameters: number of parameters.
    active_parameters: number of parameters used per token.
    flops_per_token: multiplications and additions of the forward pass per token, including attention over `context`
        earlier tokens. Training takes three times as many.
    context: earlier tokens to which a token attends in `flops_per_token`.
    cache_bytes_per_token: key/value cache per token in bfloat16, in bytes.
    cache_bytes_unshared: the same without sharing between layers.
    cache_bytes_multi_head: as `cache_bytes_unshared`, with one key/value head per query head.
    weight_bytes: weights in bfloat16, in bytes.
    """

    parameters: int
    active_parameters: int
    flops_per_token: int
    context: int
    cache_bytes_per_token: int
    cache_bytes_unshared: int
    cache_bytes_multi_head: int
    weight_bytes: int


def model_cost(config: FamilyConfig, context: int = 4096) -> ModelCost:
    """Cost of a model with this configuration, which is built on torch's meta device and so takes no memory."""
    with torch.device("meta"):
        model = family_of(config).policy(config)  # type: ignore[arg-type]  # a configuration of this family
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
    attention = 4 * config.num_hidden_layers * heads * context  # scores, and the weighted sum of the values
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


def bytes_per_token(config: FamilyConfig, bytes_per_value: int = 2) -> int:
    """Bytes of key/value cache per token over all layers; each cross-layer group stores keys and values once."""
    groups = -(-config.num_hidden_layers // config.kv_group_size)
    return 2 * groups * config.num_key_value_heads * config.head_dim * bytes_per_value


def _is_lookup(name: str, config: FamilyConfig) -> bool:
    """True for an embedding that is only indexed. A tied embedding is also the output head, which is multiplied."""
    return name.endswith("embed_tokens.weight") and not config.tie_word_embeddings
