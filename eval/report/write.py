"""The report of a run: reads the run folder and writes report.json, report.md and report.html.

    runs/<run>/recipe.json                    what was asked for
    runs/<run>/<stage>/manifest.json          what happened
    runs/<run>/<stage>/metrics.jsonl          curves, one object a line
    runs/<run>/<evaluate stage>/results.json  per-prompt values and samples

Markdown and HTML are rendered from the content of report.json, so the three agree. A run that is not complete
has a report too; it says what is missing.
"""

from __future__ import annotations

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.config.recipe import BASE
from align.errors import UserError
from align.eval.compare import compare
from align.eval.report.formatting import interval, number, plain
from align.eval.report.markdown import render_markdown

RESAMPLES = 2000
SAMPLES = 8
COPIED = (
    "seconds",
    "started",
    "finished",
    "commit",
    "dirty",
    "config_hash",
    "parents",
    "seed",
    "data",
    "packages",
    "hardware",
    "metrics",
    "parameters",
)


def build_report(run_dir: Path, *, generated: str | None = None) -> dict[str, Any]:
    """The content of report.json. Reads only; `generated` is an ISO time, by default now."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such run folder.")
    recipe = _read_json(run_dir / "recipe.json") or {}
    stages = [_stage(run_dir / name, kind) for name, kind in _stage_kinds(run_dir, recipe).items()]
    if not recipe and not stages:
        raise UserError(f"{run_dir}: holds neither recipe.json nor a stage's manifest.json, so it is no run folder.")
    evaluations = [found for stage in stages if (found := _evaluation(run_dir, stage["name"], recipe)) is not None]
    report: dict[str, Any] = {
        "name": recipe.get("name") or run_dir.resolve().name,
        "generated": generated or datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": _verdict(evaluations),
        "notes": _notes(recipe, stages, evaluations),
        "recipe": {
            "description": recipe.get("description", ""),
            "seed": recipe.get("seed"),
            "dtype": recipe.get("dtype"),
            "model": (recipe.get("model") or {}).get("kind"),
            "stages": {stage["name"]: stage["kind"] for stage in stages},
        },
        "total_seconds": sum(stage["seconds"] or 0.0 for stage in stages),
        "commits": _distinct({"commit": s["commit"], "dirty": s["dirty"]} for s in stages if s["commit"]),
        "hardware": _distinct(s["hardware"] for s in stages if s["hardware"]),
        "packages": _packages(stages),
        "stages": stages,
        "evaluations": evaluations,
    }
    finite: dict[str, Any] = _finite(report)
    return finite


def write_report(run_dir: Path) -> list[Path]:
    """Write report.json, report.md and report.html into the run folder; returns their paths."""
    from align.eval.report.html import render_html  # needs matplotlib, which reading a report does not

    run_dir = Path(run_dir)
    report = build_report(run_dir)
    curves = {stage["name"]: read_metrics(run_dir / stage["name"] / "metrics.jsonl") for stage in report["stages"]}
    texts = {
        "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
        "report.md": render_markdown(report),
        "report.html": render_html(report, curves),
    }
    return [_write_atomically(run_dir / name, text) for name, text in texts.items()]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, merged by step and in order of steps.

    A resumed stage writes some steps twice: the later value of a key counts. A torn line (the process was
    killed while writing) is skipped, and so is a line without a step.
    """
    if not path.is_file():
        return []
    merged: dict[float, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int | float):
            merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def _stage_kinds(run_dir: Path, recipe: dict[str, Any]) -> dict[str, str]:
    """The base model, the recipe's stages in their order, then other folders with a manifest."""
    kinds = {BASE: BASE} if (run_dir / BASE / "manifest.json").is_file() else {}
    kinds |= {name: stage.get("kind", "") for name, stage in (recipe.get("stages") or {}).items()}
    for manifest in sorted(run_dir.glob("*/manifest.json")):
        kinds.setdefault(manifest.parent.name, "")
    return kinds


def _stage(folder: Path, kind: str) -> dict[str, Any]:
    manifest = _read_json(folder / "manifest.json")
    if manifest is not None:
        status = manifest.get("status", "finished")
    else:
        status = "unfinished" if (folder / "metrics.jsonl").is_file() else "not run"
    found = manifest or {}
    stage = {"name": folder.name, "kind": found.get("kind") or kind, "status": status}
    stage |= {key: found.get(key) for key in COPIED}
    if manifest is None:
        rows = read_metrics(folder / "metrics.jsonl")
        stage["metrics"] = {key: value for row in rows for key, value in row.items() if key != "step"}
    return stage


def _evaluation(run_dir: Path, name: str, recipe: dict[str, Any]) -> dict[str, Any] | None:
    results = _read_json(run_dir / name / "results.json")
    if results is None:
        return None
    settings = (recipe.get("stages") or {}).get(name, {})
    table = compare(results, resamples=settings.get("bootstrap", RESAMPLES), seed=recipe.get("seed") or 0)
    prompts = results.get("prompts") or []
    shown = prompts[: settings.get("samples", SAMPLES)]
    scores = {model: values.get("scores") or [] for model, values in (results.get("models") or {}).items()}
    samples = [
        {
            "prompt": plain(row.get("prompt")),
            "reference": plain(row["reference"]) if row.get("reference") else None,
            "completions": {model: plain(text) for model, text in (row.get("completions") or {}).items()},
            "scores": {model: of[i] for model, of in scores.items() if len(of) == len(prompts)},
        }
        for i, row in enumerate(shown)
    ]
    return {"stage": name, **table, "samples": samples, "prompts": len(prompts)}


def _verdict(evaluations: list[dict[str, Any]]) -> str:
    """One line of key numbers: the last model against the baseline and against the model before it."""
    if not evaluations:
        return "No models have been compared in this run."
    last = evaluations[-1]
    names, baseline = last["models"], last["baseline"]
    candidates = [name for name in names if name != baseline]
    if not candidates:
        return "Only one model was evaluated, so there is nothing to compare."
    model = candidates[-1]
    parts = []
    for against in dict.fromkeys([baseline, *candidates[-2:-1]]):
        differences = []
        for metric in (m for m in last["metrics"] if m["better"]):
            for d in metric["differences"]:
                if (d["model"], d["against"]) == (model, against):
                    label = metric["label"][0].lower() + metric["label"][1:]
                    unsure = d["low"] is not None and d["low"] <= 0 <= d["high"]
                    text = f"{label} {number(d['mean'], signed=True)} {interval(d)}".rstrip()
                    differences.append(text + (" (includes zero)" if unsure else ""))
        if differences:
            parts.append(f"{model} against {against}: {', '.join(differences)}")
    return "; ".join(parts) + "." if parts else "The models share no metric, so they cannot be compared."


def _notes(recipe: dict[str, Any], stages: list[dict], evaluations: list[dict]) -> list[str]:
    notes = []
    if not recipe:
        notes.append("recipe.json is missing; the stages are those with a manifest.")
    for stage in stages:
        if stage["status"] == "not run":
            notes.append(f"The stage '{stage['name']}' has not been run.")
        elif stage["status"] != "finished":
            notes.append(f"The stage '{stage['name']}' is {stage['status']}; its metrics are the last ones logged.")
    if not any(stage["kind"] == "evaluate" for stage in stages):
        notes.append("The recipe has no evaluate stage, so no models are compared.")
    elif not evaluations:
        notes.append("The evaluate stage has no results yet, so no models are compared.")
    if any(stage["dirty"] for stage in stages):
        notes.append("Some stages ran from a working tree with uncommitted changes.")
    return notes + [note for evaluation in evaluations for note in evaluation["notes"]]


def _packages(stages: list[dict[str, Any]]) -> dict[str, str]:
    """Version of every package; several, with commas, where stages ran with different ones."""
    versions: dict[str, list[str]] = {}
    for stage in stages:
        for name, version in (stage.pop("packages") or {}).items():
            seen = versions.setdefault(name, [])
            if str(version) not in seen:
                seen.append(str(version))
    return {name: ", ".join(versions[name]) for name in sorted(versions)}


def _distinct(items: Any) -> list[Any]:
    seen: list[Any] = []
    for item in items:
        if item not in seen:
            seen.append(item)
    return seen


def _finite(value: Any) -> Any:
    """The same content with None for NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {str(key): _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if the file does not exist."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); restore it or delete the stage.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} where an object is expected.")
    return content


def _write_atomically(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
