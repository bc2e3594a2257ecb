"""Advantage estimators: pure functions, and the registry that `advantage_estimator` in a recipe selects from.

Shapes: B completions, T completion tokens (right-padded), G completions per prompt, in adjacent rows.
Advantages [B, T] are zero where the mask is 0.

To add an estimator, write its function here, and add its name to `ADVANTAGE_ESTIMATORS` and to the Literal
`AdvantageEstimator` of the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from align.losses.gae import gae
from align.losses.reduce import whiten as whitened

EPSILON = 1e-4
"""Added to a group's standard deviation in GRPO, so that rounding errors of equal scores are not amplified."""


@dataclass(frozen=True)
class EstimatorInputs:
    """Inputs of every estimator; each uses those that it needs.

    rewards: per token [B, T]; their sum over T is the completion's score.
    mask: [B, T], 1 on tokens with a loss.
    values: the critic's values [B, T]; None without a critic.
    group_size: G.
    gamma: discount factor.
    lam: lambda of GAE for the advantages.
    value_lam: lambda of GAE for the critic's returns; None means `lam`.
    whiten: normalise GAE's advantages over the batch.
    """

    rewards: Tensor
    mask: Tensor
    values: Tensor | None
    group_size: int
    gamma: float
    lam: float
    value_lam: float | None
    whiten: bool

    @property
    def scores(self) -> Tensor:
        """Score of each completion, [B]."""
        return self.rewards.sum(1)


def gae_advantages(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    value_lam: float | None = None,
    whiten: bool = True,
) -> tuple[Tensor, Tensor]:
    """PPO: (advantages, returns) of generalised advantage estimation, both [B, T].

    whiten: normalise the advantages over all valid tokens, as implementations of InstructGPT do.
    value_lam: lambda for the critic's returns, by default `lam` (VC-PPO, arXiv 2503.01491).
    Source: Schulman et al. 2016 (arXiv 1506.02438) and 2017 (arXiv 1707.06347).
    """
    advantages, returns = gae(rewards_BT, values_BT, mask_BT, gamma, lam)
    if value_lam is not None and value_lam != lam:
        _, returns = gae(rewards_BT, values_BT, mask_BT, gamma, value_lam)
    return (whitened(advantages, mask_BT) if whiten else advantages), returns


def grpo(scores_B: Tensor, mask_BT: Tensor, group_size: int) -> Tensor:
    """(score - group mean) / (group standard deviation + EPSILON), the same for all tokens of a completion.

    The standard deviation is that of a sample (divided by G - 1). The published GRPO also averages the loss within each
    completion; set `loss_average: completions` for that. Advantages are zero if G is 1.
    Source: Shao et al., DeepSeekMath (arXiv 2402.03300), section 4.1.
    """
    centred = centre(scores_B, group_size)
    if group_size == 1:
        return torch.zeros_like(mask_BT)
    deviation = scores_B.view(-1, group_size).std(dim=1).repeat_interleave(group_size)
    return (centred / (deviation + EPSILON))[:, None] * mask_BT


def dr_grpo(scores_B: Tensor, mask_BT: Tensor, group_size: int) -> Tensor:
    """score - group mean, the same for all tokens of a completion.

    Dr. GRPO removes two divisions of GRPO. Division by the group's standard deviation would give more weight to prompts
    that are too easy or too hard; this function omits it. Division by each completion's length belongs to the loss:
    `loss_average: constant` divides the sum over tokens by completions * max_new_tokens instead.
    Source: Liu et al. (arXiv 2503.20783), section 3.2.
    """
    return centre(scores_B, group_size)[:, None] * mask_BT


def rloo(scores_B: Tensor, mask_BT: Tensor, group_size: int) -> Tensor:
    """REINFORCE leave-one-out: score - mean score of the group's other completions; G is at least 2.

    Source: Ahmadian et al. (arXiv 2402.14740); Kool et al. 2019.
    """
    if group_size < 2:
        raise ValueError("the leave-one-out baseline needs at least two completions per prompt")
    return centre(scores_B, group_size)[:, None] * mask_BT * (group_size / (group_size - 1))


def reinforce_plus_plus(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float) -> Tensor:
    """REINFORCE++: discounted sum of the rewards from each token on, whitened over the batch.

    It needs neither a critic nor groups. Source: Hu (arXiv 2501.03262).
    """
    returns, _ = gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma, 1.0)
    return whitened(returns, mask_BT)


def centre(scores_B: Tensor, group_size: int) -> Tensor:
    """Scores [B] minus the mean of their group."""
    groups = scores_B.view(-1, group_size)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


def _gae(inputs: EstimatorInputs) -> tuple[Tensor, Tensor]:
    assert inputs.values is not None
    return gae_advantages(
        inputs.rewards,
        inputs.values,
        inputs.mask,
        gamma=inputs.gamma,
        lam=inputs.lam,
        value_lam=inputs.value_lam,
        whiten=inputs.whiten,
    )


ADVANTAGE_ESTIMATORS: dict[str, Callable[[EstimatorInputs], tuple[Tensor, Tensor | None]]] = {
    "gae": _gae,
    "grpo": lambda inputs: (grpo(inputs.scores, inputs.mask, inputs.group_size), None),
    "dr_grpo": lambda inputs: (dr_grpo(inputs.scores, inputs.mask, inputs.group_size), None),
    "rloo": lambda inputs: (rloo(inputs.scores, inputs.mask, inputs.group_size), None),
    "reinforce_plus_plus": lambda inputs: (
        reinforce_plus_plus(inputs.rewards, inputs.mask, gamma=inputs.gamma),
        None,
    ),
}
"""Estimators by their name in a recipe. Each returns (advantages, returns for the critic or None)."""
