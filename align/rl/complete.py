"""What the trainer knows of a round before it learns from it: log-probabilities, values, advantages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain, cycle
from typing import Any

import torch
from torch import Tensor

from align.config.ppo import LOOKED_AT_ONE_IN, PpoStage
from align.data.experience import OF_ALL_TOKENS, Experience
from align.losses import advantages
from align.losses.kl import kl_estimate
from align.losses.ppo import explained_variance
from align.losses.reduce import masked_mean
from align.models.forward import critic_features, critic_values, policy_output
from align.parallel.micro_batches import largest, shared_passes, summed
from align.rl.models import Models
from align.train.learner import Learner

Metrics = dict[str, float]
Answer = dict[str, Tensor]
"""Fields of `Experience` and what else was asked for, [b, T] or [b, L]."""
Part = tuple[Tensor, bool]
"""Rows of a pass, and whether what is found there counts."""
ROUTING = "routed_experts"


@torch.no_grad()
def look_back(stage: PpoStage, models: Models, batch: Experience, kl_coef: float) -> Metrics:
    """Fill the round's old and reference log-probabilities, values, advantages and returns."""
    metrics = ask_models(stage, models, batch)
    old, ref, score = known(batch.old_logprobs), known(batch.ref_logprobs), known(batch.score)
    kl = kl_estimate(old, ref, stage.kl.estimator) * batch.mask
    penalty = kl_coef * kl if stage.kl.apply_to == "reward" else torch.zeros_like(kl)
    batch.advantages, batch.returns = estimate_advantages(stage, batch, score, penalty)
    if batch.values is not None and batch.returns is not None:
        metrics["explained_variance"] = explained_variance(batch.values, batch.returns, batch.loss_mask).item()
    return metrics | {
        "kl": (kl_estimate(old, ref, "k1") * batch.mask).sum(1).mean().item(),
        "kl_k3": (kl_estimate(old, ref, "k3") * batch.mask).sum(1).mean().item(),
        "kl_coef": kl_coef,
    }


def ask_models(stage: PpoStage, models: Models, batch: Experience) -> Metrics:
    """One pass of each model over the round; where the sampler's log-probabilities are taken, of the policy over some
    rows alone, to see how far they are from the trainer's."""

    def parts_of(rows: Tensor) -> list[Part]:
        return list(shared_passes(list(batch.micro_batches(rows, stage.micro_batch_tokens))))

    parts = parts_of(torch.arange(len(batch)))
    sample = parts if stage.old_logprobs == "trainer" else parts_of(torch.arange(0, len(batch), LOOKED_AT_ONE_IN))

    def asked(parts: list[Part], of: Callable[..., Answer], *whom: Any) -> list[Callable[[], Answer]]:
        return [partial(of, *whom, stage, batch.rows(rows)) for rows, _ in parts]

    passes = [(models.policy.model, asked(sample, ask_policy, models))]
    if models.critic is not None:
        passes.append((models.critic.model, asked(parts, ask_critic, models, models.critic)))
    answers = models.run_passes(*passes)
    with models.reference_run() as reference:
        answering = models.policy.model if models.reference is None else models.reference.model
        answers += models.run_passes((answering, asked(parts, ask_reference, models, reference)))

    tables: Answer = {}
    for answer, (rows, counts) in zip(answers, chain(sample, cycle(parts))):
        for name, values in answer.items():
            if name not in tables:
                size = batch.input_ids.shape[1] if name in OF_ALL_TOKENS else batch.mask.shape[1]
                tables[name] = values.new_full((len(batch), size, *values.shape[2:]), -1 if name == ROUTING else 0)
            if counts:
                tables[name][rows, : values.shape[1]] = values
    # Each rank has filled its own rows; now all have all. A place that nobody filled has less than any expert's number.
    for name, table in tables.items():
        tables[name] = largest(table, models.device) if name == ROUTING else summed(table, models.device)
    asked_mask, logprobs, entropy = (tables.pop(name) for name in ("asked_mask", "logprobs", "entropy"))
    batch.old_logprobs = logprobs if stage.old_logprobs == "trainer" else batch.rollout_logprobs
    for name, table in tables.items():
        setattr(batch, name, table)
    mismatch = (logprobs - batch.rollout_logprobs).abs() * asked_mask
    return {
        "entropy": masked_mean(entropy, asked_mask).item(),
        "mismatch_mean": masked_mean(mismatch, asked_mask).item(),
        "mismatch_max": mismatch.max().item(),
    }


def ask_policy(models: Models, stage: PpoStage, batch: Experience) -> Answer:
    """Of some rows, in host memory; here and below."""
    replay = stage.routing_replay == "rollout"
    output = models.policy.run(policy_output, batch.to(models.device), stage.rollout.temperature, replay=replay)
    answer = {"logprobs": output.logprobs.cpu(), "entropy": output.entropy.cpu(), "asked_mask": batch.mask}
    if stage.routing_replay == "trainer" and output.routed_experts is not None:
        answer[ROUTING] = output.routed_experts.cpu().to(torch.int16)
    return answer


def ask_critic(models: Models, critic: Learner, stage: PpoStage, batch: Experience) -> Answer:
    rows, answer = batch.to(models.device), {}
    if stage.critic.trainable == "head":  # its trunk stays as it is, and so do the features
        rows.features = critic.run(critic_features, rows)
        answer["features"] = rows.features.float().cpu()
    return answer | {"values": critic.run(critic_values, rows).cpu()}


def ask_reference(models: Models, reference: Callable[..., Any], stage: PpoStage, batch: Experience) -> Answer:
    output = reference(policy_output, batch.to(models.device), stage.rollout.temperature)
    return {"ref_logprobs": output.logprobs.cpu()}


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
    match stage.advantage_estimator:
        case "gae":
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
