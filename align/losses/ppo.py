"""Clipped policy and value losses of PPO (Schulman et al. 2017, arXiv 1707.06347).

Shapes: all tensors are [B, T] over completion tokens; mask is 1 where a token counts; count is the number of valid
tokens of the whole optimizer step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.losses.kl import LOG_RATIO_BOUND, kl_estimate
from align.losses.reduce import masked_mean

Metrics = dict[str, Tensor]


def importance_weight(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    cap: float,
    sequence: bool = False,
    drop: bool = False,
) -> Tensor:
    """Corrects the sampler's distribution to the trainer's: old / rollout, truncated at `cap`, or 0 beyond it (drop).

    sequence: one weight a completion, the product over its tokens. No gradient. Source: Yao et al. 2025, truncated
    importance sampling; masking as in IcePop.
    """
    log_ratio = torch.where(mask.bool(), old_logprobs - rollout_logprobs, 0.0)
    if sequence:
        log_ratio = log_ratio.sum(dim=-1, keepdim=True).expand_as(mask)
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().detach()
    return torch.where(ratio > cap, 0.0, ratio) if drop else ratio.clamp_max(cap)


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, sequence: bool = False) -> Tensor:
    """new / old of each token; or (GSPO) of the whole completion, the geometric mean over its tokens.

    The sequence ratio's gradient is spread over the tokens, so that a token's own term in the loss still has the
    sequence's value. Source: Zheng et al., GSPO (arXiv 2507.18071), equations 5 and 14.
    """
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    if sequence:
        mean = log_ratio.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp_min(1.0)
        log_ratio = mean.detach() + log_ratio - log_ratio.detach()
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    count: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    sequence: bool = False,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Sum over valid tokens of weight * max(-A * ratio, -A * clip(ratio, 1 - low, 1 + high)) / count.

    clip_range_high: another upper bound (DAPO, arXiv 2503.14476). dual_clip: for A < 0 the loss is at most
    -A * dual_clip, so that one token far off cannot dominate (arXiv 1912.09729); above 1. sequence: GSPO's ratio.
    """
    ratio = probability_ratio(logprobs, old_logprobs, mask, sequence=sequence)
    high = clip_range if clip_range_high is None else clip_range_high
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    loss = torch.maximum(plain, clipped)
    metrics = {
        "clip_fraction": masked_mean((clipped > plain).float(), mask, count).detach(),
        # From the policy before the update to the present one.
        "update_kl": masked_mean(kl_estimate(old_logprobs, logprobs, "k3"), mask, count).detach(),
    }
    if dual_clip is not None:
        bound = -advantages * dual_clip
        bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(bounded, bound, loss)
        metrics["dual_clip_fraction"] = masked_mean(bounded.float(), mask, count).detach()
    if weights is not None:
        loss = loss * weights
    return masked_mean(loss, mask, count), metrics


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
    if not valid.any():
        return values.new_zeros(())
    returns, errors = returns[valid], (returns - values)[valid]
    return 1 - errors.var(unbiased=False) / returns.var(unbiased=False).clamp_min(1e-8)
