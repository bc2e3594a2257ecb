"""The reference's log-probabilities: rows that a run reads, and use of the cache."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from align.models.hunyuan import HunYuanForCausalLM
from align.train import references
from tests.unit.train.one_step import build, checkpoint, rows
from tests.unit.train.test_first_steps import completion_logprobs


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return checkpoint(tmp_path / "model")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the references that are loaded."""
    loaded, load = [], references.load_policy

    def watched(folder: Path, *arguments: Any, **options: Any) -> Any:
        loaded.append(folder)
        return load(folder, *arguments, **options)

    monkeypatch.setattr(references, "load_policy", watched)
    return loaded


def values(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **stage: Any) -> np.ndarray:
    found: np.ndarray = build("dpo", model, folder, monkeypatch, **stage).objective.references
    return found


def test_values_equal_those_of_single_rows(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build("dpo", model, tmp_path, monkeypatch, micro_batch_tokens=40)
    plain = HunYuanForCausalLM.from_pretrained(model)
    expected = [
        [sum(completion_logprobs(plain, row, side)) for side in ("chosen", "rejected")] for row in trainer.train_dataset
    ]
    np.testing.assert_allclose(trainer.objective.references, expected, rtol=1e-6)


def test_a_second_run_reads_the_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[Path]
) -> None:
    first = values(model, tmp_path / "first", monkeypatch)
    again = values(model, tmp_path / "again", monkeypatch, beta=0.7, epochs=3.0)
    assert loads == [model]
    np.testing.assert_array_equal(first, again)


def test_other_weights_rows_or_precision_are_computed_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[Path]
) -> None:
    first = values(model, tmp_path / "first", monkeypatch)
    policy = HunYuanForCausalLM.from_pretrained(model)
    policy.model.norm.weight.data[3] += 1e-3
    policy.save_pretrained(model)
    changed = values(model, tmp_path / "weights", monkeypatch)
    assert len(loads) == 2
    assert (first != changed).all()
    monkeypatch.setattr("tests.unit.train.one_step.rows", lambda kind: rows(kind)[::-1])
    values(model, tmp_path / "rows", monkeypatch)
    assert len(loads) == 3


def test_a_run_computes_only_the_rows_that_it_reads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[Path]
) -> None:
    """One step of two rows, then a whole epoch, which computes the other three rows."""
    part = values(model, tmp_path / "part", monkeypatch, batch_size=2, max_steps=1)
    assert np.isnan(part).all(1).sum() == 3
    whole = values(model, tmp_path / "whole", monkeypatch, batch_size=2, max_steps=3)
    assert not np.isnan(whole).any()
    np.testing.assert_array_equal(whole[~np.isnan(part)], part[~np.isnan(part)])
    assert len(loads) == 2


def test_a_damaged_file_is_computed_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[Path]
) -> None:
    first = values(model, tmp_path / "first", monkeypatch)
    (file,) = (tmp_path / "cache" / "references").glob("*.npy")
    file.write_bytes(file.read_bytes()[:70])
    np.testing.assert_array_equal(values(model, tmp_path / "again", monkeypatch), first)
    assert len(loads) == 2


def test_a_policy_equal_to_the_reference_has_log_ratios_of_zero(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build("dpo", model, tmp_path, monkeypatch)
    (step,) = trainer.get_train_dataloader()
    loss = trainer.training_step(trainer.model, step)
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)


@pytest.mark.parametrize(("count", "lines"), [(0, 0), (2, 1)])
def test_rows_from_the_cache_are_named_if_there_are_any(
    count: int, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "_read", lambda path, shape: np.zeros(shape))
    said: list[str] = []
    reference: Any = object.__new__(references.Reference)
    reference.stage = SimpleNamespace(data=SimpleNamespace(cache=str(tmp_path)), sequences_per_row=1)
    reference.context, reference.key = SimpleNamespace(say=said.append), {}
    rows: Any = [None] * count
    assert reference.of("mismatched", rows, range(count)).shape == (count, 1)
    assert len(said) == lines
