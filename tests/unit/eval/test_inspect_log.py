"""`.eval` logs have the files and fields of inspect_ai 0.3.285 (`inspect_ai.log.EvalLog`); its reader reads them."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from align.eval.inspect_log import write_inspect
from align.eval.results import Results

METRIC = {
    "mean": 0.5,
    "low": 0.1,
    "high": 0.9,
    "standard_error": 0.35,
    "n": 2,
    "unscored": 1,
    "method": "",
    "better": 1,
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The log of a task with a right, a wrong and an unscored answer."""
    rows: list[dict[str, Any]] = [
        {"document": "7", "sample": 0, "values": {"acc": 1.0}, "reason": "", "shown": {"answer": "4", "target": "4"}},
        {"document": "7", "sample": 1, "values": {"acc": 0.0}, "reason": "", "shown": {"answer": "五", "target": "4"}},
        {"document": "8", "sample": 0, "values": {"acc": None}, "reason": "too long", "shown": {}},
    ]
    rows = [{"task": "t", **row, "shown": {"question": "2 + 2?", **row["shown"]}} for row in rows]
    (tmp_path / "m").mkdir()
    (tmp_path / "m/scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"t": {"version": "1", "samples": 2, "metrics": {"acc": METRIC}}, "group": {"version": "1", "metrics": {}}}
    model = {"checkpoint": "runs/m", "dtype": "float32", "tasks": tasks}
    content: dict[str, Any] = {"align": "0.1", "settings": {"limit": 2}, "models": {"m": model}, "notes": []}
    (path,) = write_inspect(Results(content, tmp_path))
    assert path == tmp_path / "m/t.eval"
    return path


def test_a_log_has_the_documented_files_and_fields(log: Path) -> None:
    with zipfile.ZipFile(log) as archive:
        found = {name: json.loads(archive.read(name)) for name in archive.namelist()}
    samples = {f"samples/{name}.json" for name in ("7_epoch_1", "7_epoch_2", "8_epoch_1")}
    assert set(found) == {"_journal/start.json", "header.json", "summaries.json"} | samples
    header = found["header.json"]
    assert (header["version"], header["status"]) == (2, "success")
    assert {"created", "task", "dataset", "model", "config"} <= set(header["eval"])  # fields without a default
    assert datetime.fromisoformat(header["eval"]["created"]).tzinfo is not None
    assert header["eval"]["dataset"]["sample_ids"] == ["7", "8"]
    (score,) = header["results"]["scores"]
    assert {name: metric["value"] for name, metric in score["metrics"].items()} == {
        "mean": 0.5,
        "stderr": 0.35,
        "low": 0.1,
        "high": 0.9,
    }
    assert (score["scored_samples"], score["unscored_samples"]) == (2, 1)
    wrong = found["samples/7_epoch_2.json"]
    assert wrong["scores"] == {"acc": {"value": 0.0, "answer": "五"}}
    assert wrong["messages"] == [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "五"}]
    unscored = found["samples/8_epoch_1.json"]
    assert (unscored["scores"], unscored["metadata"]) == ({}, {"unscored": "too long"})
    assert [summary["id"] for summary in found["summaries.json"]] == ["7", "7", "8"]


@pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="inspect_ai is not installed")
def test_inspect_reads_a_log(log: Path) -> None:
    from inspect_ai.log import read_eval_log

    found = read_eval_log(str(log))
    assert [(sample.id, sample.epoch) for sample in found.samples] == [("7", 1), ("7", 2), ("8", 1)]
    assert found.results.scores[0].metrics["mean"].value == 0.5
    assert found.samples[1].scores["acc"].value == 0.0
