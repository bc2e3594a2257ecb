"""Complete a rollout batch before the update: old and reference log-probabilities, values, advantages.

Shapes: B completions, T completion tokens, L prompt and completion tokens, D hidden, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain, cycle
from typing import Any

import torch
from torch import Tensor

from align.config.ppo import LOGPROBS_OF_ONE_IN, PpoStage
from align.data.experience import OF_ALL_TOKENS, Experience
from align.errors import UserError
from align.losses.advantages import ADVANTAGE_ESTIMATORS, EstimatorInputs
from align.losses.kl import kl_estimate
from align.losses.ppo import explained_variance
from align.losses.reduce import masked_mean
from align.models.forward import critic_features, critic_values, policy_output
from align.parallel.micro_batches import largest, shared_passes, summed
from align.rl.models import Models
from align.train.learner import Learner

ROUTING = "routed_experts"
UNROUTED = -1
"""Value in `routed_experts` where no expert is recorded. The all-reduce takes the maximum over the ranks, so it is
replaced by the expert that another rank has recorded, if any."""


Comparison = Callable[[Tensor, Tensor, Tensor], None]
"""Takes log-probabilities of trainer and sampler and a mask, all [B, T]; see `SelfCheck.compare`."""


@torch.no_grad()
def complete_batch(
    stage: PpoStage, models: Models, batch: Experience, kl_coef: float, compare: Comparison | None = None
) -> dict[str, float]:
    """Fill in the batch's old and reference log-probabilities, values, advantages and returns; return metrics.

    compare: called with the policy's log-probabilities before they are used.
    """
    metrics = forward_passes(stage, models, batch, compare)
    old, ref, score = filled(batch.old_logprobs), filled(batch.ref_logprobs), filled(batch.score)
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


def forward_passes(
    stage: PpoStage, models: Models, batch: Experience, compare: Comparison | None = None
) -> dict[str, float]:
    """Run policy, critic and reference over the batch and store their results in it.

    Returns the metrics of entropy and of the mismatch between sampler and trainer. Each rank computes its share of the
    micro-batches. Under `old_logprobs: rollout` the policy computes only one completion in 16, for these metrics.
    """

    def micro_batches(rows: Tensor) -> list[tuple[Tensor, bool]]:
        return list(shared_passes(list(batch.micro_batches(rows, stage.micro_batch_tokens))))

    every = micro_batches(torch.arange(len(batch)))
    some = every if stage.old_logprobs == "trainer" else micro_batches(torch.arange(0, len(batch), LOGPROBS_OF_ONE_IN))

    def passes(
        micros: list[tuple[Tensor, bool]], run: Callable[..., dict[str, Tensor]], *models: Any
    ) -> list[Callable[[], dict[str, Tensor]]]:
        return [partial(run, *models, stage, batch.rows(rows)) for rows, _ in micros]

    trained = [(models.policy.model, passes(some, policy_pass, models))]
    if models.critic is not None:
        trained.append((models.critic.model, passes(every, critic_pass, models, models.critic)))
    results = models.run_passes(*trained)
    with models.reference_run() as run:
        reference = models.policy.model if models.reference is None else models.reference.model
        results += models.run_passes((reference, passes(every, reference_pass, models, run)))

    tables: dict[str, Tensor] = {}
    for result, (rows, counts) in zip(results, chain(some, cycle(every))):
        for name, values in result.items():
            if name not in tables:
                size = batch.input_ids.shape[1] if name in OF_ALL_TOKENS else batch.mask.shape[1]
                empty = UNROUTED if name == ROUTING else 0
                tables[name] = values.new_full((len(batch), size, *values.shape[2:]), empty)
            if counts:
                tables[name][rows, : values.shape[1]] = values
    # Each rank has filled in the rows that it computed; the all-reduce gives every rank all rows.
    for name, table in tables.items():
        tables[name] = largest(table, models.device) if name == ROUTING else summed(table, models.device)
    require_finite_results(batch, tables)
    computed, logprobs, entropy = (tables.pop(name) for name in ("computed", "logprobs", "entropy"))
    if compare is not None:
        compare(logprobs, batch.rollout_logprobs, computed)
    batch.old_logprobs = logprobs if stage.old_logprobs == "trainer" else batch.rollout_logprobs
    for name, table in tables.items():
        setattr(batch, name, table)
    mismatch = (logprobs - batch.rollout_logprobs).abs() * computed
    return {
        "entropy": masked_mean(entropy, computed).item(),
        "mismatch_mean": masked_mean(mismatch, computed).item(),
        "mismatch_max": mismatch.max().item(),
    }


def policy_pass(models: Models, stage: PpoStage, batch: Experience) -> dict[str, Tensor]:
    """Forward pass of the policy; results are moved to the CPU.

    Returns log-probabilities and entropy [B, T], `computed` [B, T] (1 on the completion tokens of these rows) and, with
    `routing_replay: trainer`, the chosen experts [B, L, layers, k].
    """
    replay = stage.routing_replay == "rollout"
    output = models.policy.run(policy_output, batch.to(models.device), stage.rollout.temperature, replay=replay)
    logprobs, entropy = torch.stack((output.logprobs, output.entropy)).cpu()  # in one copy
    results = {"logprobs": logprobs, "entropy": entropy, "computed": batch.mask}
    if stage.routing_replay == "trainer" and output.routed_experts is not None:
        results[ROUTING] = output.routed_experts.cpu().to(torch.int16)
    return results


@torch.no_grad()
def compare_samples(stage: PpoStage, models: Models, samples: Experience, compare: Comparison) -> None:
    """Compare the log-probabilities of samples of the current weights. Every rank computes all samples."""
    output = models.policy.run(
        policy_output, samples.to(models.device), stage.rollout.temperature, replay=stage.routing_replay == "rollout"
    )
    compare(output.logprobs.cpu(), samples.rollout_logprobs, samples.mask)


def critic_pass(models: Models, critic: Learner, stage: PpoStage, batch: Experience) -> dict[str, Tensor]:
    """Values [B, T]; with a frozen trunk also the trunk's features [B, T, D], which the updates reuse."""
    rows, results = batch.to(models.device), {}
    if stage.critic.trainable == "head":
        rows.features = critic.run(critic_features, rows)
        results["features"] = rows.features.float().cpu()
    return results | {"values": critic.run(critic_values, rows).cpu()}


def reference_pass(models: Models, run: Callable[..., Any], stage: PpoStage, batch: Experience) -> dict[str, Tensor]:
    """Log-probabilities [B, T] of the reference."""
    output = run(policy_output, batch.to(models.device), stage.rollout.temperature)
    return {"ref_logprobs": output.logprobs.cpu()}


def require_finite_results(batch: Experience, tables: dict[str, Tensor]) -> None:
    """Raise `UserError` if a log-probability or value is not finite. `tables` are the same on all ranks."""
    names = {
        "logprobs": "log-probabilities of the policy",
        "ref_logprobs": "log-probabilities of the reference",
        "values": "values of the critic",
    }
    found = {names[name]: table for name, table in tables.items() if name in names}
    for name, table in {"log-probabilities of the rollout engine": batch.rollout_logprobs, **found}.items():
        if bad := int((~table.isfinite()).sum()):
            raise UserError(
                f"PPO: {bad:,} of {table.numel():,} {name} are infinite or not a number. Lower optimizer.learning_rate "
                "and critic.learning_rate, or start from another checkpoint (init_from)."
            )


def estimate_advantages(
    stage: PpoStage, batch: Experience, score_B: Tensor, penalty_BT: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(advantages, returns for the critic), both [B, T]; the returns are None for estimators without a critic.

    A token's reward is minus its KL penalty. The last completion token also gets the score, whether it is a stop token
    or the completion was truncated after it.

    score_B: score of each completion.
    penalty_BT: KL penalty of each token.
    """
    rewards = -penalty_BT
    last = (batch.lengths - batch.prompt_lengths - 1).clamp_min(0)
    rewards[torch.arange(len(batch)), last] += score_B
    estimate = ADVANTAGE_ESTIMATORS[stage.advantage_estimator]
    return estimate(
        EstimatorInputs(
            rewards=rewards,
            mask=batch.loss_mask,
            values=batch.values,
            group_size=stage.completions_per_prompt,
            gamma=stage.gamma,
            lam=stage.lam,
            value_lam=stage.critic.lam,
            whiten=stage.whiten_advantages,
        )
    )


def filled(tensor: Tensor | None) -> Tensor:
    """Return an optional field of the batch that an earlier step must have filled in."""
    assert tensor is not None
    return tensor
