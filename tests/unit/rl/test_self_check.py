"""A PPO run ends when its sampler computes another model than its trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from align.errors import UserError
from align.pipeline import run
from align.rollout.base import SyncReport
from align.rollout.hf_engine import HuggingFaceEngine
from tests.unit.rl.runs import lines, recipe


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine keep its weights in every update."""

    def keep(self: HuggingFaceEngine, weights: object, version: int) -> SyncReport:
        self.version = version
        return SyncReport(0, 0.0, version)

    monkeypatch.setattr(HuggingFaceEngine, "update_weights", keep)


def test_weights_that_do_not_arrive_end_the_run(tmp_path: Path, start, stale) -> None:
    made, folder = recipe(tmp_path, kl={"coef": 0.0}), start("stale")
    with pytest.raises(UserError, match="after the first update: their log-probabilities of 48 tokens differ"):
        run(made, folder, say=lambda line: None)
    assert [line["step"] for line in lines(folder)] == [1]


def test_another_model_ends_the_run_before_its_first_update(tmp_path: Path, start, monkeypatch) -> None:
    generate = HuggingFaceEngine.generate

    def shifted(self: HuggingFaceEngine, *arguments):
        return [
            [replace(completion, logprobs=[value - 0.01 for value in completion.logprobs]) for completion in row]
            for row in generate(self, *arguments)
        ]

    monkeypatch.setattr(HuggingFaceEngine, "generate", shifted)
    with pytest.raises(UserError, match=r"at the start: .* differ by up to 0\.01 \(limit 0\.001 in float32\)"):
        run(recipe(tmp_path), start("shifted"), say=lambda line: None)


def test_without_the_setting_the_run_goes_on(tmp_path: Path, start, stale) -> None:
    folder = start("unchecked")
    run(recipe(tmp_path, self_check=False), folder, say=lambda line: None)
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]


def test_overlapping_runs_sample_the_new_weights_for_the_check(tmp_path: Path, start, stale) -> None:
    """Under `overlap` every later rollout batch comes from earlier weights, so it cannot be compared."""
    made, folder = recipe(tmp_path), start("overlapping")
    object.__setattr__(made.stages["ppo"], "overlap", True)  # a recipe needs servers for it
    with pytest.raises(UserError, match="after the first update"):
        run(made, folder, say=lambda line: None)
    assert lines(folder) == []


def test_overlapping_runs_that_agree_are_not_ended(tmp_path: Path, start) -> None:
    made, folder = recipe(tmp_path), start("agreeing")
    object.__setattr__(made.stages["ppo"], "overlap", True)
    run(made, folder, say=lambda line: None)
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]
