"""The estimate of a stage's time, against times made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from align.cli.data_text import duration, time_lines
from align.config import load_recipe
from align.config.recipe import Recipe
from align.data.report import DataReport
from align.models.family import family_of
from align.recipes import duration as timing
from align.recipes.duration import Estimate, estimate_time
from align.recipes.preview import Lengths, Preview
from align.run.manifest import hardware, stage_settings
from align.train.checkpoint import checked_config

DATA = {"train": [{"path": "rows.jsonl"}], "max_length": 100}
PPO = {"kind": "ppo", "prompts": [{"path": "p.jsonl"}], "rewards": [{"kind": "length", "max_tokens": 8}], "steps": 50}


def _recipe(folder: Path, **settings: Any) -> Recipe:
    stages = {"sft": {"kind": "sft", "batch_size": 4, "data": DATA, **settings}, "ppo": PPO}
    model = {"kind": "scratch", "preset": "tiny", "tokenizer": {"data": [{"path": "rows.jsonl"}]}}
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump({"name": "r", "model": model, "stages": stages}, sort_keys=False))
    return load_recipe(file)


def _data(rows: int, tokens: int, steps: int) -> Preview:
    report = DataReport(rows, rows, 0, {}, 0, tokens, tokens, "")
    lengths = Lengths(tokens / rows, tokens / rows, 100, [], 0)
    return Preview(lambda start, count: [], rows, report, lengths=lengths, steps=steps)


def _finished(folder: Path, recipe: Recipe, name: str, **more: Any) -> None:
    (folder / name).mkdir(exist_ok=True)
    settings = stage_settings(recipe, name)
    facts = {"status": "finished", "config": settings, "parallel": None, "hardware": hardware(), **more}
    (folder / name / "manifest.json").write_text(json.dumps(facts))


def test_an_earlier_run_is_scaled_by_steps_and_tokens(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    # 10 steps of 4 rows of 30 tokens took 20 s: 2 s per step of 120 tokens.
    _finished(tmp_path, recipe, "sft", training={"steps": 10, "seconds": 20.0}, data={"tokens": 300, "rows_train": 10})
    # Now 25 steps of 8 rows of 45 tokens: 360 tokens per step, three times as many.
    found = estimate_time(_recipe(tmp_path, batch_size=8), "sft", tmp_path, _data(200, 9000, 25))
    assert found.kind == "earlier run"
    assert found.seconds == pytest.approx(25 * 2.0 * 3)
    assert "2 s per step" in found.basis
    assert "times 3: a step has about 360 tokens now, 120 then" in found.basis


@pytest.mark.parametrize("change", ["model", "hardware", "parallel", "lora", "not timed"])
def test_a_run_that_says_nothing_about_this_one_is_not_used(tmp_path: Path, change: str) -> None:
    recipe, timed = _recipe(tmp_path), {"steps": 10, "seconds": 20.0}
    data = {"tokens": 300, "rows_train": 10}
    other = {"hardware": {"cpu": "another"}} if change == "hardware" else {}
    other |= {"parallel": {"processes": 2}} if change == "parallel" else {}
    _finished(tmp_path, recipe, "sft", training=None if change == "not timed" else timed, data=data, **other)
    if change == "model":
        _finished(tmp_path, recipe, "base")
        base = json.loads((tmp_path / "base" / "manifest.json").read_text())
        base["config"]["base"]["preset"] = "small"
        (tmp_path / "base" / "manifest.json").write_text(json.dumps(base))
    now = _recipe(tmp_path, lora={"rank": 4}) if change == "lora" else recipe
    assert estimate_time(now, "sft", tmp_path, _data(200, 9000, 25)).kind == "lower bound"


def test_the_bound_is_the_arithmetic_of_the_matrices_at_the_measured_rate(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(timing, "matmul_rate", lambda *_: 1e9)
    recipe = _recipe(tmp_path)
    found = estimate_time(recipe, "sft", tmp_path, _data(200, 9000, 25))
    # Forward and backward pass: six operations per token and weight of a matrix that the token uses. The weights are
    # counted on the model itself; a token uses top_k of the experts.
    sizes = recipe.model.sizes()
    config = checked_config({**sizes, "vocab_size": 2048}, "test", "")
    with torch.device("meta"):
        model = family_of(config).policy(config)
    weights = 0.0
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and "embed_tokens" not in name:
            weights += weight.numel() * (config.moe_topk / config.num_experts if ".experts." in name else 1)
    if config.tie_word_embeddings:
        weights += config.vocab_size * config.hidden_size
    assert found.kind == "lower bound"
    assert found.seconds == pytest.approx(6 * weights * 25 * 4 * 45 / 1e9, rel=1e-3)


def test_the_measured_rate_is_that_of_a_product() -> None:
    assert 1e7 < timing.matmul_rate(256, 128, 256, "float32") < 1e15


def test_several_processes_and_ppo_without_a_run_are_unknown(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    assert estimate_time(recipe, "ppo", tmp_path, _data(10, 100, 50)).seconds is None
    apart = recipe.model_copy(update={"parallel": load_recipe("tiny", ["parallel.processes=2"]).parallel})
    found = estimate_time(apart, "sft", tmp_path, _data(200, 9000, 25))
    assert found.seconds is None
    assert "align plan" in found.basis


def test_iterations_of_ppo_take_the_time_of_their_phases(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    _finished(tmp_path, recipe, "ppo", data={})
    lines = [
        {"step": 1, "time/generate": 2.0, "time/update": 1.0},
        {"step": 2, "time/generate": 4.0, "time/update": 1.0},
    ]
    (tmp_path / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert estimate_time(recipe, "ppo", tmp_path, _data(10, 100, 50)).seconds == pytest.approx(50 * 4.0)


def test_the_line_of_the_report() -> None:
    assert [duration(seconds) for seconds in (0.34, 89, 90, 1200, 7200, 400000)] == [
        "0.3 s",
        "89 s",
        "1.5 min",
        "20 min",
        "2.0 h",
        "4.6 days",
    ]
    assert time_lines(Estimate(60.0, "earlier run", "x")) == ["time        about 60 s: x"]
    assert time_lines(Estimate(60.0, "lower bound", "x")) == ["time        at least 60 s: x"]
    assert time_lines(Estimate(None, "unknown", "x")) == ["time        unknown: x"]
    assert time_lines(Estimate(None, "does not train", "x")) == []
