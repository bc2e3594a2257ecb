"""PPO's maths against hand arithmetic, closed forms and an independent NumPy implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from align.losses.gae import gae
from align.losses.kl import kl_estimate
from align.losses.logprobs import token_entropy, token_logprobs
from align.losses.moe import balance_loss, expert_load, router_entropy, router_z_loss
from align.losses.ppo import cispo_loss, explained_variance, importance_weight, policy_loss, update_kl, value_loss
from align.losses.reduce import masked_mean, whiten


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_policy_loss_by_hand() -> None:
    # Ratios 1.5 (A > 0, clipped to 1.2), 0.5 (A < 0, clipped to 0.8) and 1.1 (not clipped); the last token is masked.
    logprobs = tensor([math.log(1.5), math.log(0.5), math.log(1.1), 99.0])
    advantages = tensor([2.0, -1.0, 1.0, 5.0])
    mask = tensor([1, 1, 1, 0])
    loss, metrics = policy_loss(logprobs, torch.zeros_like(logprobs), advantages, mask, clip_range=0.2, count=3)
    assert loss.item() == pytest.approx((-2.4 + 0.8 - 1.1) / 3)
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 3)


def test_policy_loss_at_ratio_one_is_minus_the_mean_advantage() -> None:
    advantages = tensor([3.0, -1.0])
    loss, _ = policy_loss(
        tensor([-1.0, -2.0]), tensor([-1.0, -2.0]), advantages, tensor([1, 1]), clip_range=0.2, count=2
    )
    assert loss.item() == pytest.approx(-1.0)


def test_cispo_by_hand() -> None:
    """Ratios 1.5 (clipped to 1.2), 0.5 (clipped to 0.8) and 1.1 (not clipped), and a masked token."""
    ratios, advantages = tensor([1.5, 0.5, 1.1, 1e9]), tensor([2.0, -1.0, 1.0, 5.0])
    old = tensor([-2.0, -1.0, -0.5, -3.0])
    logprobs = (old + ratios.log()).requires_grad_()
    mask, weights = tensor([1, 1, 1, 0]), tensor([1.0, 0.5, 2.0, 1.0])
    loss, metrics = cispo_loss(logprobs, old, advantages, mask, clip_range=0.2, count=4, weights=weights)
    new = [math.log(1.5) - 2, math.log(0.5) - 1, math.log(1.1) - 0.5]
    expected = -(1.2 * 2 * new[0] + 0.5 * 0.8 * -1 * new[1] + 2 * 1.1 * new[2]) / 4
    assert loss.item() == pytest.approx(expected)
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 4)
    kl = sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1)) / 4
    assert metrics["update_kl"].item() == pytest.approx(kl)
    loss.backward()
    # REINFORCE with a constant weight: a clipped token keeps its gradient. In `policy_loss` it has no gradient.
    assert logprobs.grad[0].tolist() == pytest.approx([-1.2 * 2 / 4, 0.5 * 0.8 / 4, -2 * 1.1 / 4, 0.0])
    logprobs.grad = None
    policy_loss(logprobs, old, advantages, mask, clip_range=0.2, count=4)[0].backward()
    assert logprobs.grad[0, :2].tolist() == [0.0, 0.0]


def test_cispo_clips_either_side_on_its_own() -> None:
    ratios = tensor([2.0, 1.25, 0.6])
    old = torch.full_like(ratios, -1.0)
    loss, metrics = cispo_loss(
        old + ratios.log(), old, torch.ones_like(ratios), torch.ones_like(ratios),
        clip_range=0.5, clip_range_high=0.28, count=3,
    )  # fmt: skip
    expected = -sum(w * (math.log(r) - 1) for w, r in ((1.28, 2.0), (1.25, 1.25), (0.6, 0.6))) / 3
    assert loss.item() == pytest.approx(expected)
    assert metrics["clip_fraction"].item() == pytest.approx(1 / 3)


def test_losses_do_not_depend_on_how_a_batch_is_split() -> None:
    torch.manual_seed(0)
    new, old, advantages = torch.randn(3, 6, 5, dtype=torch.float64)
    mask = (torch.rand(6, 5) > 0.3).double()
    whole, _ = policy_loss(new, old, advantages, mask, clip_range=0.2, count=mask.sum().item())
    parts = sum(
        policy_loss(new[i], old[i], advantages[i], mask[i], clip_range=0.2, count=mask.sum().item())[0]
        for i in (slice(0, 1), slice(1, 6))
    )
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)


def test_masked_tokens_get_no_gradient() -> None:
    new = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = tensor([1, 0, 1], [1, 1, 0])
    loss, _ = policy_loss(new, new.detach() + 0.1, torch.ones(2, 3).double(), mask, clip_range=0.2, count=4)
    loss.backward()
    assert torch.equal(new.grad == 0, mask == 0)


def test_value_loss_by_hand() -> None:
    # V = 2 is clipped to 1.5 (old value 1, range 0.5). Loss for R = 0: max(4, 2.25) / 2; for R = 2: max(0, 0.25) / 2.
    values, old = tensor([2.0, 2.0]), tensor([1.0, 1.0])
    loss, metrics = value_loss(values, old, tensor([0.0, 2.0]), tensor([1, 1]), clip_range=0.5, count=2)
    assert loss.item() == pytest.approx((2.0 + 0.125) / 2)
    assert metrics["value_clip_fraction"].item() == pytest.approx(0.5)


def numpy_gae(rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Advantages by definition: per row, the discounted sum of the deltas of this and all later valid tokens."""
    advantages = np.zeros_like(rewards)
    for row in range(len(rewards)):
        valid = np.flatnonzero(mask[row])
        v = np.append(values[row, valid], 0.0)
        deltas = rewards[row, valid] + gamma * v[1:] - v[:-1]
        for i in range(len(valid)):
            advantages[row, valid[i]] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(valid)))
    return advantages


def test_gae_equals_its_definition_on_200_random_batches() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        shape = tuple(generator.integers(1, 8, 2))
        rewards, values = generator.normal(size=(2, *shape))
        mask = (generator.random(shape) > 0.3).astype(float)
        gamma, lam = generator.random(2)
        advantages, returns = gae(*map(torch.tensor, (rewards, values, mask)), gamma, lam)
        expected = numpy_gae(rewards, values, mask, gamma, lam)
        np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(returns.numpy(), (expected + values) * mask, atol=1e-12)


def test_gae_limits() -> None:
    rewards, values, mask = tensor([1.0, 2.0, 3.0]), tensor([0.5, 0.25, 0.125]), tensor([1, 1, 1])
    monte_carlo, _ = gae(rewards, values, mask, 1.0, 1.0)
    assert monte_carlo.tolist()[0] == pytest.approx([6 - 0.5, 5 - 0.25, 3 - 0.125])
    one_step, _ = gae(rewards, values, mask, 1.0, 0.0)
    assert one_step.tolist()[0] == pytest.approx([1 + 0.25 - 0.5, 2 + 0.125 - 0.25, 3 - 0.125])


def test_kl_estimators_average_to_the_true_divergence() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        assert (p * kl_estimate(p.log(), q.log(), estimator)).sum().item() == pytest.approx(exact.item())
    assert kl_estimate(tensor([0.0]), tensor([-2.0]), "k2").item() == pytest.approx(2.0)
    assert (kl_estimate(p.log(), q.log(), "k3") >= 0).all()


def test_whiten_counts_valid_tokens_only() -> None:
    values, mask = tensor([1.0, 3.0, 1e6]), tensor([1, 1, 0])
    assert whiten(values, mask).tolist()[0] == pytest.approx([-1.0, 1.0, 0.0], abs=1e-6)
    assert whiten(values, mask, shift_mean=False).tolist()[0] == pytest.approx([1.0, 3.0, 0.0], abs=1e-6)


def test_masked_mean_ignores_nan_behind_the_mask() -> None:
    assert masked_mean(tensor([2.0, math.nan]), tensor([1, 0])).item() == 2.0


def test_a_weight_equal_to_the_cap_is_not_dropped() -> None:
    old, rollout, mask = torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), torch.ones(1, 2)
    assert importance_weight(old, rollout, mask, cap=1.0, drop=True).tolist() == [[1.0, 0.0]]


def test_importance_weight_is_capped() -> None:
    old, rollout, mask = tensor([0.0, 0.0, 9.0]), tensor([-3.0, 0.5, 0.0]), tensor([1, 1, 0])
    assert importance_weight(old, rollout, mask, cap=2.0).tolist()[0] == pytest.approx([2.0, math.exp(-0.5), 1.0])
    dropped = importance_weight(old, rollout, mask, cap=2.0, drop=True)
    assert dropped.tolist()[0] == pytest.approx([0.0, math.exp(-0.5), 1.0])
    whole = importance_weight(old, rollout, mask, cap=100.0, sequence=True)
    assert whole.tolist()[0] == pytest.approx([math.exp(2.5)] * 3)
    assert not importance_weight(old.requires_grad_(), rollout, mask, cap=2.0).requires_grad


def test_the_kl_of_an_update_is_a_metric_without_gradient() -> None:
    logprobs, mask = tensor([-1.0, -2.0]).requires_grad_(), tensor([1, 1])
    assert not update_kl(logprobs, tensor([-1.5, -2.0]), mask, 2.0).requires_grad


def test_explained_variance() -> None:
    returns = tensor([1.0, 2.0, 3.0])
    mask = torch.ones_like(returns)
    assert explained_variance(returns, returns, mask).item() == pytest.approx(1.0)
    assert explained_variance(torch.zeros_like(returns), returns, mask).item() == pytest.approx(0.0)


def test_logprobs_and_entropy_at_a_temperature() -> None:
    logits = torch.tensor([[0.0, math.log(4.0)]])
    # At temperature 2 the odds are sqrt(4) = 2 to 1.
    assert token_logprobs(logits, torch.tensor([1]), 2.0).item() == pytest.approx(math.log(2 / 3))
    assert token_entropy(logits, 2.0).item() == pytest.approx(-(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3)


def test_balance_loss_by_hand_without_padding() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0], [0.0, 50.0]], requires_grad=True)
    experts, mask = torch.tensor([[0], [0], [1]]), torch.tensor([1, 1, 0])
    loss = balance_loss(logits, experts, mask)
    # Both valid tokens chose expert 0, with probability 3/4: 2 experts * (1 * 3/4 + 0 * 1/4).
    assert loss.item() == pytest.approx(1.5)
    assert expert_load(experts, 2, mask).tolist() == [1.0, 0.0]
    loss.backward()
    assert logits.grad[0].abs().sum() > 0
    assert logits.grad[2].abs().sum() == 0


def test_router_z_loss_and_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [50.0, -50.0]], requires_grad=True)
    mask = torch.tensor([1, 1, 0])
    # log-sum-exp: log 2 and log 4; the third token is padding.
    z_loss = router_z_loss(logits, mask)
    assert z_loss.item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert router_entropy(logits, mask).item() == pytest.approx((math.log(2) + entropy) / 2)
    z_loss.backward()
    # d (lse^2) / d logit = 2 lse p, averaged over the two valid tokens.
    assert logits.grad[1].tolist() == pytest.approx([math.log(4) * 0.75, math.log(4) * 0.25])
    assert logits.grad[2].abs().max() == 0
