"""Soft overlong punishment (Yu et al., DAPO, arXiv 2503.14476, equation 13)."""

from __future__ import annotations

from torch import Tensor


def overlong_penalty(lengths_B: Tensor, *, max_tokens: int, buffer: int, largest: float) -> Tensor:
    """What a completion's length costs [B]: 0 up to max_tokens - buffer, then linear up to `largest` at max_tokens."""
    if not buffer:
        return lengths_B.new_zeros(lengths_B.shape).float()
    return ((lengths_B - (max_tokens - buffer)) / buffer).clamp(0, 1) * largest
