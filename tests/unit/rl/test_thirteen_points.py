"""The points where implementations of PPO go wrong. Each point of the list in docs/ppo.md has a test here."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from align.config.ppo import Kl
from align.config.rollout import Rollout
from align.losses.advantages import gae_advantages
from align.losses.gae import gae
from align.losses.kl import adapted_kl_coef, kl_estimate, kl_loss
from align.losses.ppo import importance_weight, policy_loss, value_loss
from align.losses.reduce import whiten
from align.models.forward import critic_values, policy_output
from align.models.hunyuan import HunYuanConfig, HunYuanForSequenceClassification
from align.rl.complete import complete_batch, estimate_advantages
from align.rl.models import build_critic
from align.rl.score import score_batch, to_experience
from align.rl.update import sampler_correction, update
from tests.unit.rl.small import EOS, SIZES, build, completions, settings
from tests.unit.rl.tables import Task


def test_01_the_score_sits_on_the_last_completion_token(batch) -> None:
    batch.score = torch.tensor([1.0, 2.0, 3.0])
    batch.values = torch.zeros_like(batch.mask)
    stage = settings(gamma=0.5, lam=1.0, whiten_advantages=False)
    found, _ = estimate_advantages(stage, batch, batch.score, torch.zeros_like(batch.mask))
    # With values of 0 the advantage is the discounted score. The last token gets the full score, EOS or not.
    assert found.tolist() == [[0.25, 0.5, 1.0, 0.0], [0.25, 0.5, 1.0, 2.0], [1.5, 3.0, 0.0, 0.0]]


def test_02_the_penalty_for_a_missing_eos_looks_at_the_completion_only() -> None:
    # EOS is in the first prompt but not in its completion, so that completion counts as truncated and is penalised.
    task = Task(lambda ids: 1.0, horizon=2, tokens=4, missing_eos_penalty=0.25, batch_size=2, mini_batch_size=2)
    drawn = task.sampler.sample()
    drawn.completions[:] = completions(([EOS], [1, 2], False), ([1], [3, EOS], True))
    scored = score_batch(task.stage, task.sampler, drawn, task.scorer)
    assert scored.experience.score.tolist() == [0.75, 1.0]
    assert scored.metrics["truncated_share"] == scored.metrics["eos_rate"] == 0.5
    masking = task.stage.model_copy(update={"mask_truncated": True})
    masked = score_batch(masking, task.sampler, drawn, task.scorer)
    assert masked.experience.loss_mask.tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert masked.experience.mask.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_03_masks_come_from_lengths_for_pad_may_equal_eos(batch) -> None:
    assert batch.mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    model = build().policy.model
    logprobs = policy_output(model, batch, 1.0).logprobs
    alone = model(torch.tensor([[5, 6, 7, EOS, EOS]])).logits.log_softmax(-1)[0]
    assert logprobs[2, :2].tolist() == pytest.approx([alone[2, EOS].item(), alone[3, EOS].item()], abs=1e-5)


def test_04_a_kl_loss_has_a_gradient_and_the_coefficient_adapts() -> None:
    logprobs, ref = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([[-1.5, -2.5]])
    kl_loss(logprobs, ref, torch.ones(1, 2), estimator="k2", count=2).backward()
    assert logprobs.grad.tolist() == [pytest.approx([0.25, 0.25])]  # d = 0.5, averaged over two tokens
    logprobs.grad = None
    kl_loss(logprobs, ref, torch.ones(1, 2), estimator="k3", count=2).backward()
    assert logprobs.grad.tolist() == [pytest.approx([(1 - math.exp(-0.5)) / 2] * 2)]
    with pytest.raises(ValidationError, match="k1 is zero on average"):
        Kl(apply_to="loss", estimator="k1")
    # The same in whole updates: with equal scores, only the KL loss moves the policy, towards the reference.
    task = Task(lambda ids: 1.0, horizon=1, tokens=3, kl={"coef": 1.0, "estimator": "k2", "apply_to": "loss"}, steps=20)
    task.reference.lm_head.weight.data[:, 0] = torch.tensor([1.0, 0.0, -1.0])
    target = task.reference.lm_head.weight[:, 0].softmax(-1)
    before = (task.probabilities()[0] - target).abs().sum()
    task.learn()
    assert (task.probabilities()[0] - target).abs().sum() < 0.5 * before
    assert adapted_kl_coef(0.1, 8.0, 4.0, 100, 1000) == pytest.approx(0.1 * (1 + 0.2 * 0.1))  # error clipped to 20 %
    assert adapted_kl_coef(0.1, 3.8, 4.0, 100, 1000) == pytest.approx(0.1 * (1 - 0.05 * 0.1))
    assert [kl_estimate(torch.tensor(1.0), torch.tensor(0.0), k).item() for k in ("k1", "k2", "k3")] == pytest.approx(
        [1.0, 0.5, math.exp(-1)]
    )


def test_05_gae_carries_values_over_masked_tokens_and_has_two_lambdas() -> None:
    rewards, values = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.25]])
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    found, _ = gae(rewards, values, mask, 1.0, 0.5)
    # After the first token, the next value is that of the third token: 0.25 - 0.5 + 0.5 * (1 - 0.25).
    assert found.tolist() == [pytest.approx([0.125, 0.0, 0.75])]
    both, returns = gae_advantages(rewards, values, mask, gamma=1.0, lam=0.5, value_lam=1.0, whiten=False)
    assert both.tolist() == found.tolist()
    assert returns.tolist() == [pytest.approx([1.0, 0.0, 1.0])]  # Monte Carlo
    batch = to_experience(completions(([5], [7, 8], True)))
    batch.score, batch.values = torch.tensor([1.0]), torch.tensor([[0.5, 0.25]])
    stage = settings(lam=0.0, critic={"lam": 1.0}, whiten_advantages=False)
    one_step, targets = estimate_advantages(stage, batch, batch.score, torch.zeros(1, 2))
    assert one_step.tolist() == [[-0.25, 0.75]]
    assert targets.tolist() == [[1.0, 1.0]]


def test_06_advantages_are_whitened_over_the_batch_by_valid_tokens_with_the_mean_shifted() -> None:
    values, mask = torch.tensor([[1.0, 5.0], [3.0, 1e9]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    found = whiten(values, mask)
    assert found.tolist() == [pytest.approx([-math.sqrt(1.5), math.sqrt(1.5)]), pytest.approx([0.0, 0.0])]


def test_07_ratios_are_clipped_and_counted_by_the_mask() -> None:
    old, mask = torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 0.0]])
    new = torch.tensor([[90.0, 0.0, 90.0]])  # exp(90) overflows; the third token is masked
    loss, metrics = policy_loss(new, old, torch.tensor([[-1.0, 1.0, 1.0]]), mask, clip_range=0.2, count=2)
    assert loss.item() == pytest.approx((math.exp(20) - 1) / 2)
    assert metrics["clip_fraction"].item() == 0.0  # a negative advantage is not clipped from above
    loss, metrics = policy_loss(new, old, torch.tensor([[1.0, 1.0, 1.0]]), mask, clip_range=0.2, count=2)
    assert (loss.item(), metrics["clip_fraction"].item()) == (pytest.approx(-1.1), 0.5)
    far = torch.tensor([[3.0, 0.0, 9.0]])
    loss, metrics = value_loss(far, old, torch.zeros(1, 3), mask, clip_range=0.5, count=2)
    assert loss.item() == pytest.approx(0.5 * 9 / 2)
    assert metrics["value_clip_fraction"].item() == 0.0


def test_08_rollout_and_trainer_are_two_policies_and_their_mismatch_is_reported(batch) -> None:
    models = build()
    batch.score = torch.zeros(3)
    truth = policy_output(models.policy.model, batch, 1.0).logprobs.detach()
    batch.rollout_logprobs = (truth + 0.5 * batch.mask).clone()
    batch.rollout_logprobs[0, 0] = truth[0, 0] - 2.0
    metrics = complete_batch(settings(), models, batch, 0.05)
    assert metrics["mismatch_max"] == pytest.approx(2.0, abs=1e-5)
    assert metrics["mismatch_mean"] == pytest.approx((2.0 + 8 * 0.5) / 9, abs=1e-5)
    torch.testing.assert_close(batch.old_logprobs, truth)
    old, rollout, mask = batch.old_logprobs, batch.rollout_logprobs, batch.mask
    weights = importance_weight(old, rollout, mask, cap=2.0)
    assert weights[0, :2].tolist() == pytest.approx([2.0, math.exp(-0.5)], rel=1e-4)
    assert importance_weight(old, rollout, mask, cap=2.0, drop=True)[0, 0] == 0
    sequence = importance_weight(old, rollout, mask, cap=9.0, sequence=True)
    assert sequence[0].tolist() == pytest.approx([math.exp(2.0 - 0.5 - 0.5)] * 4, rel=1e-4)


def test_08_the_samplers_logprobs_may_stand_for_the_policy_before_the_update(batch, monkeypatch) -> None:
    monkeypatch.setattr("align.rl.complete.LOGPROBS_OF_ONE_IN", 2)
    models = build()
    batch.score = torch.zeros(3)
    passes = Counter()
    for name, model in (("policy", models.policy.model), ("reference", models.reference.model)):
        model.model.register_forward_hook(lambda *_, name=name: passes.update([name]))
    truth = policy_output(models.policy.model, batch, 1.0).logprobs.detach()
    passes.clear()
    apart = torch.tensor([[0.1], [0.2], [0.4]])
    batch.rollout_logprobs = sampled = (truth + apart) * batch.mask
    stage = settings(old_logprobs="rollout", micro_batch_tokens=5, mini_batch_size=4, batch_size=4, epochs=1)
    metrics = complete_batch(stage, models, batch, 0.05)
    # Each of the three rows fills a micro-batch. The policy computes every second row: the first and the third.
    assert passes == {"policy": 2, "reference": 3}
    torch.testing.assert_close(batch.old_logprobs, sampled)
    assert metrics["mismatch_mean"] == pytest.approx((3 * 0.1 + 2 * 0.4) / 5, abs=1e-5)
    assert metrics["mismatch_max"] == pytest.approx(0.4, abs=1e-5)
    sampled_from = torch.cat([models.policy.model(batch.input_ids[row : row + 1]).logits[0, start:end]
                              for row, start, end in ((0, 1, 4), (2, 2, 4))]).log_softmax(-1)  # fmt: skip
    entropy = -(sampled_from * sampled_from.exp()).sum(-1).mean().item()
    assert metrics["entropy"] == pytest.approx(entropy, abs=1e-5)
    # In the first update, a ratio is the trainer's probability over the sampler's.
    found = update(stage, models, batch, step=0, seed=0, kl_coef=0.0)
    wanted = sum(n * (math.exp(-d) - 1 + d) for n, d in ((3, 0.1), (4, 0.2), (2, 0.4))) / 9
    assert found["update_kl"] == pytest.approx(wanted, abs=1e-5)


def test_09_logprobs_are_of_the_sampled_distribution(batch) -> None:
    model = build().policy.model
    found = policy_output(model, batch, 0.5).logprobs
    logits = model(torch.tensor([[5, 6, 7, 8, EOS]])).logits[0]
    expected = [(logits[1 + t] / 0.5).log_softmax(-1)[token].item() for t, token in enumerate((7, 8, EOS))]
    assert found[0, :3].tolist() == pytest.approx(expected, abs=1e-5)
    # There are no rollout settings that renormalise the distribution.
    for setting in ("top_p", "top_k", "min_p"):
        with pytest.raises(ValidationError, match=setting):
            Rollout.model_validate({setting: 1})


def test_10_token_ids_go_through_as_they_are() -> None:
    # No tokenizer produces these ids from text: they have two halves of a word and a special token in the middle.
    drawn = completions(([3, 3], [4, EOS, 4, 4], False))
    assert to_experience(drawn).input_ids.tolist() == [[3, 3, 4, EOS, 4, 4]]


@pytest.mark.parametrize("average", ["tokens", "completions", "constant"])
def test_11_the_split_into_micro_batches_and_threads_changes_nothing(batch, average) -> None:
    found, before = [], torch.get_num_threads()
    for tokens, threads in ((5, 1), (1000, 1), (5, 2)):  # with two threads, policy and critic run concurrently
        torch.set_num_threads(threads)
        models = build(router_aux_loss_coef=0.0)
        batch.score = torch.tensor([1.0, -1.0, 2.0])
        batch.features = None
        stage = settings(batch_size=3, mini_batch_size=3, micro_batch_tokens=tokens, loss_average=average, epochs=1)
        complete_batch(stage, models, batch, 0.05)
        update(stage, models, batch, step=0, seed=0, kl_coef=0.05)
        found.append([p.detach().clone() for m in models.learners.values() for p in m.model.parameters()])
    torch.set_num_threads(before)
    assert len(list(batch.micro_batches(torch.arange(3), 5))) == 3
    start = [
        p.detach().clone() for m in build(router_aux_loss_coef=0.0).learners.values() for p in m.model.parameters()
    ]
    assert any((after - before).abs().max() > 1e-3 for after, before in zip(found[0], start, strict=True))
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_12_the_critic_starts_from_the_reward_model_with_a_fresh_head(tmp_path) -> None:
    """test_run.py covers the rest of this point: that a resumed run restores all state."""
    torch.manual_seed(0)
    scorer = HunYuanForSequenceClassification(HunYuanConfig(**SIZES, num_labels=1))
    scorer.save_pretrained(tmp_path / "rm")
    stage = settings(rewards=[{"kind": "model", "init_from": str(tmp_path / "rm")}])

    class Context:
        recipe = type("Recipe", (), {"dtype": "float32", "parallel": None})
        checkpoint = staticmethod(lambda reference: tmp_path / "rm" if reference.endswith("rm") else None)
        trained_dtype = staticmethod(lambda lora: "float32")

    critic = build_critic(stage, Context)
    assert critic.score.weight.abs().max() == 0
    torch.testing.assert_close(critic.model.layers[1].mlp.gate.weight, scorer.model.layers[1].mlp.gate.weight)
    # Warm-up: the critic is trained and the policy is not.
    task = Task(lambda ids: float(ids[0]), horizon=1, tokens=3, critic={"warmup_steps": 2}, steps=3)
    for step, moved in enumerate((False, False, True)):
        before = task.policy.lm_head.weight.detach().clone()
        metrics = task.iterate(step)[1]
        assert (not torch.equal(before, task.policy.lm_head.weight)) == moved
        assert (metrics["policy_updates"] > 0) == moved
        assert metrics["critic_grad_norm"] > 0


def test_13_no_dropout_while_logprobs_are_compared_and_adam_has_its_eps(batch) -> None:
    models = build(attention_dropout=0.5, hidden_dropout=0.5, moe_drop_tokens=True, capacity_factor=0.5)
    once, again = (policy_output(models.policy.model, batch, 1.0).logprobs for _ in range(2))
    assert torch.equal(once, again)
    assert torch.equal(critic_values(models.critic.model, batch), critic_values(models.critic.model, batch))
    # The first forward pass of an update gives the log-probabilities of `complete_batch`: all ratios are 1.
    batch.score = torch.ones(3)
    stage = settings(epochs=1, mini_batch_size=3, batch_size=3)
    complete_batch(stage, models, batch, 0.0)
    assert update(stage, models, batch, step=0, seed=0, kl_coef=0.0)["update_kl"] == pytest.approx(0.0, abs=1e-10)
    assert stage.optimizer.eps == 1e-5


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        ({"correction": "none"}, None),
        ({"correction": "truncate", "cap": 3.0}, [[2.0, 3.0, 1.0], [1.0, 0.5, 1.0]]),
        ({"correction": "mask", "cap": 3.0}, [[2.0, 0.0, 1.0], [1.0, 0.5, 1.0]]),
        ({"correction": "truncate", "cap": 10.0, "level": "sequence"}, [[8.0] * 3, [0.5] * 3]),
    ],
)
def test_the_recipe_selects_the_correction_of_the_samplers_probabilities(importance, expected) -> None:
    """Trainer over sampler probability is 2 and 4 in row 0, 1 and 1/2 in row 1. The last token of a row has no loss."""
    rows = to_experience(completions(([5], [7, 8, 9], True), ([5], [1, 2, 3], True)))
    rows.old_logprobs = rows.rollout_logprobs + torch.tensor([[2.0, 4.0, 7.0], [1.0, 0.5, 7.0]]).log()
    rows.loss_mask = torch.tensor([[1.0, 1.0, 0.0]] * 2)
    weights = sampler_correction(settings(importance=importance), rows)
    assert (weights if weights is None else weights.tolist()) == (expected and [pytest.approx(row) for row in expected])
