"""Score samples and build the rollout batch: padded tensors, scores, length penalties, dynamic sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.config.ppo import PpoStage
from align.data.experience import Experience, build_experience
from align.data.prepare import PromptRow
from align.reward.mixture import Scorer
from align.reward.shaping import overlong_shaping
from align.rl.complete import filled
from align.rl.sample import Rollouts, RolloutSampler
from align.rollout.base import Completion


@dataclass
class RolloutBatch:
    """Scored completions of one PPO iteration; the same on all ranks.

    rows: each completion's prompt.
    completions: the engine's completions.
    experience: prompts, completions and scores as padded tensors.
    metrics: metrics of sampling and scoring.
    """

    rows: list[PromptRow]
    completions: list[Completion]
    experience: Experience
    metrics: dict[str, float]

    def group_scores(self, size: int) -> Tensor:
        """Scores [G, size] of the completions of each prompt."""
        return filled(self.experience.score).view(-1, size)


def score_batch(stage: PpoStage, sampler: RolloutSampler, samples: Rollouts, scorer: Scorer) -> RolloutBatch:
    """Score `samples` and build the rollout batch.

    With dynamic sampling, groups whose scores are all equal are replaced by newly sampled groups, as far as the
    recipe's maximum of extra generations allows. The batch always has the recipe's size.
    """
    group = stage.completions_per_prompt
    batches = [score_samples(stage, samples, scorer)]
    for _ in range(stage.dynamic_sampling):
        missing = stage.batch_size - group * sum(int(informative(b.group_scores(group)).sum()) for b in batches)
        if missing <= 0:
            break
        batches.append(score_samples(stage, sampler.sample(missing), scorer))
    batch = concatenate(batches)
    if group > 1:
        useful = informative(batch.group_scores(group))
        batch.metrics["informative_groups"] = useful.float().mean().item()
        batch.metrics["drawn_completions"] = float(len(batch.experience))
        if len(batches) > 1:
            first = torch.argsort(~useful, stable=True)[: stage.batch_size // group].sort().values
            batch = select(batch, (first[:, None] * group + torch.arange(group)).flatten())
    if stage.mask_truncated:
        finished = torch.tensor([float(c.finished) for c in batch.completions])
        batch.experience.loss_mask = batch.experience.mask * finished[:, None]
    batch.metrics |= batch_metrics(batch)
    return batch


def informative(scores_GN: Tensor) -> Tensor:
    """True [G] for groups whose scores differ. In other groups all advantages would be zero."""
    return (scores_GN - scores_GN[:, :1]).abs().amax(dim=1) > 1e-6


def score_samples(stage: PpoStage, samples: Rollouts, scorer: Scorer) -> RolloutBatch:
    """Score samples: total reward minus the penalties for truncated and overlong completions."""
    experience = to_experience(samples.completions)
    scores, metrics = scorer.score(experience, samples.rows, samples.completions)
    if stage.missing_eos_penalty is not None:
        truncated = torch.tensor([float(not c.finished) for c in samples.completions])
        scores = scores - stage.missing_eos_penalty * truncated
    if stage.overlong_buffer:
        shaping = overlong_shaping(
            experience.lengths - experience.prompt_lengths,
            max_new_tokens=stage.rollout.max_new_tokens,
            buffer=stage.overlong_buffer,
            penalty=stage.overlong_penalty,
        )
        metrics["overlong_penalty"] = -shaping.mean().item()
        scores = scores + shaping
    experience.score = scores
    return RolloutBatch(samples.rows, samples.completions, experience, samples.metrics | metrics)


def to_experience(completions: Sequence[Completion]) -> Experience:
    """Completions as padded tensors."""
    return build_experience(
        [c.prompt_ids for c in completions],
        [c.token_ids for c in completions],
        [c.logprobs for c in completions],
        [c.routed_experts for c in completions if c.routed_experts is not None],
    )


def concatenate(batches: list[RolloutBatch]) -> RolloutBatch:
    """One batch of all completions, with pooled metrics."""
    if len(batches) == 1:
        return batches[0]
    completions = [c for batch in batches for c in batch.completions]
    experience = to_experience(completions)
    experience.score = torch.cat([filled(batch.experience.score) for batch in batches])
    sizes = [len(batch.experience) for batch in batches]
    metrics = {name: pool(name, [b.metrics[name] for b in batches], sizes) for name in batches[0].metrics}
    return RolloutBatch([row for batch in batches for row in batch.rows], completions, experience, metrics)


def pool(name: str, values: list[float], sizes: list[int]) -> float:
    """Combine a metric of several batches with the given sizes.

    Minima and maxima are taken over all batches; times and counts are added. Any other metric is the mean weighted by
    batch size. For a standard deviation this mean ignores the differences between batches.
    """
    if name.endswith(("/min", "/max")):
        return min(values) if name.endswith("/min") else max(values)
    if name.startswith("time/") or name in ("rollout/prompt_tokens", "rollout/retried"):
        return sum(values)
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def select(batch: RolloutBatch, index: Tensor) -> RolloutBatch:
    """The completions at `index`, with the metrics of the whole batch."""
    rows, completions = [batch.rows[i] for i in index], [batch.completions[i] for i in index]
    return RolloutBatch(rows, completions, batch.experience.rows(index), batch.metrics)


def batch_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Metrics of the completions' scores, lengths and stop tokens."""
    scores, completions = filled(batch.experience.score), batch.completions
    finished = sum(c.finished for c in completions) / len(completions)
    return {
        "score_mean": scores.mean().item(),
        "score_std": scores.std(unbiased=False).item(),
        "completion_length": batch.experience.mask.sum(1).mean().item(),
        "eos_rate": finished,
        "truncated_share": 1 - finished,
    }
