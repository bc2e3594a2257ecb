"""Means over valid tokens, normalised by a count the caller gives.

A loss is a sum over this micro-batch divided by the valid tokens of the whole optimizer step, so that splitting the
batch into micro-batches or ranks changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor, count: float | None = None) -> Tensor:
    """Sum of values where mask is 1, over `count` (default: the mask's own sum)."""
    # where, not a product: a masked position may hold inf or nan.
    total = torch.where(mask.bool(), values, 0.0).sum()
    return total / (mask.sum().clamp_min(1.0) if count is None else count)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / std over the valid tokens, zero elsewhere; with shift_mean=False the mean is added back.

    The variance is the population's (divided by n). For PPO advantages the mean is shifted, as in the InstructGPT line
    of implementations.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, 0.0)


def averaging_weights(mask: Tensor, how: str, *, count: float, completions: float, max_tokens: int) -> Tensor | None:
    """Factors [B, T] by which a sum over tokens divided by `count` becomes another mean; None for "tokens" itself.

    "completions": the mean over `completions` of each one's mean over its own tokens. "constant": the sum divided by
    completions * max_tokens. count and completions are those of the whole optimizer step.
    """
    if how == "tokens":
        return None
    if how == "completions":
        return (count / completions / mask.sum(dim=-1, keepdim=True).clamp_min(1.0)).expand_as(mask)
    if how == "constant":
        return torch.full_like(mask, count / (completions * max_tokens))
    raise ValueError(f"loss average '{how}' is not one of tokens, completions, constant")
