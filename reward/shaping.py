"""Terms added to the score of a completion for its length.

Shapes: B sequences.
"""

from __future__ import annotations

from torch import Tensor


def overlong_shaping(lengths_B: Tensor, *, max_new_tokens: int, buffer: int, penalty: float) -> Tensor:
    """Soft penalty for long completions, [B] in [-penalty, 0] (Yu et al. 2025, DAPO, eq. 13).

        0                                                           length <= max_new_tokens - buffer
        -penalty * (length - (max_new_tokens - buffer)) / buffer    within the last `buffer` tokens
        -penalty                                                    length >= max_new_tokens

    lengths_B: tokens of each completion. The penalty grows before the limit is reached, so the policy learns to end
    completions before they are truncated.
    """
    if buffer < 1:
        raise ValueError("the buffer must have at least one token")
    beyond = (lengths_B - (max_new_tokens - buffer)).clamp(min=0, max=buffer)
    return -penalty * beyond.float() / buffer
