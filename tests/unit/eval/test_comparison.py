"""`align compare` on hand-made runs, stages and evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align import cli
from align.errors import UserError
from align.eval.comparison.build import compare_sides
from align.eval.comparison.curves import curve_groups
from align.eval.comparison.page import render_comparison
from align.eval.comparison.sides import read_sides
from align.eval.report.overlay import POINTS, decimated
from tests.unit.eval.made_run import write_json, write_stage

PROMPTS = [{"prompt": text, "reference": None, "completions": {}} for text in ("a", "b", "b", "c", "d")]
SCORES = {"one": [1.0, 2.0, 3.0, 4.0, 5.0], "two": [2.0, 2.5, 3.0, 5.5, 6.0]}


def write_run(folder: Path, beta: float, scores: list[float], *, prompts: list[dict] | None = None) -> Path:
    """A run of sft and dpo, whose evaluate stage has measured both models on five prompts."""
    stages = {"sft": {"kind": "sft"}, "dpo": {"kind": "dpo", "beta": beta}, "evaluate": {"kind": "evaluate"}}
    write_json(folder / "recipe.json", {"name": "r", "seed": 0, "stages": stages})
    write_stage(folder, "sft", "sft", [{"step": s, "loss": 1 / s} for s in (1, 2, 3)])
    write_stage(folder, "dpo", "dpo", [{"step": s, "loss": beta / s, "eval_loss": beta} for s in (1, 2, 3)])
    write_stage(folder, "evaluate", "evaluate", [])
    config = {"seed": 0, "dtype": "float32", "dpo": {"beta": beta}}
    set_manifest(folder / "dpo", metrics={"loss": beta / 3}, config=config)
    set_manifest(folder / "evaluate", metrics={"scores": scores[0]})  # a mean over documents, and no last value
    models = {
        "sft": {"scores": [0.0] * 5, "f1": [0.5] * 5},
        "dpo": {"scores": scores, "f1": [0.5, 0.5, None, 0.5, 0.5], "preference": {"accuracy": 1.0, "values": [1, 1]}},
    }
    results = {"models": models, "baseline": "sft", "reference": "sft", "prompts": prompts or PROMPTS}
    write_json(folder / "evaluate" / "results.json", results)
    return folder


def set_manifest(stage: Path, **values: Any) -> None:
    write_json(stage / "manifest.json", json.loads((stage / "manifest.json").read_text()) | values)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    return tuple(str(write_run(tmp_path / name, beta, SCORES[name])) for name, beta in (("one", 0.1), ("two", 0.3)))


def row(comparison: dict, metric: str, model: str = "dpo") -> dict:
    (found,) = [row for row in comparison["metrics"] if (row["metric"], row["model"]) == (metric, model)]
    return found


def test_two_runs_are_paired_by_prompt(runs) -> None:
    comparison = compare_sides(read_sides(runs))
    scores = row(comparison, "scores")
    assert scores["label"] == "dpo: Reward-model score"
    assert (scores["sides"]["one"]["mean"], scores["sides"]["two"]["mean"]) == (3.0, pytest.approx(3.8))
    (difference,) = scores["differences"]  # 1, 0.5, 0, 1.5, 1: mean 0.8, sample standard deviation sqrt(0.325)
    assert (difference["side"], difference["against"], difference["n"], difference["changed"]) == ("two", "one", 5, 4)
    half = 2.7764451 * (0.325 / 5) ** 0.5  # 0.975 quantile of Student's t with 4 degrees of freedom
    assert [difference[key] for key in ("mean", "low", "high")] == pytest.approx([0.8, 0.8 - half, 0.8 + half])
    assert row(comparison, "f1")["differences"][0]["n"] == 4
    assert comparison["equal"] == ["sft"]
    assert comparison["settings"] == [{"key": "stages.dpo.beta", "values": {"one": 0.1, "two": 0.3}}]
    (final,) = comparison["final"]
    assert (final["stage"], final["label"]) == ("dpo", "Loss")
    assert final["values"] == pytest.approx({"one": 0.1 / 3, "two": 0.1})


def test_the_p_values_are_adjusted_for_the_rows(runs) -> None:
    """The exact permutation test of (1, 0.5, 0, 1.5, 1): 4 of the 32 signs reach the sum, times three rows."""
    difference = row(compare_sides(read_sides(runs)), "scores")["differences"][0]
    assert difference["p_value"] == pytest.approx(3 * 4 / 32)


def test_prompts_of_another_order_are_paired_by_their_text(tmp_path: Path, runs) -> None:
    order = [4, 1, 0, 2, 3]
    prompts = [PROMPTS[place] for place in order]
    other = write_run(tmp_path / "other", 0.3, [SCORES["two"][place] for place in order], prompts=prompts)
    difference = row(compare_sides(read_sides([runs[0], str(other)])), "scores")["differences"][0]
    assert (difference["n"], difference["mean"]) == (5, pytest.approx(0.8))


def test_other_prompts_and_pairs_are_not_compared(tmp_path: Path, runs) -> None:
    other = write_run(tmp_path / "other", 0.3, SCORES["two"], prompts=[{"prompt": str(n)} for n in range(5)])
    set_manifest(other / "evaluate", inputs={"pairs.jsonl": {"": "sha256:other"}})
    comparison = compare_sides(read_sides([runs[0], str(other)]))
    assert row(comparison, "scores")["differences"] == []
    assert "dpo: Reward-model score: no document is scored in both one and other" in comparison["notes"]
    assert row(comparison, "preference")["differences"] == []


@pytest.mark.parametrize(("other", "compared"), [("a", 1), ("b", 0)])
def test_preferences_are_paired_if_the_rows_of_their_stage_are_equal(runs, other: str, compared: int) -> None:
    for run, text in zip(runs, ("a", other)):
        (Path(run) / "pairs" / "data").mkdir(parents=True)
        (Path(run) / "pairs" / "data" / "held_out.jsonl").write_text(text)
        preferences = [{"kind": "stage", "stage": "pairs"}]
        set_manifest(Path(run) / "evaluate", config={"evaluate": {"preferences": preferences}})
    assert len(row(compare_sides(read_sides(runs)), "preference")["differences"]) == compared


def test_a_changed_working_tree_is_a_setting(runs) -> None:
    set_manifest(Path(runs[1]) / "dpo", dirty=True)
    settings = {row["key"]: row["values"] for row in compare_sides(read_sides(runs))["settings"]}
    assert settings["commit"] == {"one": "0123456789ab", "two": "0123456789ab, 0123456789ab with changes"}


def test_stages_and_their_names(runs) -> None:
    sides = read_sides([f"{runs[0]}/dpo", f"better={runs[1]}/dpo", f"{runs[1]}/sft"])
    assert [side.name for side in sides] == ["dpo", "better", "sft"]
    comparison = compare_sides(sides)
    scores = row(comparison, "scores", model="")
    assert [(d["side"], d["mean"]) for d in scores["differences"]] == [("better", pytest.approx(0.8)), ("sft", -3.0)]
    assert {"key": "beta", "values": {"dpo": 0.1, "better": 0.3}} in compare_sides(sides[:2])["settings"]
    titles = [(group.title, list(group.rows)) for group in curve_groups(sides)]
    assert titles == [("dpo", ["dpo", "better"])]


def test_stages_of_one_kind_share_their_charts(tmp_path: Path, runs) -> None:
    other = tmp_path / "other"
    write_json(other / "recipe.json", {"name": "r", "stages": {"simpo": {"kind": "dpo"}}})
    write_stage(other, "simpo", "dpo", [{"step": s, "loss": 3.0} for s in (1, 2)])
    sides = read_sides([f"{runs[0]}/dpo", str(other / "simpo")])
    assert [(group.title, list(group.rows)) for group in curve_groups(sides)] == [("dpo", ["dpo", "simpo"])]


def test_a_name_of_the_user_is_not_changed(runs) -> None:
    with pytest.raises(UserError, match="2 of the compared results have this name"):
        read_sides([f"mine={run}" for run in runs])


def test_equal_names_get_more_of_their_paths(runs) -> None:
    assert [side.name for side in read_sides([f"{run}/dpo" for run in runs])] == ["one/dpo", "two/dpo"]


def test_a_folder_with_an_equals_sign_is_a_path(tmp_path: Path, runs) -> None:
    Path(runs[0]).rename(tmp_path / "beta=0.1")
    assert [side.name for side in read_sides([str(tmp_path / "beta=0.1"), runs[1]])] == ["beta=0.1", "two"]


def write_evaluation(folder: Path, models: dict[str, list[float | None]], version: str = "1") -> Path:
    tasks = {"sums": {"version": version, "metrics": {"acc": {"better": 1}, "perplexity": {"better": -1}}}}
    write_json(folder / "results.json", {"settings": {}, "models": {m: {"tasks": tasks} for m in models}, "notes": []})
    for model, values in models.items():
        rows = [{"task": "sums", "document": str(n), "values": {"acc": value}} for n, value in enumerate(values)]
        (folder / model).mkdir(parents=True)
        (folder / model / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_models_of_an_evaluation_are_sides(tmp_path: Path) -> None:
    out = write_evaluation(tmp_path / "out", {"a": [0, 0, 1, 1], "b": [1, 0, 1, None], "c": [1, 1, 1, 1]})
    comparison = compare_sides(read_sides([str(out)]))
    found = row(comparison, "acc", model="")
    assert found["label"] == "sums: acc"
    differences = {d["side"]: (d["mean"], d["n"], d["only_first"]) for d in found["differences"]}
    assert differences == {"b": (pytest.approx(1 / 3), 3, 1), "c": (0.5, 4, 0)}
    assert "sums, perplexity: not a mean over documents, so it is not compared" in comparison["notes"]


def test_a_document_is_the_mean_of_its_samples_if_all_are_scored(tmp_path: Path) -> None:
    """Second samples: document 0 of b is wrong once, and document 1 is unscored once."""
    out = write_evaluation(tmp_path / "out", {"a": [0, 0, 0], "b": [1, 1, 1]})
    with (out / "b" / "scores.jsonl").open("a") as file:
        for document, value in (("0", 0), ("1", None)):
            file.write(json.dumps({"task": "sums", "document": document, "values": {"acc": value}}) + "\n")
    found = row(compare_sides(read_sides([str(out)])), "acc", model="")
    assert (found["sides"]["b"]["mean"], found["sides"]["b"]["n"], found["sides"]["b"]["unscored"]) == (0.75, 2, 1)
    assert (found["differences"][0]["mean"], found["differences"][0]["n"]) == (0.75, 2)


def test_a_stage_is_paired_with_an_evaluation_by_its_tasks(tmp_path: Path, runs) -> None:
    results = Path(runs[0]) / "evaluate" / "results.json"
    metrics = {"acc": {"better": 1, "models": {"dpo": {"0": 1.0, "1": 0.0}}}}
    write_json(results, json.loads(results.read_text()) | {"benchmarks": {"sums": metrics}})
    write_evaluation(Path(runs[0]) / "evaluate" / "tasks", {"dpo": [1, 0]})
    out = write_evaluation(tmp_path / "out", {"a": [0, 0]})
    comparison = compare_sides(read_sides([str(out), f"{runs[0]}/dpo"]))
    (difference,) = row(comparison, "acc", model="")["differences"]
    assert (difference["n"], difference["mean"]) == (2, 0.5)
    assert comparison["settings"] == []  # a stage and an evaluation have no setting in common


def test_tasks_of_other_versions_are_not_compared(tmp_path: Path) -> None:
    first = write_evaluation(tmp_path / "one", {"a": [0, 1]})
    second = write_evaluation(tmp_path / "two", {"b": [0, 1]}, version="2")
    with pytest.raises(UserError, match="share no metric and no scored document"):
        compare_sides(read_sides([str(first), str(second)]))


def test_a_stale_stage_is_named(runs) -> None:
    set_manifest(Path(runs[1]) / "dpo", parent_ids={"sft": "of an earlier run"})
    notes = compare_sides(read_sides(runs))["notes"]
    assert "two: the stage 'dpo' is stale, because its parent 'sft' was run again after it" in notes


def test_curves_of_shared_stages_are_left_out(runs) -> None:
    (group,) = curve_groups(read_sides(runs))
    assert (group.title, group.keys()) == ("dpo", ["loss", "eval_loss"])
    assert group.rows["two"][1] == {"step": 2, "loss": 0.15, "eval_loss": 0.3}


def test_a_long_curve_keeps_its_mean_and_its_last_step() -> None:
    import numpy as np

    steps, values = decimated(np.arange(1, 10 * POINTS + 1), np.arange(10.0 * POINTS))
    assert (len(steps), steps[-1], values.mean()) == (POINTS, 10 * POINTS, pytest.approx((10 * POINTS - 1) / 2))


def test_the_command_writes_the_page_and_prints_the_table(runs, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["compare", *runs])
    said = capsys.readouterr().out
    assert "two − one" in said
    assert said.splitlines()[-1] == "comparison.html"
    page = (tmp_path / "comparison.html").read_text()
    assert page == render_comparison(compare_sides(read_sides(runs)), curve_groups(read_sides(runs)))
    (tmp_path / "comparison.html").unlink()
    cli.main(["compare", *runs, "--json"])
    assert json.loads(capsys.readouterr().out)["equal"] == ["sft"]
    assert not (tmp_path / "comparison.html").exists()
    cli.main(["compare", *runs, "--json", "--out", "other.html"])
    assert (tmp_path / "other.html").read_text() == page
