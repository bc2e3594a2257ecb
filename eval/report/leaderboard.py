"""Tables of an evaluation: the leaderboard, one row per model, and all metrics, one row per task and metric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.eval.report.formatting import NOTHING, interval, number
from align.eval.report.page import breakable, escape, scrolling
from align.eval.results import Results

Values = Mapping[str, Any]
"""One metric of one model, as results.json holds it."""


@dataclass(frozen=True)
class Column:
    """One column of the leaderboard.

    task, metric: title in two lines. better: 1 if higher is better, -1 if lower is, 0 if neither.
    cells: by model; a model may be missing.
    """

    task: str
    metric: str
    better: int
    cells: Mapping[str, Values]

    @property
    def is_share(self) -> bool:
        """True if all means are between 0 and 1 and higher is better."""
        means = [cell["mean"] for cell in self.cells.values()]
        return self.better == 1 and all(mean is not None and 0 <= mean <= 1 for mean in means)

    def best(self) -> set[str]:
        """The models with the best mean, or with an interval that reaches it."""
        known = {model: cell for model, cell in self.cells.items() if cell["mean"] is not None}
        if not self.better or len(known) < 2:
            return set()
        top = max(self.better * cell["mean"] for cell in known.values())
        return {model for model, cell in known.items() if self._reach(cell) >= top}

    def _reach(self, cell: Values) -> float:
        """The end of the interval on the better side, with the sign that makes higher better."""
        end = cell["high"] if self.better > 0 else cell["low"]
        mean: float = cell["mean"]
        return self.better * (mean if end is None else end)


def top_level(results: Results) -> list[str]:
    """The groups and tasks that are not part of another group."""
    members: dict[str, set[str]] = {}
    groups: set[str] = set()
    for of_model in results.content["models"].values():
        for task, result in of_model["tasks"].items():
            members[task] = set(result.get("members", [task]))
            groups |= {task} if "members" in result else set()

    def is_part(task: str) -> bool:
        own = members[task]
        return any(own < members[group] or (task not in groups and own <= members[group]) for group in groups - {task})

    return [task for task in members if not is_part(task)]


def columns(results: Results) -> list[Column]:
    """The first metric of each group and task on top level."""
    wanted, found = set(top_level(results)), dict[str, Column]()
    for task, metric, values in results.rows():
        if task in wanted and task not in found:
            found[task] = Column(task, metric, next(iter(values.values()))["better"], values)
    return list(found.values())


def mean_of_tasks(found: Sequence[Column], models: Sequence[str]) -> Column | None:
    """Mean of the shares of each model over the tasks that all models have; None for fewer than two tasks.

    Each task has equal weight. The interval is the normal one, from the tasks' standard errors.
    """
    shares = [column for column in found if column.is_share and all(model in column.cells for model in models)]
    if len(shares) < 2:
        return None
    cells: dict[str, Values] = {}
    for model in models:
        metrics = [column.cells[model] for column in shares]
        mean = sum(metric["mean"] for metric in metrics) / len(metrics)
        errors = [metric["standard_error"] for metric in metrics]
        low = high = None
        if None not in errors:
            half = 1.96 * math.sqrt(sum(error * error for error in errors)) / len(errors)
            low, high = mean - half, mean + half
        cells[model] = {"mean": mean, "low": low, "high": high}
    return Column("Mean", f"of {len(shares)} tasks", 1, cells)


def leaderboard(results: Results) -> Iterator[str]:
    """A row per model, best first. The script of the page sorts the rows by any column."""
    models, found = results.models, columns(results)
    overall = mean_of_tasks(found, models)
    left_out = [column.task for column in found if overall is not None and not column.is_share]
    all_columns = [*([overall] if overall else []), *found]
    best = [column.best() for column in all_columns]
    yield f'<p class="soft">{escape(_caption(all_columns, models, left_out))}</p>'
    heads = ['<th scope="col" data-better="0">Model</th>']
    for column in all_columns:
        words = f"{breakable(column.task)}<small>{breakable(column.metric)}</small>"
        heads.append(f'<th scope="col" data-better="{column.better}">{words}</th>')
    body = []
    for model in ranked(models, all_columns[0] if all_columns else None):
        place = models.index(model)
        cells = [f'<th scope="row" data-value="{place}"><i class="dot m{place % 7}"></i>{breakable(model)}</th>']
        for column, chosen in zip(all_columns, best):
            cell = column.cells.get(model)
            mean = None if cell is None else cell["mean"]
            known = "" if mean is None else f' data-value="{mean}"'
            mark = ' class="best"' if model in chosen else ""
            cells.append(f"<td{known}{mark}>{value(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = f'<table class="board"><thead><tr>{"".join(heads)}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    yield scrolling("Leaderboard", table)


def _caption(found: Sequence[Column], models: Sequence[str], left_out: Sequence[str]) -> str:
    if not found:
        return "No task has a metric."
    sentences = ["The first metric of each task, with its 95 % interval."]
    if len(models) > 1 and found[0].better:
        order = f"{found[0].task} {found[0].metric}".replace("Mean of", "the mean of")
        sentences[0] += f" Ranked by {order}."
        sentences.append("Bold: the best mean of a column, and those whose interval reaches it.")
    if left_out:
        sentences.append(f"Not in the mean, which is over shares alone: {', '.join(left_out)}.")
    return " ".join(sentences)


def ranked(models: Sequence[str], column: Column | None) -> list[str]:
    """The models, the best one of a column first; those without a mean last, and equal ones in their own order."""
    if column is None:
        return list(models)

    def rank(model: str) -> tuple[bool, float]:
        cell = column.cells.get(model)
        if cell is None or cell["mean"] is None:
            return True, 0.0
        return False, -column.better * cell["mean"]

    return sorted(models, key=rank)


def all_metrics(results: Results) -> Iterator[str]:
    """Table of all metrics of all tasks with their counts; a slash separates the counts of the models."""
    models = results.models
    heads = ["Task and metric", *models, "n", "unscored", "truncated", "no answer"]
    body, before = [], ""
    for task, metric, values in results.rows():
        counts = [results.content["models"][model]["tasks"][task] for model in values]
        title = f"{breakable(task)}<small>{escape(counts[0]['version'])}</small>" if task != before else ""
        before = task
        cells = [f'<th scope="row">{title}<span class="metric">{breakable(metric)}</span></th>']
        cells += [f"<td>{value(values.get(model))}</td>" for model in models]
        of_models = [
            [found["n"] for found in values.values()],
            [count["unscored"] + count["missing"] for count in counts],
            *([count[key] for count in counts] for key in ("truncated", "unanswered")),
        ]
        cells += [f'<td class="nowrap">{_counts(found)}</td>' for found in of_models]
        body.append(f"<tr{' class=task' if title else ''}>{''.join(cells)}</tr>")
    top = "".join(f'<th scope="col">{breakable(head)}</th>' for head in heads)
    table = f'<table class="numbers"><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    yield scrolling("All metrics", table)


def _counts(counts: Sequence[int]) -> str:
    """The counts of the models; one number if they are equal."""
    return f"{counts[0]:,}" if len(set(counts)) == 1 else " / ".join(f"{count:,}" for count in counts)


def value(metric: Values | None) -> str:
    """A mean with its interval below it."""
    if metric is None:
        return NOTHING
    ends = interval(metric)
    return number(metric["mean"]) + (f"<small>{ends}</small>" if ends else "")
