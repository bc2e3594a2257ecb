"""Clipped policy and value losses of PPO (Schulman et al. 2017, arXiv 1707.06347).

Shapes: all tensors are [B, T] over completion tokens; mask is 1 where a token counts; count is the number of valid
tokens of the whole optimizer step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.losses.kl import LOG_RATIO_BOUND
from align.losses.reduce import masked_mean

Metrics = dict[str, Tensor]


def importance_weight(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """min(old / rollout, cap): corrects the sampler's distribution to the trainer's (truncated importance sampling)."""
    log_ratio = (old_logprobs - rollout_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return log_ratio.exp().clamp_max(cap)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    count: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Sum over valid tokens of weight * max(-A * ratio, -A * clip(ratio)) / count, ratio = exp(logprobs - old)."""
    ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(plain, clipped)
    if weights is not None:
        loss = loss * weights
    return masked_mean(loss, mask, count), {
        "clip_fraction": masked_mean((clipped > plain).float(), mask, count).detach()
    }


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float, count: float
) -> tuple[Tensor, Metrics]:
    """Half the larger of (V - R)^2 and (clip(V, V_old +- clip_range) - R)^2, summed over valid tokens / count."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * torch.maximum(plain_error, clipped_error)
    return masked_mean(loss, mask, count), {
        "value_clip_fraction": masked_mean((clipped_error > plain_error).float(), mask, count).detach()
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - var(returns - values) / var(returns) over valid tokens: 1 is perfect, 0 no better than a constant."""
    valid = mask.bool()
    returns, errors = returns[valid], (returns - values)[valid]
    return 1 - errors.var(unbiased=False) / returns.var(unbiased=False).clamp_min(1e-8)
