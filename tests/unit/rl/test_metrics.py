"""Metrics of a rollout batch and of an iteration against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from align.data.prepare import PromptRow
from align.rl.complete import complete_batch
from align.rl.log import speeds
from align.rl.sample import Rollouts
from align.rl.score import (
    RolloutBatch,
    batch_metrics,
    concatenate,
    informative,
    pool,
    score_samples,
    select,
    to_experience,
)
from tests.unit.rl.small import EOS, build, completions, settings
from tests.unit.rl.tables import TokenReward

ROW = PromptRow((5,), [{"role": "user", "content": "go"}], None, {})


def rollout_batch(*lengths: int, truncated: int = 0, **metrics: float) -> RolloutBatch:
    """Completions of these lengths, with the lengths as scores. The first `truncated` completions are not finished."""
    made = completions(*(([5, 6], [7] * (n - 1) + [EOS], index >= truncated) for index, n in enumerate(lengths)))
    experience = to_experience(made)
    experience.score = torch.tensor([float(n) for n in lengths])
    return RolloutBatch([ROW] * len(lengths), made, experience, dict(metrics))


def test_metrics_of_a_batch_by_hand() -> None:
    assert batch_metrics(rollout_batch(1, 2, 6, 3, truncated=1)) == {
        "score_mean": 3.0,
        "score_std": pytest.approx(math.sqrt((4 + 1 + 9 + 0) / 4)),
        "completion_length": 3.0,
        "eos_rate": 0.75,
        "truncated_share": 0.25,
    }


def test_batches_are_concatenated_with_pooled_metrics() -> None:
    names = ("reward/r/min", "reward/r/max", "time/reward/r", "rollout/prompt_tokens", "rollout/retried", "reward/r")
    first = rollout_batch(4, 1, **dict.fromkeys(names, 1.0))
    second = rollout_batch(2, 3, 5, 6, **dict.fromkeys(names, 4.0))
    joined = concatenate([first, second])
    assert joined.experience.score.tolist() == [4, 1, 2, 3, 5, 6]
    assert joined.experience.mask.sum(1).tolist() == [4, 1, 2, 3, 5, 6]
    assert [len(c.token_ids) for c in joined.completions] == [4, 1, 2, 3, 5, 6]
    assert len(joined.rows) == 6
    assert [joined.metrics[name] for name in names] == [1.0, 4.0, 5.0, 5.0, 5.0, 3.0]  # the mean is (2 * 1 + 4 * 4) / 6
    chosen = select(joined, torch.tensor([1, 3]))
    assert chosen.experience.score.tolist() == [1, 3]
    assert [len(c.token_ids) for c in chosen.completions] == [1, 3]
    assert pool("reward/r/std", [1.0, 2.0], [1, 3]) == 1.75


def test_a_group_is_informative_if_any_score_differs() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.5], [2.0, 1.0, 2.0], [1.0, 1.0, 1.0 + 1e-7]])
    assert informative(scores).tolist() == [False, True, True, False]


def test_truncated_and_overlong_completions_are_penalised_by_hand() -> None:
    stage = settings(rollout={"max_new_tokens": 8}, missing_eos_penalty=0.25, overlong_buffer=4, overlong_penalty=2.0)
    made = completions(([5], [7] * 3, True), ([5], [7] * 6, True), ([5], [7] * 8, False))
    scored = score_samples(stage, Rollouts(0, [ROW] * 3, made, {"rollout/retried": 1.0}), TokenReward(len))
    # Lengths 3, 6 and 8. The buffer begins after 4 tokens, so the overlong penalties are 0, half and full.
    assert scored.experience.score.tolist() == [3.0, 6.0 - 1.0, 8.0 - 0.25 - 2.0]
    assert scored.metrics == {"rollout/retried": 1.0, "overlong_penalty": 1.0}


def test_speeds_count_sampled_tokens_for_generation_and_all_tokens_for_the_rest() -> None:
    metrics = speeds(rollout_batch(1, 3), {"generate": 2.0, "update": 0.5, "sync": 1.0})
    assert metrics.pop("memory/peak_gib") > 0
    assert metrics == {
        "time/generate": 2.0,
        "time/update": 0.5,
        "time/sync": 1.0,
        "speed/generate": 2.0,  # 4 sampled tokens in 2 s
        "speed/update": 16.0,  # 4 sampled and 4 prompt tokens in 0.5 s
    }


@pytest.mark.parametrize("apply_to", ["reward", "loss"])
def test_kl_metrics_and_penalties_by_hand(batch, apply_to) -> None:
    """KL metrics are sums over a completion's tokens, averaged over completions.

    With `apply_to: reward`, each token's reward is reduced by its own KL.
    """
    models = build()
    models.critic = None
    batch.score = torch.tensor([1.0, 2.0, -1.0])
    kl = {"apply_to": apply_to, "estimator": "k2", "coef": 0.5}
    stage = settings(advantage_estimator="reinforce_plus_plus", gamma=1.0, kl=kl)
    metrics = complete_batch(stage, models, batch, 0.5)
    ratios = (batch.old_logprobs - batch.ref_logprobs).tolist()
    lengths = (3, 4, 2)
    rows = [row[:n] for row, n in zip(ratios, lengths)]
    assert metrics["kl"] == pytest.approx(sum(map(sum, rows)) / 3, abs=1e-5)
    assert metrics["kl_k3"] == pytest.approx(sum(math.exp(-d) - 1 + d for row in rows for d in row) / 3, abs=1e-5)
    assert metrics["kl_coef"] == 0.5
    cost = 0.5 if apply_to == "reward" else 0.0
    returns = [
        score - cost * sum(d**2 / 2 for d in row[t:])
        for row, score in zip(rows, (1.0, 2.0, -1.0))
        for t in range(len(row))
    ]
    mean = sum(returns) / 9
    std = math.sqrt(sum((r - mean) ** 2 for r in returns) / 9)
    assert batch.advantages[batch.mask.bool()].tolist() == pytest.approx([(r - mean) / std for r in returns], abs=1e-4)
