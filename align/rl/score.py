"""From drawn completions to a scored round: padded tensors, rewards, penalties for length."""

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
from align.rl.complete import Metrics, known
from align.rl.sample import Draw, Sampler
from align.rollout.base import Completion


@dataclass
class Round:
    """Completions, their prompts' rows and scores, and what was measured of them."""

    rows: list[PromptRow]
    completions: list[Completion]
    batch: Experience
    metrics: Metrics

    def groups(self, size: int) -> Tensor:
        """Scores [G, size] of the completions of one prompt."""
        return known(self.batch.score).view(-1, size)


def scored_round(stage: PpoStage, sampler: Sampler, drawn: Draw, scorer: Scorer) -> Round:
    """The round to learn from. With dynamic sampling, groups of equal scores are replaced by further draws where those
    have better ones, so that its size is always the recipe's."""
    group = stage.completions_per_prompt
    rounds = [score_draw(stage, drawn, scorer)]
    for _ in range(stage.dynamic_sampling):
        missing = stage.batch_size - group * sum(int(teaches(r.groups(group)).sum()) for r in rounds)
        if missing <= 0:
            break
        rounds.append(score_draw(stage, sampler.draw(missing), scorer))
    whole = joined(rounds)
    if group > 1:
        useful = teaches(whole.groups(group))
        whole.metrics["informative_groups"] = useful.float().mean().item()
        whole.metrics["drawn_completions"] = float(len(whole.batch))
        if len(rounds) > 1:
            first = torch.argsort(~useful, stable=True)[: stage.batch_size // group].sort().values
            whole = picked(whole, (first[:, None] * group + torch.arange(group)).flatten())
    if stage.mask_truncated:
        finished = torch.tensor([float(c.finished) for c in whole.completions])
        whole.batch.loss_mask = whole.batch.mask * finished[:, None]
    whole.metrics |= describe(whole)
    return whole


def teaches(scores_GN: Tensor) -> Tensor:
    """[G], whether the scores of a group differ; advantages of equal ones are zero."""
    return (scores_GN - scores_GN[:, :1]).abs().amax(dim=1) > 1e-6


def score_draw(stage: PpoStage, drawn: Draw, scorer: Scorer) -> Round:
    """Rewards, less the penalties for completions that are cut or nearly so."""
    batch = to_experience(drawn.completions)
    scores, metrics = scorer.score(batch, drawn.rows, drawn.completions)
    if stage.missing_eos_penalty is not None:
        scores = scores - stage.missing_eos_penalty * torch.tensor([float(not c.finished) for c in drawn.completions])
    if stage.overlong_buffer:
        shaping = overlong_shaping(
            batch.lengths - batch.prompt_lengths,
            max_new_tokens=stage.rollout.max_new_tokens,
            buffer=stage.overlong_buffer,
            penalty=stage.overlong_penalty,
        )
        metrics["overlong_penalty"] = -shaping.mean().item()
        scores = scores + shaping
    batch.score = scores
    return Round(drawn.rows, drawn.completions, batch, drawn.metrics | metrics)


def to_experience(completions: Sequence[Completion]) -> Experience:
    return build_experience(
        [c.prompt_ids for c in completions],
        [c.token_ids for c in completions],
        [c.logprobs for c in completions],
        [c.routed_experts for c in completions if c.routed_experts is not None],
    )


def joined(rounds: list[Round]) -> Round:
    """Several draws as one."""
    if len(rounds) == 1:
        return rounds[0]
    completions = [c for r in rounds for c in r.completions]
    batch = to_experience(completions)
    batch.score = torch.cat([known(r.batch.score) for r in rounds])
    sizes = [len(r.batch) for r in rounds]
    metrics = {name: pooled(name, [r.metrics[name] for r in rounds], sizes) for name in rounds[0].metrics}
    return Round([row for r in rounds for row in r.rows], completions, batch, metrics)


def pooled(name: str, values: list[float], sizes: list[int]) -> float:
    """One draw's metric for several of these sizes: extremes stay extremes, times add up, means are weighted (also of
    standard deviations, which are then those within a draw)."""
    if name.endswith(("/min", "/max")):
        return min(values) if name.endswith("/min") else max(values)
    if name.startswith("time/") or name in ("rollout/prompt_tokens", "rollout/retried"):
        return sum(values)
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def picked(whole: Round, index: Tensor) -> Round:
    return Round(
        [whole.rows[i] for i in index], [whole.completions[i] for i in index], whole.batch.rows(index), whole.metrics
    )


def describe(whole: Round) -> Metrics:
    scores, completions = known(whole.batch.score), whole.completions
    finished = sum(c.finished for c in completions) / len(completions)
    return {
        "score_mean": scores.mean().item(),
        "score_std": scores.std(unbiased=False).item(),
        "completion_length": whole.batch.mask.sum(1).mean().item(),
        "eos_rate": finished,
        "truncated_share": 1 - finished,
    }
