"""RLOO: REINFORCE with the other completions of the prompt as the baseline."""

from __future__ import annotations

from torch import Tensor

from align.losses.advantages.grpo import centre


def rloo(scores_B: Tensor, mask_BT: Tensor, group_size: int) -> Tensor:
    """score - mean of the other completions' scores, the same at every token; needs groups of at least two.

    Source: Ahmadian et al. (arXiv 2402.14740); Kool et al. 2019.
    """
    if group_size < 2:
        raise ValueError("the leave-one-out baseline needs at least two completions a prompt")
    return centre(scores_B, group_size)[:, None] * mask_BT * (group_size / (group_size - 1))
