"""Losses on preference data: Bradley-Terry, the DPO family, SimPO and KTO, as pure functions.

Arguments that the DPO family shares (B pairs of a prompt's two completions):

    chosen_logprobs_B, rejected_logprobs_B          log pi(completion | prompt), summed over the completion's tokens.
    ref_chosen_logprobs_B, ref_rejected_logprobs_B  the same under the reference; no gradient is needed.
    chosen_tokens_B, rejected_tokens_B              completion lengths, for losses that average over tokens.
    beta                                            scale of the implicit reward r(y) = beta * log(pi(y) / ref(y)).
    count                                           pairs in the whole optimizer step; B by default. If set, the
                                                    losses of a step's micro-batches add up to the step's mean.

In the equations, h(y) = log pi(y) - log ref(y), w is the chosen and l the rejected completion, and s is the sigmoid.
Each function returns (loss, metrics); the metrics, if any, are detached means over the pairs of this call.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.losses.precision import in_float32

Metrics = dict[str, Tensor]
LossAndMetrics = tuple[Tensor, Metrics]


@in_float32
def bradley_terry_loss(
    chosen_scores_B: Tensor,
    rejected_scores_B: Tensor,
    *,
    margins_B: Tensor | None = None,
    center_coef: float = 0.0,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of -log s(score_w - score_l - margin) + center_coef * (score_w + score_l)^2 over pairs.

    Args:
        chosen_scores_B, rejected_scores_B: scalar outputs of the reward model.
        margins_B: required score differences, by default 0 (Llama 2, arXiv 2307.09288).
        center_coef: weight of the term that keeps scores around zero (Eisenstein et al., arXiv 2312.09244).

    Source: Bradley and Terry 1952; Ouyang et al. (arXiv 2203.02155), equation 1.
    """
    difference = chosen_scores_B - rejected_scores_B
    losses = -logsigmoid(difference if margins_B is None else difference - margins_B)
    if center_coef:
        losses = losses + center_coef * (chosen_scores_B + rejected_scores_B) ** 2
    metrics = {"accuracy": _mean(chosen_scores_B > rejected_scores_B), "margin": _mean(difference)}
    return _sum_over(losses, count), metrics


@in_float32
def dpo_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    *,
    beta: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of -log s(beta * (h(w) - h(l))); it is ln 2 if policy and reference are equal.

    Source: Rafailov et al., DPO (arXiv 2305.18290), equation 7.
    """
    chosen, rejected = chosen_logprobs_B - ref_chosen_logprobs_B, rejected_logprobs_B - ref_rejected_logprobs_B
    return _paired(-logsigmoid(beta * (chosen - rejected)), beta * chosen, beta * rejected, count)


@in_float32
def hinge_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    *,
    beta: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of max(0, 1 - beta * (h(w) - h(l))); no gradient once beta * (h(w) - h(l)) is 1.

    Source: Zhao et al., SLiC-HF (arXiv 2305.10425); with the reference, Liu et al., RSO (arXiv 2309.06657).
    """
    chosen, rejected = chosen_logprobs_B - ref_chosen_logprobs_B, rejected_logprobs_B - ref_rejected_logprobs_B
    return _paired((1 - beta * (chosen - rejected)).relu(), beta * chosen, beta * rejected, count)


@in_float32
def ipo_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    chosen_tokens_B: Tensor,
    rejected_tokens_B: Tensor,
    *,
    beta: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of (h(w) / |w| - h(l) / |l| - 1 / (2 beta))^2: the margin is regressed to a target, not pushed to infinity.

    Log-ratios are averaged over tokens, as in TRL, so that the target does not depend on the completion's length. If
    all lengths are 1, this is the paper's equation, where `beta` is called tau.
    Source: Azar et al., IPO (arXiv 2310.12036), equation 17.
    """
    chosen, rejected = chosen_logprobs_B - ref_chosen_logprobs_B, rejected_logprobs_B - ref_rejected_logprobs_B
    margin = _per_token(chosen, chosen_tokens_B) - _per_token(rejected, rejected_tokens_B)
    return _paired((margin - 1 / (2 * beta)) ** 2, beta * chosen, beta * rejected, count)


@in_float32
def sigmoid_norm_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    chosen_tokens_B: Tensor,
    rejected_tokens_B: Tensor,
    *,
    beta: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of -log s(beta * (h(w) / |w| - h(l) / |l|)): DPO on log-ratios averaged over tokens.

    Source: Lambert et al., Tulu 3 (arXiv 2411.15124).
    """
    chosen, rejected = chosen_logprobs_B - ref_chosen_logprobs_B, rejected_logprobs_B - ref_rejected_logprobs_B
    margin = _per_token(chosen, chosen_tokens_B) - _per_token(rejected, rejected_tokens_B)
    return _paired(-logsigmoid(beta * margin), beta * chosen, beta * rejected, count)


@in_float32
def robust_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of (-(1 - e) log s(m) + e log s(-m)) / (1 - 2e), with m = beta * (h(w) - h(l)) and e = label_smoothing.

    This is an unbiased estimate of the DPO loss on clean labels, if each label is flipped with probability e < 1/2.
    Source: Chowdhury et al., robust DPO (arXiv 2403.00409).
    """
    chosen, rejected = chosen_logprobs_B - ref_chosen_logprobs_B, rejected_logprobs_B - ref_rejected_logprobs_B
    margin = beta * (chosen - rejected)
    losses = label_smoothing * logsigmoid(-margin) - (1 - label_smoothing) * logsigmoid(margin)
    return _paired(losses / (1 - 2 * label_smoothing), beta * chosen, beta * rejected, count)


@in_float32
def exo_pair_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of KL((s(m), s(-m)) || (1 - e, e)), with m = beta * (h(w) - h(l)) and e = label_smoothing > 0.

    DPO minimises the divergence in the other direction. Source: Ji et al., EXO (arXiv 2402.00856), equation 16.
    """
    chosen, rejected = chosen_logprobs_B - ref_chosen_logprobs_B, rejected_logprobs_B - ref_rejected_logprobs_B
    margin = beta * (chosen - rejected)
    losses = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-label_smoothing)) + (-margin).sigmoid() * (
        logsigmoid(-margin) - math.log(label_smoothing)
    )
    return _paired(losses, beta * chosen, beta * rejected, count)


@in_float32
def nca_pair_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    *,
    beta: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of -log s(r(w)) - (log s(-r(w)) + log s(-r(l))) / 2, which fits each reward and not only their
    difference.

    Source: Chen et al., noise contrastive alignment (arXiv 2402.05369), for pairs.
    """
    chosen = beta * (chosen_logprobs_B - ref_chosen_logprobs_B)
    rejected = beta * (rejected_logprobs_B - ref_rejected_logprobs_B)
    losses = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    return _paired(losses, chosen, rejected, count)


@in_float32
def bco_pair_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    *,
    beta: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of -log s(r(w)) - log s(-r(l)): trains a classifier of good and bad completions whose logit is the reward.

    The paper's reward shift, a running mean over batches, is 0 here. Source: Jung et al., BCO (arXiv 2404.04656).
    """
    chosen = beta * (chosen_logprobs_B - ref_chosen_logprobs_B)
    rejected = beta * (rejected_logprobs_B - ref_rejected_logprobs_B)
    return _paired(-logsigmoid(chosen) - logsigmoid(-rejected), chosen, rejected, count)


@in_float32
def sppo_hard_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    *,
    beta: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of (h(w) - 1 / (2 beta))^2 + (h(l) + 1 / (2 beta))^2: both log-ratios are regressed to a target.

    The chosen completion is taken to win with probability 1.
    Source: Wu et al., SPPO (arXiv 2405.00675), equation 4.7.
    """
    chosen, rejected = chosen_logprobs_B - ref_chosen_logprobs_B, rejected_logprobs_B - ref_rejected_logprobs_B
    losses = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return _paired(losses, beta * chosen, beta * rejected, count)


@in_float32
def apo_zero_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    *,
    beta: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of 1 - s(r(w)) + s(r(l)): raises the chosen likelihood and lowers the rejected one.

    For data whose chosen completions are better than the policy's own.
    Source: D'Oosterlinck et al., APO (arXiv 2408.06266), equation 7.
    """
    chosen = beta * (chosen_logprobs_B - ref_chosen_logprobs_B)
    rejected = beta * (rejected_logprobs_B - ref_rejected_logprobs_B)
    return _paired(1 - chosen.sigmoid() + rejected.sigmoid(), chosen, rejected, count)


@in_float32
def apo_down_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    *,
    beta: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of s(r(w)) + 1 - s(r(w) - r(l)): lowers both likelihoods, the rejected one more.

    For data whose chosen completions are worse than the policy's own.
    Source: D'Oosterlinck et al., APO (arXiv 2408.06266), equation 8.
    """
    chosen = beta * (chosen_logprobs_B - ref_chosen_logprobs_B)
    rejected = beta * (rejected_logprobs_B - ref_rejected_logprobs_B)
    return _paired(chosen.sigmoid() + 1 - (chosen - rejected).sigmoid(), chosen, rejected, count)


@in_float32
def discopop_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    *,
    beta: float,
    discopop_tau: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of -(1 - g) log s(m) + g exp(-m), with m = beta * (h(w) - h(l)) and the gate g = s(m / discopop_tau).

    Source: Lu et al., DiscoPOP (arXiv 2406.08414), equation 5.
    """
    chosen, rejected = chosen_logprobs_B - ref_chosen_logprobs_B, rejected_logprobs_B - ref_rejected_logprobs_B
    margin = beta * (chosen - rejected)
    gate = (margin / discopop_tau).sigmoid()
    losses = (-margin).exp() * gate - logsigmoid(margin) * (1 - gate)
    return _paired(losses, beta * chosen, beta * rejected, count)


@in_float32
def aot_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of -(1 - e) log s(m) - e log s(-m) over sorted pairs, with e = label_smoothing.

    m = beta * (sort(log pi(w) - log pi(l)) - sort(log ref(w) - log ref(l))): the loss makes the policy's distribution
    of margins stochastically dominate the reference's. Sorting mixes a batch's pairs, so the loss depends on the split
    into micro-batches.
    Source: Melnyk et al., AOT (arXiv 2406.05882).
    """
    margins, _ = (chosen_logprobs_B - rejected_logprobs_B).sort()
    ref_margins, _ = (ref_chosen_logprobs_B - ref_rejected_logprobs_B).sort()
    losses = _smoothed(beta * (margins - ref_margins), label_smoothing)
    chosen, rejected = chosen_logprobs_B - ref_chosen_logprobs_B, rejected_logprobs_B - ref_rejected_logprobs_B
    return _paired(losses, beta * chosen, beta * rejected, count)


@in_float32
def aot_unpaired_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    ref_chosen_logprobs_B: Tensor,
    ref_rejected_logprobs_B: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    count: float | None = None,
) -> LossAndMetrics:
    """As `aot_loss`, with m = beta * (sort(h(w)) - sort(h(l))).

    It makes the distribution of rewards of chosen completions stochastically dominate that of rejected ones. The loss
    depends on the split into micro-batches. Source: Melnyk et al., AOT (arXiv 2406.05882).
    """
    chosen, rejected = chosen_logprobs_B - ref_chosen_logprobs_B, rejected_logprobs_B - ref_rejected_logprobs_B
    losses = _smoothed(beta * (chosen.sort().values - rejected.sort().values), label_smoothing)
    return _paired(losses, beta * chosen, beta * rejected, count)


@in_float32
def simpo_loss(
    chosen_logprobs_B: Tensor,
    rejected_logprobs_B: Tensor,
    chosen_tokens_B: Tensor,
    rejected_tokens_B: Tensor,
    *,
    beta: float,
    simpo_gamma: float,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of -log s(beta * (log pi(w) / |w| - log pi(l) / |l|) - simpo_gamma); it needs no reference.

    simpo_gamma: target reward margin. The reward is beta times the mean log-probability per token, so beta is larger
    than DPO's: the paper uses 2 to 10, and a margin of 0.3 to 1.6.
    Source: Meng et al., SimPO (arXiv 2405.14734), equation 6.
    """
    chosen = beta * _per_token(chosen_logprobs_B, chosen_tokens_B)
    rejected = beta * _per_token(rejected_logprobs_B, rejected_tokens_B)
    return _paired(-logsigmoid(chosen - rejected - simpo_gamma), chosen, rejected, count)


@in_float32
def sft_loss(chosen_token_logprobs_BT: Tensor, mask_BT: Tensor, *, count: float | None = None) -> LossAndMetrics:
    """Negative log-likelihood per token of the chosen completions: the term that `sft_coef` adds to a DPO loss.

    Args:
        chosen_token_logprobs_BT: log-probability of each token.
        mask_BT: 1 on the completion's tokens.
        count: chosen tokens in the whole optimizer step; by default those of this call.

    Source: Pang et al. (arXiv 2404.19733); the Hunyuan-Large report (arXiv 2411.02265) adds it to DPO.
    """
    total = -torch.where(mask_BT.bool(), chosen_token_logprobs_BT, 0.0).sum()
    return total / (mask_BT.sum().clamp_min(1) if count is None else count), {}


@in_float32
def kto_loss(
    logprobs_B: Tensor,
    ref_logprobs_B: Tensor,
    desirable_B: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    count: float | None = None,
) -> LossAndMetrics:
    """Mean of weight * (1 - s(+-(beta * (h(y) - kl)))) over completions, + for desirable ones, - for the others.

    Args:
        logprobs_B, ref_logprobs_B: log-probabilities of B completions, which need not come in pairs.
        desirable_B: True for desirable completions.
        kl: scalar that `kto_kl` returns for the whole optimizer step.
        desirable_weight, undesirable_weight: compensate for unequal numbers of the two kinds.

    Source: Ethayarajh et al., KTO (arXiv 2402.01306).
    """
    rewards = logprobs_B - ref_logprobs_B
    desirable = desirable_B.to(rewards.dtype)
    weights = desirable_weight * desirable + undesirable_weight * (1 - desirable)
    losses = weights * (1 - (beta * (2 * desirable - 1) * (rewards - kl.detach())).sigmoid())
    return _sum_over(losses, count), {"kl": kl.detach(), "reward": _mean(beta * rewards)}


@in_float32
def kto_kl(mismatched_logprobs_B: Tensor, ref_mismatched_logprobs_B: Tensor) -> Tensor:
    """Estimate of KL(policy || reference): mean h of mismatched completions, at least 0, a scalar without gradient.

    A mismatched completion is scored with a prompt of the batch that it does not answer.
    """
    return (mismatched_logprobs_B - ref_mismatched_logprobs_B).mean().clamp_min(0).detach()


PREFERENCE_LOSSES: dict[str, Callable[..., LossAndMetrics]] = {
    "sigmoid": dpo_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "robust": robust_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "simpo": simpo_loss,
}
"""Losses on pairs, by their `loss_type` in a recipe."""


def preference_loss(loss_type: str, tensors: Mapping[str, Tensor], options: Mapping[str, float]) -> LossAndMetrics:
    """Call the loss `loss_type` with the `tensors` and `options` whose names are among its parameters."""
    function = PREFERENCE_LOSSES[loss_type]
    given = {**tensors, **options}
    return function(**{name: given[name] for name in inspect.signature(function).parameters if name in given})


def _per_token(values_B: Tensor, tokens_B: Tensor) -> Tensor:
    return values_B / tokens_B.clamp_min(1)


def _smoothed(margins_B: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(margins_B) - label_smoothing * logsigmoid(-margins_B)


def _paired(
    losses_B: Tensor, chosen_rewards_B: Tensor, rejected_rewards_B: Tensor, count: float | None
) -> LossAndMetrics:
    """The mean loss, and metrics of the implicit rewards under TRL's names."""
    return _sum_over(losses_B, count), {
        "rewards/chosen": _mean(chosen_rewards_B),
        "rewards/rejected": _mean(rejected_rewards_B),
        "rewards/accuracies": _mean(chosen_rewards_B > rejected_rewards_B),
        "rewards/margins": _mean(chosen_rewards_B - rejected_rewards_B),
    }


def _sum_over(losses_B: Tensor, count: float | None) -> Tensor:
    return losses_B.mean() if count is None else losses_B.sum() / count


def _mean(values_B: Tensor) -> Tensor:
    return values_B.detach().float().mean()
