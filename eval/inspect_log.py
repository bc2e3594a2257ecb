"""Write results as `.eval` logs of inspect_ai, for `inspect view` and its Python API. Nothing of inspect_ai is needed.

A log is a zip of JSON files:

    _journal/start.json             what is evaluated
    samples/DOCUMENT_epoch_N.json   one sample; a sample's number is its epoch
    summaries.json                  the samples without their messages
    header.json                     all but the samples
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from align.eval.results import Results
from align.run.folder import replace_file

LOG_VERSION = 2
Json = dict[str, Any]


def write_inspect(results: Results) -> list[Path]:
    """Write OUT/MODEL/TASK.eval for each model and task with samples; returns the files."""
    written = []
    for model in results.models:
        rows = results.all_verdicts(model)
        for task, result in results.content["models"][model]["tasks"].items():
            if chosen := [row for row in rows if row["task"] == task]:
                members = list(_members(results, model, task, result, chosen))
                path = results.folder / model / f"{task}.eval"
                replace_file(path, partial(_zip, members=members))
                written.append(path)
    return written


def _zip(path: Path, members: list[tuple[str, Any]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, json.dumps(content, ensure_ascii=False))


def _members(
    results: Results, model: str, task: str, result: Mapping[str, Any], rows: list[Json]
) -> Iterator[tuple[str, Any]]:
    """(name, content) of each file of a log."""
    spec, plan = _spec(results, model, task, result, rows), {"name": "plan", "steps": []}
    yield "_journal/start.json", {"version": LOG_VERSION, "eval": spec, "plan": plan}
    samples = [_sample(model, row) for row in rows]
    for sample in samples:
        yield f"samples/{sample['id']}_epoch_{sample['epoch']}.json", sample
    kept = ("id", "epoch", "input", "target", "scores", "metadata")
    yield "summaries.json", [{key: sample[key] for key in kept} | {"completed": True} for sample in samples]
    yield (
        "header.json",
        {
            "version": LOG_VERSION,
            "status": "success",
            "eval": spec,
            "plan": plan,
            "results": _results(result, len(rows)),
            "stats": {"started_at": spec["created"], "completed_at": spec["created"]},
        },
    )


def _spec(results: Results, model: str, task: str, result: Mapping[str, Any], rows: list[Json]) -> Json:
    documents = list(dict.fromkeys(row["document"] for row in rows))
    about = {key: value for key, value in results.content["models"][model].items() if key != "tasks"}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": task,
        "task_version": result["version"],
        "dataset": {"name": task, "samples": len(documents), "sample_ids": documents, "shuffled": False},
        "model": model,
        "model_args": about,
        "config": {"epochs": result["samples"]},
        "packages": {"align": results.content["align"]},
        "metadata": {"settings": results.content["settings"]},
    }


def _sample(model: str, row: Json) -> Json:
    """One verdict as a sample. A metric without a value has no score; the reason is in the metadata."""
    shown = row["shown"]
    messages = []
    for key, text in shown.items():
        if role := {"question": "user", "answer": "assistant"}.get(key.partition(",")[0]):
            messages.append({"role": role, "content": text})
    answer = next((message["content"] for message in reversed(messages) if message["role"] == "assistant"), "")
    said = {"role": "assistant", "content": answer}
    return {
        "id": row["document"],
        "epoch": row["sample"] + 1,
        "input": shown.get("question") or shown.get("question, turn 1") or "",
        "target": shown.get("target", ""),
        "messages": messages,
        "output": {
            "model": model,
            "choices": [{"message": said, "stop_reason": "unknown"}],
            "completion": answer,
        },
        "scores": {
            name: {"value": value, "answer": answer} for name, value in row["values"].items() if value is not None
        },
        "metadata": {
            **{key: text for key, text in shown.items() if key.partition(",")[0] not in ("question", "answer")},
            **({"unscored": row["reason"]} if row["reason"] else {}),
        },
    }


def _results(result: Mapping[str, Any], samples: int) -> Json:
    scores = []
    for name, metric in result["metrics"].items():
        found = {
            "mean": metric["mean"],
            "stderr": metric["standard_error"],
            "low": metric["low"],
            "high": metric["high"],
        }
        scores.append(
            {
                "name": name,
                "scorer": name,
                "scored_samples": metric["n"],
                "unscored_samples": metric["unscored"],
                "metrics": {key: {"name": key, "value": value} for key, value in found.items() if value is not None},
            }
        )
    return {"total_samples": samples, "completed_samples": samples, "scores": scores}
