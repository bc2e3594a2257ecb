"""Probability that one of k samples passes."""

from __future__ import annotations

import math


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of pass@k from `samples` completions of a problem, of which `passed` are right.

    1 - C(samples - passed, k) / C(samples, k). Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} samples of which {passed} passed")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
