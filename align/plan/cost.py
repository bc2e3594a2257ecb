"""Cost of a model: parameters, key/value cache, arithmetic, memory."""

from __future__ import annotations

from dataclasses import dataclass

from align.plan.sizes import ModelShape


@dataclass(frozen=True)
class ModelCost:
    """Cost of a model.

    parameters: number of parameters.
    active_parameters: number of parameters used per token.
    flops_per_token: multiplications and additions of the forward pass per token, including attention over `context`
        earlier tokens. Training takes three times as many.
    context: earlier tokens to which a token attends in `flops_per_token`.
    cache_bytes_per_token: key/value cache per token in bfloat16, in bytes.
    cache_bytes_of_context: key/value cache of `context` tokens; windows bound the tokens that a layer keeps.
    cache_bytes_unshared: cache per token without sharing between layers.
    cache_bytes_multi_head: as `cache_bytes_unshared`, with one key and value per query head.
    weight_bytes: weights in bfloat16, in bytes.
    """

    parameters: int
    active_parameters: int
    flops_per_token: int
    context: int
    cache_bytes_per_token: int
    cache_bytes_of_context: int
    cache_bytes_unshared: int
    cache_bytes_multi_head: int
    weight_bytes: int


def model_cost(shape: ModelShape, context: int = 4096) -> ModelCost:
    """Cost of a model of these sizes."""
    own_cache = max(layer.cache for layer in shape.layers)
    attending = [layer for layer in shape.layers if layer.score_width]
    return ModelCost(
        parameters=shape.parameters(),
        active_parameters=shape.active,
        flops_per_token=round(shape.token_flops(context)),
        context=context,
        cache_bytes_per_token=2 * sum(layer.cache for layer in shape.layers),
        cache_bytes_of_context=shape.cache_bytes(context),
        cache_bytes_unshared=2 * sum(layer.cache or own_cache for layer in attending),
        cache_bytes_multi_head=2 * sum(layer.score_width for layer in attending),
        weight_bytes=2 * shape.parameters(),
    )
