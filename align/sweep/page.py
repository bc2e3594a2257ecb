"""A sweep's report as HTML, from the content of report.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

from align.config.load import parse_value
from align.eval.comparison.curves import Group, curve_groups
from align.eval.comparison.page import curves_section, page_sections
from align.eval.comparison.sides import read_run
from align.eval.report.formatting import NOTHING, interval, number
from align.eval.report.html import figures, table
from align.eval.report.page import breakable, escape, page
from align.eval.report.plots import COLORS, LEGEND, STYLE, Plot, as_svg, new_figure
from align.sweep.axes import short_keys
from align.sweep.text import intervals_line, point_rows

CURVES = len(COLORS)
"""Maximum number of points whose curves are drawn, the best first."""
LOG_FROM = 8.0
"""A setting's axis is logarithmic if its largest value is at least this multiple of its smallest."""


def render_sweep(content: Mapping[str, Any], folder: Path) -> str:
    """The page of a sweep. folder: the sweep's folder, for the curves of its runs."""
    title = f"{content['name']}: sweep"
    drawn = content["points"][:CURVES]
    sections = [
        ("settings", "Settings, best first", list(_points(content))),
        ("plots", "By setting", [figures(setting_plots(content))]),
        ("curves", f"Curves{_of_best(content)}", list(_curves(drawn, folder))),
        ("seeds", "Runs", list(_runs(content))),
    ]
    body = [
        f'<header><p class="soft">Sweep of {escape(content["recipe"])}</p><h1>{escape(content["name"])}</h1>',
        f'<div class="verdict"><p>{escape(content["verdict"])}</p></div>',
        f'<ul class="notes" aria-label="Notes">{"".join(f"<li>{escape(note)}</li>" for note in content["notes"])}</ul>'
        if content["notes"]
        else "",
        *page_sections([section for section in sections if any(section[2])]),
        f'<footer class="soft">Generated {escape(content["generated"])}.</footer>',
    ]
    return page(title, body)


def _of_best(content: Mapping[str, Any]) -> str:
    return f" of the {CURVES} best" if len(content["points"]) > CURVES else ""


def _points(content: Mapping[str, Any]) -> Iterator[str]:
    head, rows = point_rows(content)
    if content["metrics"]:
        short = short_keys(axis["key"] for axis in content["axes"])
        named = "".join(f" {name}: {key}." for key, name in short.items() if name != key)
        yield f'<p class="soft">{escape(intervals_line(content) + named)}</p>'
        cells = [
            [_label(point), *(_cell(cell) for cell in row[1:])]
            for point, row in zip(content["points"], rows, strict=True)
        ]
        yield table("Settings", [escape(name) for name in head], cells)


def _label(point: Mapping[str, Any]) -> str:
    """The settings of a point with short keys, as HTML."""
    short = short_keys(point["settings"])
    words = [f"{breakable(short[key])}=<wbr>{breakable(text)}" for key, text in point["settings"].items()]
    return ", ".join(words) or escape(point["label"])


def _cell(cell: Any) -> str:
    if cell is None or isinstance(cell, str):
        return f"<b>{escape(cell)}</b>" if cell else NOTHING
    return f"{number(cell['mean'])}<small>{interval(cell)}</small>"


def _curves(points: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[str]:
    """Curves of the stages that differ between points; all seeds of a point have the same colour."""
    sides, places = [], {}
    for place, point in enumerate(points):
        for run in point["runs"]:
            if (folder / run["folder"] / "recipe.json").is_file():
                sides.append(replace(read_run(folder / run["folder"]), name=run["folder"]))
                places[run["folder"]] = place
    groups: list[Group] = curve_groups(sides) if len(sides) > 1 else []
    if groups:
        yield '<ul class="legend" aria-label="Settings">'
        for place, point in enumerate(points):
            yield f'<li><i class="dot m{place % len(COLORS)}"></i><b>{_label(point)}</b></li>'
        yield "</ul>"
        yield from curves_section(groups, places)


def _runs(content: Mapping[str, Any]) -> Iterator[str]:
    metric = content["metric"]
    label = content["metrics"][metric]["label"] if metric in content["metrics"] else "Metric"
    rows = [
        [
            _label(p),
            *map(escape, (r["seed"], number(r["metrics"].get(metric)), r["status"])),
            breakable(r["folder"]),
        ]
        for p in content["points"]
        for r in p["runs"]
    ]
    yield table("Runs", ["Setting", "Seed", escape(label), "Status", "Folder"], rows, wide={4})


# --- plots ---------------------------------------------------------------------------------------------------


def setting_plots(content: Mapping[str, Any]) -> list[Plot]:
    """One chart per swept setting: the metric over its values, with a line per combination of the other settings."""
    metric = content["metric"]
    if metric not in content["metrics"]:
        return []
    label = content["metrics"][metric]["label"]
    plots = []
    for number_of_plot, axis in enumerate(content["axes"]):
        points = [point for point in content["points"] if metric in point["metrics"]]
        if points:
            title = f"{label}, by {axis['key']}"
            plots.append(Plot(title, _setting_plot(axis, points, metric, f"setting{number_of_plot}-", title), ""))
    return plots


def _setting_plot(
    axis: Mapping[str, Any], points: Sequence[Mapping[str, Any]], metric: str, prefix: str, title: str
) -> str:
    key = axis["key"]
    texts = list(dict.fromkeys(point["settings"][key] for point in points))
    texts = [text for text in axis.get("values", texts) if text in texts]
    numbers = [parse_value(text, key) for text in texts]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
    place = dict(zip(texts, numbers)) if numeric else {text: place for place, text in enumerate(texts)}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    short = short_keys(points[0]["settings"])
    for point in points:
        others = ", ".join(f"{short[name]} {text}" for name, text in point["settings"].items() if name != key)
        groups.setdefault(others, []).append(point)
    lines = len(groups) <= len(COLORS) and any(len(found) > 1 for found in groups.values())
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        for number_of_group, (others, found) in enumerate(sorted(groups.items())):
            found = sorted(found, key=lambda point: float(place[point["settings"][key]]))
            cells = [point["metrics"][metric] for point in found]
            across = [float(place[point["settings"][key]]) for point in found]
            color = COLORS[number_of_group % len(COLORS)] if lines else COLORS[0]
            axes.plot(
                across,
                [cell["mean"] for cell in cells],
                "o-" if lines else "o",
                color=color,
                markersize=4,
                label=others,
            )
            for x, cell in zip(across, cells):
                if cell["low"] is not None:
                    axes.plot([x, x], [cell["low"], cell["high"]], color=color, linewidth=2.2, alpha=0.45)
        values = [float(value) for value in place.values()]
        if numeric and min(values) > 0 and max(values) / min(values) >= LOG_FROM:
            axes.set_xscale("log")
        if len(texts) <= 6:
            axes.set_xticks(values, texts)
            axes.minorticks_off()
        axes.margins(x=0.08)
        axes.set_xlabel(key)
        if lines and len(groups) > 1:
            axes.legend(**LEGEND | {"ncols": 2})
        return as_svg(figure, prefix, title)
