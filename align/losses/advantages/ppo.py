"""PPO: generalised advantage estimation on a critic's values, whitened over the round."""

from __future__ import annotations

from torch import Tensor

from align.losses.gae import gae
from align.losses.reduce import whiten


def ppo(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    value_lam: float | None = None,
    whitened: bool = True,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [B, T]. Source: Schulman et al. 2016 and 2017; whitening as in InstructGPT's line.

    value_lam: another lambda for the returns that the critic learns (VC-PPO, arXiv 2503.01491).
    """
    advantages, returns = gae(rewards_BT, values_BT, mask_BT, gamma, lam)
    if value_lam is not None and value_lam != lam:
        _, returns = gae(rewards_BT, values_BT, mask_BT, gamma, value_lam)
    return (whiten(advantages, mask_BT) if whitened else advantages), returns
