"""The gradient of a step does not depend on the split of its batch into micro-batches and over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from align.config.stages import LOSS_OPTIONS, WHOLE_BATCH
from align.losses.preference import PREFERENCE_LOSSES
from align.recipes import dpo
from tests.unit.train.one_step import build, checkpoint, gradient_of, mean_gradient_of_ranks, train_one_step

STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"kind": "pretrain"},
    "sft": {"kind": "sft"},
    "sft on all tokens": {"kind": "sft", "assistant_only_loss": False},
    "sft with lora": {"kind": "sft", "lora": {"rank": 2}},
    "reward_model": {"kind": "reward_model", "center_coef": 0.3},
    "dpo": {"kind": "dpo", "sft_coef": 0.5},
    "dpo with lora": {"kind": "dpo", "lora": {"rank": 2}, "sft_coef": 0.5},
    "simpo": {"kind": "dpo", "loss_type": "simpo", "sft_coef": 0.5},
}
RANKS = ("pretrain", "sft", "reward_model", "dpo", "simpo")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max().item() < 2e-6 * largest, name


@pytest.mark.parametrize("name", STAGES)
def test_micro_batches(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows of unequal length give the same gradient in one micro-batch and in three (2, 2, 1), with z-loss."""
    router = {"router_z_loss_coef": 0.1}
    single, split = (
        train_one_step(
            build(
                model=model,
                folder=tmp_path / str(size),
                monkeypatch=monkeypatch,
                router=router,
                micro_batch_size=size,
                **STAGES[name],
            )
        )
        for size in (6, 2)
    )
    assert_equal(split.gradients, single.gradients)
    assert split.logs["loss"] == pytest.approx(single.logs["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def dpo_trainers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two trainers on the same five pairs, in one micro-batch and in three."""
    folder, settings = tmp_path_factory.mktemp("dpo"), {"model": model, "beta": 0.7}
    with pytest.MonkeyPatch.context() as monkeypatch:
        return [
            build("dpo", folder=folder / str(size), monkeypatch=monkeypatch, micro_batch_size=size, **settings)
            for size in (6, 2)
        ]


@pytest.mark.parametrize("loss_type", [name for name in PREFERENCE_LOSSES if name not in WHOLE_BATCH])
def test_micro_batches_with_every_preference_loss(loss_type: str, dpo_trainers: list[Any]) -> None:
    options = LOSS_OPTIONS.get(loss_type, {})
    for trainer in dpo_trainers:
        trainer.align_stage = trainer.align_stage.model_copy(update={"loss_type": loss_type})
        trainer.loss_types, trainer.label_smoothing = [loss_type], options.get("label_smoothing", 0.0)
    single, split = map(gradient_of, dpo_trainers)
    assert_equal(split, single)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "robust"])
def test_the_recipes_loss_equals_trls(loss_type: str, dpo_trainers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For losses that TRL has, the recipe's own implementation gives TRL's gradient."""
    trainer = dpo_trainers[1]
    trainer.align_stage = trainer.align_stage.model_copy(update={"loss_type": loss_type})
    trainer.loss_types, trainer.label_smoothing = [loss_type], LOSS_OPTIONS.get(loss_type, {}).get("label_smoothing", 0)
    theirs = gradient_of(trainer)
    monkeypatch.setattr(dpo, "BY_TRL", set())
    assert_equal(gradient_of(trainer), theirs)


def test_the_recipes_loss_equals_trls_with_adapters_and_an_sft_term(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build("dpo", model, tmp_path, monkeypatch, lora={"rank": 2}, sft_coef=0.5, micro_batch_size=2)
    theirs = gradient_of(trainer)
    monkeypatch.setattr(dpo, "BY_TRL", set())
    assert_equal(gradient_of(trainer), theirs)


@pytest.mark.parametrize("name", RANKS)
def test_ranks(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five micro-batches of one row give the same gradient on one rank and on two, with all router losses.

    One of the two ranks repeats a row with weight 0.
    """
    router = {"router_z_loss_coef": 0.1, "router_aux_loss_coef": 0.1}
    settings = {"model": model, "monkeypatch": monkeypatch, "router": router, "micro_batch_size": 1, **STAGES[name]}
    alone = train_one_step(build(folder=tmp_path / "alone", **settings))
    ranks = [build(folder=tmp_path / f"rank{rank}", **settings) for rank in range(2)]
    assert_equal(mean_gradient_of_ranks(ranks), alone.gradients)
