"""The page of a comparison: one HTML file without scripts or requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from align.eval.comparison.curves import Group
from align.eval.comparison.text import shown
from align.eval.report.formatting import NOTHING, certainty, interval, mark, mean, number
from align.eval.report.html import figures, table
from align.eval.report.overlay import is_dashed, overlay_plots
from align.eval.report.page import breakable, escape, page
from align.eval.report.plots import COLORS, comparison_plots

CLEAR = 8
"""Differences in the first box of the page."""


def render_comparison(comparison: Mapping[str, Any], groups: Sequence[Group], title: str = "") -> str:
    """The page of a comparison of `compare_sides`, with the curves of `groups`. title: default: the sides' names."""
    names = [side["name"] for side in comparison["sides"]]
    title = title or (" and ".join(names) if len(names) == 2 else f"{names[0]} and {len(names) - 1} more")
    sections = [
        ("metrics", "Metrics", list(metrics_section(comparison))),
        ("figures", "Bias and calibration", list(_figures(comparison["figures"], names))),
        ("curves", "Curves", list(curves_section(groups, {name: place for place, name in enumerate(names)}))),
        ("final", "Last values of the training", list(_final(comparison, names))),
        ("settings", "Settings that differ", list(settings_section(comparison["settings"], names))),
    ]
    body = [
        f'<header><p class="soft">Comparison</p><h1>{escape(title)}</h1>',
        *_verdict(comparison),
        *legend(comparison["sides"]),
        *_notes(comparison),
        *page_sections(sections),
    ]
    return page(f"{title}: comparison", body)


def page_sections(sections: Iterable[tuple[str, str, list[str]]]) -> Iterator[str]:
    """The end of the header with links, and the sections that have content. sections: (anchor, title, content)."""
    kept = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in kept)
    yield f'<nav aria-label="Sections">{links}</nav></header><main>'
    for anchor, title, content in kept:
        yield f'<section id="{anchor}"><h2>{escape(title)}</h2>'
        yield from content
        yield "</section>"
    yield "</main>"


def legend(sides: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The names with their colours."""
    yield '<ul class="legend" aria-label="Compared">'
    for place, side in enumerate(sides):
        dashed = " dashed" if is_dashed(place) else ""
        about = f'<span class="soft">{escape(side["kind"])} {breakable(side["path"])}</span>'
        dot = f'<i class="dot m{place % len(COLORS)}{dashed}"></i>'
        yield f"<li>{dot}<b>{breakable(side['name'])}</b>{' (dashed)' if dashed else ''} {about}</li>"
    yield "</ul>"


def _verdict(comparison: Mapping[str, Any]) -> Iterator[str]:
    """The differences whose interval excludes zero."""
    found = [
        (row, d)
        for row in comparison["metrics"]
        for d in row["differences"]
        if d["low"] is not None and (d["low"] > 0 or d["high"] < 0)
    ]
    if not any(row["differences"] for row in comparison["metrics"]):
        return
    items = [
        f"{escape(row['label'])}: {escape(d['side'])} − {escape(d['against'])} "
        f'<span class="nowrap">{number(d["mean"], signed=True)} {interval(d)}</span>'
        for row, d in found[:CLEAR]
    ]
    if len(found) > CLEAR:
        items.append(f"and {len(found) - CLEAR} more below")
    if not found:
        items.append("No interval of a difference excludes zero.")
    yield f'<div class="verdict"><ul>{"".join(f"<li>{item}</li>" for item in items)}</ul></div>'


def _notes(comparison: Mapping[str, Any]) -> Iterator[str]:
    equal = [f"The same in all: {', '.join(comparison['equal'])}."] if comparison["equal"] else []
    if notes := [*equal, *comparison["notes"]]:
        yield f'<ul class="notes" aria-label="Notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>'


def metrics_section(comparison: Mapping[str, Any]) -> Iterator[str]:
    """Means with intervals, differences from the first side, and a drawing of each metric."""
    names = [side["name"] for side in comparison["sides"]]
    rows = comparison["metrics"]
    if not rows:
        return
    cells = [[escape(row["label"]), *(_value(row["sides"].get(name)) for name in names)] for row in rows]
    yield table("Means", ["Metric", *map(breakable, names)], cells)
    others = [name for name in names[1:] if any(d["side"] == name for row in rows for d in row["differences"])]
    if others:
        yield f"<h3>Paired differences from {escape(names[0])}</h3>"
        cells = []
        for row in rows:
            by_side = {d["side"]: d for d in row["differences"]}
            cells.append([escape(row["label"]), *(_difference(by_side.get(name), row["better"]) for name in others)])
        yield table("Paired differences", ["Metric", *map(breakable, others)], cells)
        yield (
            '<p class="soft">Means over the documents that both have scored, with 95 % intervals. ▲ above zero, ▼ '
            "below zero, ≈ the interval includes zero. p: paired test, adjusted by Holm's method for the number of "
            "rows. Detects: the difference that the test would find in four of five cases. The intervals cover the "
            "choice of documents, not the variance between training runs with other seeds.</p>"
        )
    drawn = [{"label": row["label"], "models": row["sides"]} for row in rows]
    yield figures(comparison_plots({"models": names, "metrics": drawn}, "cmp"))


def _value(cell: dict[str, Any] | None) -> str:
    return f"{mean(cell)}<small>{interval(cell)}</small>" if cell else NOTHING


def _difference(cell: dict[str, Any] | None, better: int) -> str:
    if cell is None:
        return NOTHING
    sign = mark(cell)
    tone = {"▲": better, "▼": -better}.get(sign, 0)
    style = {1: "up", -1: "down"}.get(tone, "")
    shown_mean = f'<span class="nowrap {style}">{sign} {number(cell["mean"], signed=True)}</span>'
    counts = f"{number(cell['changed'])} of {number(cell['n'])} changed"
    return f"{shown_mean}<small>{interval(cell)}{certainty(cell)}</small><small>{counts}</small>"


def _figures(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str]:
    """Figures of reward models on preference pairs."""
    if rows:
        cells = [[escape(row["label"]), *(_value(row["sides"].get(name)) for name in names)] for row in rows]
        yield table("Bias and calibration", ["Figure", *map(breakable, names)], cells)
        yield (
            '<p class="soft">Each model on its own pairs, with 95 % intervals. Model minus labels: how much more often '
            "the model prefers this completion than the labels do; a bias is shown if the interval excludes 0.</p>"
        )


def curves_section(groups: Sequence[Group], places: Mapping[str, int]) -> Iterator[str]:
    """The charts of each stage; a curve has the colour of its place in the legend."""
    for number_of_group, group in enumerate(groups):
        yield f"<h3>{escape(group.title)}</h3>"
        yield figures(overlay_plots(group.kind, group.keys(), group.rows, places, f"curve{number_of_group}"))


def _final(comparison: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    rows = comparison["final"]
    if rows:
        cells = []
        for row in rows:
            label = f"{row['stage']}: {row['label']}" if row["stage"] else row["label"]
            cells.append([escape(label), *(escape(number(row["values"].get(name))) for name in names)])
        yield table("Last values of the training", ["Metric", *map(breakable, names)], cells)


def settings_section(settings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str]:
    """The settings that differ."""
    if settings:
        cells = [
            [breakable(row["key"]).replace(".", ".<wbr>"), *(escape(shown(row["values"], name)) for name in names)]
            for row in settings
        ]
        yield table("Settings", ["Setting", *map(breakable, names)], cells, wide=set(range(1, len(names) + 1)))
