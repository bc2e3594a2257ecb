"""Means over valid tokens, normalised by a count that the caller passes.

A loss is the sum over a micro-batch divided by the valid tokens of the whole optimizer step, so the split into
micro-batches and ranks changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.losses.precision import in_float32


@in_float32
def masked_mean(values: Tensor, mask: Tensor, count: float | None = None) -> Tensor:
    """Sum of values where mask is 1, divided by `count` (default: the sum of the mask)."""
    # Not a product with the mask: a masked position may hold inf or nan.
    total = torch.where(mask.bool(), values, 0.0).sum()
    return total / (mask.sum().clamp_min(1.0) if count is None else count)


@in_float32
def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / std over the valid tokens, zero elsewhere.

    shift_mean: False adds the mean back. PPO's advantages are shifted, as in InstructGPT's line of implementations.
    The variance is the population's (divided by n).
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, 0.0)


@in_float32
def averaging_weights(mask: Tensor, how: str, *, count: float, completions: float, max_tokens: int) -> Tensor | None:
    """Factors [B, T] that turn a sum over tokens divided by `count` into another average.

    how: "tokens": none are needed, returns None. "completions": the mean over completions of each one's mean over its
    tokens (GRPO). "constant": the sum over tokens divided by completions * max_tokens (Dr. GRPO).
    count, completions: valid tokens of the whole optimizer step, and completions that have such tokens.
    """
    if how == "tokens":
        return None
    if how == "completions":
        return (count / completions / mask.sum(dim=-1, keepdim=True).clamp_min(1.0)).expand_as(mask)
    if how == "constant":
        return torch.full_like(mask, count / (completions * max_tokens))
    raise ValueError(f"loss average '{how}' is not one of tokens, completions, constant")
