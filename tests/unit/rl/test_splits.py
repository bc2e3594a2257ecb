"""The gradient of an optimizer step does not depend on micro-batches or ranks (the balance loss excepted), and the
router losses equal their definitions.

Each configuration runs the same mini-batch of rows of unequal lengths in three ways: whole, one row per micro-batch,
and split over two ranks. The ranks are simulated one after another: each computes its micro-batches, and gradients and
metrics are added as the collectives would add them. tests/unit/parallel/test_ppo_ranks.py does the same with processes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from align.data.experience import Experience
from align.losses.moe import expert_load
from align.models.forward import policy_output
from align.parallel import micro_batches
from align.rl import complete as complete_module
from align.rl import update as update_module
from align.rl.complete import complete_batch
from align.rl.models import Models
from align.rl.score import to_experience
from align.rl.update import update
from tests.unit.rl.small import build, completions, settings

WHOLE, ROWS = 10_000, 1
"""Values of `micro_batch_tokens`: all rows in one micro-batch, and one row per micro-batch."""
GROUPS = {"advantage_estimator": "grpo", "completions_per_prompt": 3}
KL_LOSS = {"apply_to": "loss", "coef": 0.5}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip, completions": {"loss_average": "completions"},
    "clip, constant": {"loss_average": "constant"},
    "dual clip": {"dual_clip": 1.1, "clip_range_high": 0.28},
    "sequence ratio": {"ratio": "sequence", "clip_range": 0.05},
    "GSPO": {**GROUPS, "ratio": "sequence", "clip_range": 0.05, "loss_average": "completions"},
    "CISPO": {"policy_loss": "cispo"},
    "CISPO, completions": {"policy_loss": "cispo", "loss_average": "completions"},
    "CISPO, constant": {"policy_loss": "cispo", "loss_average": "constant"},
    "KL loss k2": {"kl": {**KL_LOSS, "estimator": "k2"}},
    "KL loss k3, completions": {"kl": {**KL_LOSS, "estimator": "k3"}, "loss_average": "completions"},
    "KL loss k3, constant": {"kl": {**KL_LOSS, "estimator": "k3"}, "loss_average": "constant"},
    "GRPO": {**GROUPS, "loss_average": "completions", "kl": {**KL_LOSS, "estimator": "k3"}},
    "Dr. GRPO, KL in the reward": {**GROUPS, "advantage_estimator": "dr_grpo", "loss_average": "constant"},
    "RLOO": {**GROUPS, "advantage_estimator": "rloo"},
    "REINFORCE++": {"advantage_estimator": "reinforce_plus_plus"},
    "importance per sequence": {"importance": {"level": "sequence", "correction": "mask", "cap": 1.5}},
    "truncated masked": {"mask_truncated": True, "loss_average": "completions"},
    "frozen trunk of the critic": {"critic": {"trainable": "head"}},
    "router z-loss": {},
    "router balance loss": {},
}
ROUTER = {"router z-loss": {"router_z_loss_coef": 0.3}, "router balance loss": {"router_aux_loss_coef": 0.3}}


def rollout_batch() -> Experience:
    rows = [([5], [7, 8], True), ([5], [9, 9, 9, 9, 3], False), ([5], [1], True)]
    rows += [([5, 6, 7, 2], [4, 10, 11], True), ([5, 6, 7, 2], [2, 0], True), ([5, 6, 7, 2], [6, 6, 6, 1, 2, 3], True)]
    batch = to_experience(completions(*rows))
    batch.score = torch.tensor([1.0, -0.5, 0.25, 2.0, 0.0, -1.5])
    return batch


def prepared(name: str) -> tuple[Any, Models, Experience]:
    """(stage, models, batch). The models are perturbed after the batch is completed, so ratios differ from 1."""
    stage = settings(
        **{"batch_size": 6, "mini_batch_size": 6, "epochs": 1, "rollout": {"max_new_tokens": 8}, **CONFIGURATIONS[name]}
    )
    models = build(**{"router_aux_loss_coef": 0.0, **ROUTER.get(name, {})})
    if stage.advantage_estimator != "gae":
        models.critic = None
    elif stage.critic.trainable == "head":
        models.critic.model.requires_grad_(False).score.requires_grad_(True)
    batch = rollout_batch()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        batch.rollout_logprobs = policy_output(models.policy.model, batch, 1.0).logprobs
    batch.rollout_logprobs += 0.4 * torch.randn(batch.mask.shape, generator=noise) * batch.mask
    if stage.mask_truncated:
        batch.loss_mask = batch.mask.clone()
        batch.loss_mask[1] = 0
    complete_batch(stage, models, batch, stage.kl.coef)
    with torch.no_grad():
        for learner in models.learners.values():
            for parameter in learner.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.03 * torch.randn(parameter.shape, generator=noise)
    return stage, models, batch


def step(
    stage: Any, models: Models, batch: Experience, tokens: int, place: tuple[int, int], patch: pytest.MonkeyPatch
) -> tuple[dict[str, Tensor], Counter[str]]:
    """Gradients of one optimizer step by parameter, and its metrics, on rank place[0] of place[1]."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> float:
        for key, parameter in models.learners[name].model.named_parameters():
            if parameter.grad is not None:
                found[f"{name}.{key}"] = parameter.grad.clone()
        models.learners[name].discard()
        return 1.0

    for name, learner in models.learners.items():
        patch.setattr(learner, "_step", lambda name=name: keep(name))
    patch.setattr(micro_batches, "world", lambda: place)
    patch.setattr(update_module, "summed", lambda tensor, device: tensor)
    split = stage.model_copy(update={"micro_batch_tokens": tokens})
    return found, Counter(update(split, models, batch, step=0, seed=0, kl_coef=stage.kl.coef))


def both_ranks(*arguments: Any) -> tuple[dict[str, Tensor], Counter[str]]:
    """Gradients and metrics of an optimizer step, summed over two ranks."""
    *arguments, patch = arguments
    (gradients, metrics), (more, others) = (step(*arguments, (rank, 2), patch) for rank in (0, 1))
    for key, gradient in more.items():
        gradients[key] = gradients[key] + gradient if key in gradients else gradient
    metrics.update(others)
    return gradients, metrics


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference between two gradient elements, relative to the largest element of the same model."""
    assert one.keys() == other.keys()
    largest = {"policy": 0.0, "critic": 0.0}
    for name, gradient in one.items():
        model = name.split(".")[0]
        largest[model] = max(largest[model], gradient.abs().max().item())
    return max((one[n] - other[n]).abs().max().item() / max(largest[n.split(".")[0]], 1e-12) for n in one)


NOT_ADDITIVE = ("expert_load_max", "aux_loss", "policy_updates", "policy_grad_norm", "critic_grad_norm")


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name != "router balance loss"])
def test_the_gradient_does_not_depend_on_how_a_mini_batch_is_split(name, monkeypatch) -> None:
    stage, models, batch = prepared(name)
    whole, metrics = step(stage, models, batch, WHOLE, (0, 1), monkeypatch)
    assert max(gradient.abs().max().item() for gradient in whole.values()) > 1e-3
    assert 0 < metrics["clip_fraction"] < 1  # some ratios are clipped and some are not
    splits = [step(stage, models, batch, ROWS, (0, 1), monkeypatch)]
    splits += [both_ranks(stage, models, batch, tokens, monkeypatch) for tokens in (ROWS, 12, WHOLE)]
    for gradients, others in splits:
        assert apart(whole, gradients) < 2e-5
        for key in metrics.keys() - set(NOT_ADDITIVE):
            assert others[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), key


def test_each_rank_computes_its_share_of_the_forward_passes(batch, monkeypatch) -> None:
    """With three micro-batches on two ranks, the second pass of rank 1 only takes part in the collectives."""
    stage = settings(routing_replay="trainer", micro_batch_tokens=ROWS)
    names = ("old_logprobs", "ref_logprobs", "values", "routed_experts")

    def run(place: tuple[int, int]) -> dict[str, Tensor]:
        rows = batch.rows(torch.arange(3))
        monkeypatch.setattr(micro_batches, "world", lambda: place)
        monkeypatch.setattr(complete_module, "summed", lambda tensor, device: tensor)
        monkeypatch.setattr(complete_module, "largest", lambda tensor, device: tensor)
        complete_module.forward_passes(stage, build(), rows)
        return {name: getattr(rows, name) for name in names}

    whole, first, second = run((0, 1)), run((0, 2)), run((1, 2))
    for name in names[:-1]:
        torch.testing.assert_close(first[name] + second[name], whole[name])
        assert (first[name] == 0).all(dim=1).sum() == 1
        assert (second[name] == 0).all(dim=1).sum() == 2
    assert torch.equal(torch.maximum(first["routed_experts"], second["routed_experts"]), whole["routed_experts"])


def router_logits(models: Models, batch: Experience) -> list[Tensor]:
    """Logits [tokens, E] of each router, with gradient."""
    found: list[Tensor] = []
    gates = [layer.mlp.gate for layer in models.policy.model.model.layers]
    hooks = [gate.register_forward_hook(lambda *call: found.append(call[-1].logits_TE)) for gate in gates]
    policy_output(models.policy.model, batch.rows(torch.arange(len(batch))), 1.0)
    for hook in hooks:
        hook.remove()
    return found


def z_loss(logits: list[Tensor]) -> Tensor:
    return sum((layer.exp().sum(1).log() ** 2).mean() for layer in logits) / len(logits)


def balance(logits: list[Tensor]) -> Tensor:
    total = 0.0
    for layer in logits:
        load = expert_load(layer.argmax(1)[:, None], layer.shape[1], torch.ones(len(layer)))
        total = total + layer.shape[1] * (load * layer.softmax(1).mean(0)).sum()
    return total / len(logits)


@pytest.mark.parametrize(("name", "loss"), [("router z-loss", z_loss), ("router balance loss", balance)])
@pytest.mark.parametrize("tokens", [WHOLE, ROWS])
def test_a_routers_loss_is_added_with_its_coefficient(name, loss, tokens, monkeypatch) -> None:
    """With one row per micro-batch, the balance loss is the token-weighted mean of the balance losses of the rows."""
    stage, models, batch = prepared(name)
    config = models.policy.model.config
    with_loss, metrics = step(stage, models, batch, tokens, (0, 1), monkeypatch)
    monkeypatch.setattr(config, "router_aux_loss_coef", 0.0)
    monkeypatch.setattr(config, "router_z_loss_coef", 0.0)
    without, _ = step(stage, models, batch, tokens, (0, 1), monkeypatch)
    parts = [torch.arange(6)] if tokens == WHOLE else torch.arange(6).split(1)
    every = batch.lengths.sum()
    expected = sum(batch.lengths[p].sum() / every * loss(router_logits(models, batch.rows(p))) for p in parts)
    assert metrics["router_z_loss" if loss is z_loss else "aux_loss"] == pytest.approx(expected.item(), rel=1e-5)
    models.policy.discard()
    expected.backward()
    for key, parameter in models.policy.model.named_parameters():
        added = with_loss[f"policy.{key}"] - without[f"policy.{key}"]
        wanted = torch.zeros_like(added) if parameter.grad is None else 0.3 * parameter.grad
        torch.testing.assert_close(added, wanted, rtol=1e-3, atol=2e-5)
    assert models.policy.model.model.layers[0].mlp.gate.weight.grad.abs().max() > 1e-3
