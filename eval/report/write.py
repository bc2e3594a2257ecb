"""The report of a run: read the run folder, write report.json, report.md and report.html.

    runs/<run>/recipe.json                    settings
    runs/<run>/<stage>/manifest.json          outcome of a stage
    runs/<run>/<stage>/metrics.jsonl          curves, one object per line
    runs/<run>/<evaluate stage>/results.json  values per prompt, and samples

Markdown and HTML are rendered from the content of report.json, so the three agree. An incomplete run has a report too,
which lists what is missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.config.recipe import BASE, Recipe
from align.errors import UserError
from align.eval.compare import compare
from align.eval.report.formatting import NOT_FINITE, flat, interval, mean, plain
from align.eval.report.markdown import render_markdown
from align.run.folder import MANIFEST, write_text
from align.run.stale import stale_stages

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
    """The content of report.json. Writes nothing.

    generated: ISO time of the report. Default: now.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder; check the path.")
    recipe = read_object(run_dir / "recipe.json") or {}
    kinds = stage_kinds(run_dir, recipe)
    manifests = {name: found for name in kinds if (found := read_object(run_dir / name / MANIFEST)) is not None}
    stale = stale_stages(run_dir, manifests, valid_recipe(recipe))
    stages = [_stage(run_dir / name, kind, manifests.get(name), stale.get(name)) for name, kind in kinds.items()]
    if not recipe and not stages:
        raise UserError(
            f"{run_dir}: not a run folder, because it has no recipe.json and no stage with a manifest.json; pass the "
            "folder of a run."
        )
    evaluations = [
        found for stage in stages if (found := _evaluation(run_dir, stage["name"], stage["stale"], recipe)) is not None
    ]
    report: dict[str, Any] = {
        "name": recipe.get("name") or run_dir.resolve().name,
        "generated": generated or datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": _verdict(evaluations, stale),
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
    """Write report.json, report.md and report.html into the run folder; return their paths."""
    from align.eval.report.html import render_html  # imports matplotlib, which `build_report` does not need

    run_dir = Path(run_dir)
    report = build_report(run_dir)
    curves = {stage["name"]: read_metrics(run_dir / stage["name"] / "metrics.jsonl") for stage in report["stages"]}
    texts = {
        "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
        "report.md": render_markdown(report),
        "report.html": render_html(report, curves),
    }
    for name, text in texts.items():
        write_text(run_dir / name, text)
    return [run_dir / name for name in texts]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, merged by step and sorted by step.

    If a resumed stage has written a step twice, the later value of a key counts. Incomplete lines, which a killed
    process leaves, and lines without a step are skipped.
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


def stage_kinds(run_dir: Path, recipe: dict[str, Any]) -> dict[str, str]:
    """{name: kind} of the base model, the recipe's stages in their order, and then other folders with a manifest."""
    kinds = {BASE: BASE} if (run_dir / BASE / "manifest.json").is_file() else {}
    kinds |= {name: stage.get("kind", "") for name, stage in (recipe.get("stages") or {}).items()}
    for manifest in sorted(run_dir.glob("*/manifest.json")):
        kinds.setdefault(manifest.parent.name, "")
    return kinds


def valid_recipe(recipe: dict[str, Any]) -> Recipe | None:
    """The recipe; None for one that is missing, or that another version has written and this one cannot read."""
    try:
        return Recipe.model_validate(recipe)
    except ValidationError:
        return None


def _stage(folder: Path, kind: str, manifest: dict[str, Any] | None, stale: str | None) -> dict[str, Any]:
    if manifest is not None:
        status = manifest.get("status", "finished")
    else:
        status = "unfinished" if (folder / "metrics.jsonl").is_file() else "not run"
    found = manifest or {}
    stage = {"name": folder.name, "kind": found.get("kind") or kind, "status": status, "stale": stale}
    stage |= {key: found.get(key) for key in COPIED}
    if manifest is None:
        rows = read_metrics(folder / "metrics.jsonl")
        stage["metrics"] = {key: value for row in rows for key, value in row.items() if key != "step"}
    return stage


def _evaluation(run_dir: Path, name: str, stale: str | None, recipe: dict[str, Any]) -> dict[str, Any] | None:
    results = read_object(run_dir / name / "results.json")
    if results is None:
        return None
    settings = (recipe.get("stages") or {}).get(name, {})
    if settings.get("reference"):
        results.setdefault("reference", settings["reference"])  # results of earlier versions do not name it
    table = compare(results, resamples=settings.get("bootstrap", RESAMPLES), seed=recipe.get("seed") or 0)
    limit = settings.get("samples", SAMPLES)
    models = results.get("models") or {}
    scores = {model: found["scores"] for model, found in models.items() if "scores" in found}
    groups = [("Prompt", results.get("prompts") or [], scores)]
    for task, found in (results.get("tasks") or {}).items():
        values = {model: next(iter(of["metrics"].values()))["values"] for model, of in found["models"].items()}
        groups.append((f"{task}, prompt", found["prompts"], values))
    samples = [
        sample for title, prompts, values in groups for sample in _samples(title, prompts[:limit], values, len(prompts))
    ]
    return {
        "stage": name,
        "stale": stale,
        **table,
        "samples": samples,
        "prompts": sum(len(prompts) for _, prompts, _ in groups),
    }


def _samples(
    title: str, shown: list[dict[str, Any]], values: dict[str, list[float | None]], prompts: int
) -> Iterator[dict[str, Any]]:
    """For each prompt, every model's completion and, if it was scored, its score."""
    for i, row in enumerate(shown):
        yield {
            "title": f"{title} {i + 1}",
            "prompt": plain(row.get("prompt")),
            "reference": plain(row["reference"]) if row.get("reference") else None,
            "completions": {model: plain(text) for model, text in (row.get("completions") or {}).items()},
            "scores": {model: of[i] for model, of in values.items() if len(of) == prompts and of[i] is not None},
        }


def _verdict(evaluations: list[dict[str, Any]], stale: Mapping[str, str]) -> str:
    """One line of key numbers: the last model compared with the baseline and with the model before it."""
    if not evaluations:
        return "No models have been compared in this run."
    last = evaluations[-1]
    if last["stage"] in stale:
        return f"Stale, not of the present models: {stale[last['stage']]}; {_key_numbers(last)}"
    return _key_numbers(last)


def _key_numbers(last: dict[str, Any]) -> str:
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
                    text = f"{label} {mean(d, signed=True)} {interval(d)}".rstrip()
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
        if stage["stale"]:
            notes.append(
                f"The stage '{stage['name']}' is stale: {stage['stale']}. Run it again with --from {stage['name']}."
            )
        broken = [key for key, value in flat(stage["metrics"] or {}) if not _is_finite(value)]
        if broken:
            notes.append(f"The stage '{stage['name']}' has metrics that are not finite: {', '.join(broken)}.")
    if not any(stage["kind"] == "evaluate" for stage in stages):
        notes.append("The recipe has no evaluate stage, so no models are compared.")
    elif not evaluations:
        notes.append("The evaluate stage has no results yet, so no models are compared.")
    if any(stage["dirty"] for stage in stages):
        notes.append("Some stages ran from a working tree with uncommitted changes.")
    return notes + [note for evaluation in evaluations for note in evaluation["notes"]]


def _packages(stages: list[dict[str, Any]]) -> dict[str, str]:
    """Version of every package; all versions, separated by commas, if stages ran with different ones."""
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
    """The same content with `not finite` for NaN and infinity, which JSON cannot express."""
    if isinstance(value, dict):
        return {str(key): _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return value if _is_finite(value) else NOT_FINITE


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if the file does not exist."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore the file, or delete the stage's folder.") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: contains a JSON {type(content).__name__} instead of an object; restore the file, or delete the "
            "stage's folder."
        )
    return content
