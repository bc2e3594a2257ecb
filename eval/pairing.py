"""Compare two evaluations document by document: paired differences, tests, and minimum detectable effects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import UserError
from align.eval.report.write import read_object
from align.eval.results import RESAMPLES
from align.eval.statistics.intervals import difference_interval
from align.eval.statistics.significance import holm, minimum_detectable_effect, paired_test
from align.run.folder import RESULTS, read_jsonl

Values = dict[tuple[str, str], dict[str, float | None]]
"""By (task, metric) the mean over samples of each document; None if a sample is unscored."""


@dataclass
class Difference:
    """One metric of two evaluations on the documents that both scored.

    first, second: means over these documents. mean, low, high: of second minus first, with the 95 % interval.
    p_value: of the paired test, adjusted by Holm's method for the number of rows. test, interval: methods.
    detectable: smallest true difference that the test finds with 80 % power; None if unknown.
    n: documents that both scored. only_first, only_second: documents that one of the two scored.
    changed: documents whose value differs.
    """

    task: str
    metric: str
    first: float
    second: float
    mean: float
    low: float | None
    high: float | None
    p_value: float
    test: str
    interval: str
    detectable: float | None
    n: int
    only_first: int
    only_second: int
    changed: int


@dataclass
class Comparison:
    """Comparison of two evaluations.

    notes: tasks and metrics that only one of the two has, or has in another version.
    """

    first: str
    second: str
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """The differences for a terminal, one line per task and metric."""
        lines = [["task", "metric", self.first, self.second, "difference", "p (Holm)", "detectable", "changed", "n"]]
        for d in self.differences:
            interval = "" if d.low is None else f" [{d.low:+.3g}, {d.high:+.3g}]"
            detectable = "unknown" if d.detectable is None else f"{d.detectable:.3g}"
            cells = [d.task, d.metric, f"{d.first:.4g}", f"{d.second:.4g}", f"{d.mean:+.4g}{interval}"]
            lines.append([*cells, f"{d.p_value:.3g}", detectable, str(d.changed), str(d.n)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        rows = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([*rows, *(f"note: {note}" for note in self.notes)])


def compare_folders(first: Path, second: Path) -> Comparison:
    """Compare the model of `second` with the model of `first`. Raises `UserError` if they share no metric."""
    folders = [_model_folder(path) for path in (first, second)]
    results = [model_results(folder) for folder in folders]
    left, right = (document_values(folder, of_model) for folder, of_model in zip(folders, results))
    found = Comparison(*_names(folders))
    for key in [*left, *(key for key in right if key not in left)]:
        task, metric = key
        if key not in left or key not in right:
            found.notes.append(f"{task}, {metric}: only {found.first if key in left else found.second} has it")
            continue
        versions = [of_model[task]["version"] if task in of_model else None for of_model in results]
        if versions[0] != versions[1]:
            found.notes.append(f"{task}: the versions differ ({versions[0]}; {versions[1]}), so it is not compared")
            continue
        if (difference := paired_difference(task, metric, left[key], right[key])) is None:
            found.notes.append(f"{task}, {metric}: no document is scored in both")
        else:
            found.differences.append(difference)
    for task in results[0]:
        metrics = [name for name in results[0][task]["metrics"] if (task, name) not in left]
        if metrics and task in results[1]:
            found.notes.append(f"{task}, {', '.join(metrics)}: not a mean over documents, so it is not compared")
    if not found.differences:
        raise UserError(f"{first}, {second}: they share no scored document of a task. Evaluate the same tasks.")
    for difference, adjusted in zip(found.differences, holm([d.p_value for d in found.differences])):
        difference.p_value = adjusted
    found.notes = list(dict.fromkeys(found.notes))
    return found


def paired_difference(
    task: str,
    metric: str,
    first: dict[str, float | None],
    second: dict[str, float | None],
    clusters: Mapping[str, str] | None = None,
) -> Difference | None:
    """Second minus first on the documents that both have scored; None if there are none.

    clusters: label of each document, if some belong together.
    """
    both = [d for d, value in first.items() if value is not None and second.get(d) is not None]
    if not both:
        return None
    a = np.array([first[document] for document in both], dtype=np.float64)
    b = np.array([second[document] for document in both], dtype=np.float64)
    labels = None if clusters is None else [clusters[document] for document in both]
    interval = difference_interval(b, a, clusters=labels, resamples=RESAMPLES)
    test = paired_test(b, a, clusters=labels)
    detectable = minimum_detectable_effect(b, a, clusters=labels)
    scored = [{d for d, value in values.items() if value is not None} for values in (first, second)]
    return Difference(
        task,
        metric,
        float(a.mean()),
        float(b.mean()),
        interval.mean,
        _known(interval.low),
        _known(interval.high),
        test.p_value,
        test.method,
        interval.method,
        _known(detectable),
        len(both),
        len(scored[0] - scored[1]),
        len(scored[1] - scored[0]),
        int((a != b).sum()),
    )


def _model_folder(path: Path) -> Path:
    """The folder with scores.jsonl: `path`, or its only model's."""
    if (path / "scores.jsonl").is_file():
        return path
    models = sorted(file.parent for file in path.glob("*/scores.jsonl"))
    if len(models) == 1:
        return models[0]
    if not models:
        raise UserError(f"{path}: it has no results of `align eval`. Pass its --out folder.")
    raise UserError(
        f"{path}: it has results of several models. Pass one of the folders {', '.join(str(m) for m in models)}."
    )


def _names(folders: list[Path]) -> tuple[str, str]:
    """Names of the two models; with the evaluation's folder if they are equal."""
    names = [folder.name for folder in folders]
    if names[0] == names[1]:
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    return names[0], names[1]


def document_values(folder: Path, results: dict[str, Any]) -> Values:
    """The values of a model's groups over all documents of their tasks, then those of tasks.

    folder: the model's. results: its tasks in results.json.
    """
    samples: dict[tuple[str, str], dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    for row in read_jsonl(folder / "scores.jsonl"):
        for metric, value in row["values"].items():
            samples[row["task"], metric][row["document"]].append(value)
    values = {key: {d: _mean(found) for d, found in documents.items()} for key, documents in samples.items()}
    pooled: Values = {}
    for group, result in results.items():
        for metric in result["metrics"] if "members" in result else []:
            pooled[group, metric] = {
                f"{task} {document}": value
                for task in result["members"]
                for document, value in values.get((task, metric), {}).items()
            }
    return pooled | values


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def model_results(folder: Path) -> dict[str, Any]:
    """The model's tasks in results.json; empty if there is none."""
    content = read_object(folder.parent / RESULTS) or {}
    of_model: dict[str, Any] = (content.get("models") or {}).get(folder.name) or {}
    return dict(of_model.get("tasks") or {})


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
