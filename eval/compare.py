"""Comparison of the models of an evaluate stage: means, intervals and paired differences of every metric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.eval.statistics.intervals import difference_interval
from align.eval.statistics.significance import holm, minimum_detectable_effect, paired_test
from align.eval.statistics.summary import summarize
from align.run.metrics import EVALUATION, with_unit

BETTER = {"scores": 1, "f1": 1, "preference": 1, "kl": 0, "lengths": 0, "eos": 0}
"""Metrics of the stage's own prompts and pairs. 1: higher is better; 0: neither direction is better in general."""

TASK_PREFIX = "task/"

COUNTS = ("mean", "standard_error", "n", "unscored", "not_finite", "unanswered")
"""Statistics of a task's metric that the report shows."""


class Column(NamedTuple):
    """One column of the comparison.

    key: metric, or `task/TASK/METRIC`.
    label: title with its unit.
    better: 1 if higher is better, 0 if neither direction is.
    values: per model one value per prompt, None where a prompt was not scored.
    """

    key: str
    label: str
    better: int
    values: dict[str, list[float | None]]


def compare(results: dict[str, Any], *, resamples: int, seed: int) -> dict[str, Any]:
    """Table of an evaluate stage's results.json; metrics that no model has are omitted.

    Each model except the baseline is compared with the baseline and with every model before it in the list. The
    differences are paired by prompt.
    """
    models: dict[str, dict] = results.get("models") or {}
    names = list(models)
    baseline = results.get("baseline") or (names[0] if names else None)
    notes: list[str] = []
    columns = []
    for column in _columns(results, results.get("reference") or baseline):
        cells = {
            name: summarize(values, resamples=resamples, seed=seed)._asdict() for name, values in column.values.items()
        }
        for name in names:
            if column.key == "preference" and name not in cells and (known := _accuracy_only(models[name])):
                cells[name] = known
        if not cells:
            continue
        notes += [
            f"{column.label}: {cell['not_finite']} of {cell['n']} values of {name} are not finite, so it has no mean."
            for name, cell in cells.items()
            if cell["not_finite"]
        ]
        differences = []
        for model, against in _pairs(names, baseline):
            if model not in column.values or against not in column.values:
                continue
            difference = _difference(column.values[model], column.values[against], resamples, seed)
            if difference is None:
                notes.append(f"{column.label}: {model} and {against} share no scored prompts and are not compared.")
            else:
                differences.append({"model": model, "against": against, **difference})
        columns.append(
            {
                "key": column.key,
                "label": column.label,
                "better": column.better,
                "models": cells,
                "differences": differences,
            }
        )
    _correct_for_tasks(columns)
    return {
        "models": names,
        "checkpoints": {name: models[name].get("checkpoint") for name in names},
        "baseline": baseline,
        "pairs": _pairs(names, baseline),
        "metrics": columns,
        "tasks": [_describe_task(name, task) for name, task in (results.get("tasks") or {}).items()],
        "resamples": resamples,
        "reward_model_accuracy": results.get("reward_model_accuracy"),
        "notes": notes,
    }


def _columns(results: dict[str, Any], reference: str | None) -> Iterator[Column]:
    """The metrics of the stage's prompts and pairs, then those of its tasks and of those of `align eval`."""
    models: dict[str, dict] = results.get("models") or {}
    for metric in EVALUATION:
        if metric.key in BETTER:
            label = with_unit(metric.title.replace("REFERENCE", str(reference)), metric.unit)
            values = {name: found for name in models if (found := _values(models[name], metric.key)) is not None}
            yield Column(metric.key, label, BETTER[metric.key], values)
    for task, of_task in (results.get("tasks") or {}).items():
        labels = {label: None for result in of_task["models"].values() for label in result["metrics"]}
        for label in labels:
            values = {name: result["metrics"][label]["values"] for name, result in of_task["models"].items()}
            yield Column(f"{TASK_PREFIX}{task}/{label}", f"{task}: {label}", 1, values)
    for task, metrics in (results.get("benchmarks") or {}).items():
        for label, metric in metrics.items():
            documents = dict.fromkeys(document for of in metric["models"].values() for document in of)
            values = {name: [of.get(document) for document in documents] for name, of in metric["models"].items()}
            yield Column(f"{TASK_PREFIX}{task}/{label}", f"{task}: {label}", max(metric["better"], 0), values)


def _describe_task(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """Sampling settings of a task and, per model, the statistics of each metric."""
    counts = [
        {
            "model": model,
            "n": result["n"],
            "truncated": result["truncated"],
            "mean_length": result["mean_length"],
            "metrics": {label: {key: metric[key] for key in COUNTS} for label, metric in result["metrics"].items()},
        }
        for model, result in task["models"].items()
    ]
    return {
        "task": name,
        "temperature": task["temperature"],
        "max_new_tokens": task["max_new_tokens"],
        "models": counts,
    }


def _pairs(names: list[str], baseline: str | None) -> list[tuple[str, str]]:
    """The compared pairs (model, against): each model but the baseline, against the baseline and all models before."""
    pairs = []
    for i, model in enumerate(names):
        if model != baseline and baseline in names:
            pairs.append((model, str(baseline)))
        pairs += [(model, earlier) for earlier in names[:i] if earlier != baseline and model != baseline]
    return pairs


def _values(model: dict[str, Any], key: str) -> list[float | None] | None:
    """One number per prompt, None where a prompt was not scored; None if the model does not have the metric."""
    raw = (model.get("preference") or {}).get("values") if key == "preference" else model.get(key)
    if not isinstance(raw, list) or all(value is None for value in raw):
        return None
    return [None if value is None else float(value) for value in raw]


def _accuracy_only(model: dict[str, Any]) -> dict[str, Any] | None:
    preference = model.get("preference") or {}
    if preference.get("accuracy") is None:
        return None
    return {
        "mean": preference["accuracy"],
        "standard_error": None,
        "low": None,
        "high": None,
        "n": preference.get("n"),
        "unscored": 0,
        "not_finite": 0,
    }


def _difference(
    a: list[float | None], b: list[float | None], resamples: int, seed: int
) -> dict[str, float | int | str | None] | None:
    """Mean difference over the prompts that have a value for both models; None if there are none.

    It has an interval, the p-value of a paired test, and the minimum detectable effect. They and the mean are None if a
    value is not finite.
    """
    if len(a) != len(b):
        return None
    left, right = _array(a), _array(b)
    both = np.array([x is not None and y is not None for x, y in zip(a, b, strict=True)])
    if not both.any():
        return None
    left, right, n = left[both], right[both], int(both.sum())
    if not_finite := int((~np.isfinite(left - right)).sum()):
        unknown = dict.fromkeys(("mean", "low", "high", "p_value", "detectable"))
        return {**unknown, "n": n, "not_finite": not_finite}
    interval = difference_interval(left, right, resamples=resamples, seed=seed)
    test = paired_test(left, right, seed=seed)
    found = {
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "p_value": test.p_value,
        "detectable": minimum_detectable_effect(left, right),
    }
    known = {key: None if np.isnan(value) else value for key, value in found.items()}
    return {**known, "n": n, "interval": interval.method, "test": test.method}


def _correct_for_tasks(columns: list[dict[str, Any]]) -> None:
    """Replace the p-values of each pair of models on the tasks' metrics by Holm's, adjusted for their number."""
    by_pair: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for column in columns:
        for difference in column["differences"] if column["key"].startswith(TASK_PREFIX) else []:
            if difference["p_value"] is not None:
                by_pair.setdefault((difference["model"], difference["against"]), []).append(difference)
    for differences in by_pair.values():
        for difference, adjusted in zip(differences, holm([d["p_value"] for d in differences]), strict=True):
            difference["p_value"] = adjusted


def _array(values: list[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
