"""Means over valid tokens, normalised by a count that the caller passes.

The loss of a micro-batch is its sum over valid tokens, divided by the number of valid tokens of the whole optimizer
step. The step's gradient therefore does not depend on the split into micro-batches and ranks.
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
    """(values - mean) / std over the valid tokens, zero elsewhere. The variance is the population's (divided by n).

    shift_mean: False adds the mean back, so that only the scale changes. PPO's advantages are whitened with True, as
        in implementations of InstructGPT.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, 0.0)


@in_float32
def averaging_weights(mask: Tensor, how: str, *, count: float, completions: float, max_tokens: int) -> Tensor | None:
    """Factors [B, T] that turn a sum over tokens divided by `count` into another average.

    how: the average. "tokens": mean over tokens, which needs no factors, so the result is None. "completions": mean
        over tokens within each completion, then over completions (GRPO). "constant": sum over tokens divided by
        completions * max_tokens (Dr. GRPO).
    count: valid tokens of the whole optimizer step.
    completions: completions of the whole optimizer step that have valid tokens.
    """
    if how == "tokens":
        return None
    if how == "completions":
        return (count / completions / mask.sum(dim=-1, keepdim=True).clamp_min(1.0)).expand_as(mask)
    if how == "constant":
        return torch.full_like(mask, count / (completions * max_tokens))
    raise ValueError(f"loss average '{how}' is not one of tokens, completions, constant")
