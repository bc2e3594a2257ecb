"""`align sweep` from end to end: parents run once, killed with SIGKILL, resumed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from align.run.folder import read_jsonl
from tests.integration import forked
from tests.integration.forked import Forked
from tests.integration.runs import plain_environment, small_model

pytestmark = pytest.mark.slow
STEPS = 20


def write_recipe(folder: Path) -> Path:
    """Two stages of pretraining of a model of two layers. The second one writes checkpoints only when it is stopped."""
    texts = [{"text": f"{n} and {n + 1} make {2 * n + 1}."} for n in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    source = [{"kind": "file", "path": str(folder / "texts.jsonl")}]
    data = {"train": source, "held_out_fraction": 0.2, "max_length": 32}
    stage = {"kind": "pretrain", "data": data, "batch_size": 8, "micro_batch_size": 4}
    content = {
        "name": "small",
        "model": small_model(source),
        "stages": {
            "first": {**stage, "max_steps": 1},
            "second": {**stage, "init_from": "first", "max_steps": STEPS},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


def sweep(recipe: Path, out: Path, *words: str) -> Forked:
    rates = "stages.second.optimizer.learning_rate=1e-3,3e-3"
    return forked.align(["sweep", str(recipe), rates, "--out", str(out), *words], plain_environment())


def until(holds: Callable[[], object], process: Forked, *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, process.output()[-3000:]
        time.sleep(0.01)


def test_a_killed_sweep_resumes_and_runs_parents_once(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "sweep"
    runs = [out / f"learning_rate-{rate}" / "seed-0" for rate in ("1e-3", "3e-3")]
    killed = sweep(recipe, out)
    until(lambda: len(read_jsonl(runs[1] / "second" / "metrics.jsonl")) >= 3 or killed.poll() is not None, killed)
    assert killed.poll() is None, killed.output()[-3000:]
    os.kill(killed.pid, signal.SIGKILL)
    # The run ends with the sweep, after a checkpoint.
    finished = runs[1] / "second" / "manifest.json"
    until(lambda: "stopped by SIGTERM" in killed.output() or finished.is_file(), killed)
    assert not finished.is_file()
    resumed = sweep(recipe, out, "--resume")
    output = resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0, output[-3000:]
    for stage in ("base", "first"):
        assert not (runs[0] / stage).is_symlink()
        assert (runs[1] / stage).resolve() == (runs[0] / stage).resolve()
    for run in runs:
        rows = read_jsonl(run / "second" / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    manifest = json.loads(finished.read_text())
    assert manifest["training"]["steps"] <= STEPS - 3  # it has continued
    report = json.loads((out / "report.json").read_text())
    assert report["metric"] == "second/eval_loss"
    assert [run["status"] for point in report["points"] for run in point["runs"]] == ["finished", "finished"]
    assert report["verdict"] in output
