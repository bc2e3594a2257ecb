"""Training that ends early: non-finite values, a request to stop, and the checkpoint to resume from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from align.errors import UserError
from align.run.folder import read_jsonl
from align.run.interrupt import Stopped
from align.train import fit
from align.train.checkpoint import load_policy, load_tokenizer, save_model
from align.train.trainer import StepClock
from tests.unit.train.one_step import checkpoint, run_stage


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kind", ["sft", "reward_model", "dpo"])
def test_a_model_that_overflows_is_not_trained(kind: str, model: Path, tmp_path: Path) -> None:
    """Every weight is finite, but the final norm's weights are so large that the outputs are not."""
    checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] *= 1e38
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"stages\.stage: the (loss|gradient norm) is (nan|inf) at step 1; "):
        run_stage(kind, tmp_path / "model", tmp_path)
    assert not (tmp_path / "run" / "stage" / "model").exists()
    assert not list((tmp_path / "run" / "stage" / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("name", "label"), [("loss", "loss"), ("grad_norm", "gradient norm"), ("eval_loss", "held-out")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_non_finite_value_ends_training(name: str, label: str, value: float) -> None:
    stop, state = fit.StopEarly(SimpleNamespace(name="sft")), SimpleNamespace(global_step=7)
    stop.on_log(None, state, None, logs={"loss": 1.0, "grad_norm": 1e30, "eval_loss": 2.0})
    with pytest.raises(
        UserError, match=f"the {label}.* is {value} at step 7; lower stages.sft.optimizer.learning_rate"
    ):
        stop.on_log(None, state, None, logs={"loss": 1.0, name: value})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_model_with_non_finite_weights_is_not_saved(value: float, model: Path, tmp_path: Path) -> None:
    policy, tokenizer = load_policy(model, "float32"), load_tokenizer(model)
    save_model(policy, tokenizer, tmp_path / "before", "float32")
    policy.model.norm.weight.data[:2] = value
    with pytest.raises(UserError, match="sft: 2 weights are infinite or not a number"):
        save_model(policy, tokenizer, tmp_path / "sft", "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


def test_a_run_with_a_request_to_stop_writes_a_checkpoint_and_resumes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "batch_size": 2, "micro_batch_size": 2}
    requests: Iterator[bool] = iter([False, True])
    monkeypatch.setattr(fit, "should_stop", lambda: next(requests))
    with pytest.raises(Stopped):
        run_stage("sft", model, tmp_path, **settings)
    folder = tmp_path / "run" / "stage"
    assert [path.name for path in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert (folder / "checkpoints" / "checkpoint-2" / fit.COMPLETE).is_file()
    assert not (folder / "model").exists()
    monkeypatch.setattr(fit, "should_stop", lambda: False)
    training = run_stage("sft", model, tmp_path, resume=True, **settings).training
    assert training is not None
    assert training["steps"] == 2  # those after the checkpoint, which its seconds are for
    assert training["seconds"] > 0
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [line["step"] for line in map(json.loads, lines) if "loss" in line] == [1, 2, 3, 4]
    assert (folder / "model" / "config.json").is_file()


def test_only_complete_numbered_checkpoints_count(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-best", "checkpoint-1-old"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-11":
            (tmp_path / name / fit.COMPLETE).touch()
    found = fit.last_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists()
    assert (tmp_path / "checkpoint-best").exists()


def test_a_stage_shows_its_steps_and_keeps_the_last_one_and_evaluations(model: Path, tmp_path: Path) -> None:
    """Two steps: a line for each, with the tokens trained until then; only the last line stays."""
    said: list[str] = []
    shown: list[str] = []
    settings: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "micro_batch_size": 2}
    run_stage("sft", model, tmp_path, say=said.append, progress=shown.append, **settings)
    number = r"\d+\.\d{4}  learning rate \d\.\de-\d\d  [\d,]+ tokens/s  0:\d\d"
    assert [line for line in shown if re.fullmatch(rf"  step 1/2  loss {number}, 0:\d\d left", line)]
    assert [line for line in said if re.fullmatch(rf"  step 2/2  loss {number}", line)]
    assert not [line for line in said if "step 1/2" in line]


def test_steps_have_time_speed_and_memory_and_some_have_the_load_of_each_expert(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "batch_size": 2, "micro_batch_size": 1}
    run_stage("sft", model, tmp_path, **settings)
    folder = tmp_path / "run" / "stage"
    assert json.loads((folder / "steps.json").read_text()) == {"steps": 3}
    steps = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    for line in steps:
        assert line["time/step"] > 0
        assert line["speed/train"] > 0
        assert line["memory/peak_gib"] > 0.01
    loads = read_jsonl(folder / "experts.jsonl")
    assert [line["step"] for line in loads] == [1, 2, 3]
    for line, step in zip(loads, steps, strict=True):
        for layer in line["load"]:
            assert sum(layer) == pytest.approx(1, abs=1e-3)
        # Passes are averaged with their tokens as weights, so the busiest expert of the mean is at most the mean of
        # the passes' busiest experts.
        busiest = sum(max(layer) * len(layer) for layer in line["load"]) / len(line["load"])
        assert 1 <= busiest <= step["expert_load_max"] + 1e-3


def test_the_clock_of_steps_leaves_out_evaluations() -> None:
    times = iter([10.0, 12.0, 15.0, 115.0, 119.0])
    clock = StepClock(lambda: next(times))
    clock.start()  # at 10
    assert clock.lap(50) == {"time/step": 2.0, "speed/train": 25.0}
    clock.start()  # runs already
    assert clock.lap(80) == {"time/step": 3.0, "speed/train": 10.0}
    clock.stop()  # an evaluation
    clock.start()  # at 115
    assert clock.lap(120) == {"time/step": 4.0, "speed/train": 10.0}
    clock.stop()
    assert clock.lap(130) == {}
