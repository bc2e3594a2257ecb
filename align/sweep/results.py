"""Results of a sweep: each point's metrics over its seeds, and the best point."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from align.errors import UserError
from align.eval.compare import BETTER as BETTER_OF_MODELS
from align.eval.comparison.sides import Documents, read_run
from align.eval.report.formatting import interval, number
from align.eval.statistics.intervals import difference_interval, student_t
from align.eval.statistics.summary import summarize
from align.run.folder import write_json, write_text
from align.run.manifest import read_manifest
from align.run.metrics import titled
from align.sweep.state import read_state
from align.sweep.text import render_markdown

BETTER = {
    "loss": -1,
    "accuracy": 1,
    "margin": 1,
    "mean_token_accuracy": 1,
    "rewards/accuracies": 1,
    "rewards/margins": 1,
    "score_mean": 1,
}
"""{key: direction} of final training metrics that a sweep may optimise: 1 if higher is better, -1 if lower is."""
LEVEL = 0.95


class Value(NamedTuple):
    """A metric of one run. documents: values per document; None for a final training metric."""

    label: str
    better: int
    mean: float
    documents: Documents | None


def collect(folder: Path) -> dict[str, Value]:
    """The metrics of a run; empty if the run has not started.

    Keys are MODEL/KEY and MODEL/TASK/METRIC for evaluations, and STAGE/KEY for final training metrics.
    """
    if not (folder / "recipe.json").is_file():
        return {}
    side = read_run(folder)
    found: dict[str, Value] = {}
    for key, measured in side.measured.items():
        known = [value for value in measured.documents.values() if value is not None]
        if known and all(map(math.isfinite, known)):
            name = "/".join(part for part in key if part)
            label = f"{key.model}: {measured.label}"
            found[name] = Value(label, measured.better, sum(known) / len(known), measured.documents)
    for (stage, last), value in side.finals.items():
        if math.isfinite(value):
            better = BETTER.get(last.removeprefix("eval_"), 0)
            found.setdefault(f"{stage}/{last}", Value(f"{stage}: {titled(last)}", better, value, None))
    return found


def direction(metric: str) -> int:
    """Direction of a metric by its name alone: 1 if higher is better, -1 if lower is, 0 if unknown."""
    key = metric.partition("/")[2]
    return BETTER.get(key.removeprefix("eval_"), BETTER_OF_MODELS.get(key, 0))


def metric_value(values: Mapping[str, Value], metric: str | None) -> float | None:
    """The value of a metric of a run, if it has one."""
    return values[metric].mean if metric is not None and metric in values else None


def default_metric(runs: Sequence[Mapping[str, Value]], affected: Sequence[str]) -> str | None:
    """The metric that ranks the points by default.

    It is the first metric with a direction of the last evaluated model that the swept settings affect. If no such model
    was evaluated, it is the held-out or training loss of the last affected stage.
    """
    values = next((found for found in runs if found), {})
    directed = [key for key, value in values.items() if value.better]

    def is_affected(key: str) -> bool:
        return not affected or key.split("/")[0] in affected

    measured = [key for key in directed if values[key].documents is not None and is_affected(key)]
    if measured:
        model = measured[-1].split("/")[0]
        return next(key for key in measured if key.split("/")[0] == model)
    losses = [key for key in directed if is_affected(key) and key.split("/")[-1] in ("eval_loss", "loss")]
    return next((key for key in reversed(losses) if key.endswith("eval_loss")), losses[-1] if losses else None)


def write_sweep_report(folder: Path) -> list[Path]:
    """Write report.json, report.md and report.html of a sweep; return their paths."""
    from align.sweep.page import render_sweep  # loads matplotlib

    content = sweep_content(folder)
    write_json(folder / "report.json", content)
    write_text(folder / "report.md", render_markdown(content))
    write_text(folder / "report.html", render_sweep(content, folder))
    return [folder / f"report.{kind}" for kind in ("json", "md", "html")]


def sweep_content(folder: Path, *, generated: str | None = None) -> dict[str, Any]:
    """The content of report.json. generated: ISO time of the report; default: now."""
    state = read_state(folder)
    seeds = int(state["seeds"])
    folders = {
        point["name"]: [folder / point["name"] / f"seed-{seed}" for seed in range(seeds)] for point in state["points"]
    }
    values = {name: [collect(run) for run in runs] for name, runs in folders.items()}
    every = [run for runs in values.values() for run in runs]
    metric = state.get("metric") or default_metric(every, state["affected"])
    for name, runs in values.items():
        for run, found in zip(folders[name], runs):
            if metric is not None and metric not in found and _status(run) == "finished":
                raise UserError(f"--metric {metric}: {run} has no such metric; use one of {', '.join(found)}.")
    keys = list(dict.fromkeys(key for run in every for key in run))
    described = {key: next(run[key] for run in every if key in run) for key in keys}
    shown = [key for key in keys if key == metric or _varies(key, every)]
    shown.sort(key=lambda key: key != metric)
    points = [
        {
            "name": point["name"],
            "label": ", ".join(f"{key}={text}" for key, text in point["settings"].items()) or "the recipe",
            "settings": point["settings"],
            "runs": [
                {
                    "seed": seed,
                    "folder": str(run.relative_to(folder)),
                    "status": _status(run),
                    "metrics": {key: found[key].mean for key in shown if key in found},
                }
                for seed, (run, found) in enumerate(zip(folders[point["name"]], values[point["name"]]))
            ],
            "metrics": {key: cell for key in shown if (cell := _cell(key, values[point["name"]], seeds))},
        }
        for point in state["points"]
    ]
    better = state.get("better") or (described[metric].better if metric in described else direction(metric or ""))
    if metric:
        points.sort(key=lambda point: _rank(point, metric, better))
    content = {
        "name": folder.resolve().name,
        "generated": generated or datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": state["recipe"].get("name"),
        "axes": state["axes"],
        "seeds": seeds,
        "search": state.get("search"),
        "metric": metric,
        "better": better,
        "metrics": {key: {"label": described[key].label, "better": described[key].better} for key in shown},
        "points": points,
        "notes": _notes(points, metric, better, seeds),
    }
    return content | _best(points, values, metric, better, described)


def _varies(key: str, runs: Sequence[Mapping[str, Value]]) -> bool:
    return len({run[key].mean for run in runs if key in run}) > 1


def _status(run: Path) -> str:
    """`finished`, `unfinished` or `not run`."""
    recipe = run / "recipe.json"
    if not recipe.is_file():
        return "not run"
    stages = json.loads(recipe.read_text(encoding="utf-8"))["stages"]
    finished = all(read_manifest(run / name) is not None for name in ["base", *stages])
    return "finished" if finished else "unfinished"


def _cell(key: str, runs: Sequence[Mapping[str, Value]], seeds: int) -> dict[str, Any] | None:
    """Mean of a metric with its interval: over seeds, or over documents if the sweep has one seed.

    seeds: number of seeds of the sweep. If only one of several has finished, there is no interval.
    The key `over` is "seeds", "documents" or None.
    """
    found = [run[key] for run in runs if key in run]
    if not found:
        return None
    means = [value.mean for value in found]
    if len(means) > 1:
        known = student_t(means, level=LEVEL)
        return {"mean": known.mean, "low": known.low, "high": known.high, "n": len(means), "over": "seeds"}
    documents = found[0].documents
    if documents is None or seeds > 1:
        return {"mean": means[0], "low": None, "high": None, "n": 1, "over": None}
    summary = summarize(list(documents.values()), resamples=2000, seed=0)
    return {"mean": summary.mean, "low": summary.low, "high": summary.high, "n": summary.n, "over": "documents"}


def _rank(point: Mapping[str, Any], metric: str, better: int) -> tuple[bool, float]:
    cell = point["metrics"].get(metric)
    return (True, 0.0) if cell is None else (False, -better * cell["mean"])


def _notes(points: Sequence[Mapping[str, Any]], metric: str | None, better: int, seeds: int) -> list[str]:
    notes = []
    for point in points:
        missing = [run["seed"] for run in point["runs"] if run["status"] != "finished"]
        if missing:
            seed = f", seed {', '.join(map(str, missing))}" if seeds > 1 else ""
            notes.append(f"Not finished: {point['label']}{seed}.")
    if seeds == 1:
        notes.append("One seed per setting: the intervals are over documents, not over training runs with other seeds.")
    elif seeds < 5:
        notes.append(f"{seeds} seeds per setting: intervals over so few seeds are wide.")
    if any(point["metrics"] for point in points) and metric and not better:
        notes.append(f"{metric} has no direction in the table of metrics; pass --maximize or --minimize.")
    return notes


def _best(
    points: Sequence[Mapping[str, Any]],
    values: Mapping[str, Sequence[Mapping[str, Value]]],
    metric: str | None,
    better: int,
    described: Mapping[str, Value],
) -> dict[str, Any]:
    """The point with the best mean, its differences from all other points, and the verdict as a sentence.

    The intervals of the differences hold simultaneously with 95 % confidence (Bonferroni).
    """
    having = [point for point in points if metric in point["metrics"]]
    if metric is None or not better or not having:
        verdict = "No finished run has a metric to judge the settings by."
        return {"best": None, "clear": False, "differences": [], "verdict": verdict}
    best, *others = having
    label = described[metric].label
    mean = number(best["metrics"][metric]["mean"])
    if not others:
        return {
            "best": best["name"],
            "clear": False,
            "differences": [],
            "verdict": f"Only one setting has finished. {best['label']}: {label} {mean}.",
        }
    level = 1 - (1 - LEVEL) / len(others)
    differences = [
        {"point": other["name"], "label": other["label"]}
        | _difference(values[best["name"]], values[other["name"]], metric, level)
        for other in others
    ]
    open_ = [d for d in differences if d["low"] is None or not (d["low"] > 0 if better > 0 else d["high"] < 0)]
    word = "highest" if better > 0 else "lowest"
    next_best = differences[0]
    margin = f"{number(next_best['mean'], signed=True)} {interval(next_best)}".rstrip()
    over = f" over {next_best['n']} {next_best['over']}" if next_best["over"] else ""
    if open_:
        equal = "; ".join(d["label"] for d in open_[:5]) + (f" and {len(open_) - 5} more" if len(open_) > 5 else "")
        verdict = (
            f"No setting is clearly best in {label}. {best['label']} has the {word} mean, {mean}; its difference from "
            f"the next, {next_best['label']}, is {margin}{over}. Not clearly worse: {equal}."
        )
    else:
        verdict = f"Best in {label}: {best['label']}, {mean}. Its margin to {next_best['label']} is {margin}{over}."
    return {"best": best["name"], "clear": not open_, "differences": differences, "verdict": verdict}


def _difference(
    first: Sequence[Mapping[str, Value]], second: Sequence[Mapping[str, Value]], metric: str, level: float
) -> dict[str, Any]:
    """Mean of first minus second, paired by seed, or by document for a single seed."""
    pairs = [(a[metric], b[metric]) for a, b in zip(first, second) if metric in a and metric in b]
    if len(pairs) > 1:
        found = student_t([a.mean - b.mean for a, b in pairs], level=level)
        return {"mean": found.mean, "low": found.low, "high": found.high, "n": len(pairs), "over": "seeds"}
    if pairs and pairs[0][0].documents is not None and pairs[0][1].documents is not None:
        left, right = pairs[0][0].documents, pairs[0][1].documents
        both = [(a, b) for d, a in left.items() if a is not None and (b := right.get(d)) is not None]
        if len(both) > 1:
            found = difference_interval([a for a, _ in both], [b for _, b in both], level=level)
            return {"mean": found.mean, "low": found.low, "high": found.high, "n": len(both), "over": "documents"}
    known = [[run[metric].mean for run in runs if metric in run] for runs in (first, second)]
    mean = sum(known[0]) / len(known[0]) - sum(known[1]) / len(known[1])
    return {"mean": mean, "low": None, "high": None, "n": len(pairs), "over": None}
