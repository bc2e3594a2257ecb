"""GRPO and Dr. GRPO: a completion's score against the other completions of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to a group's standard deviation: a group whose scores are all equal has advantage zero, not noise."""


def grpo(scores_B: Tensor, mask_BT: Tensor, group_size: int) -> Tensor:
    """(score - mean of the group) / (standard deviation of the group + EPSILON), the same at every token.

    The deviation is the sample's (n - 1). Source: Shao et al., DeepSeekMath (arXiv 2402.03300), section 4.1.
    """
    centred = centre(scores_B, group_size)
    if group_size == 1:
        return torch.zeros_like(mask_BT)
    deviation = scores_B.view(-1, group_size).std(dim=1).repeat_interleave(group_size)
    return (centred / (deviation + EPSILON))[:, None] * mask_BT


def dr_grpo(scores_B: Tensor, mask_BT: Tensor, group_size: int) -> Tensor:
    """score - mean of the group: no deviation, by which GRPO weighs too easy and too hard prompts more.

    The other half of the method, a loss divided by a constant instead of each completion's own length, is how every
    loss here is divided: by the tokens of the whole step. Source: Liu et al. (arXiv 2503.20783).
    """
    return centre(scores_B, group_size)[:, None] * mask_BT


def centre(scores_B: Tensor, group_size: int) -> Tensor:
    groups = scores_B.view(-1, group_size)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()
