"""Tasks with a known optimum, which training must approach, and one update against the same update in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.unit.rl.tables import PROMPT, Task

ARMS = (0.1, 0.5, 0.3, 1.0, 0.7)
CRITIC = {"critic": {"learning_rate": 0.05}}
ESTIMATORS = {
    "gae": CRITIC,
    "grpo": {"completions_per_prompt": 8},
    "dr_grpo": {"completions_per_prompt": 8},
    "rloo": {"completions_per_prompt": 8},
    "reinforce_plus_plus": {},
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_best_arm_of_a_bandit_is_found(estimator) -> None:
    task = Task(
        lambda ids: ARMS[ids[0]],
        horizon=1,
        tokens=len(ARMS),
        advantage_estimator=estimator,
        steps=40,
        batch_size=64,
        mini_batch_size=32,
        kl={"coef": 0.0},
        **ESTIMATORS[estimator],
    )
    before = (task.probabilities()[PROMPT] * torch.tensor(ARMS)).sum().item()
    task.learn()
    after = (task.probabilities()[PROMPT] * torch.tensor(ARMS)).sum().item()
    assert before == pytest.approx(0.52)
    assert after >= 0.95 * max(ARMS)


STEP_REWARDS = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(5)) ** 2
"""Reward [time, last token, token] of choosing a token in a state of the token game."""


def game_reward(ids: list[int]) -> float:
    """Score of a completion: the sum of its step rewards."""
    return sum(STEP_REWARDS[t, last, token].item() for t, (last, token) in enumerate(zip([PROMPT, *ids], ids)))


def expected_reward(probabilities: torch.Tensor) -> float:
    """Expected score under probabilities [4 * time + last token, token], from all 64 possible completions."""
    total = 0.0
    for ids in itertools.product(range(4), repeat=3):
        states = zip(range(3), [PROMPT, *ids], ids)
        chance = math.prod(probabilities[t * 4 + last, token].item() for t, last, token in states)
        total += chance * game_reward(list(ids))
    return total


@pytest.mark.parametrize("estimator", ["gae", "grpo", "rloo"])
def test_the_best_sequence_of_tokens_is_found(estimator) -> None:
    task = Task(
        game_reward,
        horizon=3,
        tokens=4,
        advantage_estimator=estimator,
        steps=60,
        batch_size=128,
        mini_batch_size=64,
        kl={"coef": 0.0},
        **ESTIMATORS[estimator],
    )
    best = max(game_reward(list(ids)) for ids in itertools.product(range(4), repeat=3))
    assert expected_reward(task.probabilities()) < 0.6 * best
    task.learn()
    assert expected_reward(task.probabilities()) >= 0.95 * best


@pytest.mark.parametrize(("apply_to", "estimator"), [("reward", "k1"), ("loss", "k2")])
def test_the_optimum_under_a_kl_penalty_is_the_tilted_reference(apply_to, estimator) -> None:
    beta = 0.4
    task = Task(
        lambda ids: ARMS[ids[0]],
        horizon=1,
        tokens=len(ARMS),
        steps=80,
        batch_size=512,
        mini_batch_size=256,
        whiten_advantages=False,
        optimizer={"eps": 1e-5, "schedule": "cosine", "warmup_fraction": 0.0},
        kl={"coef": beta, "apply_to": apply_to, "estimator": estimator},
        **CRITIC,
    )
    task.reference.lm_head.weight.data[:, PROMPT] = torch.tensor([1.0, 0.0, 0.5, -1.0, 0.0])
    task.policy.lm_head.weight.data.copy_(task.reference.lm_head.weight)
    reference = task.probabilities()[PROMPT]
    rewards = torch.tensor(ARMS)
    # The maximum of E[r] - beta KL(p || q) is beta log E_q[exp(r / beta)], at p proportional to q exp(r / beta).
    partition = (reference * (rewards / beta).exp()).sum()
    optimum = reference * (rewards / beta).exp() / partition

    def objective(p: torch.Tensor) -> float:
        return ((p * rewards).sum() - beta * (p * (p / reference).log()).sum()).item()

    assert objective(optimum) == pytest.approx(beta * partition.log().item(), rel=1e-5)
    assert objective(reference) < 0.9 * objective(optimum)
    task.learn()
    found = task.probabilities()[PROMPT]
    assert objective(found) >= 0.98 * objective(optimum)
    assert (found - optimum).abs().max() < 0.02


def test_one_update_equals_one_by_hand() -> None:
    """The task has one state with two logits and one value. Only the second mini-batch has ratios other than 1."""
    rate, beta, eps = 0.3, 0.1, 1e-5
    task = Task(
        lambda ids: (2.0, -1.0)[ids[0]],
        horizon=1,
        tokens=2,
        learning_rate=rate,
        epochs=1,
        batch_size=6,
        mini_batch_size=3,
        whiten_advantages=False,
        clip_range=0.1,
        kl={"coef": beta},
        critic={"learning_rate": 0.5},
        optimizer={"eps": eps, "schedule": "constant", "warmup_fraction": 0.0, "max_grad_norm": 0.4},
        steps=1,
    )
    task.reference.lm_head.weight.data[:, PROMPT] = torch.tensor([0.7, 0.0])
    scored, metrics = task.iterate(0)
    arms = [c.token_ids[0] for c in scored.completions]
    assert set(arms) == {0, 1}

    theta, value = [0.0, 0.0], 0.0
    old = [0.5, 0.5]
    ref = [math.exp(0.7) / (math.exp(0.7) + 1), 1 / (math.exp(0.7) + 1)]
    reward = [(2.0, -1.0)[a] - beta * math.log(old[a] / ref[a]) for a in arms]
    policy_moments, value_moments = [[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0)).tolist()
    losses, value_losses = [], []
    for turn, rows in enumerate((order[:3], order[3:]), start=1):
        losses.append(0.0)
        value_losses.append(0.0)
        p = [math.exp(t) / sum(map(math.exp, theta)) for t in theta]
        gradient, value_gradient = [0.0, 0.0], 0.0
        for i in rows:
            a, advantage = arms[i], reward[i]  # the value before the update is 0
            ratio = p[a] / old[a]
            losses[-1] -= min(advantage * ratio, advantage * min(max(ratio, 0.9), 1.1)) / 3
            clipped = (advantage > 0 and ratio > 1.1) or (advantage < 0 and ratio < 0.9)
            for j in (0, 1):
                slope = 0.0 if clipped else -advantage * ratio * ((a == j) - p[j])
                gradient[j] += slope / 3
            near = min(max(value, -0.2), 0.2)
            value_losses[-1] += 0.5 * max((value - reward[i]) ** 2, (near - reward[i]) ** 2) / 3
            if (value - reward[i]) ** 2 >= (near - reward[i]) ** 2:
                value_gradient += (value - reward[i]) / 3
            elif -0.2 < value < 0.2:
                value_gradient += (near - reward[i]) / 3
        norm = math.hypot(*gradient)
        gradient = [g * min(1.0, 0.4 / (norm + 1e-6)) for g in gradient]
        value_gradient *= min(1.0, 0.4 / (abs(value_gradient) + 1e-6))
        for j in (0, 1):
            theta[j] -= rate * adam(policy_moments[j], gradient[j], turn, eps)
        value -= 0.5 * adam(value_moments, value_gradient, turn, eps)
    assert task.policy.lm_head.weight[:, PROMPT].tolist() == pytest.approx(theta, abs=1e-5)
    assert task.models.critic.model.score.weight[0, PROMPT].item() == pytest.approx(value, abs=1e-5)
    assert metrics["policy_updates"] == 2
    assert metrics["policy_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert metrics["value_loss"] == pytest.approx(sum(value_losses) / 2, rel=1e-4)
    assert metrics["clip_fraction"] > 0
    assert metrics["value_clip_fraction"] > 0


def adam(moments: list[float], gradient: float, turn: int, eps: float) -> float:
    """AdamW's step for one number, in units of the learning rate; betas 0.9 and 0.95, the recipe's defaults."""
    if len(moments) < 2:
        moments += [0.0] * (2 - len(moments))
    moments[0] = 0.9 * moments[0] + 0.1 * gradient
    moments[1] = 0.95 * moments[1] + 0.05 * gradient**2
    return moments[0] / (1 - 0.9**turn) / (math.sqrt(moments[1] / (1 - 0.95**turn)) + eps)
