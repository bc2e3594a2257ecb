"""Learning from a round: epochs over mini-batches, each made of micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from align.config.ppo import PpoStage
from align.data.experience import Experience
from align.losses.kl import kl_loss
from align.losses.ppo import importance_weight, policy_loss, value_loss
from align.losses.reduce import averaging_weights
from align.models.forward import critic_values, policy_output
from align.parallel.micro_batches import shared_passes, summed
from align.rl.complete import Metrics, known
from align.rl.models import Models


@dataclass(frozen=True)
class Whole:
    """What a mini-batch holds altogether, by which each of its micro-batches' losses is divided."""

    tokens: float
    completions: float


def update(stage: PpoStage, models: Models, batch: Experience, *, step: int, seed: int, kl_coef: float) -> Metrics:
    """Means over the mini-batches of what was measured in them, and the numbers of updates made and skipped. The
    policy's average, where there is one, moves on by a round."""
    measured: dict[str, list[float]] = {}
    counts = {"policy_updates": 0.0, "skipped_updates": 0.0}
    active = dict(models.learners)
    if models.critic is not None and step < stage.critic.warmup_steps:
        del active["policy"]
    for learner in active.values():
        learner.schedule(step)
    shuffle = torch.Generator().manual_seed(seed * 1_000_003 + step)
    for _ in range(stage.epochs):
        for mini in torch.randperm(len(batch), generator=shuffle).split(stage.mini_batch_size):
            mask = batch.loss_mask[mini]
            whole = Whole(mask.sum().item(), mask.any(dim=1).sum().item())
            if not whole.tokens:
                counts["skipped_updates"] += len(active)  # every completion was cut, and those do not count
                continue
            found = gather_gradients(stage, models, batch, mini, whole, kl_coef, policy_learns="policy" in active)
            if "policy" in active and stage.kl.stop is not None and found["update_kl"] > stage.kl.stop:
                active.pop("policy").discard()
            for name, learner in active.items():
                norm = learner.step()
                if norm is None:
                    counts["skipped_updates"] += 1
                else:
                    found[f"{name}_grad_norm"] = norm
                    counts["policy_updates"] += name == "policy"
            for name, value in found.items():
                measured.setdefault(name, []).append(value)
    models.policy.update_ema()
    return counts | {name: mean_of_finite(values) for name, values in measured.items()}


def gather_gradients(
    stage: PpoStage,
    models: Models,
    batch: Experience,
    mini: Tensor,
    whole: Whole,
    kl_coef: float,
    *,
    policy_learns: bool,
) -> Metrics:
    """Gradients of a mini-batch, in as many passes as its tokens need; their split changes nothing."""
    found: Metrics = {}
    for micro, counts in shared_passes(list(batch.micro_batches(mini, stage.micro_batch_tokens))):
        rows = batch.rows(micro).to(models.device)
        if not counts:
            rows.loss_mask = torch.zeros_like(rows.loss_mask)
        passes = []
        if policy_learns:
            passes.append((models.policy.model, [partial(learn_policy, stage, models, rows, whole, kl_coef)]))
        if models.critic is not None:
            passes.append((models.critic.model, [partial(learn_values, stage, models, rows, whole)]))
        parts = models.run_passes(*passes)
        for name, value in (item for part in parts for item in part.items()):
            found[name] = found.get(name, 0.0) + float(value)
    sums = summed(torch.tensor(list(found.values()), dtype=torch.float64), models.device)
    return dict(zip(found, sums.tolist(), strict=True))


def learn_policy(stage: PpoStage, models: Models, rows: Experience, whole: Whole, kl_coef: float) -> dict[str, Tensor]:
    """Gradients of the policy's loss on some rows, as their share of the whole mini-batch."""
    replay = stage.routing_replay != "none"
    output = models.policy.run(policy_output, rows, stage.rollout.temperature, replay=replay)
    old, mask = known(rows.old_logprobs), rows.loss_mask
    average = averaging_weights(
        mask,
        stage.loss_average,
        count=whole.tokens,
        completions=whole.completions,
        max_tokens=stage.rollout.max_new_tokens,
    )
    loss, metrics = policy_loss(
        output.logprobs,
        old,
        known(rows.advantages),
        mask,
        clip_range=stage.clip_range,
        clip_range_high=stage.clip_range_high,
        dual_clip=stage.dual_clip,
        sequence=stage.ratio == "sequence",
        weights=_product(sampler_correction(stage, rows), average),
        count=whole.tokens,
    )
    metrics["policy_loss"] = loss.detach()
    if stage.kl.apply_to == "loss":
        distance = kl_loss(
            output.logprobs,
            known(rows.ref_logprobs),
            mask,
            estimator=stage.kl.estimator,
            count=whole.tokens,
            weights=average,
        )
        metrics["kl_loss"] = distance.detach()
        loss = loss + kl_coef * distance
    if output.router is not None:
        share = mask.sum() / whole.tokens
        loss = loss + share * output.router.loss(models.policy.model.config)
        metrics |= {name: share * value for name, value in output.router.metrics().items()}
    models.policy.backward(loss)
    return metrics


def sampler_correction(stage: PpoStage, rows: Experience) -> Tensor | None:
    """Weights [B, T] from the sampler's distribution to the trainer's, as the recipe wants them."""
    if stage.importance.correction == "none":
        return None
    return importance_weight(
        known(rows.old_logprobs),
        rows.rollout_logprobs,
        rows.loss_mask,
        cap=stage.importance.cap,
        sequence=stage.importance.level == "sequence",
        drop=stage.importance.correction == "mask",
    )


def learn_values(stage: PpoStage, models: Models, rows: Experience, whole: Whole) -> dict[str, Tensor]:
    """Gradients of the critic's loss on some rows, as their share of the whole mini-batch."""
    assert models.critic is not None
    loss, metrics = value_loss(
        models.critic.run(critic_values, rows),
        known(rows.values),
        known(rows.returns),
        rows.loss_mask,
        clip_range=stage.value_clip_range,
        count=whole.tokens,
    )
    models.critic.backward(loss)
    return metrics | {"value_loss": loss.detach()}


def mean_of_finite(values: list[float]) -> float:
    """A mini-batch whose loss was not finite is counted among the skipped, and would hide the others here."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else 0.0


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second
