"""PPO with `dtype: bfloat16` in one process: passes in bf16, master weights in float32, exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.config.recipe import Recipe
from align.models.forward import critic_values, policy_output
from align.models.heads import ScoreHead, TokenHead
from align.models.hunyuan.moe import Router
from align.pipeline import run
from align.recipes import ppo
from align.rl.models import build_models
from align.run.context import StageContext
from align.train.learner import LocalLearner
from tests.near import assert_near
from tests.unit.rl import small
from tests.unit.rl.runs import lines, recipe


def in_bf16(folder: Path, **settings) -> Recipe:
    return recipe(folder, **settings).model_copy(update={"dtype": "bfloat16"})


def quietly(made: Recipe, run_dir: Path, **options) -> None:
    run(made, run_dir, say=lambda line: None, **options)


SETTINGS = {
    "full": {},
    "recomputed": {"gradient_checkpointing": True},
    "lora": {"lora": {"rank": 2, "save": "merged"}, "critic": {"lora": {"rank": 2}}},
    "head": {"advantage_estimator": "gae", "critic": {"trainable": "head"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_an_interrupted_run_in_bf16_ends_like_one_that_was_not(tmp_path, monkeypatch, name) -> None:
    made = in_bf16(tmp_path, steps=2, checkpoint_every=1, **SETTINGS[name])
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    quietly(made, whole)
    update = ppo.update

    def interrupt(*arguments, step: int, **options):
        if step == 1:
            raise KeyboardInterrupt
        return update(*arguments, step=step, **options)

    with monkeypatch.context() as patched:
        patched.setattr(ppo, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quietly(made, interrupted)
    quietly(made, interrupted, resume=True)
    assert lines(interrupted) == lines(whole)
    weights = [(folder / "ppo/model/model.safetensors").read_bytes() for folder in (whole, interrupted)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_recomputed_activations_change_no_result_in_bf16(tmp_path) -> None:
    for recompute in (False, True):
        quietly(in_bf16(tmp_path, steps=2, gradient_checkpointing=recompute), tmp_path / str(recompute))
    assert lines(tmp_path / "True") == lines(tmp_path / "False")


@pytest.mark.parametrize(
    ("settings", "trained", "frozen"),
    [
        ({}, {torch.float32}, set()),
        ({"lora": {"rank": 2}, "critic": {"lora": {"rank": 2}}}, {torch.float32}, {torch.bfloat16}),
        ({"critic": {"trainable": "head"}}, {torch.float32}, {torch.bfloat16}),
    ],
    ids=["full", "lora", "head"],
)
def test_trained_weights_are_float32_and_frozen_ones_bf16(tmp_path, settings, trained, frozen) -> None:
    made = in_bf16(tmp_path, **settings)
    quietly(made, tmp_path / "run", only="base")
    models = build_models(made.stages["ppo"], StageContext(made, "ppo", tmp_path / "run"))
    learners = models.learners.values()
    found = [(p.requires_grad, p.dtype) for learner in learners for p in learner.model.parameters()]
    assert {dtype for requires_grad, dtype in found if requires_grad} == trained
    assert {dtype for requires_grad, dtype in found if not requires_grad} == frozen
    if models.reference is not None:
        assert {p.dtype for p in models.reference.model.parameters()} == {torch.bfloat16}


@pytest.fixture
def models():
    """Models in float32 whose learners compute in bf16, and copies that compute in float32."""
    pair = []
    for dtype in ("bfloat16", "float32"):
        built = small.build(moe_topk=2)
        optimizer = built.policy.settings
        built.policy = LocalLearner(built.policy.model, optimizer, total=1, dtype=dtype)
        built.critic = LocalLearner(built.critic.model, optimizer, total=1, dtype=dtype)
        torch.nn.init.normal_(built.critic.model.score.weight)
        pair.append(built)
    return pair


def test_the_products_of_a_pass_are_bf16_and_its_router_and_heads_fp32(models, batch) -> None:
    bf16, _ = models
    seen: dict[str, set[torch.dtype]] = {"linear": set(), "router": set(), "score": set(), "logprobs": set()}
    kinds = {Router: "router", ScoreHead: "score", TokenHead: "logprobs", torch.nn.Linear: "linear"}

    def record(module, _, output):
        first = output[0] if isinstance(output, tuple) else output
        seen[kinds[type(module)]].add(first.dtype)

    for learner in bf16.learners.values():
        for module in learner.model.modules():
            if type(module) in kinds:
                module.register_forward_hook(record)
    bf16.policy.run(policy_output, batch, 1.0)
    bf16.critic.run(critic_values, batch)
    assert seen.pop("linear") == {torch.bfloat16}
    assert set(map(frozenset, seen.values())) == {frozenset({torch.float32})}


def test_a_router_under_autocast_is_the_float32_product(models) -> None:
    router = next(m for m in models[0].policy.model.modules() if isinstance(m, Router))
    hidden = torch.randn(7, router.weight.shape[1])
    plain = router(hidden).logits_TE
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(hidden).logits_TE, plain)


def gradients(models, batch) -> dict[str, torch.Tensor]:
    factors = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0)) * batch.mask
    models.policy.backward((models.policy.run(policy_output, batch, 1.0).logprobs * factors).sum())
    models.critic.backward((models.critic.run(critic_values, batch) * factors).sum())
    return {
        f"{name}.{key}": parameter.grad
        for name, learner in models.learners.items()
        for key, parameter in learner.model.named_parameters()
        if parameter.grad is not None
    }


def test_gradients_in_bf16_are_those_in_float32_up_to_rounding(models, batch, monkeypatch) -> None:
    """Each parameter's gradient has a relative error of a few roundings to bf16: at most 16 u, with u = 2^-8.

    The bf16 model replays the experts that the float32 model chose, as another choice is not a rounding error.
    """
    route = Router.forward
    chosen: list[torch.Tensor] = []

    def record(self, hidden, *_):
        routing = route(self, hidden)
        chosen.append(routing.chosen_Tk)
        return routing

    monkeypatch.setattr(Router, "forward", record)
    exact = gradients(models[1], batch)
    monkeypatch.setattr(Router, "forward", lambda self, hidden, *_: route(self, hidden, None, chosen.pop(0)))
    found = gradients(models[0], batch)
    assert set(found) == set(exact)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        error = (gradient - exact[name]).norm() / exact[name].norm()
        assert error < 16 * 2.0**-8, f"{name}: {error:.4f}"


def test_passes_side_by_side_in_bf16_equal_one_after_another(models, batch) -> None:
    bf16, _ = models
    with torch.no_grad():
        alone = [bf16.policy.run(policy_output, batch, 1.0).logprobs, bf16.critic.run(critic_values, batch)]
        passes = [
            (bf16.policy.model, [lambda: bf16.policy.run(policy_output, batch, 1.0).logprobs] * 4),
            (bf16.critic.model, [lambda: bf16.critic.run(critic_values, batch)] * 4),
        ]
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            results = bf16.run_passes(*passes)
        finally:
            torch.set_num_threads(threads)
    for found, expected in zip(results, [alone[0]] * 4 + [alone[1]] * 4, strict=True):
        assert_near(found, expected)
    assert not torch.is_autocast_enabled("cpu")
