"""Contents of the live page for run folders: progress, charts, samples, router load; added and removed folders."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from align.run.charts import CHARTS
from align.watch.runs import JsonFile, Run, Watched
from tests.unit.watch.made_runs import ATTACK, append, start, training_row, write, write_ppo


def read(run: Run) -> dict[str, dict[str, Any]]:
    """The states of the stages, by name."""
    assert not run.read(time.monotonic() + 60)
    return {stage["name"]: stage for stage in run.state(time.time())["stages"]}


def test_progress_and_time_left(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", steps=100)
    append(folder / "metrics.jsonl", *(training_row(step, 100) for step in range(1, 41)))
    run = Run(tmp_path / "run")
    sft = read(run)["sft"]
    assert (sft["status"], sft["step"], sft["steps"]) == ("running", 40, 100)
    assert sft["left"] == pytest.approx(60 * 0.5)  # 60 steps of 0.5 s
    assert (sft["tokens"], sft["memory"]) == (1000 + 40 % 7, 1.25)
    assert read(run)["ppo"]["status"] == "waiting"
    write(folder / "manifest.json", {"status": "finished", "kind": "sft", "seconds": 50.0})
    sft = read(run)["sft"]
    assert (sft["status"], sft["seconds"], sft["left"]) == ("finished", 50.0, None)


def test_the_time_left_is_that_of_the_last_fifty_steps(tmp_path: Path) -> None:
    """After 30 slow steps, 25 of 1 s and 25 of 3 s: the mean of the last 50 is 2 s, and 20 steps are left."""
    folder = start(tmp_path / "run", steps=100)
    seconds = [60.0] * 30 + [1.0] * 25 + [3.0] * 25
    append(folder / "metrics.jsonl", *({"step": step, "time/step": s} for step, s in enumerate(seconds, 1)))
    assert read(Run(tmp_path / "run"))["sft"]["left"] == pytest.approx(20 * 2.0)


def test_the_time_left_of_ppo_is_that_of_its_phases(tmp_path: Path) -> None:
    write_ppo(tmp_path / "run")
    assert read(Run(tmp_path / "run"))["ppo"]["left"] == pytest.approx(7 * 3.0)


def test_a_part_has_a_new_version_only_if_it_has_changed(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    append(folder / "metrics.jsonl", {"step": 1, "loss": 1.0})
    run = Run(tmp_path / "run")
    first = dict(read(run)["sft"]["versions"])
    assert read(run)["sft"]["versions"] == first
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert read(run)["sft"]["versions"] == first
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('ss": 3.0}\n')
    assert read(run)["sft"]["versions"]["curves"] > first["curves"]
    (chart,) = run.stages["sft"].charts()
    assert chart["series"] == [{"label": "training", "x": [1, 2], "y": [1, 3], "window": 0}]


def test_charts_are_those_of_the_report_and_then_all_others(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    append(folder / "metrics.jsonl", training_row(1, 9), {"step": 1, "eval_loss": 2.0, "eval_router_entropy": 1.0})
    run = Run(tmp_path / "run")
    read(run)
    charts = run.stages["sft"].charts()
    titles = {group: [chart["title"] for chart in charts if chart["group"] == group] for group in groups(charts)}
    assert titles == {
        "Training": ["Loss", "Gradient norm", "Learning rate", "Load of the busiest expert (× uniform load)"],
        "Speed and memory": ["Throughput (tokens/s)", "Time per step (s)", "Peak memory (GiB)"],
        "Other metrics": ["Router entropy (nats per token)", "mine", "Router entropy, held out (nats per token)"],
    }
    assert [series["label"] for series in charts[0]["series"]] == ["training", "held out"]
    assert charts[0]["axis"] == "Optimizer step"
    report = {chart.full_title for chart in CHARTS["sft"]}
    assert set(titles["Training"]) < report


def groups(charts: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(chart["group"] for chart in charts))


def test_ppo_has_a_band_and_the_names_of_rewards(tmp_path: Path) -> None:
    write_ppo(tmp_path / "run")
    run = Run(tmp_path / "run")
    read(run)
    charts = {chart["title"]: chart for chart in run.stages["ppo"].charts()}
    assert charts["Score"]["band"] == {
        "x": [1, 2, 3],
        "low": [0, 0.5, 1],
        "high": [1, 1.5, 2],
        "about": "one standard deviation over completions",
    }
    assert "Reward own, mean" in charts
    assert [series["label"] for series in charts["Time per iteration (s)"]["series"]] == ["generate", "update"]


def test_samples_are_texts_of_the_last_steps(tmp_path: Path) -> None:
    write_ppo(tmp_path / "run")
    rows = {"prompt": [{"role": "user", "content": "why?"}], "chosen": [{"role": "assistant", "content": "so"}]}
    append(tmp_path / "run" / "sft" / "data" / "train.jsonl", rows | {"rejected": "no"})
    run = Run(tmp_path / "run")
    read(run)
    last = run.stages["ppo"].samples[-1]
    assert last["title"] == "step 3"
    assert last["prompt"] == ATTACK  # as text: the page never makes HTML of it
    assert last["texts"] == [{"title": "score 0.500, truncated", "text": f"{ATTACK} 3"}]
    (made,) = run.stages["sft"].samples
    assert (made["prompt"], [text["text"] for text in made["texts"]]) == ("why?", ["so", "no"])


def test_the_load_of_each_expert(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    loads = [[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]
    append(folder / "experts.jsonl", {"step": 1, "load": loads}, {"step": 2, "load": "no"}, {"step": 3, "load": loads})
    run = Run(tmp_path / "run")
    read(run)
    found = run.stages["sft"].expert_load(None)
    assert found["steps"] == [1, 3]
    assert found["load"][0] == [1.5, 1.5, 0.5, 0.5]  # means of 2, 2, 0, 0 and 1, 1, 1, 1
    assert run.stages["sft"].expert_load(0)["load"][1] == [2, 2, 0, 0]
    assert found["last"] == [[2, 2, 0, 0], [1, 1, 1, 1]]


def test_a_resumed_stage_replaces_the_loads_after_its_checkpoint(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    rows = [{"step": step, "load": [[share, 1 - share]]} for step, share in ((1, 0.5), (2, 0.5), (3, 0.5), (2, 1.0))]
    append(folder / "experts.jsonl", *rows)
    run = Run(tmp_path / "run")
    read(run)
    found = run.stages["sft"].expert_load(None)
    assert (found["steps"], found["load"]) == ([1, 2], [[1, 1], [2, 0]])


def test_samples_of_a_stage_that_starts_again(tmp_path: Path) -> None:
    """The old samples go, and a long text is shortened with the number of characters that are left out."""
    folder = start(tmp_path / "run", stage="ppo")
    append(folder / "samples.jsonl", {"step": 9, "prompt": "old", "completion": "old"})
    run = Run(tmp_path / "run")
    read(run)
    (folder / "samples.jsonl").unlink()
    append(folder / "samples.jsonl", {"step": 1, "prompt": "new", "completion": "x" * 4321})
    read(run)
    (sample,) = run.stages["ppo"].samples
    assert sample["prompt"] == "new"
    assert sample["texts"][0]["text"] == f"{'x' * 4000} … (321 characters more)"


def test_runs_are_found_two_levels_deep(tmp_path: Path) -> None:
    """Runs, and the runs of a sweep (setting/seed), in a folder; not deeper, and not in a hidden folder."""
    for name in ("a", "setting/seed-0", "x/y/z", ".hidden/b"):
        write(tmp_path / name / "recipe.json", {"name": "r"})
    assert sorted(Watched(tmp_path).scan()) == ["a", "setting/seed-0"]


def test_a_stage_name_cannot_lead_out_of_the_run(tmp_path: Path) -> None:
    stages = {"../other": {"kind": "sft"}, "sft": {"kind": "sft"}}
    write(tmp_path / "run" / "recipe.json", {"name": "r", "stages": stages})
    run = Run(tmp_path / "run")
    read(run)
    assert list(run.stages) == ["sft"]


def test_a_stage_that_starts_again_starts_its_curves_again(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    append(folder / "metrics.jsonl", *({"step": step, "loss": 1.0} for step in range(1, 9)))
    run = Run(tmp_path / "run")
    assert read(run)["sft"]["step"] == 8
    (folder / "metrics.jsonl").unlink()
    append(folder / "metrics.jsonl", {"step": 1, "loss": 7.0})
    assert read(run)["sft"]["step"] == 1
    assert run.stages["sft"].charts()[0]["series"][0]["y"] == [7]


def test_a_folder_that_appears_grows_and_is_removed(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "runs")
    assert list(watched.scan()) == []
    (tmp_path / "runs").mkdir()
    assert list(watched.scan()) == []
    start(tmp_path / "runs" / "one")
    start(tmp_path / "runs" / "sweep" / "two")
    start(tmp_path / "runs" / ".hidden")
    assert set(watched.scan()) == {"one", "sweep/two"}
    assert not watched.read(["one", "sweep/two"], time.monotonic() + 60)
    shutil.rmtree(tmp_path / "runs" / "one")
    assert not watched.read(["one"], time.monotonic() + 60)  # removed between the two calls
    assert set(watched.scan()) == {"sweep/two"}
    assert set(watched.runs) == {"sweep/two"}
    shutil.rmtree(tmp_path / "runs")
    assert list(watched.scan()) == []


def test_a_run_is_watched_by_its_own_folder(tmp_path: Path) -> None:
    start(tmp_path / "run")
    assert list(Watched(tmp_path / "run").scan()) == ["."]


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"stages": [1], "name": null}', '{"stages": {"../x": 1, "sft": 2}}']
)
def test_a_half_written_or_strange_recipe_is_no_error(tmp_path: Path, content: str) -> None:
    start(tmp_path / "run")
    (tmp_path / "run" / "recipe.json").write_text(content)
    (tmp_path / "run" / "report.json").write_text('{"evaluations": [1, {"samples"')
    assert list(read(Run(tmp_path / "run"))) == ["sft"]


def test_nothing_is_written(tmp_path: Path) -> None:
    write_ppo(tmp_path / "run")
    files = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [tmp_path, *tmp_path.rglob("*")]}
    watched = Watched(tmp_path)
    watched.scan()
    watched.read(["run"], time.monotonic() + 60)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in [tmp_path, *tmp_path.rglob("*")]} == files


def test_the_comparison_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    start(tmp_path / "run")
    run = Run(tmp_path / "run")
    read(run)
    assert run.state(0.0)["report"] == 0
    cell = {"mean": 0.5, "low": 0.25, "high": 0.75}
    metric = {"label": "Score", "models": {"sft": cell, "ppo": {"mean": 1.0, "low": None}}}
    sample = {
        "title": "Prompt 1",
        "prompt": "p",
        "reference": "r",
        "completions": {"sft": ATTACK},
        "scores": {"sft": 2.0},
    }
    evaluation = {"stage": "evaluate", "models": ["base", "sft", "ppo"], "metrics": [metric], "samples": [sample]}
    write(tmp_path / "run" / "report.json", {"verdict": "a; b.", "evaluations": [evaluation]})
    read(run)
    first = run.state(0.0)["report"]
    assert first
    found = run.comparison()
    assert found["verdict"] == ["a", "b"]
    rows = [["base", ["–", ""]], ["sft", ["0.500", "[0.250, 0.750]"]], ["ppo", ["1.00", ""]]]
    assert found["tables"] == [{"stage": "evaluate", "head": ["Score"], "rows": rows}]
    assert found["samples"][0]["texts"][1] == {"title": "sft, score 2.00", "text": ATTACK}
    write(tmp_path / "run" / "report.json", {"verdict": "c.", "evaluations": [evaluation]})
    read(run)
    assert run.state(0.0)["report"] > first


def test_a_json_file_that_cannot_be_read_is_empty(tmp_path: Path) -> None:
    file = JsonFile(tmp_path / "x.json")
    assert file.read() == {}
    (tmp_path / "x.json").write_bytes(b"\xff")
    assert file.read() == {}
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    assert file.read() == {"a": 1}
