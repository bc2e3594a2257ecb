"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

Shapes: B sequences, T completion tokens (right-padded).
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [B, T], zero where mask is 0.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}. Masked tokens are skipped: t+1 is
    the next valid token. V and A are zero after the last valid token. Returns are A + V.
    """
    advantages = torch.zeros_like(rewards_BT)
    next_value = torch.zeros_like(values_BT[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        valid = mask_BT[:, t].bool()
        delta = rewards_BT[:, t] + gamma * next_value - values_BT[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(valid, advantage, 0.0)
        next_advantage = torch.where(valid, advantage, next_advantage)
        next_value = torch.where(valid, values_BT[:, t], next_value)
    return advantages, torch.where(mask_BT.bool(), advantages + values_BT, 0.0)
