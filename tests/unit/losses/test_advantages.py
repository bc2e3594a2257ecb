"""Advantage estimators against hand-computed values; policy and value losses against NumPy in float64."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from align.config.ppo import AdvantageEstimator, PolicyLoss
from align.losses.advantages import (
    ADVANTAGE_ESTIMATORS,
    EstimatorInputs,
    dr_grpo,
    gae_advantages,
    grpo,
    reinforce_plus_plus,
    rloo,
)
from align.losses.ppo import POLICY_LOSSES, cispo_loss, policy_loss, probability_ratio, value_loss

MASK = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
SCORES = torch.tensor([1.0, 3.0, 5.0, 5.0])


def test_every_name_in_a_recipe_has_its_function() -> None:
    assert set(ADVANTAGE_ESTIMATORS) == set(get_args(AdvantageEstimator))
    assert set(POLICY_LOSSES) == set(get_args(PolicyLoss))
    assert POLICY_LOSSES["clip"] is policy_loss
    assert POLICY_LOSSES["cispo"] is cispo_loss


def test_an_estimator_gets_the_sum_of_a_completions_rewards() -> None:
    """Per-token rewards, as with a KL penalty. They sum to SCORES; one token is masked out."""
    rewards = torch.tensor([[-1.0, 2.0], [3.0, 0.0], [4.0, 1.0], [-0.5, 5.5]])
    inputs = EstimatorInputs(
        rewards, MASK, values=torch.full((4, 2), 0.5), group_size=4, gamma=0.5, lam=0.0, value_lam=1.0, whiten=False
    )
    found = {name: estimate(inputs) for name, estimate in ADVANTAGE_ESTIMATORS.items()}
    assert found["dr_grpo"][0].tolist() == [[-2.5, -2.5], [-0.5, 0.0], [1.5, 1.5], [1.5, 1.5]]
    assert found["rloo"][0][:, 0].tolist() == pytest.approx([-10 / 3, -2 / 3, 2.0, 2.0])
    deviation = math.sqrt(11 / 3)  # 2.5^2 + 0.5^2 + 1.5^2 + 1.5^2 = 11
    assert found["grpo"][0][:, 1].tolist() == pytest.approx(
        [-2.5 / deviation, 0, 1.5 / deviation, 1.5 / deviation], rel=1e-3
    )
    # With lambda 0 an advantage is r + gamma * next value - value. Returns use lambda 1: discounted sums of rewards.
    advantages, returns = found["gae"]
    assert advantages.tolist() == [[-1.25, 1.5], [2.5, 0.0], [3.75, 0.5], [-0.75, 5.0]]
    assert returns.tolist() == [[0.0, 2.0], [3.0, 0.0], [4.5, 1.0], [2.25, 5.5]]
    discounted = torch.tensor([0.0, 2.0, 3.0, 4.5, 1.0, 2.25, 5.5])
    expected = (discounted - discounted.mean()) / discounted.std(unbiased=False)
    assert found["reinforce_plus_plus"][0][MASK.bool()].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert [found[name][1] for name in ("dr_grpo", "rloo", "grpo", "reinforce_plus_plus")] == [None] * 4


def test_grpo_by_hand() -> None:
    advantages = grpo(SCORES, MASK, 2)
    # Group (1, 3) has mean 2 and sample standard deviation sqrt(2). In group (5, 5) all scores are equal, so it gets 0.
    expected = 1 / (math.sqrt(2) + 1e-4)
    assert advantages.tolist() == [
        pytest.approx([-expected, -expected]),
        pytest.approx([expected, 0.0]),
        [0.0, 0.0],
        [0.0, 0.0],
    ]
    assert grpo(SCORES, MASK, 1).abs().max() == 0


def test_dr_grpo_and_rloo_by_hand() -> None:
    assert dr_grpo(SCORES, MASK, 4)[:, 0].tolist() == pytest.approx([-2.5, -0.5, 1.5, 1.5])
    # Mean scores of the other three completions: 13/3, 11/3, 3, 3.
    assert rloo(SCORES, MASK, 4)[:, 0].tolist() == pytest.approx([1 - 13 / 3, 3 - 11 / 3, 2.0, 2.0])
    assert rloo(SCORES, MASK, 2)[1].tolist() == pytest.approx([2.0, 0.0])
    with pytest.raises(ValueError, match="at least two"):
        rloo(SCORES, MASK, 1)


def test_leave_one_out_is_unbiased_where_grpos_scaling_is_not() -> None:
    """With RLOO, the mean of A * grad log p over all pairs of draws from a two-armed bandit is the true gradient."""
    p, reward = 0.3, (1.0, 4.0)
    true = p * (1 - p) * (reward[0] - reward[1])
    found = 0.0
    for a in (0, 1):
        for b in (0, 1):
            probability = (p if a == 0 else 1 - p) * (p if b == 0 else 1 - p)
            advantages = rloo(torch.tensor([reward[a], reward[b]]), torch.ones(2, 1), 2)[:, 0]
            gradients = [(1 - p) if arm == 0 else -p for arm in (a, b)]
            found += probability * sum(float(adv) * g for adv, g in zip(advantages, gradients, strict=True)) / 2
    assert found == pytest.approx(true)


def test_reinforce_plus_plus_by_hand() -> None:
    rewards = torch.tensor([[0.0, 2.0], [1.0, 99.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    # With gamma 0.5 the returns are 1 and 2 in the first row, 1 in the second: mean 4/3, population variance 2/9.
    expected = [(x - 4 / 3) / math.sqrt(2 / 9) for x in (1, 2, 1)]
    found = reinforce_plus_plus(rewards, mask, gamma=0.5)
    assert found[mask.bool()].tolist() == pytest.approx(expected, abs=1e-5)
    assert found[1, 1] == 0


def test_gae_is_whitened_over_the_batch() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3, 5).double()
    mask = torch.ones(3, 5).double()
    advantages, returns = gae_advantages(rewards, values, mask, gamma=1.0, lam=0.95)
    raw, _ = gae_advantages(rewards, values, mask, gamma=1.0, lam=0.95, whiten=False)
    assert advantages.mean().item() == pytest.approx(0, abs=1e-9)
    assert advantages.std(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(returns, raw + values)


def numpy_policy_loss(new, old, advantages, mask, low, high, dual, sequence, weights, count) -> float:
    total = 0.0
    for row in range(len(new)):
        valid = np.flatnonzero(mask[row])
        differences = new[row, valid] - old[row, valid]
        if sequence and len(valid):
            differences = np.full(len(valid), differences.mean())
        for t, difference in zip(valid, differences, strict=True):
            ratio, advantage = math.exp(difference), advantages[row, t]
            loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
            if dual is not None and advantage < 0:
                loss = min(loss, -advantage * dual)
            total += loss * weights[row, t]
    return total / count


def test_policy_loss_equals_numpy_on_200_random_batches() -> None:
    generator = np.random.default_rng(0)
    for turn in range(200):
        shape = tuple(generator.integers(1, 8, 2))
        new, old, advantages = generator.normal(size=(3, *shape))
        weights, mask = generator.random(shape), (generator.random(shape) > 0.3).astype(float)
        low, high = generator.random(2) * 0.5
        dual, sequence = (None, 3.0)[turn % 2], turn % 3 == 0
        count = mask.sum() + 1
        loss, _ = policy_loss(
            *map(torch.tensor, (new, old, advantages, mask)),
            clip_range=low,
            clip_range_high=high,
            dual_clip=dual,
            sequence=sequence,
            weights=torch.tensor(weights),
            count=count,
        )
        expected = numpy_policy_loss(new, old, advantages, mask, low, high, dual, sequence, weights, count)
        assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_value_loss_equals_numpy_on_200_random_batches() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        shape = tuple(generator.integers(1, 8, 2))
        values, old, returns = generator.normal(size=(3, *shape))
        mask, clip = (generator.random(shape) > 0.3).astype(float), generator.random()
        count = mask.sum() + 1
        near = np.clip(values, old - clip, old + clip)
        expected = (0.5 * np.maximum((values - returns) ** 2, (near - returns) ** 2) * mask).sum() / count
        loss, _ = value_loss(*map(torch.tensor, (values, old, returns, mask)), clip_range=clip, count=count)
        assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_the_sequence_ratio_has_the_gradient_of_the_geometric_mean() -> None:
    old = torch.tensor([[-1.0, -2.0, -0.5]]).double()
    mask = torch.tensor([[1.0, 1.0, 0.0]]).double()
    new = (old + torch.tensor([[0.3, -0.1, 5.0]]).double()).requires_grad_()
    ratio = probability_ratio(new, old, mask, sequence=True)
    assert ratio[0, :2].tolist() == pytest.approx([math.exp(0.1)] * 2)
    # GSPO's objective (equation 5) has one ratio per sequence. The mean of our token ratios has the same gradient.
    ((ratio * mask).sum() / 2).backward()
    found = new.grad.clone()
    new.grad = None
    (((new - old) * mask).sum() / 2).exp().backward()
    torch.testing.assert_close(found, new.grad)


def test_dual_clip_bounds_the_loss_of_a_token() -> None:
    new, old = torch.tensor([[4.0]]), torch.tensor([[0.0]])
    loss, metrics = policy_loss(new, old, torch.tensor([[-1.0]]), torch.ones(1, 1), clip_range=0.2, count=1)
    assert loss.item() == pytest.approx(math.exp(4))
    loss, metrics = policy_loss(
        new, old, torch.tensor([[-1.0]]), torch.ones(1, 1), clip_range=0.2, count=1, dual_clip=3.0
    )
    assert (loss.item(), metrics["dual_clip_fraction"].item()) == (3.0, 1.0)
