"""Update policy and critic on a rollout batch: epochs of mini-batches, each one optimizer step over micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.config.ppo import PpoStage
from align.data.experience import Experience
from align.data.transfer import to_host
from align.errors import UserError
from align.losses.kl import kl_loss
from align.losses.ppo import POLICY_LOSSES, importance_weight, value_loss
from align.losses.reduce import averaging_weights
from align.models.forward import critic_values, policy_output
from align.parallel.micro_batches import shared_passes, summed
from align.rl.complete import filled
from align.rl.models import Models
from align.train.learner import Learner

OVERFLOWS = 3
"""Number of successive steps with overflowing bf16 gradients after which the run stops."""
LOSSES = {"policy": ("policy_loss", "kl_loss", "aux_loss", "router_z_loss"), "critic": ("value_loss",)}
"""Metrics that are losses, by the model that they train."""


@dataclass(frozen=True)
class BatchTotals:
    """Totals of a whole mini-batch, which normalise the losses of its micro-batches.

    tokens: number of completion tokens with a loss.
    completions: number of completions with such tokens.
    all_tokens: number of tokens of all prompts and completions; the router's losses are means over them.
    """

    tokens: float
    completions: float
    all_tokens: float


def update(
    stage: PpoStage, models: Models, batch: Experience, *, step: int, seed: int, kl_coef: float
) -> dict[str, float]:
    """Run all epochs of updates, then update the policy's EMA weights.

    Returns each metric's mean over the mini-batches, the number of policy updates, and the number of skipped updates of
    policy and critic. Raises `UserError` at the first loss that is not finite, and for gradients as
    `require_finite_gradients` does.
    """
    measured: dict[str, list[float]] = {}
    counts = {"policy_updates": 0.0, "skipped_updates": 0.0}
    active = dict(models.learners)
    if models.critic is not None and step < stage.critic.warmup_steps:
        del active["policy"]
    for learner in active.values():
        learner.schedule(step)
    shuffle = torch.Generator().manual_seed(seed * 1_000_003 + step)
    for _ in range(stage.epochs):
        for mini_batch in torch.randperm(len(batch), generator=shuffle).split(stage.mini_batch_size):
            mask = batch.loss_mask[mini_batch]
            totals = BatchTotals(
                tokens=mask.sum().item(),
                completions=mask.any(dim=1).sum().item(),
                all_tokens=batch.lengths[mini_batch].sum().item(),
            )
            if not totals.tokens:
                counts["skipped_updates"] += len(active)  # `mask_truncated` has masked all completions
                continue
            metrics = accumulate_gradients(
                stage, models, batch, mini_batch, totals, kl_coef, train_policy="policy" in active
            )
            require_finite_losses(metrics, step)
            if "policy" in active and stage.kl.stop is not None and metrics["update_kl"] > stage.kl.stop:
                active.pop("policy").discard()
            for name, learner in active.items():
                norm = learner.step()
                require_finite_gradients(name, learner, step)
                if norm is None:
                    counts["skipped_updates"] += 1
                else:
                    metrics[f"{name}_grad_norm"] = norm
                    counts["policy_updates"] += name == "policy"
            for name, value in metrics.items():
                measured.setdefault(name, []).append(value)
    models.policy.update_ema()
    return counts | {name: sum(values) / len(values) for name, values in measured.items()}


def require_finite_losses(metrics: dict[str, float], step: int) -> None:
    """Raise `UserError` if a loss of a mini-batch is not finite. `metrics` are the same on all ranks."""
    for model, names in LOSSES.items():
        for name in names:
            if not math.isfinite(metrics.get(name, 0.0)):
                raise diverged(f"{name} is {metrics[name]}", model, step)


def require_finite_gradients(model: str, learner: Learner, step: int) -> None:
    """Raise `UserError` if the learner skipped its last step because of gradients that are not finite.

    A learner under DeepSpeed in bf16 may skip single steps, because bf16 gradients can overflow where the loss does
    not. `OVERFLOWS` skipped steps in a row are an error.
    """
    if learner.skips_in_a_row and not learner.skips_overflow:
        raise diverged("the gradient norm is not finite", model, step)
    if learner.skips_in_a_row >= OVERFLOWS:
        raise diverged(f"the bf16 gradients overflowed in {OVERFLOWS} steps in a row", model, step)


def diverged(problem: str, model: str, step: int) -> UserError:
    """The error for a loss or gradient that is infinite or not a number."""
    key = "critic.learning_rate" if model == "critic" else "optimizer.learning_rate"
    return UserError(f"PPO step {step + 1}, {model}: {problem}. Lower {key}, and start the stage again with --from.")


def accumulate_gradients(
    stage: PpoStage,
    models: Models,
    batch: Experience,
    mini_batch: Tensor,
    totals: BatchTotals,
    kl_coef: float,
    *,
    train_policy: bool,
) -> dict[str, float]:
    """Accumulate the gradients of a mini-batch over its micro-batches on all ranks; returns its metrics.

    The result does not depend on how the mini-batch is split, except for the router's balance loss. This loss is a
    product of two means, so it is computed per micro-batch, and then averaged with the micro-batches' tokens as
    weights.
    """
    measured: list[dict[str, Tensor]] = []
    for micro_batch, counts in shared_passes(list(batch.micro_batches(mini_batch, stage.micro_batch_tokens))):
        rows = batch.rows(micro_batch).to(models.device)
        if not counts:  # a repeated micro-batch; this rank only takes part in the collectives
            rows.loss_mask = torch.zeros_like(rows.loss_mask)
        share = counts * rows.lengths.sum().item() / totals.all_tokens
        passes = []
        if train_policy:
            passes.append(
                (models.policy.model, [partial(policy_backward, stage, models.policy, rows, totals, share, kl_coef)])
            )
        if models.critic is not None:
            passes.append((models.critic.model, [partial(critic_backward, stage, models.critic, rows, totals)]))
        measured += models.run_passes(*passes)
    metrics: dict[str, float] = {}
    named = [(name, value) for results in measured for name, value in results.items()]
    # Metrics are read once per mini-batch, because reading makes the host wait for the GPU.
    for (name, _), value in zip(named, to_host([value for _, value in named]), strict=True):
        metrics[name] = metrics.get(name, 0.0) + value
    sums = summed(torch.tensor(list(metrics.values()), dtype=torch.float64), models.device)
    return dict(zip(metrics, sums.tolist(), strict=True))


def policy_backward(
    stage: PpoStage, policy: Learner, rows: Experience, totals: BatchTotals, share: float, kl_coef: float
) -> dict[str, Tensor]:
    """Forward and backward pass of the policy on a micro-batch; return the micro-batch's metrics.

    Loss and metrics are normalised by `totals`, so those of all micro-batches add up to the mini-batch's.

    share: the micro-batch's share of the mini-batch's tokens, which weights the router's losses.
    """
    output = policy.run(policy_output, rows, stage.rollout.temperature, replay=stage.routing_replay != "none")
    mask = rows.loss_mask
    average = averaging_weights(
        mask,
        stage.loss_average,
        count=totals.tokens,
        completions=totals.completions,
        max_tokens=stage.rollout.max_new_tokens,
    )
    loss, metrics = POLICY_LOSSES[stage.policy_loss](
        output.logprobs,
        filled(rows.old_logprobs),
        filled(rows.advantages),
        mask,
        clip_range=stage.clip_range,
        clip_range_high=stage.clip_range_high,
        weights=_product(sampler_correction(stage, rows), average),
        count=totals.tokens,
        **clip_options(stage),
    )
    metrics["policy_loss"] = loss.detach()
    if stage.kl.apply_to == "loss":
        kl = kl_loss(
            output.logprobs,
            filled(rows.ref_logprobs),
            mask,
            estimator=stage.kl.estimator,
            count=totals.tokens,
            weights=average,
        )
        metrics["kl_loss"] = kl.detach()
        loss = loss + kl_coef * kl
    if output.router is not None:
        loss = loss + share * output.router.loss(policy.model.config)
        router = output.router.metrics()
        weighted = share * torch.stack(list(router.values())).double()
        metrics |= dict(zip(router, weighted.unbind(), strict=True))
    policy.backward(loss)
    return metrics


def clip_options(stage: PpoStage) -> dict[str, Any]:
    """Options of the clipped policy loss that the recipe sets; its validation refuses them with other losses."""
    options: dict[str, Any] = {} if stage.dual_clip is None else {"dual_clip": stage.dual_clip}
    return options | ({"sequence": True} if stage.ratio == "sequence" else {})


def sampler_correction(stage: PpoStage, rows: Experience) -> Tensor | None:
    """Importance weights [B, T] from the rollout engine's distribution to the trainer's; None without a correction."""
    if stage.importance.correction == "none":
        return None
    return importance_weight(
        filled(rows.old_logprobs),
        rows.rollout_logprobs,
        rows.loss_mask,
        cap=stage.importance.cap,
        sequence=stage.importance.level == "sequence",
        drop=stage.importance.correction == "mask",
    )


def critic_backward(stage: PpoStage, critic: Learner, rows: Experience, totals: BatchTotals) -> dict[str, Tensor]:
    """Forward and backward pass of the critic on a micro-batch; return the micro-batch's metrics.

    Loss and metrics are normalised by `totals`, so those of all micro-batches add up to the mini-batch's.
    """
    loss, metrics = value_loss(
        critic.run(critic_values, rows),
        filled(rows.values),
        filled(rows.returns),
        rows.loss_mask,
        clip_range=stage.value_clip_range,
        count=totals.tokens,
    )
    critic.backward(loss)
    return metrics | {"value_loss": loss.detach()}


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second
