"""REINFORCE++: no critic and no groups; discounted returns, whitened over the whole round."""

from __future__ import annotations

import torch
from torch import Tensor

from align.losses.gae import gae
from align.losses.reduce import whiten


def reinforce_plus_plus(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float) -> Tensor:
    """Whitened sum of the discounted rewards from each token on. Source: Hu (arXiv 2501.03262)."""
    returns, _ = gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma, 1.0)
    return whiten(returns, mask_BT)
