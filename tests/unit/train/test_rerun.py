"""Stages that run a second time: finished results are kept, stale ones are made again or refused."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
import yaml

from align.config import load_recipe
from align.config.section import result_settings
from align.errors import UserError
from align.eval.report.write import build_report, write_report
from align.pipeline import run
from align.run.context import StageResult
from align.run.manifest import read_manifest
from tests.unit.rl.small import settings

ROW = '{{"prompt": "Hi", "completion": "{}"}}\n'
STAGE = {"kind": "sft", "data": {"train": [{"kind": "file", "path": "rows.jsonl"}]}}


class Runs:
    """A recipe of two stages whose `run` is a stub that records the order of execution."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.done, self.fails = folder, [], None
        monkeypatch.chdir(folder)
        (folder / "rows.jsonl").write_text(ROW.format("a"))
        (folder / "model").mkdir()
        for module in ("base", "sft"):
            monkeypatch.setattr(importlib.import_module(f"align.recipes.{module}"), "run", self.stage)

    def stage(self, *arguments) -> StageResult:
        *_, context = arguments
        (context.dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.done.append((context.name, context.resume))
        if context.name == self.fails:
            raise KeyboardInterrupt
        (context.dir / "model").mkdir(exist_ok=True)
        (context.dir / "model" / "config.json").touch()
        return StageResult()

    def run(
        self,
        *,
        rate: float = 1e-3,
        changes: dict | None = None,
        fails: str | None = None,
        keep_checkpoints: bool = False,
        **how,
    ) -> list[tuple[str, bool]]:
        """Run the recipe; return (stage, resumes) in order of execution."""
        second = {**STAGE, "init_from": "first"}
        stages = {"first": {**STAGE, "optimizer": {"learning_rate": rate}, **(changes or {})}, "second": second}
        content = {"name": "t", "model": {"kind": "pretrained", "path": "./model"}, "stages": stages}
        content |= {"keep_checkpoints": True} if keep_checkpoints else {}
        (self.folder / "t.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        self.done, self.fails = [], fails
        recipe = load_recipe(self.folder / "t.yaml")
        try:
            run(recipe, self.folder / "run", say=lambda line: None, **how)
        except KeyboardInterrupt:
            assert fails
        return self.done


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def test_finished_stages_are_kept(runs) -> None:
    assert [name for name, _ in runs.run()] == ["base", "first", "second"]
    assert runs.run() == []


@pytest.mark.parametrize("fails", ["first", "second"])
def test_an_interrupted_run_with_from_keeps_no_old_result(runs, fails) -> None:
    runs.run()
    runs.run(rate=1e-4, start="first", fails=fails)
    later = runs.run(rate=1e-4, resume=True)
    assert [name for name, _ in later] == (["first", "second"] if fails == "first" else ["second"])


def test_a_stage_made_from_an_earlier_result_is_refused(runs) -> None:
    runs.run()
    assert runs.run(rate=1e-4, only="first") == [("first", False)]
    with pytest.raises(UserError, match=r"the result of 'first' has changed.*add --from second"):
        runs.run(rate=1e-4)
    assert runs.run(rate=1e-4, start="second") == [("second", False)]
    assert runs.run(rate=1e-4) == []


def stale(runs) -> dict[str, str | None]:
    return {stage["name"]: stage["stale"] for stage in build_report(runs.folder / "run")["stages"]}


def test_a_stage_whose_parent_was_run_again_is_stale_until_it_is_run_again(runs) -> None:
    runs.run()
    assert stale(runs) == {"base": None, "first": None, "second": None}
    runs.run(only="first")
    assert stale(runs) == {"base": None, "first": None, "second": "its parent 'first' was run again after it"}
    runs.run(start="second")
    assert set(stale(runs).values()) == {None}


def test_a_stage_with_other_settings_than_the_recipe_is_stale_and_so_are_its_children(runs) -> None:
    runs.run()
    runs.run(rate=1e-4, only="second")  # it writes recipe.json, whose first stage has now another rate
    reasons = stale(runs)
    assert "(first.optimizer.learning_rate: 0.001 -> 0.0001)" in reasons["first"]
    assert reasons["second"] == "its parent 'first' is stale"


def test_a_stage_run_alone_writes_the_report_that_it_announces(runs) -> None:
    said: list[str] = []
    runs.run()
    run(load_recipe(runs.folder / "t.yaml"), runs.folder / "run", say=said.append)
    assert not any(line.startswith("report:") for line in said)  # the run has none
    write_report(runs.folder / "run")
    run(load_recipe(runs.folder / "t.yaml"), runs.folder / "run", only="first", say=said.append)
    assert said[-1] == f"report: {runs.folder / 'run' / 'report.html'}"
    page = (runs.folder / "run" / "report.html").read_text()
    assert "is stale: its parent &#x27;first&#x27; was run again after it." in page
    assert "| second | sft | stale |" in (runs.folder / "run" / "report.md").read_text()


def test_a_stage_that_is_to_run_again_leaves_no_number_of_its_earlier_run(runs) -> None:
    runs.run()
    for file in ("metrics.jsonl", "results.json"):
        (runs.folder / "run" / "second" / file).write_text('{"step": 1, "loss": 2.0}')
    runs.run(start="first", fails="first")
    report = build_report(runs.folder / "run")
    assert [(stage["name"], stage["status"], stage["metrics"]) for stage in report["stages"]][-1] == (
        "second",
        "not run",
        {},
    )
    assert report["evaluations"] == []


def test_one_interrupted_stage_can_be_resumed_alone(runs) -> None:
    runs.run(fails="second")
    assert runs.run(only="second", resume=True) == [("second", True)]
    assert read_manifest(runs.folder / "run" / "second") is not None
    assert runs.run(only="second", resume=True) == [("second", False)]  # it had finished, so it starts again
    assert runs.run(only="second") == [("second", False)]


def test_a_stage_without_its_parent_is_refused_before_any_work(runs) -> None:
    with pytest.raises(UserError, match=r"stages\.second needs the checkpoint of 'first'.*--only first"):
        runs.run(only="second", resume=True)
    assert runs.done == []
    assert not (runs.folder / "run").exists()


def test_an_interrupted_stage_is_not_resumed_with_other_settings(runs) -> None:
    runs.run(fails="first")
    with pytest.raises(UserError, match="the interrupted run had other settings"):
        runs.run(rate=1e-4, only="first", resume=True)
    assert runs.run(rate=1e-4, only="first") == [("first", False)]


def test_settings_that_do_not_affect_the_result_may_change(runs) -> None:
    changes = {"gradient_checkpointing": True, "checkpoint_every": 7}
    runs.run(fails="first")
    assert runs.run(changes=changes, resume=True) == [("first", True), ("second", True)]
    assert read_manifest(runs.folder / "run" / "first")["config"]["first"]["checkpoint_every"] == 7
    assert runs.run() == []  # the finished stages have another value and are kept


@pytest.mark.parametrize("finished", [True, False])
def test_settings_that_an_earlier_version_did_not_know_have_their_defaults(runs, finished) -> None:
    runs.run(fails=None if finished else "first", only="first")
    path = runs.folder / "run" / "first" / ("manifest.json" if finished else "config.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    config = (record["config"] if finished else record)["first"]
    del config["group_by_length"], config["optimizer"]["max_grad_norm"], config["data"]["train"][0]["streaming"]
    path.write_text(json.dumps(record), encoding="utf-8")
    for change in ({"group_by_length": True}, {"optimizer": {"learning_rate": 1e-3, "max_grad_norm": 0.5}}):
        with pytest.raises(UserError, match="with other settings" if finished else "had other settings"):
            runs.run(changes=change, resume=not finished)
    left = [("second", False)] if finished else [("first", True), ("second", True)]
    assert runs.run(resume=not finished) == left


def test_a_changed_data_file_is_refused_and_named(runs) -> None:
    """The change keeps the size and the modification time of the file."""
    rows = runs.folder / "rows.jsonl"
    rows.write_text(ROW.format("a"))
    runs.run()
    assert runs.run() == []
    before = rows.stat()
    rows.write_text(ROW.format("b"))
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"run/first: rows\.jsonl has changed since.*--from first"):
        runs.run()
    rows.write_text(ROW.format("a"))
    assert runs.run() == []


def test_an_interrupted_stage_is_not_resumed_with_other_data(runs) -> None:
    rows = runs.folder / "rows.jsonl"
    rows.write_text(ROW.format("a"))
    runs.run(fails="first")
    rows.write_text(ROW.format("b"))
    with pytest.raises(UserError, match=r"rows\.jsonl has changed since the interrupted run read it; restore it"):
        runs.run(resume=True)
    rows.write_text(ROW.format("a"))
    assert runs.run(resume=True) == [("first", True), ("second", True)]


def test_a_result_of_an_earlier_version_without_fingerprints_is_kept(runs) -> None:
    runs.run()
    path = runs.folder / "run" / "first" / "manifest.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["inputs"]
    path.write_text(json.dumps(record), encoding="utf-8")
    (runs.folder / "rows.jsonl").write_text(ROW.format("changed"))
    with pytest.raises(UserError, match="run/second: rows"):  # its manifest has fingerprints
        runs.run()
    assert runs.run(only="first") == [("first", False)]


def test_a_finished_stage_does_not_need_its_data(runs) -> None:
    runs.run()
    (runs.folder / "rows.jsonl").unlink()
    assert runs.run() == []


def test_only_marked_settings_are_ignored_in_a_comparison() -> None:
    """Settings marked as not affecting the result are ignored, also in nested sections and lists.

    A setting that this version does not know is kept.
    """
    rewards = [{"kind": "remote", "url": "http://127.0.0.1:1", "weight": 2.0}, {"kind": "length", "max_tokens": 8}]
    rollout = {"engine": "remote", "servers": ["http://127.0.0.1:2"]}
    stage = settings(rewards=rewards, rollout=rollout, sample_every=3)
    kept = result_settings(stage, {**stage.model_dump(mode="json"), "forgotten": 1})
    assert kept["forgotten"] == 1
    assert kept["rewards"][0]["weight"] == 2.0
    assert kept["rewards"][1]["max_tokens"] == 8
    assert kept["rollout"]["temperature"] == 1.0
    assert not {"sample_every", "checkpoint_every", "gradient_checkpointing"} & set(kept)
    assert not {"url", "timeout_s", "retries"} & set(kept["rewards"][0])
    assert not {"servers", "sleep"} & set(kept["rollout"])
    assert result_settings(stage, {"rewards": []})["rewards"] == []


def test_a_renamed_setting_of_an_earlier_version_is_unchanged() -> None:
    grpo = {"advantage_estimator": "grpo", "completions_per_prompt": 2}
    for stage, old in ((settings(), "ppo"), (settings(**grpo), "grpo")):
        before = stage.model_dump(mode="json")
        del before["advantage_estimator"]
        now = result_settings(stage, stage.model_dump(mode="json"))
        assert result_settings(stage, {"algorithm": old, **before}) == now
        other = result_settings(stage, {"algorithm": "rloo", **before})
        assert other["advantage_estimator"] == "rloo"
        assert "algorithm" not in other


@pytest.mark.parametrize("other", [{"resume": True}, {"only": "first"}])
def test_from_cannot_be_combined_with_resume_or_only(runs, other) -> None:
    with pytest.raises(UserError, match="--from first starts stages again"):
        runs.run(start="first", **other)


def test_old_checkpoints_are_deleted_when_a_stage_starts_again(runs) -> None:
    runs.run()
    (runs.folder / "run" / "first" / "checkpoints" / "last").mkdir(parents=True)
    runs.run(start="first", rate=1e-4, fails="base")
    assert not (runs.folder / "run" / "first" / "checkpoints" / "last").exists()


@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_of_a_finished_stage_are_removed_unless_kept(runs, keep: bool) -> None:
    runs.run(keep_checkpoints=keep)
    folders = [runs.folder / "run" / name / "checkpoints" for name in ("first", "second")]
    assert [folder.exists() for folder in folders] == [keep, keep]


def test_checkpoints_of_an_interrupted_stage_are_kept(runs) -> None:
    runs.run(fails="second")
    assert (runs.folder / "run" / "second" / "checkpoints").exists()
