"""Training curves and comparison charts as inline SVG.

Titles and units come from the table of metrics (`align.run.metrics`). The drawing uses matplotlib's object interface,
so there is no global figure state. Text is not converted to paths, ids are unique on a page, and the same numbers give
the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from align.eval.report.formatting import mean
from align.eval.report.smoothing import smoothing_window
from align.run.charts import CHARTS, Chart, chart, evaluation_charts, grouped
from align.run.metrics import PHASES, SHARE, TIMES, step_axis

COLORS = ("#2b6a99", "#c4682b", "#3f8a63", "#7b5fa6", "#a8444c", "#777b80", "#8a7a2f")
BARS = 40
"""Largest number of bars in a chart of times; in a longer run, each bar is the mean of neighbouring iterations."""
LEGEND: Any = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "ncols": 3,
    "frameon": False,
    "borderaxespad": 0,
    "handlelength": 1.4,
    "columnspacing": 1.2,
}
"""A legend above the axes. Three columns are as wide as the figure allows."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "align",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": "#b9bdc2",
    "axes.labelcolor": "#4b5057",
    "text.color": "#2a2e33",
    "xtick.color": "#4b5057",
    "ytick.color": "#4b5057",
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e7e9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-4, 5),
}
THEME = {
    "#b9bdc2": "--axis",
    "#4b5057": "--tick",
    "#2a2e33": "--ink",
    "#e6e7e9": "--grid",
    **{color: f"--m{number}" for number, color in enumerate(COLORS)},
}
"""Variables of the style sheet that replace the colours of a drawing, so that it is legible on a dark page too."""


class Plot(NamedTuple):
    """A drawn chart."""

    title: str
    svg: str
    caption: str


def stage_plots(kind: str, rows: list[dict[str, Any]], prefix: str) -> list[Plot]:
    """The charts of a stage from its metrics `rows`, without charts that have no data; `prefix` makes ids unique."""
    plots = []
    charts = [
        *evaluation_charts(key for row in rows for key in row),
        *CHARTS.get(kind, (chart("loss", held_out=True),)),
    ]
    for i, series in enumerate(charts):
        if (figure := _curves(series, rows, kind)) is not None:
            plots.append(Plot(series.full_title, as_svg(figure[0], f"{prefix}-{i}-", series.full_title), figure[1]))
    if (figure := _times(rows)) is not None:
        title = grouped(TIMES).full_title
        plots.append(Plot(title, as_svg(figure[0], f"{prefix}-time-", title), figure[1]))
    return plots


def comparison_plots(comparison: dict[str, Any], prefix: str) -> list[Plot]:
    """One chart of means and intervals for each metric of `align.eval.compare.compare`."""
    plots = []
    for i, metric in enumerate(comparison["metrics"]):
        names = [name for name in comparison["models"] if name in metric["models"]]
        with matplotlib.rc_context(STYLE):
            figure, axes = new_figure(height=0.75 + 0.27 * len(names))
            for row, name in enumerate(names):
                cell, color = metric["models"][name], COLORS[comparison["models"].index(name) % len(COLORS)]
                if cell["mean"] is None:
                    axes.text(0.5, row, mean(cell), transform=axes.get_yaxis_transform(), ha="center", va="center")
                    continue
                if cell["low"] is not None:
                    axes.plot([cell["low"], cell["high"]], [row, row], color=color, linewidth=2.2, alpha=0.55)
                axes.plot([cell["mean"]], [row], "o", color=color, markersize=5)
            axes.set_yticks(range(len(names)), [name if len(name) <= 22 else "…" + name[-21:] for name in names])
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.grid(visible=False, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.margins(x=0.12)
        plots.append(Plot(metric["label"], as_svg(figure, f"{prefix}-{i}-", metric["label"]), ""))
    return plots


def points(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one key."""
    found = [(row["step"], float(row[key])) for row in rows if _is_finite(row.get(key)) and "step" in row]
    return np.array([step for step, _ in found]), np.array([value for _, value in found])


def not_finite(rows: list[dict[str, Any]], key: str) -> int:
    """Number of rows in which the key is NaN or infinite."""
    return sum(isinstance(row.get(key), float) and not math.isfinite(row[key]) for row in rows)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def new_figure(height: float = 2.25) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.0, height), layout="constrained")
    return figure, figure.add_subplot()


def _curves(chart: Chart, rows: list[dict[str, Any]], kind: str) -> tuple[Figure, str] | None:
    """(figure, caption) of a chart; None if no row has one of its metrics."""
    drawn = [(label, *points(rows, key)) for key, label in chart.series]
    missing = sum(not_finite(rows, key) for key, _ in chart.series)
    if not any(steps.size for _, steps, _ in drawn) and not missing:
        return None
    caption = []
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        for color, (label, steps, values) in zip(COLORS, drawn):
            if steps.size:
                window = draw_line(axes, steps, values, color, label)
                if window:
                    caption.append(f"bold line: mean of {window} points")
        band = points(rows, chart.band) if chart.band else (np.array([]), np.array([]))
        if band[0].size and np.array_equal(band[0], drawn[0][1]):
            _, steps, values = drawn[0]
            axes.fill_between(steps, values - band[1], values + band[1], color=COLORS[0], alpha=0.13, linewidth=0)
            caption.append("band: one standard deviation over completions")
        if chart.ends is not None:
            ends = [points(rows, key) for key in chart.ends]
            if all(np.array_equal(steps, drawn[0][1]) for steps, _ in ends):
                low, high = (values for _, values in ends)
                axes.fill_between(drawn[0][1], low, high, color=COLORS[0], alpha=0.13, linewidth=0)
                caption.append("band: 95 % interval over documents")
        several = sum(steps.size > 0 for _, steps, _ in drawn) > 1
        if several or (len(drawn) > 1 and not drawn[0][1].size and axes.lines):
            axes.legend(**LEGEND)
        if chart.unit == SHARE:
            axes.set_ylim(-0.03, 1.03)
        finish_axes(axes, kind)
    if missing:
        caption.append(f"not finite, not drawn: {missing} values")
    return figure, "; ".join(dict.fromkeys(caption))


def draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> int:
    """Draw one series; return the window of its running mean, or 0 if it has none."""
    window = smoothing_window(values.size, float(np.abs(np.diff(values)).sum()), float(np.ptp(values)))
    if not window:
        marker = "o" if values.size <= 25 else None
        axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=2.6, label=label)
        return 0
    padded = np.concatenate([[0.0], np.cumsum(values)])
    starts = np.maximum(np.arange(values.size) + 1 - window, 0)
    ends = np.arange(values.size) + 1
    axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
    axes.plot(steps, (padded[ends] - padded[starts]) / (ends - starts), color=color, linewidth=1.7, label=label)
    return window


def _times(rows: list[dict[str, Any]]) -> tuple[Figure, str] | None:
    """(figure, caption) with the seconds of every phase as stacked bars; None if no row has a time.

    Metrics that time a part of a phase are not drawn, because the phase includes them.
    """
    keys = {phase: f"time/{phase}" for phase in PHASES}
    timed = [row for row in rows if "step" in row and any(_is_finite(row.get(key)) for key in keys.values())]
    if not timed:
        return None
    group = math.ceil(len(timed) / BARS)
    starts = range(0, len(timed), group)
    steps = np.array([timed[start]["step"] for start in starts], dtype=float)
    width = 0.8 * float(np.min(np.diff(steps), initial=group if len(steps) < 2 else np.inf))
    bottom = np.zeros(len(steps))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        for color, (phase, key) in zip(COLORS, keys.items()):
            seconds = [[row[key] if _is_finite(row.get(key)) else 0.0 for row in timed[s : s + group]] for s in starts]
            heights = np.array([np.mean(part) for part in seconds])
            if heights.any():
                axes.bar(steps, heights, width, bottom=bottom, color=color, label=phase)
            bottom += heights
        axes.legend(**LEGEND | {"handlelength": 0.8})
        finish_axes(axes, "ppo")
    return figure, f"each bar: mean of {group} iterations" if group > 1 else ""


def finish_axes(axes: Axes, kind: str) -> None:
    """Label the axis of steps, as the table of metrics calls them for a kind of stage, and place the ticks."""
    axes.set_xlabel(step_axis(kind))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(_tick)


def _tick(value: float, _: Any) -> str:
    """A tick's label with its own exponent. A common exponent would be drawn above the axis, where the legend is."""
    text = f"{value:.6g}"
    return "−" + text[1:] if value < 0 else text


def as_svg(figure: Figure, prefix: str, title: str) -> str:
    """The figure as an <svg> that scales with its box, without metadata, its ids starting with `prefix`."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{prefix}", text)
    text = re.sub("|".join(THEME), lambda m: f"var({THEME[m[0]]}, {m[0]})", text)
    text = re.sub(r"font: ([^;\"]*?[\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    box = re.search(r'viewBox="[^"]+"', text)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{_attribute(title)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1).strip()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
