"""The gradient of a step does not depend on the split of its rows into passes and over ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from align.config.stages import WHOLE_BATCH
from align.losses.preference import PREFERENCE_LOSSES
from align.train.fit import metrics_of
from tests.unit.train.one_step import build, checkpoint, gradient_of, mean_gradient_of_ranks, train_one_step

STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"kind": "pretrain"},
    "sft": {"kind": "sft"},
    "sft on all tokens": {"kind": "sft", "assistant_only_loss": False},
    "sft with lora": {"kind": "sft", "lora": {"rank": 2}},
    "reward_model": {"kind": "reward_model", "center_coef": 0.3},
    "dpo": {"kind": "dpo", "sft_coef": 0.5},
    "dpo with lora": {"kind": "dpo", "lora": {"rank": 2}, "sft_coef": 0.5},
    "kto": {"kind": "kto", "undesirable_weight": 1.5},
    "kto with lora": {"kind": "kto", "lora": {"rank": 2}},
    "simpo": {"kind": "dpo", "loss_type": "simpo", "sft_coef": 0.5},
}
RANKS = ("pretrain", "sft", "reward_model", "dpo", "kto", "simpo")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


MEASURED = ("time/", "speed/", "memory/")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max().item() < 2e-6 * largest, name


@pytest.mark.parametrize("name", STAGES)
def test_passes(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows of unequal length give the same gradient in one pass, in several, and in five, with z-loss."""
    settings = {"model": model, "monkeypatch": monkeypatch, "router": {"router_z_loss_coef": 0.1}, **STAGES[name]}
    single, *split = (
        train_one_step(build(folder=tmp_path / str(tokens), micro_batch_tokens=tokens, **settings))
        for tokens in (1000, 40, 1)
    )
    for other in split:
        assert_equal(other.gradients, single.gradients)
        assert other.logs.keys() == single.logs.keys()
        for key in metrics_of(single.logs).keys() - {"aux_loss", "expert_load_max"}:
            if key.startswith(MEASURED):
                continue
            assert other.logs[key] == pytest.approx(single.logs[key], rel=1e-4, abs=1e-6), key


@pytest.fixture(scope="module")
def dpo_trainers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two trainers on the same five pairs, in one pass and in five."""
    folder, settings = tmp_path_factory.mktemp("dpo"), {"model": model, "beta": 0.7}
    with pytest.MonkeyPatch.context() as monkeypatch:
        return [
            build("dpo", folder=folder / str(tokens), monkeypatch=monkeypatch, micro_batch_tokens=tokens, **settings)
            for tokens in (1000, 1)
        ]


@pytest.mark.parametrize("loss_type", [name for name in PREFERENCE_LOSSES if name not in WHOLE_BATCH])
def test_passes_with_every_preference_loss(loss_type: str, dpo_trainers: list[Any]) -> None:
    for trainer in dpo_trainers:
        stage = trainer.align_stage.model_copy(update={"loss_type": loss_type})
        trainer.objective = replace(trainer.objective, stage=stage)
    single, split = map(gradient_of, dpo_trainers)
    assert_equal(split, single)


@pytest.mark.parametrize("name", RANKS)
def test_ranks(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five passes of one row give the same gradient on one rank and on two, with all router losses.

    One of the two ranks repeats a row with weight 0.
    """
    router = {"router_z_loss_coef": 0.1, "router_aux_loss_coef": 0.1}
    settings = {"model": model, "monkeypatch": monkeypatch, "router": router, "micro_batch_tokens": 1, **STAGES[name]}
    alone = train_one_step(build(folder=tmp_path / "alone", **settings))
    ranks = [build(folder=tmp_path / f"rank{rank}", **settings) for rank in range(2)]
    assert_equal(mean_gradient_of_ranks(ranks), alone.gradients)
