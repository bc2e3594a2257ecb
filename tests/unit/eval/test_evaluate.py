"""An evaluate stage on models of a few thousand parameters, in one process and in two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from align.config import load_recipe
from align.config.recipe import Recipe
from align.pipeline import run
from align.run.context import StageContext
from align.train.checkpoint import load_scorer, load_tokenizer
from tests.integration import runs
from tests.integration.runs import ROUTED, small_model

PROMPTS = [
    {"prompt": "Say one.", "reference": 1, "answer": 1},
    {"prompt": "Say two.", "reference": 2, "answer": 2},
    {"prompt": "Say three.", "reference": None, "answer": 3},
    {"prompt": "Say four, please.", "reference": 4, "answer": None},
    {"prompt": "Say five.", "reference": 5, "answer": 5},
]
PAIRS = [
    {"prompt": f"Say {word}.", "chosen": word, "rejected": f"not {word} {word}"}
    for word in ("one", "two", "three", "four", "five", "six", "seven")
]


def recipe(folder: Path, **evaluate: Any) -> Recipe:
    """The recipe with its data in `folder`."""
    for name, rows in (("prompts", PROMPTS), ("pairs", PAIRS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"kind": "file", "path": str(folder / "prompts.jsonl")}]
    rollout = {"engine": "huggingface", "max_new_tokens": 6, "max_model_length": 64}
    stage = {"kind": "evaluate", "models": ["base"], "prompts": rows, "rollout": rollout, "bootstrap": 100} | evaluate
    model = small_model([{"kind": "python_docs", "view": "text", "limit": 20}], initializer_range=0.2, **ROUTED)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "t", "model": model, "stages": {"evaluate": stage}}), encoding="utf-8")
    return load_recipe(path)


def results(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "evaluate" / "results.json").read_text())
    return found


def rows_of(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `PROMPTS` in the order of the results, which is shuffled."""
    return [next(row for row in PROMPTS if row["prompt"] == prompt["prompt"]) for prompt in shown]


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a second policy in other/, and a reward model in reward/."""
    folder = tmp_path_factory.mktemp("evaluate")
    whole = recipe(folder).model_copy(update={"seed": 7})
    run(whole, folder / "other", only="base", say=quiet)
    model = folder / "other" / "base" / "model"
    torch.manual_seed(0)
    scorer = load_scorer(model, "float32")
    scorer.save_pretrained(folder / "reward")
    load_tokenizer(model).save_pretrained(folder / "reward")
    return folder


def comparison(folder: Path) -> dict[str, Any]:
    rows = [{"kind": "file", "path": str(folder / "prompts.jsonl")}]
    metrics = [
        {"kind": "math"},
        {"kind": "f1"},
        {"kind": "length", "max_tokens": 4},
        {"kind": "regex", "pattern": "."},
    ]
    return {
        "models": ["base", f"{folder}/other/base"],
        "reward_model": f"{folder}/reward",
        "preferences": [{"kind": "file", "path": str(folder / "pairs.jsonl")}],
        "tasks": [{"name": "say", "prompts": rows, "metrics": metrics, "temperature": 0.0, "max_new_tokens": 8}],
    }


SAID: list[str] = []
"""Lines that the run of `single` prints."""


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    """Folder of a finished run on one process."""
    run_dir = folder / "single"
    run(recipe(folder, **comparison(folder)), run_dir, say=SAID.append)
    return run_dir


def test_a_run_prints_its_results_in_words(single: Path) -> None:
    """A sentence per model with titles and units, then the report's table."""
    ours = results(single)["models"]["base"]
    mean = sum(ours["lengths"]) / len(ours["lengths"])
    (line,) = [line for line in SAID if line.startswith("  base: ")]
    assert f"completion length {mean:.3f} tokens" in line
    assert "KL to base 0.000 nats per completion" in line
    assert "scores" not in line
    assert SAID[0] == "base: the model that the stages start from"
    table = SAID[SAID.index(line) :]
    assert any(row.strip().startswith("Reward-model score") for row in table)
    assert SAID[-1] == f"report: {single / 'report.html'}"


def test_a_model_has_no_kl_to_itself_and_another_has(single: Path) -> None:
    ours, other = results(single)["models"].values()
    assert results(single)["reference"] == "base"
    assert max(map(abs, ours["kl"])) < 1e-4
    assert max(map(abs, other["kl"])) > 0.1


def test_f1_is_measured_on_the_rows_with_a_reference(single: Path) -> None:
    asked = rows_of(results(single)["prompts"])
    for model in results(single)["models"].values():
        assert [value is None for value in model["f1"]] == [row["reference"] is None for row in asked]
    shown = [row["reference"] for row in results(single)["prompts"]]
    assert shown == [None if row["reference"] is None else str(row["reference"]) for row in asked]
    assert (single / "report.html").is_file()


def test_every_model_is_sampled_with_its_own_weights(single: Path) -> None:
    texts = [list(row["completions"].values()) for row in results(single)["prompts"]]
    assert any(ours != other for ours, other in texts)


def test_a_task_has_typed_counts_that_agree(single: Path) -> None:
    task = results(single)["tasks"]["say"]
    assert (task["temperature"], task["max_new_tokens"]) == (0.0, 8)
    for result in task["models"].values():
        assert result["n"] == len(PROMPTS)
        metrics = result["metrics"]
        asked = rows_of(task["prompts"])
        assert [value is None for value in metrics["math"]["values"]] == [row["answer"] is None for row in asked]
        assert (metrics["math"]["n"], metrics["math"]["unscored"]) == (4, 1)
        assert metrics["math"]["unanswered"] <= metrics["math"]["values"].count(0.0)
        assert (metrics["f1"]["n"], metrics["f1"]["unscored"]) == (4, 1)
        # Completions of 4 tokens or fewer have the value 1; those that are truncated have 8 tokens.
        assert metrics["length"]["values"].count(0.0) >= result["truncated"]
        assert result["mean_length"] <= 8
    manifest = json.loads((single / "evaluate" / "manifest.json").read_text())["metrics"]
    assert manifest["base/say/truncated"] == task["models"]["base"]["truncated"] / len(PROMPTS)
    assert manifest["base/say/math"] == task["models"]["base"]["metrics"]["math"]["mean"]


def test_greedy_completions_do_not_depend_on_the_seed_and_have_no_kl(folder: Path, tmp_path: Path) -> None:
    greedy = {"engine": "huggingface", "max_new_tokens": 6, "max_model_length": 64, "temperature": 0.0}
    found = []
    for seed in (1, 2):
        whole = recipe(folder, models=[f"{folder}/other/base"], rollout=greedy).model_copy(update={"seed": seed})
        run(whole, tmp_path / str(seed), say=quiet)
        found.append(results(tmp_path / str(seed)))
    first, second = ({row["prompt"]: [*row["completions"].values()] for row in result["prompts"]} for result in found)
    assert first == second
    for result in found:
        (model,) = result["models"].values()
        assert "kl" not in model
        assert len(model["lengths"]) == len(PROMPTS)


def test_a_recipe_of_tasks_alone_needs_no_prompts(folder: Path, tmp_path: Path) -> None:
    whole = recipe(folder, prompts=[], tasks=comparison(folder)["tasks"])
    run(whole, tmp_path, say=quiet)
    assert list(results(tmp_path)["models"]["base"]) == ["checkpoint"]
    assert StageContext(whole, "evaluate", tmp_path).dir.joinpath("manifest.json").is_file()
    assert "| say | base | math |" in (tmp_path / "report.md").read_text()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_measure_what_one_process_measures(folder: Path, single: Path, tmp_path: Path) -> None:
    """The two ranks use ZeRO-3 and have half of the experts each."""
    recipe(folder, **comparison(folder))
    words = ("--nproc", "2", "parallel.expert_parallel_size=2")
    runs.run(folder / "recipe.yaml", tmp_path / "two", *words, forks=True)
    ours, theirs = results(tmp_path / "two"), results(single)
    assert ours["prompts"] == theirs["prompts"]
    assert ours["tasks"] == theirs["tasks"]
    for name, model in theirs["models"].items():
        found = next(value for key, value in ours["models"].items() if key == name)
        assert found["lengths"] == model["lengths"]
        assert found["f1"] == model["f1"]
        assert found["kl"] == pytest.approx(model["kl"], abs=1e-4)
        assert found["scores"] == pytest.approx(model["scores"], abs=1e-5)
        assert found["preference"] == model["preference"]
    assert ours["reward_model_accuracy"] == theirs["reward_model_accuracy"]
