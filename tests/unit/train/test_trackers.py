"""Experiment trackers: names, hyper-parameters, continued runs, the report.

TensorBoard is real, and so are the others if they are installed; modules with the functions of trackio and W&B stand in
for them too.
"""

from __future__ import annotations

import importlib.machinery
import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers.integrations import integration_utils

from align import cli
from align.config.recipe import Recipe
from align.errors import UserError
from align.run.context import StageContext
from align.run.folder import read_jsonl
from align.train.trackers import Settings, Trackers
from tests.integration.runs import small_model

STAGE = {
    "kind": "sft",
    "data": {"train": [{"kind": "file", "path": "x.jsonl"}]},
    "optimizer": {"learning_rate": 0.25},
}


def context(folder: Path, *trackers: str) -> StageContext:
    values = {"name": "r", "report_to": list(trackers), "seed": 5, "model": {"kind": "pretrained", "path": "m"}}
    return StageContext(Recipe.model_validate(values | {"stages": {"sft": STAGE}}), "sft", folder)


def train(at: StageContext, first_step: int, steps: range, *, kept: bool = True) -> None:
    """Log the loss of some steps; kept: the run ends as it should."""
    trackers = Trackers(at, first_step=first_step)
    for step in steps:
        trackers.log(step, {"loss": float(first_step * 100 + step), "eval_loss": 1.0, "time/step": 2.0})
    if kept:
        trackers.close()


def reports(folder: Path) -> dict[str, Path]:
    files = {extension: folder / f"report.{extension}" for extension in ("md", "html")}
    for extension, file in files.items():
        file.write_text(f"# {extension}")
    return files


def test_tensorboard(tmp_path: Path) -> None:
    """Step 3 is logged before an interruption, and again from the checkpoint of step 2."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    at = context(tmp_path, "tensorboard")
    train(at, 0, range(1, 4))
    resumed = Trackers(at, first_step=2)
    for step in (3, 4):
        resumed.log(step, {"loss": 200.0 + step})
    resumed.attach(reports(tmp_path))
    resumed.close()
    found = EventAccumulator(str(tmp_path / "sft" / "tensorboard"))
    found.Reload()
    assert {"train/loss", "eval/loss", "train/time/step"} <= set(found.Tags()["scalars"])
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 203), (4, 204)]
    texts = {name: found.Tensors(name)[0].tensor_proto.string_val[0] for name in found.Tags()["tensors"]}
    assert b'"sft.optimizer.learning_rate": 0.25' in texts["args/text_summary"]
    assert texts["report/text_summary"] == b"# md"
    train(at, 0, range(1, 2))
    again = EventAccumulator(str(tmp_path / "sft" / "tensorboard"))
    again.Reload()
    assert [event.step for event in again.Scalars("train/loss")] == [1]  # a new start begins anew


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    at = context(tmp_path, "mlflow")
    train(at, 0, range(1, 4))
    resumed = Trackers(at, first_step=2)
    resumed.log(4, {"loss": 204.0})
    resumed.attach(reports(tmp_path))
    resumed.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("r").experiment_id])
    assert run.info.run_name == "r-sft"
    assert run.info.status == "FINISHED"
    assert run.data.params["sft.optimizer.learning_rate"] == "0.25"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"report.md", "report.html"}


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3 is logged before an interruption and again from the checkpoint of step 2. Another start is another run."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio")
    at = context(tmp_path, "trackio")
    train(at, 0, range(1, 4))
    resumed = Trackers(at, first_step=2)
    for step in (3, 4):
        resumed.log(step, {"loss": 200.0 + step})
    resumed.attach(reports(tmp_path))
    resumed.close()
    train(at, 0, range(1, 2))
    with closing(sqlite3.connect(tmp_path / "trackio" / "r.db")) as database:
        logged = database.execute("SELECT run_name, run_id, step, metrics FROM metrics ORDER BY id").fetchall()
        configs = [json.loads(text) for (text,) in database.execute("SELECT config FROM configs ORDER BY id")]
    names = list(dict.fromkeys((name, of) for name, of, _, _ in logged))
    assert [name.startswith("r-sft-") for name, _ in names] == [True, True]
    assert len(set(names)) == len({of for _, of in names}) == 2
    first = [(step, json.loads(metrics)) for name, _, step, metrics in logged if name == names[0][0]]
    losses = [(step, metrics["train/loss"]) for step, metrics in first if "train/loss" in metrics]
    assert losses == [(1, 1), (2, 2), (3, 3), (3, 203), (4, 204)]
    assert first[0][1]["eval/loss"] == 1
    assert first[-1][1]["report"]["_value"] == "# md"
    assert configs[0]["sft.optimizer.learning_rate"] == 0.25


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start of a stage is one folder of the same run; `wandb sync` joins them."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    at = context(tmp_path, "wandb")
    train(at, 0, range(1, 4))
    resumed = Trackers(at, first_step=2)
    resumed.log(3, {"loss": 203.0})
    resumed.attach(reports(tmp_path))
    resumed.close()
    run = json.loads((tmp_path / "sft" / "trackers.json").read_text())["id"]
    files = list((tmp_path / "sft" / "wandb").glob(f"offline-run-*-{run}/run-{run}.wandb"))
    assert files
    written = b"".join(file.read_bytes() for file in files)
    assert b"train/loss" in written
    assert b"sft.optimizer.learning_rate" in written


def test_a_training_stage_reports_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`align run` with two steps and a held-out row: the tracker has the losses of metrics.jsonl."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text("".join(json.dumps({"text": f"{n} and {n + 1}."}) + "\n" for n in range(20)))
    source = [{"kind": "file", "path": "texts.jsonl"}]
    data = {"train": source, "held_out_fraction": 0.2, "max_length": 16}
    stage = {"kind": "pretrain", "data": data, "batch_size": 2, "micro_batch_size": 2, "max_steps": 2}
    values = {"name": "r", "model": small_model(source), "report_to": ["tensorboard"], "stages": {"pretrain": stage}}
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    cli.main(["run", "recipe.yaml", "--run-dir", "run"])
    found = EventAccumulator("run/pretrain/tensorboard")
    found.Reload()
    rows = read_jsonl(tmp_path / "run" / "pretrain" / "metrics.jsonl")
    for key, tag in (("loss", "train/loss"), ("eval_loss", "eval/loss")):
        logged = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows if key in row]
        assert [(event.step, event.value) for event in found.Scalars(tag)] == logged
        assert len(logged) == 2


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_the_settings_leave_the_trainers_accelerator_alone(tmp_path: Path, name: str) -> None:
    """A new `TrainingArguments` would reset the state that the trainer's forward passes read."""
    accelerator = Accelerator(cpu=True)
    Settings({}, context(tmp_path, name), "r-sft", "id")
    with accelerator.autocast():
        pass
    assert AcceleratorState._shared_state


class Recorded(ModuleType):
    """A module of a tracker that records the calls of its functions."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = "1.0"
        self.calls: list[tuple[str, Any]] = []
        self.run: Any = None
        self.config: Any = SimpleNamespace(update=lambda values, **_: self.calls.append(("config", dict(values))))
        self.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))

    def init(self, **values: Any) -> None:
        self.calls.append(("init", values))
        self.run = SimpleNamespace(summary={}, _label=lambda **_: None)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.calls.append(("log", values | ({} if step is None else {"train/global_step": step})))

    def finish(self) -> None:
        self.calls.append(("finish", None))
        self.run = None

    def Html(self, text: str, **_: Any) -> str:
        return text

    Markdown = Html

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def of(self, name: str) -> list[Any]:
        return [values for called, values in self.calls if called == name]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_runs_are_continued_by_their_id_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module = Recorded(name)
    monkeypatch.setitem(sys.modules, name, module)
    if name == "wandb":
        errors = ModuleType("wandb.sdk.lib.config_util")
        errors.ConfigError = ValueError  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", errors)
    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: True)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    at = context(tmp_path, name)
    train(at, 0, range(1, 3))
    resumed = Trackers(at, first_step=2)
    resumed.log(3, {"loss": 203.0})
    resumed.attach(reports(tmp_path))
    resumed.close()
    train(at, 0, range(1, 2))  # a new start
    first, second, third = module.of("init")
    key = "id" if name == "wandb" else "name"
    assert first[key] == second[key] != third[key]
    assert {first["project"], second["project"]} == {"r"}
    assert first["resume"] == "allow"
    assert module.of("config")[0]["sft.optimizer.learning_rate"] == 0.25
    assert module.of("config")[0]["seed"] == 5
    logged = module.of("log")
    assert logged[0] == {"train/loss": 1.0, "eval/loss": 1.0, "train/time/step": 2.0, "train/global_step": 1}
    assert logged[3] == {"report": "# html" if name == "wandb" else "# md"}
    assert len(module.of("finish")) == 3


def test_a_tracker_that_is_not_installed_is_an_error_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration_utils, "is_mlflow_available", lambda: False)
    with pytest.raises(UserError, match=r"^report_to: .*mlflow"):
        Trackers(context(tmp_path, "mlflow"))
    assert not (tmp_path / "sft").exists()


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    train(context(tmp_path), 0, range(1, 3))
    assert list(tmp_path.iterdir()) == []
