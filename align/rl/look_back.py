"""What the trainer knows of a round before it learns from it: log-probabilities, values, advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from align.config.ppo import PpoStage
from align.distributed.passes import largest, shared_passes, summed
from align.losses import advantages
from align.losses.kl import kl_estimate
from align.losses.ppo import explained_variance
from align.losses.reduce import masked_mean
from align.rl.team import Team
from align.rollout.experience import Experience, critic_features, critic_values, policy_output

Metrics = dict[str, float]


@torch.no_grad()
def look_back(stage: PpoStage, team: Team, batch: Experience, kl_coef: float) -> Metrics:
    """Fill the round's old and reference log-probabilities, values, advantages and returns."""
    metrics = ask_models(stage, team, batch)
    old, ref, score = known(batch.old_logprobs), known(batch.ref_logprobs), known(batch.score)
    kl = kl_estimate(old, ref, stage.kl.estimator) * batch.mask
    penalty = kl_coef * kl if stage.kl.apply_to == "reward" else torch.zeros_like(kl)
    batch.advantages, batch.returns = estimate_advantages(stage, batch, score, penalty)
    if batch.values is not None and batch.returns is not None:
        metrics["explained_variance"] = explained_variance(batch.values, batch.returns, batch.loss_mask).item()
    mismatch = (old - batch.rollout_logprobs).abs()
    return metrics | {
        "kl": (kl_estimate(old, ref, "k1") * batch.mask).sum(1).mean().item(),
        "kl_k3": (kl_estimate(old, ref, "k3") * batch.mask).sum(1).mean().item(),
        "kl_coef": kl_coef,
        "mismatch_mean": masked_mean(mismatch, batch.mask).item(),
        "mismatch_max": (mismatch * batch.mask).max().item(),
    }


def ask_models(stage: PpoStage, team: Team, batch: Experience) -> Metrics:
    """One pass of each model over the round."""
    shape = batch.mask.shape
    batch.old_logprobs, batch.ref_logprobs, entropy = (torch.zeros(shape) for _ in range(3))
    if team.critic is not None:
        batch.values = torch.zeros(shape)
    for micro, counts in shared_passes(list(batch.micro_batches(torch.arange(len(batch)), stage.micro_batch_tokens))):
        rows = batch.rows(micro).to(team.device)
        width = rows.mask.shape[1]
        replay = stage.routing_replay == "rollout"
        output = team.policy.ask(policy_output, rows, stage.rollout.temperature, replay=replay)
        if stage.routing_replay == "trainer" and output.routed_experts is not None:
            keep_routing(batch, micro, output.routed_experts.cpu())
        batch.old_logprobs[micro, :width] = counts * output.logprobs.cpu()
        entropy[micro, :width] = counts * output.entropy.cpu()
        logprobs = team.ask_reference(policy_output, rows, stage.rollout.temperature).logprobs
        batch.ref_logprobs[micro, :width] = counts * logprobs.cpu()
        if team.critic is None or batch.values is None:
            continue
        if stage.critic.trainable == "head":
            rows.features = team.critic.ask(critic_features, rows)
            if batch.features is None:
                batch.features = torch.zeros(*shape, rows.features.shape[-1])
            batch.features[micro, :width] = counts * rows.features.float().cpu()
        batch.values[micro, :width] = counts * team.critic.ask(critic_values, rows).cpu()
    exchange(batch, entropy, team.device)
    return {"entropy": masked_mean(entropy, batch.mask).item()}


def exchange(batch: Experience, entropy: Tensor, device: torch.device) -> None:
    """Each rank has filled its own rows and left the others zero; afterwards all have all."""
    for tensor in (batch.old_logprobs, batch.ref_logprobs, entropy, batch.values, batch.features):
        if tensor is not None:
            tensor.copy_(summed(tensor, device))
    if batch.routed_experts is not None:
        batch.routed_experts = largest(batch.routed_experts, device)


def keep_routing(batch: Experience, rows: Tensor, routed_experts: Tensor) -> None:
    """Put the experts that some rows' tokens went to in their place."""
    if batch.routed_experts is None:
        shape = (*batch.input_ids.shape, *routed_experts.shape[2:])
        batch.routed_experts = torch.full(shape, -1, dtype=torch.int16)
    batch.routed_experts[rows, : routed_experts.shape[1]] = routed_experts


def estimate_advantages(
    stage: PpoStage, batch: Experience, score_B: Tensor, penalty_BT: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(advantages, returns for the critic), both [B, T].

    penalty_BT: what each token's nearness to the reference costs. Where tokens have rewards of their own, the score
    comes on top at the completion's last token, be it a stop token or the one at which it was cut.
    """
    rewards = -penalty_BT
    last = (batch.lengths - batch.prompt_lengths - 1).clamp_min(0)
    rewards[torch.arange(len(batch)), last] += score_B
    mask, group = batch.loss_mask, stage.completions_per_prompt
    match stage.algorithm:
        case "ppo":
            return advantages.ppo(
                rewards,
                known(batch.values),
                mask,
                gamma=stage.gamma,
                lam=stage.lam,
                value_lam=stage.critic.lam,
                whitened=stage.whiten_advantages,
            )
        case "reinforce_plus_plus":
            return advantages.reinforce_plus_plus(rewards, mask, gamma=stage.gamma), None
        case "grpo":
            return advantages.grpo(rewards.sum(1), mask, group), None
        case "dr_grpo":
            return advantages.dr_grpo(rewards.sum(1), mask, group), None
        case "rloo":
            return advantages.rloo(rewards.sum(1), mask, group), None


def known(tensor: Tensor | None) -> Tensor:
    """A field that an earlier step of the round has filled."""
    assert tensor is not None
    return tensor
