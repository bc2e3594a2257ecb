"""PPO: generalised advantage estimation on a critic's values, whitened over the round."""

from __future__ import annotations

from torch import Tensor

from align.losses.gae import gae
from align.losses.reduce import whiten


def ppo(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float, whitened: bool = True
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [B, T]. Source: Schulman et al. 2016 and 2017; whitening as in InstructGPT's line."""
    advantages, returns = gae(rewards_BT, values_BT, mask_BT, gamma, lam)
    return (whiten(advantages, mask_BT) if whitened else advantages), returns
