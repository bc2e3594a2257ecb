"""Results of an evaluation: each metric of each task and model with its interval and counts, as JSON and as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.eval.harness_index import Group
from align.eval.records import Record
from align.eval.statistics.summary import summarize
from align.eval.task import Scores, Task, Verdict
from align.run.folder import read_jsonl, write_json, write_text

RESAMPLES = 2000
WARN_ABOVE = 0.02
"""The notes warn if the share of truncated completions is above this one."""


@dataclass(frozen=True)
class Metric:
    """One metric of one model on one task.

    mean: mean of the scored values, or the corpus's value; None if unknown. low, high: ends of the 95 % interval.
    standard_error: of the mean; clustered by document if there are several samples.
    n: number of scored values. unscored: number of values that are None.
    method: how the interval was computed. better: 1 if higher is better, -1 if lower is, 0 if neither.
    """

    mean: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    n: int
    unscored: int
    method: str
    better: int


@dataclass(frozen=True)
class TaskResult:
    """One model on one task.

    version: the task's. documents: evaluated documents. total: documents of the task. samples: completions per request.
    missing: documents without all their records. unscored: verdicts without a value, with the reasons and their counts.
    truncated: completions that reached max_new_tokens. completions: number of completions.
    unanswered: verdicts whose completion has no answer; they count as wrong.
    truncated_prompts: prompts that were truncated at their beginning. unstable_seams: see `Encoder`.
    metrics: by name. figures: SVG by title.
    """

    version: str
    documents: int
    total: int
    samples: int
    missing: int
    unscored: int
    reasons: dict[str, int]
    truncated: int
    completions: int
    unanswered: int
    truncated_prompts: int
    unstable_seams: int
    metrics: dict[str, Metric] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)


def summarize_task(
    task: Task,
    scores: Scores,
    records: Sequence[Record],
    *,
    documents: int,
    samples: int,
    truncated_prompts: int,
    unstable_seams: int,
    seed: int,
) -> TaskResult:
    """Statistics of a task's scores. documents: number of evaluated documents."""
    scored = {verdict.document for verdict in scores.verdicts}
    reasons: dict[str, int] = {}
    for verdict in scores.verdicts:
        if verdict.reason:
            reasons[verdict.reason] = reasons.get(verdict.reason, 0) + 1
    names = list(dict.fromkeys(name for verdict in scores.verdicts for name in verdict.values))
    metrics = {name: mean_metric(scores.verdicts, name, int(task.better.get(name, 1)), seed) for name in names}
    for name, value in scores.corpus.items():
        metrics[name] = Metric(
            _finite(value.value),
            value.low,
            value.high,
            None,
            len(scored),
            0,
            value.method,
            int(task.better.get(name, 1)),
        )
    completions = [record for record in records if record.status in ("finished", "truncated")]
    return TaskResult(
        version=task.version,
        documents=documents,
        total=len(task.documents()),
        samples=samples,
        missing=documents - len(scored),
        unscored=sum(bool(verdict.reason) for verdict in scores.verdicts),
        reasons=reasons,
        truncated=sum(record.status == "truncated" for record in completions),
        completions=len(completions),
        unanswered=sum(verdict.unanswered for verdict in scores.verdicts),
        truncated_prompts=truncated_prompts,
        unstable_seams=unstable_seams,
        metrics=metrics,
        figures=dict(scores.figures),
    )


def mean_metric(verdicts: Sequence[Verdict], name: str, better: int, seed: int) -> Metric:
    """Mean of a metric over the verdicts that have it; the samples of a document are one cluster."""
    chosen = [verdict for verdict in verdicts if name in verdict.values]
    summary = summarize(
        [verdict.values[name] for verdict in chosen],
        resamples=RESAMPLES,
        seed=seed,
        clusters=[verdict.document for verdict in chosen],
    )
    error = summary.standard_error
    return Metric(summary.mean, summary.low, summary.high, error, summary.n, summary.unscored, summary.method, better)


def group_metrics(
    group: Group, scores: Mapping[str, Scores], tasks: Mapping[str, TaskResult], seed: int
) -> dict[str, Metric]:
    """Metrics of a group of the harness: over all documents of its tasks, or the mean of the tasks' means."""
    found: dict[str, Metric] = {}
    leaves = [name for name in group.leaves if name in scores]
    for settings in group.metrics:
        base = settings["metric"]
        labels = {label for name in leaves for label in tasks[name].metrics if label.partition(" ")[0] == base}
        if wanted := settings.get("filter_list"):
            parts = [wanted] if isinstance(wanted, str) else wanted
            labels &= {base if part == "none" else f"{base} ({part})" for part in parts}
        for label in sorted(labels):
            metrics = [tasks[name].metrics[label] for name in leaves if label in tasks[name].metrics]
            if settings.get("weight_by_size", True):
                verdicts = [
                    Verdict(f"{name} {verdict.document}", verdict.sample, verdict.values)
                    for name in leaves
                    for verdict in scores[name].verdicts
                ]
                found[label] = mean_metric(verdicts, label, metrics[0].better, seed)
            else:
                found[label] = _mean_of_means(metrics)
    return found


def _mean_of_means(metrics: Sequence[Metric]) -> Metric:
    """The mean of independent means; its interval is the normal one, from their standard errors."""
    means, errors = [m.mean for m in metrics], [m.standard_error for m in metrics]
    n, unscored, better = sum(m.n for m in metrics), sum(m.unscored for m in metrics), metrics[0].better
    known = [mean for mean in means if mean is not None]
    if len(known) < len(means):
        return Metric(None, None, None, None, n, unscored, "", better)
    mean = sum(known) / len(known)
    finite = [error for error in errors if error is not None]
    if len(finite) < len(errors):
        return Metric(mean, None, None, None, n, unscored, "", better)
    error = math.sqrt(sum(e * e for e in finite)) / len(finite)
    return Metric(mean, mean - 1.96 * error, mean + 1.96 * error, error, n, unscored, "normal", better)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- files ---------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Results of `evaluate`; OUT/results.json holds `content`.

    content: settings; by model, its checkpoint and tasks; notes.
    folder: OUT.
    """

    content: dict[str, Any]
    folder: Path

    @classmethod
    def read(cls, folder: Path) -> Results:
        return cls(json.loads((folder / "results.json").read_text(encoding="utf-8")), folder)

    def write(self) -> None:
        """Write results.json, results.md and report.html."""
        from align.eval.report.evaluation import render_evaluation  # it imports this module

        write_json(self.folder / "results.json", self.content)
        write_text(self.folder / "results.md", self.markdown())
        write_text(self.folder / "report.html", render_evaluation(self))

    @property
    def models(self) -> list[str]:
        return list(self.content["models"])

    def all_verdicts(self, model: str) -> list[dict[str, Any]]:
        """The scores of each task, document and sample."""
        return read_jsonl(self.folder / model / "scores.jsonl")

    def verdicts(self, model: str, task: str) -> list[dict[str, Any]]:
        """The scores of each document and sample of a task."""
        return [row for row in self.all_verdicts(model) if row["task"] == task]

    def rows(self) -> Iterator[tuple[str, str, dict[str, dict[str, Any]]]]:
        """(task, metric, {model: metric's values}) in the order of the tasks; a group's rows come before its tasks'."""
        seen: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for model, found in self.content["models"].items():
            for task, result in found["tasks"].items():
                for metric, values in result["metrics"].items():
                    seen.setdefault((task, metric), {})[model] = values
        for (task, metric), values in seen.items():
            yield task, metric, values

    def table(self) -> str:
        """The metrics for a terminal, one line per task and metric."""
        lines = [["task", "metric", *self.models, "n", "unscored", "truncated"]]
        for task, metric, values in self.rows():
            first = next(iter(values.values()))
            counts = [self.content["models"][m]["tasks"][task] for m in values]
            lines.append(
                [
                    task,
                    metric,
                    *(shown(values.get(model)) for model in self.models),
                    str(first["n"]),
                    "/".join(str(c["unscored"] + c["missing"]) for c in counts),
                    "/".join(str(c["truncated"]) for c in counts),
                ]
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths)).rstrip() for line in lines)

    def markdown(self) -> str:
        """The metrics as a Markdown page."""
        head = ["task", "version", "metric", *self.models, "interval", "n", "unscored", "truncated", "no answer"]
        lines = ["# Evaluation", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for task, metric, values in self.rows():
            first = next(iter(values.values()))
            counts = [self.content["models"][m]["tasks"][task] for m in values]
            cells = [task, counts[0]["version"], metric, *(shown(values.get(model)) for model in self.models)]
            cells += [first["method"] or "none", str(first["n"])]
            cells += ["/".join(str(c["unscored"] + c["missing"]) for c in counts)]
            cells += ["/".join(str(c[key]) for c in counts) for key in ("truncated", "unanswered")]
            lines.append(f"| {' | '.join(cells)} |")
        notes = [f"- {note}" for note in self.content["notes"]]
        settings = [f"- {key}: {value}" for key, value in self.content["settings"].items()]
        return "\n".join(
            [*lines, "", *(["## Notes", "", *notes, ""] if notes else []), "## Settings", "", *settings, ""]
        )


def shown(metric: Mapping[str, Any] | None) -> str:
    """A mean with its interval."""
    if metric is None or metric["mean"] is None:
        return "unknown"
    if metric["low"] is None:
        return f"{metric['mean']:.4g}"
    return f"{metric['mean']:.4g} [{metric['low']:.3g}, {metric['high']:.3g}]"


def write_verdicts(path: Path, scores: Mapping[str, Scores]) -> None:
    """Write one line per task, document and sample."""
    lines = [
        json.dumps({"task": task, **vars(verdict)}, ensure_ascii=False) + "\n"
        for task, found in scores.items()
        for verdict in found.verdicts
    ]
    write_text(path, "".join(lines))


def warnings(model: str, task: str, result: TaskResult) -> list[str]:
    """Notes to read before the numbers of a task."""
    found = []
    if result.missing:
        found.append(f"{result.missing} of {result.documents} documents lack records and are not in the numbers")
    for reason, count in sorted(result.reasons.items(), key=lambda item: -item[1])[:3]:
        found.append(f"{count} unscored: {reason}")
    if result.completions and result.truncated > WARN_ABOVE * result.completions:
        found.append(
            f"{result.truncated} of {result.completions} completions reached max_new_tokens; their answers may be wrong"
        )
    if result.truncated_prompts:
        found.append(f"{result.truncated_prompts} prompts were truncated at their beginning")
    if result.unstable_seams:
        found.append(
            f"{result.unstable_seams} continuations change the tokens of their context; a delimiter would prevent it"
        )
    return [f"{model}, {task}: {text}" for text in found]
