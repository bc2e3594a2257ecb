"""Bar charts of an evaluation in HTML: by task, by the tasks of a group, and by the categories of a metric."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from align.eval.report.formatting import interval, number
from align.eval.report.leaderboard import Column, columns
from align.eval.report.page import breakable, escape
from align.eval.results import Results

COLORS = 7
"""Number of colours of models in the style sheet."""
OPEN_BARS = 40
"""A chart with more bars is folded."""


class Chart(NamedTuple):
    """Bars of each model for each row. rows: (name, {model: metric as in results.json})."""

    title: str
    rows: list[tuple[str, Mapping[str, Mapping[str, Any]]]]


def charts(results: Results) -> Iterator[str]:
    """The charts by task, then those by category."""
    found = columns(results)
    for chart in (*by_task(found), *by_category(results)):
        yield from draw(chart, results.models)


def by_task(found: Sequence[Column]) -> Iterator[Chart]:
    """One chart of all shares, and one chart for each task with another scale."""
    shares = [column for column in found if column.is_share]
    if shares:
        yield Chart("By task", [(f"{column.task}: {column.metric}", column.cells) for column in shares])
    for column in found:
        if not column.is_share:
            better = {-1: ", lower is better"}.get(column.better, "")
            yield Chart(f"{column.task}: {column.metric}{better}", [("", column.cells)])


def by_category(results: Results) -> Iterator[Chart]:
    """For each group its tasks, and for each metric M the metrics `M (category)` that a judge's task adds."""
    rows: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for task, metric, values in results.rows():
        rows.setdefault(task, {})[metric] = values
    groups: dict[str, list[str]] = {}
    for of_model in results.content["models"].values():
        groups |= {task: result["members"] for task, result in of_model["tasks"].items() if "members" in result}
    for group, members in groups.items():
        first = next(iter(rows.get(group, {})), "")
        found = [(task, rows[task][first]) for task in members if first in rows.get(task, {})]
        if len(found) > 1:
            yield Chart(f"{group}, by task: {first}", [(task, values) for task, values in found])
    for task, metrics in rows.items():
        for metric in metrics:
            found = [(name, metrics[label]) for label, name in _categories(metric, metrics)]
            if len(found) > 1:
                yield Chart(f"{task}, by category: {metric}", [(name, values) for name, values in found])


def _categories(metric: str, metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[str, str]]:
    """(label, category) of the metrics `METRIC (category)`.

    A filter of the harness has such a label too, but it has a standard error: its values are in the verdicts.
    """
    for label, values in metrics.items():
        match = re.fullmatch(re.escape(metric) + r" \((.+)\)", label)
        if match and all(value["standard_error"] is None for value in values.values()):
            yield label, match[1]


def draw(chart: Chart, models: Sequence[str]) -> Iterator[str]:
    """The chart as a block of HTML that can be folded. models: all models of the page, which sets their colours."""
    low, high = _scale([cell for _, cells in chart.rows for cell in cells.values()])
    folded = sum(len(cells) for _, cells in chart.rows) > OPEN_BARS
    yield f'<details class="bars"{"" if folded else " open"}><summary>{escape(chart.title)}</summary>'
    for name, cells in chart.rows:
        yield f'<div class="bar-row"><div class="bar-name">{breakable(name)}</div><div>' if name else "<div><div>"
        for place, model in enumerate(models):
            if model in cells:
                yield _bar(model, place % COLORS, cells[model], low, high)
        yield "</div></div>"
    yield "</details>"


def _scale(cells: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Ends of the axis: 0 to 1 for shares, otherwise from 0 or the lowest end to the highest end."""
    ends = [cell[key] for cell in cells for key in ("mean", "low", "high") if cell[key] is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def _bar(model: str, color: int, cell: Mapping[str, Any], low: float, high: float) -> str:
    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    drawn = ""
    if cell["mean"] is not None:
        ends = sorted([place(0.0), place(cell["mean"])])
        drawn = f'<span class="fill m{color}" style="left:{ends[0]:.2f}%;width:{ends[1] - ends[0]:.2f}%"></span>'
        if cell["low"] is not None:
            left, width = place(cell["low"]), place(cell["high"]) - place(cell["low"])
            drawn += f'<span class="whisker" style="left:{left:.2f}%;width:{width:.2f}%"></span>'
    return (
        f'<div class="bar"><span class="who" title="{escape(model)}"><i class="dot m{color}"></i>{escape(model)}</span>'
        f'<span class="rail" aria-hidden="true">{drawn}</span>'
        f'<span class="what">{number(cell["mean"])} <small>{interval(cell)}</small></span></div>'
    )
