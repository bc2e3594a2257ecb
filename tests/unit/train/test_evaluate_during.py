"""Evaluation during training adds metrics, leaves the training unchanged, and selects the stage's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.config.recipe import Recipe
from align.errors import UserError
from align.eval.report.plots import stage_plots
from align.eval.report.write import read_metrics
from align.eval.results import Results
from align.pipeline import run
from tests.integration.runs import NOISE
from tests.unit.rl import runs as ppo_runs
from tests.unit.train.test_resume import recipe

PREFIX = "evaluation/"
LORA = {"rank": 4, "dropout": 0.2, "experts": False, "train_router": True, "save": "merged"}


def task(folder: Path, verifier: str = "{kind: length, max_tokens: 5}", name: str = "words") -> str:
    rows = [{"q": f"What is {word}?"} for word in ("one", "two", "three", "four", "five", "six")]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{name}.yaml"
    path.write_text(
        f"name: {name}\ndata: q.jsonl\nprompt: '{{{{ q }}}}'\nverifier: {verifier}\n"
        "max_new_tokens: 6\ntemperature: 1.0\n"
    )
    return str(path)


def settings(folder: Path, *, verifier: str = "{kind: length, max_tokens: 5}", **changes: Any) -> dict[str, Any]:
    return {"every": 3, "tasks": [task(folder, verifier)], "limit": 5, **changes}


def go(settings: Recipe, run_dir: Path, **how: Any) -> list[str]:
    said: list[str] = []
    run(settings, run_dir, say=said.append, **how)
    return said


def lines(run_dir: Path, stage: str = "sft") -> tuple[list[dict], list[dict]]:
    """(lines of training metrics, lines of evaluations) of metrics.jsonl, without what differs between equal runs."""
    text = (run_dir / stage / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if not k.startswith(NOISE)} for line in text]
    evaluated = [any(key.startswith(PREFIX) for key in row) for row in rows]
    return [r for r, e in zip(rows, evaluated) if not e], [r for r, e in zip(rows, evaluated) if e]


def weights(run_dir: Path, stage: str = "sft") -> dict[str, torch.Tensor]:
    return load_file(run_dir / stage / "model" / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    """Dropout draws random numbers in every step, so a draw in an evaluation would change all later losses."""
    go(recipe(tmp_path, lora=LORA), tmp_path / "without")
    said = go(recipe(tmp_path, lora=LORA, evaluate=settings(tmp_path)), tmp_path / "with")
    plain, none = lines(tmp_path / "without")
    trained, evaluated = lines(tmp_path / "with")
    assert none == []
    assert trained == plain
    assert equal(weights(tmp_path / "with"), weights(tmp_path / "without"))
    assert [row["step"] for row in evaluated] == [0, 3, 6, 8]
    results = Results.read(tmp_path / "with" / "sft" / "evaluation")
    assert results.models == ["step-0", "step-3", "step-6", "step-8"]
    for row, model in zip(evaluated, results.models):
        found = results.content["models"][model]["tasks"]["words"]["metrics"]["length"]
        assert found["n"] == 5
        expected = {PREFIX + "words/length": found["mean"]}
        expected |= {f"{PREFIX}words/length/{end}": found[end] for end in ("low", "high")}
        assert {k: v for k, v in row.items() if k.startswith(PREFIX)} == expected
    assert any("the trainer's own forward passes" in line for line in said)
    assert sum(line.startswith("  evaluation at step") for line in said) == 4
    assert not any(line.strip().startswith("step 0/") for line in said)
    plots = stage_plots("sft", read_metrics(tmp_path / "with" / "sft" / "metrics.jsonl"), "p")
    assert (plots[0].title, plots[0].caption) == ("Evaluation: words/length", "band: 95 % interval over documents")


DRAWS = '''"""A task that chooses its prompts with the generators of the process, and samples."""

import random

import numpy
import torch

from align.eval.task import Item, Scores, Verdict, by_sample


class Draws:
    name, version, text = "draws", "1", "draws 1"
    better = {"words": 0}

    def documents(self):
        return [str(n) for n in range(4)]

    def requests(self, documents, encoder):
        for n in documents:
            prompt = f"{random.random():.1f} {numpy.random.rand():.1f} {float(torch.rand(())):.1f}"
            yield Item(n, encoder.request(prompt, task=self.name, max_new_tokens=4, temperature=1.0))

    def score(self, records):
        found = by_sample(records).items()
        return Scores([Verdict(n, sample, {"words": float(len(r[0].text.split()))}) for (n, sample), r in found])


TASK = Draws()
'''


def test_a_task_that_draws_random_numbers_changes_no_training(tmp_path: Path) -> None:
    """A task in Python runs in the process that trains, whose dropout draws from torch's generator."""
    (tmp_path / "draws.py").write_text(DRAWS)
    during = {"every": 3, "tasks": [str(tmp_path / "draws.py")]}
    go(recipe(tmp_path, lora=LORA), tmp_path / "without")
    go(recipe(tmp_path, lora=LORA, evaluate=during), tmp_path / "with")
    trained, evaluated = lines(tmp_path / "with")
    assert [row["step"] for row in evaluated] == [0, 3, 6, 8]
    assert trained == lines(tmp_path / "without")[0]
    assert equal(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_a_resumed_run_keeps_the_best_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Interrupted at step 7: evaluations after the checkpoint of step 5 are made again, earlier ones are kept."""
    during = settings(tmp_path, every=2, keep="best", verifier="{kind: regex, pattern: 'e'}")
    changed = recipe(tmp_path, optimizer={"learning_rate": 3e-2}, evaluate=during)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        go(changed, folder)
    for name in ("manifest.json", "model/model.safetensors", "model/config.json"):
        (parts / "sft" / name).unlink()
    (parts / "sft" / "checkpoints" / "checkpoint-8" / "complete").unlink()
    kept = (parts / "sft" / "evaluation" / "step-4" / "records.jsonl").read_bytes()
    (parts / "sft" / "evaluation" / "step-6" / "records.jsonl").write_text('{"unfinished')
    torch.manual_seed(12345)
    go(changed, parts, resume=True)
    assert lines(parts) == lines(whole)
    assert equal(weights(parts), weights(whole))
    assert (parts / "sft" / "evaluation" / "step-4" / "records.jsonl").read_bytes() == kept
    found = [json.loads((folder / "sft" / "manifest.json").read_text())["metrics"] for folder in (whole, parts)]
    assert found[0] == found[1]
    values = {row["step"]: row[PREFIX + "words/regex"] for row in lines(whole)[1]}
    assert found[0][PREFIX + "step"] == min(step for step in values if values[step] == max(values.values()))
    assert found[0][PREFIX + "words/regex"] == max(values.values())
    content = [Results.read(folder / "sft" / "evaluation").content["models"] for folder in (whole, parts)]
    assert content[0] == content[1]


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_best_weights_are_those_of_a_run_that_ended_there(tmp_path: Path, lora: dict | None) -> None:
    """A task whose score falls from step 4 on: its verifier counts the evaluations."""
    (tmp_path / "falls.py").write_text(
        "from pathlib import Path\n"
        "def score(prompts, completions, rows):\n"
        f"    file = Path({str(tmp_path / 'calls')!r})\n"
        "    calls = len(file.read_text()) if file.exists() else 0\n"
        "    file.write_text('x' * (calls + 1))\n"
        "    return [[0.1, 0.2, 0.5, 0.3, 0.4][calls]] * len(completions)\n"
    )
    constant = {"learning_rate": 1e-2, "schedule": "constant", "warmup_fraction": 0.0}
    rises = f"{{kind: function, path: '{tmp_path / 'falls.py'}:score'}}"
    during = settings(tmp_path, every=2, keep="best", patience=2, verifier=rises)
    said = go(recipe(tmp_path, optimizer=constant, lora=lora, max_steps=12, evaluate=during), tmp_path / "best")
    go(recipe(tmp_path, optimizer=constant, lora=lora, max_steps=4), tmp_path / "four")
    assert equal(weights(tmp_path / "best"), weights(tmp_path / "four"))
    trained, evaluated = lines(tmp_path / "best")
    assert [row["step"] for row in evaluated] == [0, 2, 4, 6, 8]
    assert [row["step"] for row in trained] == list(range(1, 9))
    assert any(
        line.startswith("  stops: words/function has not improved in 2 evaluations since step 4") for line in said
    )
    assert any("keeps the weights of step 4" in line for line in said)


def test_a_metric_that_the_tasks_lack_is_refused_before_training(tmp_path: Path) -> None:
    during = settings(tmp_path, keep="best", metric="words/accuracy")
    with pytest.raises(UserError, match=r"'words/accuracy' is not a metric of .* set it to one of words/length"):
        go(recipe(tmp_path, evaluate=during), tmp_path / "run")


def test_ppo_is_the_same_with_and_without(tmp_path: Path) -> None:
    """The rollout engine answers, between the update of its weights and the next rollout."""
    go(ppo_runs.recipe(tmp_path), tmp_path / "without")
    during = settings(tmp_path, every=2, keep="best")
    changed = ppo_runs.recipe(tmp_path, evaluate=during)
    said = go(changed, tmp_path / "with")
    assert any("with the rollout engine (transformers)" in line for line in said)
    assert lines(tmp_path / "with", "ppo")[0] == lines(tmp_path / "without", "ppo")[0]
    evaluated = lines(tmp_path / "with", "ppo")[1]
    assert [row["step"] for row in evaluated] == [0, 2, 4]
    manifest = json.loads((tmp_path / "with" / "ppo" / "manifest.json").read_text())["metrics"]
    values = {row["step"]: row[PREFIX + "words/length"] for row in evaluated}
    assert manifest[PREFIX + "step"] == min(step for step in values if values[step] == max(values.values()))
