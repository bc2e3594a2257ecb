"""Per-token estimators of KL(policy || reference) from samples of the policy (Schulman, "Approximating KL").

Shapes: all tensors are [B, T] over completion tokens; mask is 1 on tokens with a loss.
"""

from __future__ import annotations

from torch import Tensor

from align.losses.precision import in_float32
from align.losses.reduce import masked_mean

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to [-20, 20] before exp: a ratio of exp(20) is meaningless, and exp(90) overflows fp32."""

ADAPTATION_BOUND = 0.2
"""The controller clips the relative error of the measured KL to [-0.2, 0.2]."""


@in_float32
def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimates [B, T] in nats, with p the policy and q the reference.

    k1 = log p/q: unbiased, may be negative.
    k2 = (log p/q)^2 / 2: biased, low variance.
    k3 = q/p - 1 - log q/p: unbiased, never negative.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    if estimator == "k3":
        return (-log_ratio).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp() - 1 + log_ratio
    raise ValueError(f"KL estimator '{estimator}' is not one of k1, k2, k3")


@in_float32
def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: str,
    count: float,
    weights: Tensor | None = None,
) -> Tensor:
    """KL loss, to be added to the policy's loss: sum over valid tokens of weight * estimate, divided by count.

    The gradient flows through `logprobs`. k1 is refused: its gradient is the score function, whose mean is zero.
    """
    if estimator == "k1":
        raise ValueError("the gradient of k1 is zero on average: a KL loss needs k2 or k3")
    estimate = kl_estimate(logprobs, ref_logprobs, estimator)
    return masked_mean(estimate if weights is None else estimate * weights, mask, count)


def adapted_kl_coef(coef: float, kl: float, target: float, completions: int, horizon: int) -> float:
    """Next KL coefficient, given the mean KL of the last completions in nats. It grows if `kl` is above `target`.

    This is a proportional controller whose relative error is clipped to ADAPTATION_BOUND. Source: Ziegler et al. 2019
    (arXiv 1909.08593), section 2.2.
    """
    error = min(max(kl / target - 1, -ADAPTATION_BOUND), ADAPTATION_BOUND)
    return coef * (1 + error * completions / horizon)
