"""Curves of several runs on common charts, as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from align.eval.report.plots import COLORS, STYLE, Plot, as_svg, draw_line, finish_axes, new_figure, points
from align.run.metrics import SHARE, metric_info, titled

POINTS = 1000
"""Largest number of points of a curve; longer ones are averaged over neighbouring steps."""


def overlay_plots(
    kind: str, keys: Sequence[str], rows: Mapping[str, list[dict[str, Any]]], places: Mapping[str, int], prefix: str
) -> list[Plot]:
    """One chart per key, with a curve for each run. The page has the legend.

    kind: of the stage. rows: of metrics.jsonl, by run. places: of each run in the page's legend; gives its colour.
    prefix: makes the ids of the drawings unique.
    """
    plots = []
    for number, key in enumerate(keys):
        title = titled(key)
        caption = []
        with matplotlib.rc_context(STYLE):
            figure, axes = new_figure()
            for name, found in rows.items():
                steps, values = decimated(*points(found, key))
                if steps.size:
                    window = draw_line(axes, steps, values, color_of(places[name]), name)
                    if window:
                        caption.append("bold line: running mean")
                    if is_dashed(places[name]):
                        for line in axes.lines[-1:]:
                            line.set_linestyle("--")
            metric = metric_info(key)
            if metric is not None and metric.unit == SHARE:
                axes.set_ylim(-0.03, 1.03)
            finish_axes(axes, kind)
        plots.append(Plot(title, as_svg(figure, f"{prefix}-{number}-", title), "; ".join(dict.fromkeys(caption))))
    return plots


def color_of(place: int) -> str:
    """Colour of the run at this place of a page's list."""
    return COLORS[place % len(COLORS)]


def is_dashed(place: int) -> bool:
    """True for the runs whose colour another run before them has."""
    return place // len(COLORS) % 2 == 1


def decimated(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` points: means over neighbouring steps, each at its last step."""
    if steps.size <= POINTS:
        return steps, values
    parts = np.array_split(np.arange(steps.size), POINTS)
    return np.array([steps[part[-1]] for part in parts]), np.array([values[part].mean() for part in parts])
