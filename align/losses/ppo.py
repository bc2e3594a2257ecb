"""Losses of PPO and its relatives: policy losses, importance weights, value loss.

Shapes: all tensors are [B, T] over completion tokens; mask is 1 on tokens with a loss; count is the number of such
tokens in the whole optimizer step.

To add a policy loss, write its function here, and add its name to `POLICY_LOSSES` and to the Literal `PolicyLoss` of
the recipe.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from align.losses.kl import LOG_RATIO_BOUND, kl_estimate
from align.losses.precision import in_float32
from align.losses.reduce import masked_mean


@in_float32
def importance_weight(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    cap: float,
    sequence: bool = False,
    drop: bool = False,
) -> Tensor:
    """Importance weights [B, T] from the sampler's distribution to the trainer's: p_old / p_rollout, without gradient.

    cap: largest weight; larger weights are truncated to `cap`.
    drop: set weights above `cap` to 0 instead.
    sequence: one weight per completion, the product of its tokens' ratios.
    Source: Yao et al. 2025, truncated importance sampling; `drop` as in IcePop.
    """
    log_ratio = torch.where(mask.bool(), old_logprobs - rollout_logprobs, 0.0)
    if sequence:
        log_ratio = log_ratio.sum(dim=-1, keepdim=True).expand_as(mask)
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().detach()
    return torch.where(ratio > cap, 0.0, ratio) if drop else ratio.clamp_max(cap)


@in_float32
def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, sequence: bool = False) -> Tensor:
    """new / old probability of each token.

    sequence: instead, the geometric mean of the ratios over the completion's tokens (GSPO). Every token has this value;
    its gradient flows through the token's own log-probability.
    Source: Zheng et al. (arXiv 2507.18071), equations 5 and 14.
    """
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    if sequence:
        mean = log_ratio.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp_min(1.0)
        log_ratio = mean.detach() + log_ratio - log_ratio.detach()
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


@in_float32
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss: the sum over valid tokens of weight * max(-A * ratio, -A * clip(ratio, 1 - low, 1 + high)),
    divided by count.

    clip_range: `low`, and `high` unless clip_range_high (DAPO, arXiv 2503.14476) is given.
    dual_clip: for A < 0, limit the loss to at most -A * dual_clip, with dual_clip > 1 (arXiv 1912.09729).
    sequence: use GSPO's sequence-level ratio.
    weights: factors [B, T] of each token's loss.
    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    ratio = probability_ratio(logprobs, old_logprobs, mask, sequence=sequence)
    high = clip_range if clip_range_high is None else clip_range_high
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    loss = torch.maximum(plain, clipped)
    metrics = {
        "clip_fraction": masked_mean((clipped > plain).float(), mask, count).detach(),
        "update_kl": update_kl(logprobs, old_logprobs, mask, count),
    }
    if dual_clip is not None:
        bound = -advantages * dual_clip
        bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(bounded, bound, loss)
        metrics["dual_clip_fraction"] = masked_mean(bounded.float(), mask, count).detach()
    if weights is not None:
        loss = loss * weights
    return masked_mean(loss, mask, count), metrics


@in_float32
def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    count: float,
    clip_range_high: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO: the sum over valid tokens of -weight * sg(clip(ratio, 1 - low, 1 + high)) * A * log pi, divided by count.

    The clipped ratio is a constant weight (sg: stop gradient), so every token keeps its gradient, unlike in
    `policy_loss`. clip_range: `low`, and `high` unless clip_range_high is given. weights: factors [B, T].
    `clip_fraction` is the share of tokens whose ratio is clipped, for either sign of A.
    Source: MiniMax-M1 (arXiv 2506.13585), equations 4 and 5.
    """
    ratio = probability_ratio(logprobs, old_logprobs, mask).detach()
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = ratio.clamp(1 - clip_range, 1 + high)
    loss = -clipped * advantages * logprobs
    if weights is not None:
        loss = loss * weights
    return masked_mean(loss, mask, count), {
        "clip_fraction": masked_mean((clipped != ratio).float(), mask, count),
        "update_kl": update_kl(logprobs, old_logprobs, mask, count),
    }


POLICY_LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {"clip": policy_loss, "cispo": cispo_loss}
"""Losses by their name in a recipe. All take (logprobs, old_logprobs, advantages, mask) and the keywords clip_range,
clip_range_high, weights and count, and return (loss, metrics)."""


def update_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, count: float) -> Tensor:
    """k3 estimate of KL(policy before the update || current policy) in nats per token."""
    return masked_mean(kl_estimate(old_logprobs, logprobs, "k3"), mask, count).detach()


@in_float32
def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float, count: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the larger of (V - R)^2 and (clip(V, V_old +- clip_range) - R)^2, summed over valid tokens and
    divided by count."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * torch.maximum(plain_error, clipped_error)
    return masked_mean(loss, mask, count), {
        "value_clip_fraction": masked_mean((clipped_error > plain_error).float(), mask, count).detach()
    }


@in_float32
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - var(returns - values) / var(returns) over valid tokens: 1 is perfect, 0 is no better than a constant."""
    valid = mask.bool()
    if not valid.any():
        return values.new_zeros(())
    returns, errors = returns[valid], (returns - values)[valid]
    return 1 - errors.var(unbiased=False) / returns.var(unbiased=False).clamp_min(1e-8)
