"""Per-token estimators of KL(policy || reference) from samples of the policy (Schulman, "Approximating KL")."""

from __future__ import annotations

from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to this: exp(20) is already meaningless, and exp(90) overflows fp32."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """k1 = log p/q: unbiased, any sign. k2 = (log p/q)^2 / 2: biased, low variance. k3 = q/p - 1 - log q/p: unbiased,
    never negative."""
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    if estimator == "k3":
        return (-log_ratio).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp() - 1 + log_ratio
    raise ValueError(f"KL estimator '{estimator}' is not one of k1, k2, k3")
